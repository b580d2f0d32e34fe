"""What the efficiency figures share: measured rows -> captioned figure, table, crossing points."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import figures, measurements, tables
from cat_bench.case import Case
from cat_bench.columns import DEFINITIONS, EFFICIENCY_COLUMNS, GIB, Column, defined
from cat_bench.notes import (
    configurations,
    failures,
    foreign_dense,
    hidden_dense,
    prompt_share,
    ranges,
)
from cat_bench.paper import _one_run, _published, _settings
from cat_bench.paper._lacking import lacking, ranked
from cat_bench.paper._settings import Content
from cat_bench.stats import MIN_COVERED

HALF_WINDOW = {_settings.label(name) for name in _settings.HALF_WINDOW}


def content(
    title: str,
    records: pd.DataFrame,
    published: Sequence,
    names: Sequence[str],
    cases: Sequence[Case],
    axis: figures.Axis,
    scale: str,
    panels: Sequence[figures.Panel] = figures.ALL_PANELS,
    says_also: Sequence[str] = (),
) -> Content:
    """The figure, its rows, and a table with % of floor, ratios and crossing points.

    `says_also`: sentences for the caption.
    """
    rows, axis = measured(records, names, cases, scale), axis.planned_by(cases)
    if _settings.only_reference(names, scale):
        rows = rows.iloc[:0]  # Dense without its subject: the paper's points alone say more
    units = {panel.published for panel in panels}
    published = [point for point in published if point.unit in units]
    by = [axis.name] if axis.planned else []
    lacks = lacking(rows, cases, names, scale, by)
    also = [figures.GAPS, *lacks] if figures.has_gaps(rows, axis) else lacks
    says = caption(title, rows, names, scale, panels, [*says_also, *also])
    figure = figures.efficiency_figure(rows, published, axis, says, panels, scale == "smoke")
    listed = _with_d_state(rows) if axis == figures.D_STATE and len(rows) else rows
    listed = ranked(listed, cases)
    made = (ratio_table(title, listed, names, axis, scale, lacks),) if len(rows) else ()
    details = tables.details_of(listed) if len(rows) else None
    if details is not None:
        made += (replace(details, title=f"{title}, per token", heading=heading(rows)),)
    return Content(made, figure, plotted(rows, published))


def _with_d_state(rows: pd.DataFrame) -> pd.DataFrame:
    """ "Mamba2, d_state 16", smallest first; in a figure the x axis says it."""
    rows = rows.sort_values("d_state", kind="stable", na_position="first")
    sizes = rows["d_state"].map(lambda size: "" if pd.isna(size) else f", d_state {size:.0f}")
    return rows.assign(label=rows["label"] + sizes).reset_index(drop=True)


def measured(
    records: pd.DataFrame, names: Sequence[str], cases: Sequence[Case], scale: str
) -> pd.DataFrame:
    """One row per closed case, with the exhibit's labels and its ratios to Dense."""
    lengths = {case.seq_len for case in cases}
    rows = measurements.measured(_settings.relabelled(records, names, scale, lengths))
    if rows.empty:
        return rows
    rows = rows.assign(d_state=rows.get("config.d_state", math.nan))
    return _settings.in_order(rows, names).reset_index(drop=True)


def caption(
    title: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    scale: str,
    panels: Sequence[figures.Panel] = figures.ALL_PANELS,
    also: Sequence[str] = (),
) -> str:
    """Title, then in one paragraph: machine, runs, settings, scale, how to read it, what lacks.

    `also`: sentences of the exhibit's own.
    """
    has_points = any(panel.published for panel in panels)
    nothing = no_row(names, scale) if has_points else "No row yet."
    parts = [heading(rows), f"{_settings.scale_of(scale).says}."] if len(rows) else [nothing]
    if "latency_s_low" in rows and rows["latency_s_low"].notna().any():
        parts.append("95 % intervals are narrower than the markers where no bar is visible.")
    if len(rows) and has_points and scale != "smoke" and not figures.may_overlay(rows):
        parts.append(
            "The paper's points are from an A100 80GB PCIe: drawn as ratios to Dense only."
        )
        parts += [PEAKS] if any(panel.published == "GiB" for panel in panels) else []
    if len(rows) and any(panel.ratio_to == "Dense" for panel in panels):
        parts += [note.replace("warning: r", "R", 1) for note in foreign_dense(rows)]
        parts += hidden_dense(rows)
    labels = set(rows["label"]) if len(rows) else set()
    parts += [f"{label}: window of half the length." for label in sorted(labels & HALF_WINDOW)]
    absent = _settings.missing(names, scale)
    if absent:
        parts.append(f"Not timed: {', '.join(absent)}.")
    parts += also
    return "\n".join([f"{title}.", " ".join(parts)])


