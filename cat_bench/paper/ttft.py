"""Time to first token at batch 1 over the prompt's length: what a user waits for.

The prefill and the argmax after it, in a state that exists (evaluation_spec.md 4.1); 8 new tokens,
so that the cases are short. CAT reads a prompt by its compressor, and its decoder sees one row per
chunk; Dense reads every token. Ratios to Dense and to Dense-2D, which has the width of CAT's
decoder, are inside one run: the row's own, or an older one, which is named.

Try it: cat-bench paper ttft --scale smoke
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import figures, tables
from cat_bench.case import Case
from cat_bench.columns import Column, faster, gib, milliseconds_with_interval, whole
from cat_bench.notes import failures
from cat_bench.paper import _curves, _lines, _one_run, _settings
from cat_bench.paper._lacking import lacking, ranked
from cat_bench.paper._settings import Content

TITLE = "Time to first token over the prompt, batch 1"
SUITES = ("efficiency",)
ARCHITECTURES = _settings.ARCHITECTURES
ARCHITECTURES_SMOKE = ("dense", "dense-2d", "cat-8")  # enough to prove the pipeline
PROMPTS = (1024, 4096, 16_384, 32_768)  # tokens
NEW_TOKENS = 8
SMOKE_PROMPTS, SMOKE_LENGTH = (_settings.PROMPT_LEN, 56), 64  # the first is Figure 2's case
OLDER = (
    "Ratios are inside one run: where a newer run shown has no Dense-2D, an older one's, which the "
    "table names."
)
LAUNCHES = (
    f"Short prompts are bound by launching kernels from Python, not by the GPU: {PROMPTS[0]} of "
    f"all, {PROMPTS[1]} where it takes no longer. Compare systems at the longer ones."
)
PROMPT = figures.Axis("prompt_len", "Prompt (tokens)")
PANELS = (
    figures.Panel(
        "ttft_s", "time to first token", "TTFT (ms)", "", low="ttft_s_low", high="ttft_s_high",
        divisor=1e-3,
    ),
    figures.Panel(
        "sooner_2d", "Dense-2D's time / this one's", "Ratio to Dense-2D (x)", "",
        "Dense-2D", "sooner_2d_low", "sooner_2d_high",
    ),
)  # fmt: skip


def plan(scale: str) -> list[Case]:
    is_smoke = scale == "smoke"
    names = ARCHITECTURES_SMOKE if is_smoke else ARCHITECTURES
    return [
        case
        for prompt in (SMOKE_PROMPTS if is_smoke else PROMPTS)
        for seq_len in [SMOKE_LENGTH if is_smoke else prompt + NEW_TOKENS]
        for case in _settings.timed_cases(names, scale, [1], [seq_len], prompt)
    ]


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    rows = _measured(records, scale)
    axis = PROMPT.planned_by(plan(scale))
    lacks = lacking(rows, plan(scale), ARCHITECTURES, scale, ["prompt_len"])
    also = [figures.GAPS, *lacks] if figures.has_gaps(rows, axis) else lacks
    also = [*also, LAUNCHES] if len(rows) and "cuda" in set(rows["device"]) else also
    if "sooner_2d_run" in rows and (rows["sooner_2d_run"] != rows["run"]).any():
        also = [*also, OLDER]
    says = _curves.caption(TITLE, rows, ARCHITECTURES, scale, PANELS, also)
    figure = _lines.line_figure(rows, PANELS, axis, says, is_smoke=scale == "smoke")
    if rows.empty:
        return Content((), figure, None)
    return Content((_table(rows, scale, lacks),), figure, _plotted(rows))


def _measured(records: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Rows of the newest run of each case; the other runs' serve as references of their own."""
    if "chosen" in records:
        records = records.rename(columns={"chosen": "is_chosen"})
    rows = _curves.measured(records, ARCHITECTURES, plan(scale), scale)
    if rows.empty or "ttft_s" not in rows:
        return rows
    rows = _one_run.with_interval(rows, "ttft_s")
    rows = _one_run.with_ratio(rows, "ttft_s", "Dense", "sooner")
    rows = _one_run.with_ratio(rows, "ttft_s", "Dense-2D", "sooner_2d")
    for name in ("sooner", "sooner_2d"):
        rows = _one_run.with_older_ratio(rows, "ttft_s", name)
    rows = rows[rows["is_chosen"]] if "is_chosen" in rows else rows
    return rows.sort_values("prompt_len", kind="stable").reset_index(drop=True)


def sooner(ratio: float, low: float, high: float, source: str, run: str) -> str:
    """The ratio, and the number of its run where that is not the row's."""
    text = faster(ratio, low, high)
    return text if source == run or pd.isna(ratio) else f"{text} ({source.partition('-')[0]})"


SOONER, SOONER_2D = ((name, f"{name}_low", f"{name}_high") for name in ("sooner", "sooner_2d"))
COLUMNS = (
    Column("architecture", ("label",), str),
    Column("prompt", ("prompt_len",), whole),
    Column(
        "TTFT ms [95 % CI]", ("ttft_s", "ttft_s_low", "ttft_s_high"),
        milliseconds_with_interval, min,
    ),
    Column("vs Dense", (*SOONER, "sooner_run", "run"), sooner),
    Column("vs Dense-2D", (*SOONER_2D, "sooner_2d_run", "run"), sooner),
    Column("peak GiB", ("peak_bytes",), gib, min),
    Column("n", ("n",), whole),
)  # fmt: skip


def _table(rows: pd.DataFrame, scale: str, lacks: Sequence[str]) -> tables.Table:
    made = tables.table(ranked(rows, plan(scale)), COLUMNS, ["prompt_len"])
    notes = [
        "TTFT = prefill of the prompt and the choice of the first new token, median. vs Dense, "
        "vs Dense-2D = their median / ours, same prompt, inside one run, 95 % interval: this row's "
        "run, or, where that has no such row, the older one whose number follows.",
        *_curves.patterns(rows),
        *failures(rows),
        *lacks,
    ]
    notes += [LAUNCHES] if "cuda" in set(rows["device"]) else []
    notes += [f"{figures.SMOKE_STAMP}."] if scale == "smoke" else []
    absent = _settings.missing(ARCHITECTURES, scale)
    notes += [f"Not timed: {', '.join(absent)}."] if absent else []
    return replace(made, title=TITLE, heading=_curves.heading(rows), notes=tuple(notes))


def _plotted(rows: pd.DataFrame) -> pd.DataFrame:
    names = ["label", "batch_size", "seq_len", "status", "device_name", "run"]
    keys = [key for column in COLUMNS for key in column.keys]
    return rows.reindex(columns=list(dict.fromkeys([*names, *keys])))
