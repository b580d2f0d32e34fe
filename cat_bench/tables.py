"""Rows of a store -> tables of text: which columns, which ratios, which notes. No torch.

Everything here is a pure function of stored rows, so it works on any laptop. Rows hold SI units and
stay so in JSON and CSV; GiB and % appear only in print. Ratios carry an interval of their own
(stats.py), a case that did not end well shows its status instead of a number, and one machine line
stands over every table.

Where to look: `run_table` is `cat-bench show`, `details_table` its second half; report.py prints.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from cat_bench import stats, store
from cat_bench.measurements import (
    SETTINGS,
    closed_rows,
    frame,
    is_reference,
    joined,
    latency_samples,
    measured,
    summary,
)

GIB = 2**30
NOT_GENERATING = ("training", "attention")  # suites without decode path, prompt and steps
TRAINING_BYTES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
TRAINING_PARTS = ("forward_s", "backward_s", "optimizer_s")
MAX_LOOP_RATIO = 1.05  # our loop / upstream's own; above it: underserved (evaluation_spec.md 4.5)
MAX_PARTS_GAP = 0.05  # forward + backward + optimizer against the whole training step
MAX_CLOCK_GAP = 0.02  # host clock against CUDA events (evaluation_spec.md 4.1)


class Column(NamedTuple):
    """One printed column: which SI values it takes from a row, and how they are written."""

    title: str
    keys: tuple[str, ...]
    write: Callable[..., str]
    best: Callable[[pd.Series], float] | None = None  # min or max of the first key is set in bold


@dataclass(frozen=True)
class Table:
    rows: pd.DataFrame  # SI values: what JSON and CSV hold
    text: pd.DataFrame  # the same as print shows it, all strings
    heading: str = ""  # machine and settings, one line
    notes: tuple[str, ...] = ()  # definitions and warnings, one line each
    best: pd.DataFrame | None = None  # booleans, the shape of `text`
    title: str = ""
    suffix: str = "table"  # of the file's name, where an exhibit writes it
    num_worse: int = 0  # regressions: `compare` exits with 4 where there are any


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


# Tables


def table(rows: pd.DataFrame, columns: Sequence[Column], by: Sequence[str] = ()) -> Table:
    """Print `columns` of `rows`; the best of each group of equal `by` is marked.

    A case with another status than ok shows it in the first column that lacks its value.
    """
    columns = [c for c in columns if set(c.keys) & set(rows.columns)]
    keys = list(dict.fromkeys(key for c in columns for key in c.keys))
    rows = rows.reset_index(drop=True).reindex(columns=list(dict.fromkeys([*rows.columns, *keys])))
    text = pd.DataFrame([_line(row, columns) for _, row in rows.iterrows()])
    text = text.reindex(columns=[c.title for c in columns])
    marks = [name for name in ("status", "error") if name in rows]
    return Table(
        rows[keys + [m for m in marks if m not in keys]], text, best=_best(rows, columns, by)
    )


def _line(row: pd.Series, columns: Sequence[Column]) -> dict[str, str]:
    status, cells = row.get("status", "ok"), {}
    for column in columns:
        values = [row[key] for key in column.keys]
        if not pd.isna(values[0]):
            cells[column.title] = column.write(*values)
        else:
            cells[column.title] = "-" if status in ("ok", "") else str(status)
            status = ""  # said once per row
    return cells


def _best(rows: pd.DataFrame, columns: Sequence[Column], by: Sequence[str]) -> pd.DataFrame:
    """True where a cell is the best of its group; a group of one has no best."""
    best = pd.DataFrame(False, index=rows.index, columns=[c.title for c in columns])
    parts = [part for _, part in rows.groupby(list(by), sort=False)] if by else [rows]
    for column in (c for c in columns if c.best):
        for part in parts:
            values = part[column.keys[0]].dropna()
            if len(values) > 1:
                best.loc[values.index[values == column.best(values)], column.title] = True
    return best


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
    EFFICIENCY_COLUMNS[-1],
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
OTHER_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("suite", ("suite",), str),
    Column("seed", ("seed",), whole),
    Column("status", ("status",), str),
)
DEFINITIONS = (
    "latency = median time of a whole generation, prefill included; tok/s = batch x new tokens / "
    "decode time; n = repeats.",
    "peak = max reserved by the allocator, captured graphs included (CPU: resident set, with the "
    "interpreter). state = by formula.",
    "vs Dense, vs Dense-2D = their median latency / median latency, same setting, 95 % interval.",
    "floor = least time by bytes and FLOPs at the best ceilings measured in the same run; "
    "% of floor = floor / latency.",
)
LOOP_DEFINITION = (
    "loop ratio = our latency / that of the authors' own generate (suite upstream), the same "
    f"weights, prompt and shape; above {MAX_LOOP_RATIO} the architecture is underserved here. Rows "
    "of other suites show the largest ratio of their architecture."
)

TRAINING_DEFINITIONS = (
    "step = forward, loss, backward, clipping, AdamW; tok/s = batch x length / step; n = repeats. "
    "first step = with all compiling.",
    "peak = max reserved by the allocator in a step (CPU: resident set, with the interpreter).",
    "TFLOP = useful ones of a step: 3 x the forward pass by formula. MFU = over the datasheet's "
    "bfloat16 rate; % of matmul = over the matmul rate measured in the same process.",
    "vs Dense, vs Dense-2D = their median step / median step, same setting, 95 % interval.",
)
ATTENTION_DEFINITIONS = (
    "Attention alone, of one layer, median of n; forward without gradients; TFLOP/s = of forward / "
    "of forward + backward, useful pairs only.",
    "allocated = most bytes in tensors beyond those held before q, k and v.",
    "vs Dense, vs Dense-2D = forward + backward of their `causal` row / this one's, same batch and "
    "length, 95 % interval: Dense has 16 heads at full size, Dense-2D 32, as CAT's decoder.",
)
KINDS = {
    "attention": (ATTENTION_COLUMNS, ATTENTION_DEFINITIONS),
    "efficiency": (EFFICIENCY_COLUMNS, DEFINITIONS),
    "training": (TRAINING_COLUMNS, TRAINING_DEFINITIONS),
    "upstream": (UPSTREAM_COLUMNS, (LOOP_DEFINITION,)),
}


def run_table(run: store.Run) -> Table:
    """What `cat-bench show` prints: all closed cases of one run."""
    made = records_table(frame([run]))
    num_open = len(run.cases()) - len(run.closed())
    if num_open:
        unfinished = f"{num_open} of {len(run.cases())} cases have not run: continue with --resume."
        made = replace(made, notes=(*made.notes, unfinished))
    return replace(made, title=run.name)


def records_table(records: pd.DataFrame) -> Table:
    """The table of the suite, where all rows are of one of KINDS; else one column per metric."""
    rows = measured(records)
    if rows.empty:
        return Table(rows, pd.DataFrame(), notes=("No case is closed yet.",))
    upstream = rows["suite"] == "upstream"
    if upstream.all():
        return _upstream_table(rows, records)
    rows = rows[~upstream].reset_index(drop=True)  # they have a table of their own
    suites = set(rows["suite"])
    timed = len(suites) == 1 and suites <= set(KINDS)
    if timed and "latency_s" not in rows:  # nothing went well: statuses still need a column
        rows["latency_s"] = math.nan
    columns, definitions = OTHER_COLUMNS + _metric_columns(records), ()
    by = ["batch_size", "seq_len"]
    if suites == {"attention"}:  # of each architecture the best implementation
        by.append("label")
    if timed:
        columns, definitions = KINDS[suites.pop()]
    rows = dense_first(rows) if timed else rows
    if "label" in by:  # batches shrink as lengths grow
        rows = rows.sort_values("seq_len", kind="stable")
    made = table(rows, (*_distinguishing(rows), *columns), by)
    notes = (
        *definitions,
        *((LOOP_DEFINITION,) if "loop_ratio" in rows else ()),
        *failures(rows),
        *foreign_dense(rows),
        *warnings(rows, records),
    )
    return replace(
        made,
        heading=" · ".join([*dict.fromkeys(rows["machine"]), *_settings_line(rows)]),
        notes=notes,
    )


def _upstream_table(rows: pd.DataFrame, records: pd.DataFrame) -> Table:
    """Suite upstream: our loop and the authors', pair by pair."""
    rows = rows.assign(loop=[dict(settings).get("loop", "") for settings in rows["settings"]])
    rows = rows.sort_values("loop", kind="stable")  # ours, upstream
    shown = dict.fromkeys([*rows.columns, "latency_s", "loop_ratio"])  # also where nothing ran
    rows = dense_first(rows).reindex(columns=list(shown))
    notes = (LOOP_DEFINITION, *failures(rows), *warnings(rows, records))
    heading = " · ".join([*dict.fromkeys(rows["machine"]), *_settings_line(rows)])
    made = table(rows, (*_distinguishing(rows), *UPSTREAM_COLUMNS))
    return replace(made, heading=heading, notes=notes)