def patterns(rows: pd.DataFrame) -> tuple[str, ...]:
    """What labels do not tell; some windows follow the length in exhibits."""
    return configurations(rows, HALF_WINDOW)


def no_row(names: Sequence[str], scale: str) -> str:
    """Which rows of ours a figure of the paper's points alone is waiting for."""
    whose = "ours"
    if _settings.only_reference(names, scale):
        subjects = (_settings.label(name).partition(" (")[0] for name in names if name != "dense")
        whose = " or ".join(dict.fromkeys(subjects))
    return f"No row of {whose} yet: the paper's points, {figures.PAPER_DEVICE}, read off its plots."


def heading(rows: pd.DataFrame) -> str:
    """Machine, runs and settings of the rows: over every table, in every caption."""
    runs = sorted(set(rows["run"]))
    word = "runs" if len(runs) > 1 else "run"
    machines = "; ".join(dict.fromkeys(rows["machine"]))
    return f"{machines}; {word} {', '.join(runs)}. {settings(rows)}{commits(rows)}"


def commits(rows: pd.DataFrame) -> str:
    """A sentence, where several measured the rows: one of older code may be slower than today."""
    names = sorted(set(rows["commit"])) if "commit" in rows else []
    if len(names) < 2:
        return ""
    changed = "; +: and changes" if any(name.endswith("+") for name in names) else ""
    where = ", where it has Dense" if any(foreign_dense(rows)) else ""
    return (
        f" Code of {len(names)} commits ({', '.join(names)}{changed}): ratios are inside one "
        f"run{where}."
    )


def settings(rows: pd.DataFrame) -> str:
    """dtype, decode path, prompt, repeats."""
    paths = ", ".join(dict.fromkeys(rows["decode_path"]))
    repeats = sorted({int(n) for n in rows.get("n", pd.Series(dtype=float)).dropna()})
    prompts = ", ".join(str(tokens) for tokens in sorted(set(rows["prompt_len"])))
    text = f"{', '.join(dict.fromkeys(rows['dtype']))}, {paths}, prompt {prompts}"
    if repeats:
        text += f", n = {', '.join(str(n) for n in repeats)}, median and 95 % interval"
        text += f" (range below n = {MIN_COVERED})" * (repeats[0] < MIN_COVERED)
    return text + "."


def ratio_table(
    title: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    axis: figures.Axis,
    scale: str,
    also: Sequence[str] = (),
) -> tables.Table:
    """Latency, memory, % of floor, ratios to Dense with intervals; crossing points in the notes."""
    made = tables.table(rows, COLUMNS, ["batch_size", "seq_len"])
    notes = [*defined(DEFINITIONS), *crossing_notes(rows, axis), *failures(rows)]
    notes += [*patterns(rows), *foreign_dense(rows), *hidden_dense(rows), *ranges(rows)]
    notes += [*prompt_share(rows), *also]
    if scale == "smoke":
        notes.append(f"{figures.SMOKE_STAMP}.")
    absent = _settings.missing(names, scale)
    if absent:
        notes.append(f"Not timed: {', '.join(absent)}.")
    return replace(made, title=title, heading=heading(rows), notes=tuple(notes))


PEAKS = (
    "Peak memory: ours is the most reserved, captured graphs included; the paper's is the most "
    "allocated."
)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


COLUMNS = (
    *EFFICIENCY_COLUMNS,
    Column("peak vs Dense", ("memory_ratio",), _times),
    Column("state vs Dense", ("state_ratio",), _times),
)


