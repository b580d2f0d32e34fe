"""SWDE recall beside speed-up and memory reduction over Dense, batch 512 and length 1024.

The speed and memory columns are measured (section 3.2), of the systems that the paper leaves out,
too; the paper's for Sparse are theoretical, and its 1.4x for CAT-8 is not what its Figure 2 shows
(1.19x).

Try it: cat-bench paper table3 --scale smoke
"""

import math
from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.columns import faster
from cat_bench.measurements import is_marked
from cat_bench.notes import REMARKED
from cat_bench.paper import _curves, _settings, _tables
from cat_bench.paper._lacking import lacking
from cat_bench.paper._settings import Content

TITLE = "Table 3: speed-up, memory reduction and SWDE recall"
SUITES = ("efficiency", "pretrain", "swde")
ARCHITECTURES = tuple(
    dict.fromkeys(("dense", "gdn-h1", "sparse-2d", "cat-8", *_settings.ARCHITECTURES))
)


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, [chosen.batch_sizes[-1]], [chosen.seq_len])


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    rows = _curves.measured(records, ARCHITECTURES, plan(scale), scale)
    notes = [f"SWDE, ours: not built (needs suites: {', '.join(SUITES[1:])})."]
    absent = _settings.missing(ARCHITECTURES, scale)
    if absent:
        notes.append(f"Not timed: {', '.join(absent)}.")
    if scale == "smoke":
        notes.append(f"{figures.SMOKE_STAMP}.")
    if len(rows) and scale != "smoke":
        notes.append(_curves.PEAKS)
    notes += _curves.patterns(rows) if len(rows) else []
    notes += lacking(rows, plan(scale), ARCHITECTURES, scale, [])
    heading = _curves.heading(rows) if len(rows) else ""
    ours = _ours(rows)
    named = dict.fromkeys([*(point.row for point in published), *(row for row, _ in ours)])
    ours |= {(row, "swde"): (math.nan, "not built") for row in named}
    return Content((_tables.comparison(TITLE, published, ours, heading=heading, notes=notes),))


def _ours(rows: pd.DataFrame) -> _tables.Ours:
    """Measured speed-up with its interval, and memory reduction, per architecture."""
    found = {}
    for _, row in rows.iterrows():
        name, status = row["label"], row["status"]
        found[name, "speedup"] = found[name, "memory_reduction"] = (math.nan, status)
        if status == "ok" and pd.notna(row.get("speedup")):
            shown = faster(row["speedup"], row["speedup_low"], row["speedup_high"])
            found[name, "speedup"] = (row["speedup"], shown + _mark(row, "speedup"))
        if status == "ok" and pd.notna(row.get("memory_ratio")):
            ratio = row["memory_ratio"]
            shown = f"{ratio:.2f}x" + _mark(row, "memory_ratio")
            found[name, "memory_reduction"] = (ratio, shown)
    return found


def _mark(row: pd.Series, metric: str) -> str:
    return REMARKED * is_marked(row, metric)