def details_table(records: pd.DataFrame) -> Table | None:
    """Per token and per case: what the efficiency table has no room for. None where no case
    generated.

    Steps come from one instrumented generation; a boundary step of CAT closes a chunk (compress,
    write the slot), all its others are inner steps.
    """
    return details_of(measured(records))


def details_of(rows: pd.DataFrame) -> Table | None:
    """`details_table` of rows that are measured and labelled already."""
    if not _has_generated(rows):
        return None
    rows = rows[~rows["suite"].isin(NOT_GENERATING)]
    several = rows["prompt_len"].nunique() > 1
    prompt = (Column("prompt", ("prompt_len",), whole),) if several else ()
    made = table(_with_step_statistics(dense_first(rows)), (*prompt, *DETAIL_COLUMNS))
    return replace(made, notes=DETAIL_DEFINITIONS, suffix="steps")


def _has_generated(rows: pd.DataFrame) -> bool:
    return any(f"{name}.samples" in rows and rows[f"{name}.samples"].notna().any()
               for name in ("step_s", "ttft_s"))  # fmt: skip


def full_table(records: pd.DataFrame) -> Table:
    """Both tables in one, with run, scale and device: JSON and CSV have no page to fit."""
    rows, made = measured(records), records_table(records)
    if rows.empty or "latency_s" not in rows:
        return made
    rows = dense_first(rows)
    columns = [Column(name, (name,), str) for name in ("run", "scale", "device_name")]
    if "loop" in rows:
        columns.append(Column("suite", ("suite",), str))
    for suite in [name for name in KINDS if name in set(rows["suite"])]:
        titles = {c.title for c in columns}
        columns += [c for c in KINDS[suite][0] if c.title not in titles]
    if _has_generated(rows):
        rows = _with_step_statistics(rows)
        titles = {c.title for c in columns}
        columns += [c for c in DETAIL_COLUMNS if c.title not in titles]
    return replace(table(rows, columns), heading=made.heading, notes=made.notes)


