"""Columns of the tables: what each takes from a row, how it is written, what it means. No torch.

A set of columns and a set of definitions per suite (`KINDS`), and those of the table of steps. Rows
hold SI units; GiB, ms and % appear only here, where values are written.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import pandas as pd

GIB = 2**30
TRAINING_BYTES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
TRAINING_PARTS = ("forward_s", "backward_s", "optimizer_s")
MAX_LOOP_RATIO = 1.05  # our loop / upstream's own; above it: underserved (evaluation_spec.md 4.5)
PERCENTILES = (50, 90, 95, 99)  # of the steps of one generation


class Column(NamedTuple):
    """One printed column: which SI values it takes from a row, and how they are written."""

    title: str
    keys: tuple[str, ...]
    write: Callable[..., str]
    best: Callable[[pd.Series], float] | None = None  # min or max of the first key is set in bold


# Lines of sentences, each with the columns that it is about: it stands where one of them is shown,
# or always where none is named.
Definitions = tuple[dict[str, tuple[str, ...]], ...]
RATIOS = ("vs Dense", "vs Dense-2D")


def defined(lines: Definitions, shown: Collection[str] | None = None) -> tuple[str, ...]:
    """What stands under a table of the columns `shown`; None: all lines as they are."""
    kept = [
        [
            text
            for text, titles in line.items()
            if shown is None or not titles or {*titles} & {*shown}
        ]
        for line in lines
    ]
    return tuple(" ".join(texts).rstrip(";.") + "." for texts in kept if texts)


# Writing single values


def digits(value: float, significant: int = 3) -> str:
    """Plain notation with so many significant digits, never fewer than the integer part has."""
    if not math.isfinite(value):
        return "-"
    whole = 1 if value == 0 else math.floor(math.log10(abs(value))) + 1
    return f"{value:,.{max(0, significant - whole)}f}"


def gib(value: float) -> str:
    return digits(value / GIB)


def gibs(*values: float) -> str:
    return " / ".join(gib(value) for value in values)


def milliseconds(*seconds: float) -> str:
    return " / ".join(digits(1000 * value) for value in seconds)


def teraflops(*rates: float) -> str:
    return " / ".join(digits(rate / 1e12) for rate in rates)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def with_interval(value: float, low: float, high: float) -> str:
    """Fewer than 3 samples have no interval (stats.py): then the value stands alone."""
    return digits(value) if math.isnan(low) else f"{digits(value)} [{digits(low)}, {digits(high)}]"


def milliseconds_with_interval(value: float, low: float, high: float) -> str:
    return with_interval(1000 * value, 1000 * low, 1000 * high)


def faster(ratio: float, low: float, high: float) -> str:
    """A speed-up with its interval; below 1 it is turned round, so that x always means times."""
    if ratio == 1:
        return "1.00x"
    word = "faster"
    if ratio < 1:
        ratio, low, high, word = 1 / ratio, 1 / high, 1 / low, "slower"
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{ratio:.2f}x {word}{interval}"


def loop_ratio(ratio: float, low: float, high: float) -> str:
    mark = " underserved" if ratio > MAX_LOOP_RATIO else ""
    return with_interval(ratio, low, high) + mark


def millions(*counts: float) -> str:
    """Total parameters (non-embedding ones), in 10^6."""
    total, inner = (f"{count / 1e6:,.1f}" for count in counts)
    return f"{total} ({inner})"


def whole(value: float) -> str:
    return f"{value:.0f}"


def percentiles(title: str, kind: str) -> Column:
    """Percentiles of the steps of one kind."""
    return Column(title, tuple(f"{kind}_p{p}_s" for p in PERCENTILES), milliseconds)


# Columns and definitions, by suite

LOOP_COLUMN = Column(
    "loop ratio [95 % CI]", ("loop_ratio", "loop_ratio_low", "loop_ratio_high"), loop_ratio
)
EFFICIENCY_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column(
        "latency s [95 % CI]", ("latency_s", "latency_s_low", "latency_s_high"), with_interval, min
    ),
    Column("tok/s", ("tokens_per_s",), digits, max),
    Column("peak GiB", ("peak_bytes",), gib, min),
    Column("state GiB", ("state_bytes",), gib, min),
    Column("vs Dense", ("speedup", "speedup_low", "speedup_high"), faster),
    Column("vs Dense-2D", ("speedup_2d", "speedup_2d_low", "speedup_2d_high"), faster),
    LOOP_COLUMN,
    Column("% of floor", ("floor_share",), percent),
    Column("n", ("n",), whole),
    Column("params M (non-emb.)", ("num_params", "num_params_non_embedding"), millions),
)
DEFINITIONS: Definitions = (
    {
        "latency = median time of a whole generation, prefill included;": (),
        "tok/s = batch x new tokens / decode time;": ("tok/s",),
        "n = repeats.": ("n",),
    },
    {
        "peak = max reserved by the allocator, captured graphs included (CPU: resident set, with "
        "the interpreter).": ("peak GiB",),
        "state = by formula.": ("state GiB",),
    },
    {
        "vs Dense, vs Dense-2D = their median latency / median latency, same setting, 95 % "
        "interval.": RATIOS,
    },
    {
        "floor = least time by bytes and FLOPs at the ceilings measured in the case's own process, "
        "lowered by the share by which the worse of them is below the best of the run; % of floor "
        "= floor / latency: none is too high, one bound by memory alone may be some points too "
        "low.": ("% of floor",),
    },
)

TRAINING_COLUMNS = (
    *EFFICIENCY_COLUMNS[:3],
    Column(
        "step s [95 % CI]", ("latency_s", "latency_s_low", "latency_s_high"), with_interval, min
    ),
    Column("trained tok/s", ("tokens_per_s",), digits, max),
    Column("peak GiB", ("peak_bytes",), gib, min),
    Column("weights / grad / Adam GiB", TRAINING_BYTES, gibs),
    Column("fwd / bwd / opt ms", TRAINING_PARTS, milliseconds),
    Column("TFLOP", ("train_flops",), lambda flops: digits(flops / 1e12)),
    Column("MFU", ("mfu",), percent, max),
    Column("% of matmul", ("matmul_flops_ratio",), percent),
    Column("vs Dense", ("speedup", "speedup_low", "speedup_high"), faster),
    Column("vs Dense-2D", ("speedup_2d", "speedup_2d_low", "speedup_2d_high"), faster),
    Column("n", ("n",), whole),
    Column("first step s", ("compile_s",), digits),
    Column("capture s", ("capture_s",), digits),
    EFFICIENCY_COLUMNS[-1],
)
TRAINING_DEFINITIONS: Definitions = (
    {
        "step = forward, loss, backward, clipping, AdamW;": (),
        "tok/s = batch x length / step.": ("trained tok/s",),
    },
    {
        "n = repeats.": ("n",),
        "first step = with all compiling;": ("first step s",),
        "capture (GPU) = of a step's CUDA graphs, once.": ("capture s",),
    },
    {
        "peak = max reserved by the allocator in a step (CPU: resident set, with the "
        "interpreter).": ("peak GiB",),
    },
    {
        "TFLOP = useful ones of a step: 3 x the forward pass by formula.": ("TFLOP",),
        "MFU = over the datasheet's bfloat16 rate;": ("MFU",),
        "% of matmul = over the matmul rate measured in the same process.": ("% of matmul",),
    },
    {
        "vs Dense, vs Dense-2D = their median step / median step, same setting, 95 % "
        "interval.": RATIOS,
    },
)

ATTENTION_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("heads", ("heads",), whole),
    Column("implementation", ("implementation",), str),
    *EFFICIENCY_COLUMNS[1:3],
    Column("forward ms", ("forward_s",), milliseconds, min),
    Column(
        "forward + backward ms [95 % CI]", ("latency_s", "latency_s_low", "latency_s_high"),
        milliseconds_with_interval, min,
    ),
    Column("TFLOP/s", ("forward_flops_per_s", "forward_backward_flops_per_s"), teraflops),
    Column("allocated GiB", ("peak_allocated_bytes",), gib, min),
    Column("vs Dense", ("speedup", "speedup_low", "speedup_high"), faster),
    Column("vs Dense-2D", ("speedup_2d", "speedup_2d_low", "speedup_2d_high"), faster),
    Column("n", ("n",), whole),
)  # fmt: skip
ATTENTION_DEFINITIONS: Definitions = (
    {
        "Attention alone, of one layer, median of n; forward without gradients;": (),
        "TFLOP/s = of forward / of forward + backward, useful pairs only.": ("TFLOP/s",),
    },
    {
        "allocated = most bytes in tensors beyond those held before q, k and v.": (
            "allocated GiB",
        ),
    },
    {
        "vs Dense, vs Dense-2D = forward + backward of their `causal` row / this one's, same "
        "batch and length, 95 % interval: Dense has 16 heads at full size, Dense-2D 32, as CAT's "
        "decoder.": RATIOS,
    },
)

UPSTREAM_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column("loop", ("loop",), str),
    Column("latency s [95 % CI]", ("latency_s", "latency_s_low", "latency_s_high"), with_interval),
    LOOP_COLUMN,
    Column("n", ("n",), whole),
    Column("first call s", ("first_call_s",), digits),
)
LOOP_DEFINITION = (
    "loop ratio = our latency / that of the authors' own generate (suite upstream), the same "
    f"weights, prompt and shape; above {MAX_LOOP_RATIO} the architecture is underserved here. Rows "
    "of other suites show the largest ratio of their architecture."
)

OTHER_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("suite", ("suite",), str),
    Column("seed", ("seed",), whole),
    Column("status", ("status",), str),
)

KINDS = {
    "attention": (ATTENTION_COLUMNS, ATTENTION_DEFINITIONS),
    "efficiency": (EFFICIENCY_COLUMNS, DEFINITIONS),
    "training": (TRAINING_COLUMNS, TRAINING_DEFINITIONS),
    "upstream": (UPSTREAM_COLUMNS, ({LOOP_DEFINITION: (LOOP_COLUMN.title,)},)),
}

# The table of steps

DETAIL_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column("TTFT ms", ("ttft_s", "ttft_s_low", "ttft_s_high"), milliseconds_with_interval),
    Column("step ms mean", ("step_mean_s",), milliseconds),
    percentiles("p50 / p90 / p95 / p99", "step"),
    percentiles("inner", "step_inner"),
    percentiles("boundary", "step_boundary"),
    Column("boundary %", ("boundary_share",), percent),
    Column("first 10 %", ("step_first_s",), milliseconds),
    Column("last 10 %", ("step_last_s",), milliseconds),
    Column("mJ/token", ("energy_per_token_j",), milliseconds),
    Column("graph GiB", ("graph_pool_bytes",), gib),
    Column("capture s", ("compile_s",), digits),
)
DETAIL_DEFINITIONS: Definitions = (
    {
        "TTFT = prefill and first token.": ("TTFT ms",),
        "Steps: one instrumented generation, one event a step, in ms;": ("step ms mean",),
        "inner, boundary = the same percentiles of CAT's steps inside a chunk and of those that "
        "close one;": ("inner", "boundary"),
        "first, last 10 % = mean of those positions.": ("first 10 %", "last 10 %"),
    },
    {
        "graph (GPU) = private pools of captured graphs.": ("graph GiB",),
        "capture (GPU) = state, kernels and graphs, once, outside of every latency; seconds more "
        "where kernels are not yet in Triton's cache.": ("capture s",),
    },
)