def crossing_notes(rows: pd.DataFrame, axis: figures.Axis) -> list[str]:
    """Where each CAT's latency and memory cross those of Dense and of Mamba2."""
    notes = []
    labels = list(dict.fromkeys(rows["label"]))
    for reference in ("Dense", "Mamba2"):
        for name in (name for name in labels if name.startswith("CAT-") and reference in labels):
            for metric, word in (("latency_s", "latency"), ("peak_bytes", "peak memory")):
                lines = [_line(rows, text, axis.name, metric) for text in (name, reference)]
                said = crossing_text(*lines, axis)
                if any(_is_marked(rows, text, metric) for text in (name, reference)):
                    said += " (without points under a remark)"
                notes.append(f"{word}, {name} against {reference}: {said}.")
    return notes


def _is_marked(rows: pd.DataFrame, name: str, metric: str) -> bool:
    of_name = rows[rows["label"] == name]
    return any(measurements.is_marked(row, metric) for _, row in of_name.iterrows())


def _line(rows: pd.DataFrame, name: str, x: str, metric: str) -> dict[float, float]:
    ok = rows[(rows["label"] == name) & (rows["status"] == "ok")]
    if metric not in ok:
        return {}
    ok = ok.loc[[index for index, row in ok.iterrows() if not measurements.is_marked(row, metric)]]
    return {float(a): float(b) for a, b in zip(ok[x], ok[metric], strict=True) if pd.notna(b)}


def crossing_text(a: dict[float, float], b: dict[float, float], axis: figures.Axis) -> str:
    shared = sorted(set(a) & set(b))
    if len(shared) < 2:
        return "too few common points"
    unit = axis.label.split(" (")[0].lower()
    where = [
        f"crosses between {unit} {x0:.0f} and {x1:.0f}"
        if axis.skips(x0, x1)  # what lies between was planned, not measured: no point is known
        else f"crosses at {unit} about {x:.0f} (interpolated)"
        for x0, x1, x in crossings(a, b)
    ]
    if where:
        return " and ".join(where) + f", lower at {shared[-1]:.0f}" * (
            a[shared[-1]] < b[shared[-1]]
        )
    word = "lower" if a[shared[0]] < b[shared[0]] else "higher"
    return f"{word} at all {len(shared)} common points from {shared[0]:.0f} to {shared[-1]:.0f}"


def crossings(a: dict[float, float], b: dict[float, float]) -> list[tuple[float, float, float]]:
    """Every (x before, x after, x between) where the lines a and b cross; the last is interpolated
    on logarithmic axes."""
    turns = _one_run.turns({x: math.log(a[x] / b[x]) for x in set(a) & set(b)})
    return [(x0, x1, x0 * (x1 / x0) ** (gap0 / (gap0 - gap1))) for (x0, gap0), (x1, gap1) in turns]


def published_dense(exhibit: str, batch_size: int | None = None) -> list[_published.Point]:
    """The paper's Dense points of another figure, of all batch sizes or of one."""
    dense = [p for p in _published.points(exhibit) if p.row == "Dense" and figures.is_plotted(p)]
    return [p for p in dense if batch_size is None or p.x["batch_size"] == batch_size]


def plotted(rows: pd.DataFrame, published: Sequence) -> pd.DataFrame:
    """All drawn values in SI units, ours and the paper's: the figure's CSV."""
    names = (
        "label",
        "batch_size",
        "seq_len",
        "status",
        "device_name",
        *(key for column in COLUMNS for key in column.keys),
    )
    ours = rows.reindex(columns=list(dict.fromkeys(names))).assign(source="ours")
    paper = [
        {
            "label": point.row,
            "source": f"paper ({point.kind})",
            "device_name": figures.PAPER_DEVICE,
            **{name: value for name, value in point.x.items()},
            "latency_s" if point.unit == "s" else "peak_bytes": point.value
            * (1 if point.unit == "s" else GIB),
        }
        for point in published
        if figures.is_plotted(point)
    ]
    return pd.DataFrame(ours.to_dict(orient="records") + paper)