def _with_step_statistics(rows: pd.DataFrame) -> pd.DataFrame:
    return joined(rows, [_step_statistics(row) for _, row in rows.iterrows()])


def _step_statistics(row: pd.Series) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("step", "step_inner", "step_boundary"):
        samples = row.get(f"{kind}_s.samples")
        if isinstance(samples, list) and samples:
            cuts = np.percentile(samples, PERCENTILES)
            found |= {f"{kind}_p{p}_s": c for p, c in zip(PERCENTILES, cuts, strict=True)}
            found[f"{kind}_mean_s"], found[f"{kind}_count"] = float(np.mean(samples)), len(samples)
    samples = row.get("step_s.samples")
    if isinstance(samples, list) and samples:
        tenth = max(1, len(samples) // 10)
        found["step_first_s"] = float(np.mean(samples[:tenth]))
        found["step_last_s"] = float(np.mean(samples[-tenth:]))
    if "step_boundary_count" in found:
        found["boundary_share"] = found["step_boundary_count"] / found["step_count"]
    ttft = row.get("ttft_s.samples")
    if isinstance(ttft, list) and ttft:
        interval = summary(tuple(ttft))
        found["ttft_s_low"], found["ttft_s_high"] = interval.low, interval.high
    return found


def _percentiles(title: str, kind: str) -> Column:
    return Column(title, tuple(f"{kind}_p{p}_s" for p in PERCENTILES), milliseconds)


PERCENTILES = (50, 90, 95, 99)
DETAIL_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column("TTFT ms", ("ttft_s", "ttft_s_low", "ttft_s_high"), milliseconds_with_interval),
    Column("step ms mean", ("step_mean_s",), milliseconds),
    _percentiles("p50 / p90 / p95 / p99", "step"),
    _percentiles("inner", "step_inner"),
    _percentiles("boundary", "step_boundary"),
    Column("boundary %", ("boundary_share",), percent),
    Column("first 10 %", ("step_first_s",), milliseconds),
    Column("last 10 %", ("step_last_s",), milliseconds),
    Column("mJ/token", ("energy_per_token_j",), milliseconds),
    Column("graph GiB", ("graph_pool_bytes",), gib),
    Column("capture s", ("compile_s",), digits),
)
DETAIL_DEFINITIONS = (
    "TTFT = prefill and first token. Steps: one instrumented generation, one event a step, in ms; "
    "inner, boundary = the same percentiles of CAT's steps inside a chunk and of those that close "
    "one; first, last 10 % = mean of those positions.",
    "graph = private pools of captured graphs. capture = state, kernels and graphs, once, outside "
    "of every latency; seconds more where kernels are not yet in Triton's cache.",
)


