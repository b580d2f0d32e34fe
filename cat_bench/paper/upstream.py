"""Our decode loop against the authors' own generation: is a baseline served well here?

For every architecture whose file wraps a program of its authors (`upstream_generate`): the same
weights, prompt and shape, our captured loop and theirs, each in a process of its own
(evaluation_spec.md 4.5). The paper has no such table. On a CPU nobody's kernels run.

Try it: cat-bench paper upstream
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import measurements, spec, tables
from cat_bench.case import Case
from cat_bench.columns import LOOP_DEFINITION, UPSTREAM_COLUMNS
from cat_bench.notes import configurations, failures, ranges
from cat_bench.paper import _curves, _settings
from cat_bench.paper._lacking import lacking
from cat_bench.paper._settings import Content

TITLE = "Our decode loop against the authors' own"
SUITES = ("upstream",)
ARCHITECTURES = tuple(
    info.name for info in spec.architectures() if "upstream_generate" in info.exports
)
BATCH_SIZES = (1, 256)
SEQ_LEN = 1024  # tokens
SHORT = {"gated_deltanet": 136}  # Hugging Face's generate takes 28 ms a token, at any length
LOOPS = ("ours", "upstream")


def plan(scale: str) -> list[Case]:
    if _settings.scale_of(scale).device == "cpu":
        return []
    return [
        replace(case, suite="upstream", settings=(("loop", loop),))
        for name in ARCHITECTURES
        for case in _settings.timed_cases([name], scale, BATCH_SIZES, [SHORT.get(name, SEQ_LEN)])
        for loop in LOOPS
    ]


def earlier(case: Case) -> Case:
    """The pairs that were measured by `cat-bench run upstream`, before there was this exhibit."""
    return replace(case, scale="custom")


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    rows = measurements.measured(records)
    if rows.empty:
        state = "not run" if plan(scale) else "needs a CUDA GPU"
        labels = [_settings.label(name) for name in ARCHITECTURES]
        unknown = pd.DataFrame({"architecture": labels, "loop ratio": state})
        return Content((tables.Table(unknown, unknown, "", (LOOP_DEFINITION,), title=TITLE),))
    rows = rows.sort_values(["label", "batch_size", "loop"], kind="stable")
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, "latency_s", "loop_ratio"])))
    lacks = lacking(rows, plan(scale), ARCHITECTURES, scale, ["batch_size", "seq_len"])
    code = f"Measured with the code of {', '.join(dict.fromkeys(rows['commit']))}."
    notes = (LOOP_DEFINITION, code, *configurations(rows), *failures(rows), *ranges(rows), *lacks)
    made = tables.table(rows.reset_index(drop=True), UPSTREAM_COLUMNS)
    return Content((replace(made, title=TITLE, heading=_curves.heading(rows), notes=notes),))
