"""Attention alone over the length: CAT's, as the decoder of CAT-16 needs it, beside dense causal.

The paper gives no times of it, only that it uses FlexAttention (Appendix B.1). One layer, forward
and backward, a call of 16,384 tokens (one sequence of 65,536 at that length); the implementations
are those of the suite `attention`. Dense-2D has the heads of CAT's decoder, Dense half of them.

Try it: cat-bench paper attention --scale smoke
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import figures, measurements, tables
from cat_bench.case import Case
from cat_bench.columns import ATTENTION_COLUMNS, ATTENTION_DEFINITIONS, defined
from cat_bench.notes import failures, foreign_dense
from cat_bench.paper import _curves, _lines, _settings
from cat_bench.paper._lacking import lacking, ranked
from cat_bench.paper._settings import Content
from cat_bench.spec import parse

TITLE = "Attention alone over the length: CAT-16's against dense"
SUITES = ("attention",)
# As in suites/attention.py, which this file must not import.
IMPLEMENTATIONS = {
    "cat:chunk_size=16": ("eager", "two_part", "fused", "flex_interleaved", "flex_permuted"),
    "dense-2d": ("causal",),
    "dense": ("causal",),
}
MAX_EAGER = 4096  # tokens
SEQ_LENS = (1024, 4096, 16_384, 65_536)
TOKENS = 16_384  # of a call, shared out among sequences
SMALL = {"num_layers": 1, "vocab_size": 256}  # the model is built, but not run
SMOKE_IMPLEMENTATIONS = ("two_part", "causal")  # enough to prove the pipeline, and no mask to build

LENGTH = figures.LENGTH
PANELS = (
    figures.Panel(
        "time_s", "forward + backward", f"ms per {TOKENS:,} tokens", "", low="time_s_low",
        high="time_s_high", divisor=1e-3,
    ),
    figures.Panel(
        "forward_backward_flops_per_s", "useful rate", "TFLOP/s", "", divisor=1e12
    ),
)  # fmt: skip
NOTES = (
    "useful pairs = those that see each other by the definition, whatever is computed; eager is a "
    f"dense mask, up to {MAX_EAGER:,} tokens.",
)


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    on_gpu = chosen.device == "cuda"
    return [
        Case(
            suite="attention",
            arch=arch_text(name, scale, seq_len),
            batch_size=max(1, TOKENS // seq_len) if on_gpu else chosen.batch_size,
            prompt_len=seq_len,
            seq_len=seq_len,
            dtype=chosen.dtype,
            device=chosen.device,
            scale=scale,
            settings=(("implementation", implementation),),
        )
        for name, implementations in IMPLEMENTATIONS.items()
        for seq_len in (SEQ_LENS if on_gpu else (chosen.seq_len,))
        for implementation in implementations
        if on_gpu or implementation in SMOKE_IMPLEMENTATIONS
        if implementation != "eager" or seq_len <= MAX_EAGER
    ]


def arch_text(name: str, scale: str, seq_len: int) -> str:
    """One layer and few words of it; at scale smoke narrow, too."""
    one = parse(_settings.arch_text(name, scale, seq_len))
    changed = {**one.overrides, **SMALL}
    if one.name == "cat":
        changed |= {"compressor_layers": 1, "max_len": max(seq_len, 1024)}
    return parse(f"{one.name}:{','.join(f'{key}={size}' for key, size in changed.items())}").text


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    rows, axis = _measured(records), LENGTH.planned_by(plan(scale))
    lacks = lacking(rows, plan(scale), (), scale, ["seq_len"], _names(scale))
    also = [figures.GAPS, *lacks] if figures.has_gaps(_named(rows), axis) else lacks
    figure = _lines.line_figure(
        _named(rows), PANELS, axis, _caption(rows, scale, also), is_smoke=scale == "smoke"
    )
    if rows.empty:
        return Content((), figure, None)
    return Content((_table(rows, scale, lacks),), figure, _plotted(rows))


def _measured(records: pd.DataFrame) -> pd.DataFrame:
    """Shortest first, then Dense, Dense-2D and the implementations in the plan's order."""
    rows = measurements.measured(records)
    if rows.empty:
        return rows
    order = [name for names in reversed(IMPLEMENTATIONS.values()) for name in names]
    rows = rows.assign(place=rows["implementation"].map(order.index))
    rows = rows.sort_values(["seq_len", "place", "heads"], kind="stable").drop(columns="place")
    if "latency_s_low" in rows:
        share = TOKENS / (rows["batch_size"] * rows["seq_len"])
        times = {f"time_s{end}": share * rows[f"latency_s{end}"] for end in ("", "_low", "_high")}
        rows = rows.assign(**times)
    return rows.reset_index(drop=True)


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per implementation: Dense and Dense-2D have one each, the others are CAT's."""
    if rows.empty:
        return rows
    is_dense = rows["implementation"] == "causal"
    return rows.assign(label=rows["label"].where(is_dense, rows["implementation"]))


def _names(scale: str) -> Callable[[Case], str]:
    """As in the figure: Dense, Dense-2D, and CAT by its implementation."""
    dense = {
        arch_text(name, scale, seq_len): _settings.label(name)
        for name in ("dense", "dense-2d")
        for seq_len in SEQ_LENS
    }
    return lambda case: dense.get(case.arch) or dict(case.settings)["implementation"]


def _table(rows: pd.DataFrame, scale: str, lacks: Sequence[str]) -> tables.Table:
    made = tables.table(
        ranked(rows, plan(scale)), ATTENTION_COLUMNS, ["batch_size", "seq_len", "label"]
    )
    notes = [*defined(ATTENTION_DEFINITIONS), *NOTES, *failures(rows), *lacks]
    notes += foreign_dense(rows)
    notes += [f"{figures.SMOKE_STAMP}."] if scale == "smoke" else []
    return replace(made, title=TITLE, heading=_heading(rows), notes=tuple(notes))


def _heading(rows: pd.DataFrame) -> str:
    machines, dtypes = ("; ".join(dict.fromkeys(rows[name])) for name in ("machine", "dtype"))
    runs = sorted(set(rows["run"]))
    text = f"{machines}; {'runs' if len(runs) > 1 else 'run'} {', '.join(runs)}. {dtypes}."
    return text + _curves.commits(rows)


def _caption(rows: pd.DataFrame, scale: str, also: Sequence[str]) -> str:
    if rows.empty:
        return f"{TITLE}.\nNo row yet."
    return (
        f"{TITLE}.\n{_heading(rows)} {_settings.scale_of(scale).says}. One layer, without its "
        f"projections; Dense-2D has the heads of CAT's decoder, Dense half of them; all the others "
        f"are CAT's. Median and 95 % interval, narrower than the markers where no bar is visible. "
        f"{' '.join(['The paper has no such points.', *also])}"
    )


def _plotted(rows: pd.DataFrame) -> pd.DataFrame:
    names = ["status", "device_name", "run", "time_s", "time_s_low", "time_s_high"]
    keys = [key for column in ATTENTION_COLUMNS for key in column.keys]
    return rows.reindex(columns=list(dict.fromkeys([*keys, *names])))