def dense_first(rows: pd.DataFrame) -> pd.DataFrame:
    """By batch size and length; within them Dense, then the others by name, whatever ran first."""

    def place(label: str) -> tuple:  # CAT-8 before CAT-16
        numbers_apart = re.split(r"(\d+)", label)
        return not label.startswith("Dense"), [int(p) if p.isdigit() else p for p in numbers_apart]

    order = {label: n for n, label in enumerate(sorted(rows["label"].unique(), key=place))}
    rows = rows.assign(place=rows["label"].map(order))
    rows = rows.sort_values(["batch_size", "seq_len", "place", "run"], kind="stable")
    return rows.drop(columns="place").reset_index(drop=True)


def _distinguishing(rows: pd.DataFrame) -> list[Column]:
    """A column for each setting in which the rows of one table differ."""
    names = ("run", "decode_path", "forward_path", "dtype", "prompt_len", "seed", "weights")
    names += SETTINGS
    if rows["suite"].isin(NOT_GENERATING).all():
        names = tuple(name for name in names if name != "prompt_len")
    return [Column(name, (name,), str) for name in names if rows[name].nunique() > 1]


def _metric_columns(records: pd.DataFrame) -> tuple[Column, ...]:
    metrics = [m for m in records["metric"].unique() if m != "case"]
    return tuple(Column(metric, (metric,), digits) for metric in metrics)


def _settings_line(rows: pd.DataFrame) -> list[str]:
    """What all rows share is said once, above the table; what differs is listed."""
    parts = [", ".join(dict.fromkeys(rows["dtype"]))]
    generating = rows[~rows["suite"].isin(NOT_GENERATING)]
    if len(generating):
        parts.append(", ".join(dict.fromkeys(generating["decode_path"])))
    forward_paths = list(dict.fromkeys(rows["forward_path"]))
    if "training" in set(rows["suite"]) or forward_paths != ["eager"]:
        parts.append(f"forward {', '.join(forward_paths)}")
    for name in SETTINGS:
        values = list(filter(None, dict.fromkeys(rows[name])))
        parts += [f"{name} {', '.join(values)}"] if values else []
    prompts = sorted(set(generating["prompt_len"]))
    if prompts:
        parts.append(f"prompt {', '.join(str(p) for p in prompts)} tokens")
    if "smoke" in set(rows["scale"]):
        parts.append("smoke scale: proves the pipeline, numbers are meaningless")
    return parts


def failures(rows: pd.DataFrame) -> tuple[str, ...]:
    """One note per case that failed, with the last line of its error, or is unsupported."""
    bad = rows[rows["status"].isin(["failed", "unsupported"])]
    return tuple(
        f"{row['status']}: {_case_name(row)}: "
        f"{_error_text(row['status'], str(row['error'] or 'no message'))} (case {row['case']})"
        for _, row in bad.iterrows()
    )


def name_of(row: pd.Series) -> str:
    """The label, and the implementation where the suite has several of one architecture."""
    implementation = row.get("implementation")
    return f"{row['label']} {implementation}" if implementation else row["label"]


def _case_name(row: pd.Series) -> str:
    return f"{name_of(row)}, batch {row['batch_size']}, length {row['seq_len']}"


def _error_text(status: str, error: str) -> str:
    """A traceback's last line names its error; of a sentence for users every line counts."""
    return " ".join(error.split()) if status == "unsupported" else error.strip().splitlines()[-1]


def foreign_dense(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note where a ratio had to take Dense from another run of the same device model."""
    if "dense_run" not in rows:
        return ()
    foreign = rows[rows["dense_run"].notna() & (rows["dense_run"] != rows["run"])]
    pairs = sorted({f"{row.run} against {row.dense_run}" for row in foreign.itertuples()})
    return tuple(f"warning: ratios to Dense across runs: {pair}." for pair in pairs)


def warnings(rows: pd.DataFrame, records: pd.DataFrame) -> tuple[str, ...]:
    """What makes numbers doubtful: drift of repeats or of the run, two clocks that disagree."""
    found = []
    for _, row in rows.iterrows():
        name = _case_name(row)
        samples = latency_samples(row)
        if len(samples) >= 3 and abs(stats.drift(samples)) > stats.MARGIN:
            found.append(f"warning: {name}: repeats drift by {100 * stats.drift(samples):+.1f} %.")
        host, device = row.get("host_latency_s"), row.get("latency_s")
        if row["device"] == "cuda" and pd.notna(host) and abs(host / device - 1) > MAX_CLOCK_GAP:
            gap = 100 * (host / device - 1)
            found.append(f"warning: {name}: host clock differs from CUDA events by {gap:+.1f} %.")
        gap = row.get("step_sum_difference")
        if pd.notna(gap):
            found.append(f"warning: {name}: the instrumented steps add up to {100 * gap:+.1f} %.")
    return (*found, *disturbances(rows), *_slow_downs(rows), *_reference_drift(records))


def disturbances(rows: pd.DataFrame) -> tuple[str, ...]:
    """A warning per training case whose parts, which are timed apart, do not sum to its step."""
    if not {"train_step_s", *TRAINING_PARTS} <= set(rows):
        return ()
    sums = rows[list(TRAINING_PARTS)].sum(axis=1, min_count=len(TRAINING_PARTS))
    disturbed = rows[(sums / rows["train_step_s"] - 1).abs() > MAX_PARTS_GAP]
    return tuple(
        f"warning: {_case_name(row)}: measured under disturbance: parts sum to "
        f"{milliseconds(sums[index])} of {milliseconds(row['train_step_s'])} ms."
        for index, row in disturbed.iterrows()
    )


def _slow_downs(rows: pd.DataFrame) -> list[str]:
    """Which reasons the GPU gave for lower clocks after how many cases."""
    notes = []
    for name in (c for c in rows if c.startswith("slow_down_") and c.endswith("_after")):
        count = int((rows[name] == 1).sum())
        reason = name.removeprefix("slow_down_").removesuffix("_after").replace("_", " ")
        if count:
            notes.append(f"clocks: {reason} was active at the end of {count} of {len(rows)} cases.")
    return notes


def _reference_drift(records: pd.DataFrame) -> list[str]:
    """The reference case at the start against the one at the end, per run."""
    rows = closed_rows(records)
    rows = rows[rows["settings"].map(is_reference) & (rows["status"] == "ok")]
    notes = []
    for run, group in rows.groupby("run", sort=False):
        if len(group) < 2:
            continue
        first, last = (group.sort_values("at")["latency_s"].iloc[i] for i in (0, -1))
        drift = last / first - 1
        word = "warning: " if abs(drift) > stats.MARGIN else ""
        notes.append(
            f"{word}reference case of {run}: {digits(first)} s first, {digits(last)} s last, "
            f"drift {100 * drift:+.1f} %."
        )
    return notes
