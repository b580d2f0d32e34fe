"""One style and the few kinds of plot that the exhibits share. matplotlib only, no torch.

Every architecture keeps its colour (Okabe-Ito, safe for colour-blind readers) and its marker in all
figures. Lines and filled markers are ours, with 95 % intervals; dotted lines and hollow markers are
the paper's. Seconds and GiB of another GPU are never drawn over ours: there only ratios to Dense
are. A case out of memory is an x at the upper edge. Whole figures come from `efficiency_figure`,
`mask_figure` and paper/_lines.py; `save` writes SVG, PDF and PNG.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from cat_bench.columns import GIB
from cat_bench.measurements import is_marked

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 3,  # an eighth of the time that type 42 takes
    "svg.hashsalt": "cat-bench",  # the same rows give the same file
}
SMOKE_STAMP = "smoke scale: proves the pipeline, numbers are meaningless"
PAPER_DEVICE = "A100 80GB PCIe"  # Appendix B.1
WIDTH_IN = 7.2  # inches: a page's text width
CAPTION_COLUMNS = 138  # characters of a caption line at that width
CAPTION_LINE_IN = 0.12  # inches
LINEAR_BELOW = 1.5  # largest / smallest value of a panel whose y axis is linear, from 0
LOG_STEPS = (  # of the ticks of a logarithmic axis, coarse to fine
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),  # two steps: 1.5 times at most
)
PAPER_DOTS = (0, (1, 2))
GAP_DASHES = {"linestyle": (0, (6, 5)), "linewidth": 0.5, "alpha": 0.6}
GAPS = "Thin dashes: planned points between are not measured."  # said where there are any
THIN_MARKERS = {"P": 7, "X": 6.5, "*": 7}  # the white edge would leave a cross or a dot


class Look(NamedTuple):
    color: str
    marker: str
    line: str = "-"


LOOKS = {
    "Dense": Look("#000000", "o"),
    "Dense-2D": Look("#7a7a7a", "s", "--"),
    "CAT-4": Look("#56b4e9", "H", "--"),
    "CAT-8": Look("#0072b2", "D"),
    "CAT-16": Look("#56b4e9", "^"),
    "CAT-32": Look("#009e73", "v"),
    "CAT-64": Look("#009e73", "d", "--"),
    "Mamba2": Look("#e69f00", "P"),
    "GDN": Look("#d55e00", "X"),
    "GDN-H1": Look("#d55e00", "<", "--"),
    "BASED": Look("#cc79a7", "p"),
    "BASED (unpatched)": Look("#5e2b97", "8", "--"),
    "BASED-2x": Look("#cc79a7", ">", "--"),
    "Sparse": Look("#b8a800", ">", "--"),
    "Sparse-2D": Look("#b8a800", "h"),
    "Sliding": Look("#8c564b", "*"),
    # Implementations of CAT's attention: paper/attention.py.
    "fused": Look("#0072b2", "P"),
    "two_part": Look("#56b4e9", "d"),
    "flex_permuted": Look("#e69f00", "v"),
    "flex_interleaved": Look("#d55e00", "D"),
    "eager": Look("#cc79a7", "h", "--"),
}
SPARE_LOOKS = tuple(
    Look(color, marker, ":")
    for marker in ("o", "s", "^")
    for color in ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
)


def look(label: str, spare: int = 0) -> Look:
    """The colour and marker of an architecture; "BASED (patched)" looks like "BASED"."""
    known = LOOKS.get(label) or LOOKS.get(label.split(" (")[0])
    return known or SPARE_LOOKS[spare % len(SPARE_LOOKS)]


class Panel(NamedTuple):
    """One axes of an efficiency figure: a quantity over the x axis."""

    value: str  # column of `measurements.measured`
    title: str
    label: str
    published: str  # unit of the paper's points: "s" or "GiB"; "": it has none
    ratio_to: str = ""  # a label; one to Dense may carry the paper's points from any GPU
    low: str | None = None  # columns of the interval
    high: str | None = None
    divisor: float = 1.0


LATENCY = Panel(
    "latency_s", "latency", "Latency (s)", "s", low="latency_s_low", high="latency_s_high"
)
MEMORY = Panel("peak_bytes", "peak memory", "Peak memory (GiB)", "GiB", divisor=GIB)
SPEEDUP = Panel(
    "speedup", "speed-up over Dense", "Speed-up (x)", "s", "Dense", "speedup_low", "speedup_high"
)
REDUCTION = Panel(
    "memory_ratio", "memory reduction over Dense", "Memory reduction (x)", "GiB", "Dense"
)
ALL_PANELS = (LATENCY, MEMORY, SPEEDUP, REDUCTION)


class Axis(NamedTuple):
    """What the x axis varies."""

    name: str  # column of the rows and coordinate of the published points
    label: str
    planned: tuple[float, ...] = ()  # every x of the exhibit's plan; empty: no line has gaps

    def skips(self, x0: float, x1: float) -> bool:
        """Whether the plan has a point between two neighbours of a line: nothing is known there."""
        return any(x0 < x < x1 for x in self.planned)

    def planned_by(self, cases: Sequence) -> "Axis":
        """This axis with every x of the plan `cases`; d_state is no field of a case."""
        x = {float(getattr(case, self.name)) for case in cases if hasattr(case, self.name)}
        return self._replace(planned=tuple(sorted(x)))


BATCH = Axis("batch_size", "Batch size")
LENGTH = Axis("seq_len", "Sequence length (tokens)")
D_STATE = Axis("d_state", "State size per head, d_state")


def efficiency_figure(
    rows: pd.DataFrame,
    published: Sequence,
    axis: Axis,
    caption: str,
    panels: Sequence[Panel] = ALL_PANELS,
    is_smoke: bool = False,
) -> Figure:
    """`rows` of measurements.measured over `axis`, a panel per quantity, the paper's points beside.

    Smoke rows stand alone: tiny models on a CPU share no axis with the paper's.
    """
    published = [] if is_smoke and len(rows) else published
    with matplotlib.rc_context(STYLE):
        num_columns = min(2, len(panels))
        num_rows = -(-len(panels) // num_columns)
        height = 0.45 + 2.35 * num_rows + CAPTION_LINE_IN * len(caption_lines(caption))
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        labels = _labels(rows, published)
        for letter, axes, panel in zip("abcdef", grid.flat, panels, strict=False):
            draw_panel(axes, panel, rows, published, axis, labels)
            axes.set_title(f"({letter}) {panel.title}")
        _legend(figure, labels, rows, published, axis, is_smoke)
        add_caption(figure, caption)
    return figure


def _labels(rows: pd.DataFrame, published: Sequence) -> list[str]:
    """All labels, ours first, then those that only the paper has."""
    ours = list(rows["label"]) if len(rows) else []
    return list(dict.fromkeys([*ours, *(point.row for point in published if is_plotted(point))]))


def is_plotted(point) -> bool:
    """Claims and recomputed numbers are remarks; only points of a plot are drawn."""
    return point.kind == "digitised" and point.unit in ("s", "GiB")


def draw_panel(
    axes: Axes,
    panel: Panel,
    rows: pd.DataFrame,
    published: Sequence,
    axis: Axis,
    labels: list[str],
) -> None:
    points = published_points(panel, published, axis, rows)
    for number, label in enumerate(labels):
        if label == panel.ratio_to:
            axes.axhline(1, color=look(label).color, linewidth=1.5, zorder=1)
            continue
        if len(rows):
            _draw_ours(axes, panel, rows[rows["label"] == label], axis, number)
        _draw_published(axes, points.get(label, {}), look(label, number))
    is_out = len(rows) > 0 and (rows["status"] == "oom").any()
    if is_out:
        _draw_out(axes, rows[rows["status"] == "oom"], axis, labels)
    if not is_out and not np.isfinite(axes.dataLim.intervaly).all():
        _say_not_run(
            axes, f"not run: {panel.ratio_to}" if panel.ratio_to and len(rows) else "not run"
        )
    axes.set_xlabel(axis.label)
    axes.set_ylabel(panel.label)
    _scale_x(axes, _ticks(axis, rows, published))
    _scale_y(axes)


def _say_not_run(axes: Axes, text: str) -> None:
    """Instead of ticks, which would name numbers that nobody measured."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5")


def _draw_ours(axes: Axes, panel: Panel, rows: pd.DataFrame, axis: Axis, number: int) -> None:
    """The line of one architecture; what has no place on the x axis is a level line."""
    if rows.empty or panel.value not in rows:
        return
    style, rows = look(rows["label"].iloc[0], number), rows.sort_values(axis.name)
    ok = rows[(rows["status"] == "ok") & rows[panel.value].notna()]
    for level in ok.loc[ok[axis.name].isna(), panel.value]:
        axes.axhline(level / panel.divisor, color=style.color, linewidth=1.5, zorder=1)
    ok = ok[ok[axis.name].notna()]
    x, y = ok[axis.name].astype(float), ok[panel.value].astype(float) / panel.divisor
    gaps = _gaps(x, axis)
    axes.plot(
        np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan), color=style.color,
        marker=style.marker, linestyle=style.line, markersize=_marker_size(style),
        markeredgecolor="white", markeredgewidth=0.5, zorder=4,
    )  # fmt: skip
    marked = [is_marked(row, panel.value) for _, row in ok.iterrows()]
    axes.plot(
        x[marked], y[marked], marker="o", linestyle="none", markersize=_marker_size(style) + 4,
        markerfacecolor="none", markeredgecolor="0.45", markeredgewidth=0.7, zorder=5,
    )  # fmt: skip
    for end in gaps:
        ends = slice(end - 1, end + 1)
        axes.plot(x[ends], y[ends], color=style.color, zorder=3, **GAP_DASHES)
    error = _error(ok, panel, y)
    if error is not None:
        axes.errorbar(x, y, error, fmt="none", ecolor=style.color, capsize=2.5, zorder=3)


def _draw_out(axes: Axes, rows: pd.DataFrame, axis: Axis, labels: list[str]) -> None:
    """A cross on the upper edge for each that ran out of memory, side by side where several did at
    one x: no point of a line lies there.
    """
    rows = rows[rows[axis.name].notna()].drop_duplicates(["label", axis.name])
    for x, there in rows.groupby(axis.name):
        for place, label in enumerate(name for name in labels if name in set(there["label"])):
            aside = ScaledTranslation(-place * 8 / 72, 0, axes.figure.dpi_scale_trans)
            axes.plot(
                float(x), 1.0, transform=axes.get_xaxis_transform() + aside,
                color=look(label, labels.index(label)).color, marker="x", markersize=6.5,
                markeredgewidth=1.8, linestyle="none", clip_on=False, zorder=5,
            )  # fmt: skip


def _gaps(x: Sequence[float], axis: Axis) -> list[int]:
    """Where the line from x[i - 1] to x[i] passes over planned points: every such i."""
    x = list(x)
    return [i for i in range(1, len(x)) if axis.skips(x[i - 1], x[i])]


def has_gaps(rows: pd.DataFrame, axis: Axis) -> bool:
    """Whether a line of these rows passes over planned points that were not measured."""
    if rows.empty or not axis.planned:
        return False
    ok = rows[rows["status"] == "ok"]
    return any(_gaps(sorted(part[axis.name]), axis) for _, part in ok.groupby("label"))


def _marker_size(style: Look) -> float:
    size = matplotlib.rcParams["lines.markersize"]
    return size * THIN_MARKERS.get(style.marker, 5) / 5


def _error(rows: pd.DataFrame, panel: Panel, y: pd.Series) -> np.ndarray | None:
    """Distances to both ends of the interval, 0 where there is none; None without columns."""
    if panel.low is None or panel.low not in rows:
        return None
    low, high = (rows[name] / panel.divisor for name in (panel.low, panel.high))
    return np.nan_to_num(np.maximum([(y - low).to_numpy(float), (high - y).to_numpy(float)], 0))


def published_points(
    panel: Panel, published: Sequence, axis: Axis, rows: pd.DataFrame
) -> dict[str, dict[float | None, float]]:
    """label -> {x: value} of the paper, for one panel; empty where they must not be compared.

    A point without a place on the x axis holds at every x: its x is None.
    """
    values: dict[str, dict[float | None, float]] = {}
    for point in published:
        if is_plotted(point) and point.unit == panel.published:
            values.setdefault(point.row, {})[point.x.get(axis.name)] = point.value
    if panel.ratio_to != "Dense":
        return values if may_overlay(rows) else {}
    dense = values.get("Dense", {})
    return {
        label: {
            x: dense.get(x, dense.get(None)) / y for x, y in line.items() if {x, None} & {*dense}
        }
        for label, line in values.items()
    }


def may_overlay(rows: pd.DataFrame) -> bool:
    """The paper's seconds and GiB may stand beside ours only from the same GPU model."""
    return rows.empty or all(PAPER_DEVICE in str(name) for name in rows["device_name"])


def _draw_published(axes: Axes, line: dict[float | None, float], style: Look) -> None:
    if None in line:
        axes.axhline(line[None], color=style.color, linestyle=PAPER_DOTS, linewidth=1.3, zorder=2)
    x = sorted(value for value in line if value is not None)
    if x:
        axes.plot(
            x, [line[value] for value in x], color=style.color, marker=style.marker,
            markersize=_marker_size(style), markerfacecolor="white", markeredgewidth=1.1,
            linestyle=PAPER_DOTS, linewidth=0.9, zorder=2,
        )  # fmt: skip


def _ticks(axis: Axis, rows: pd.DataFrame, published: Sequence) -> list[float]:
    """Every x that is measured or published, so that all panels share one axis."""
    x = {float(p.x[axis.name]) for p in published if is_plotted(p) and axis.name in p.x}
    return sorted(x | set(rows[axis.name].dropna().astype(float) if len(rows) else ()))


def _scale_x(axes: Axes, ticks: Sequence[float]) -> None:
    """Powers of two, in plain numbers."""
    axes.set_xscale("log", base=2)
    if ticks:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


def _scale_y(axes: Axes) -> None:
    """One rule for all panels: logarithmic, or from 0 where all values are close together.

    A ratio of 2 and one of 1/2 then stand equally far from 1. Labels are plain numbers.
    """
    low, high = axes.dataLim.intervaly  # infinite where nothing was drawn
    if 0 < low < high / LINEAR_BELOW:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(*axes.get_ylim())))
        axes.yaxis.set_minor_locator(NullLocator())
    elif np.isfinite(high):
        axes.set_ylim(0, 1.15 * high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    """At least three where possible, never fewer than two, in the coarsest steps that do."""
    found: list[float] = []
    for steps in LOG_STEPS:
        ticks = (step * 10.0**power for power in range(-9, 10) for step in steps)
        found = [tick for tick in ticks if low <= tick <= high]
        if len(found) >= 3:
            break
    return found


def _legend(
    figure: Figure,
    labels: list[str],
    rows: pd.DataFrame,
    published: Sequence,
    axis: Axis,
    is_smoke: bool,
) -> None:
    """One legend above all panels, under the stamp of figures that prove nothing."""
    ours = set(rows["label"]) if len(rows) else set()
    handles = [
        _handle(label, look(label, number), label in ours, _is_level(label, rows, published, axis))
        for number, label in enumerate(labels)
    ]
    if ours and any(is_plotted(point) for point in published):
        # No marker: a hollow circle would be the paper's Dense.
        text = "dotted, hollow: paper (A100, digitised)"
        handles.append(Line2D([], [], color="#555555", linestyle=PAPER_DOTS, label=text))
    if len(rows) and (rows["status"] == "oom").any():
        handles.append(
            Line2D([], [], color="#555555", marker="x", linestyle="none", label="out of memory")
        )
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=max(1, min(4, len(handles)))
    )
    if is_smoke and len(rows):  # the paper's points alone are not meaningless
        legend.set_title(SMOKE_STAMP, {"size": 10, "weight": "bold"})
        legend.get_title().set_color("#b00020")


def _handle(label: str, style: Look, is_ours: bool, is_level: bool) -> Line2D:
    """The legend's entry of one architecture; what only the paper measured says so."""
    paper_label = f"{label[:-1]}, paper)" if label.endswith(")") else f"{label} (paper)"
    return Line2D(
        [], [], color=style.color, marker="" if is_level else style.marker,
        label=label if is_ours else paper_label,
        linestyle=style.line if is_ours else PAPER_DOTS,
        markerfacecolor=style.color if is_ours else "white", markersize=_marker_size(style),
        linewidth=1.5 if is_ours else 0.9,
    )  # fmt: skip


def _is_level(label: str, rows: pd.DataFrame, published: Sequence, axis: Axis) -> bool:
    """Whether an architecture has no place on the x axis: a level line, without markers."""
    if len(rows) and (rows["label"] == label).any():
        return bool(rows.loc[rows["label"] == label, axis.name].isna().all())
    return all(axis.name not in p.x for p in published if p.row == label and is_plotted(p))


def add_caption(figure: Figure, caption: str) -> None:
    """Under the panels, at the left edge."""
    text = "\n".join(caption_lines(caption))
    figure.supxlabel(text, fontsize=7, color="#444444", x=0.01, ha="left")


def caption_lines(caption: str) -> list[str]:
    paragraphs = caption.split("\n")
    return [line for text in paragraphs for line in textwrap.wrap(text, CAPTION_COLUMNS)]


def mask_figure(masks: Sequence[tuple[str, np.ndarray, int]], caption: str) -> Figure:
    """(title, allowed[query, key], period of its slots) side by side: who sees whom in CAT."""
    colors = ("#ffffff", "#0072b2", "#e69f00")
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True}):
        figure = Figure(figsize=(WIDTH_IN, 4.35), layout="constrained")
        for axes, (title, allowed, period) in zip(
            figure.subplots(1, len(masks), squeeze=False).flat, masks, strict=True
        ):
            is_slot = np.arange(allowed.shape[1]) % period == 0
            axes.imshow(
                allowed * np.where(is_slot, 1, 2), cmap=ListedColormap(colors), vmin=0, vmax=2,
                interpolation="nearest",
            )  # fmt: skip
            axes.spines[["top", "right"]].set_visible(True)
            axes.set(title=title, xlabel="key row", ylabel="query row")
            axes.set_xticks(range(0, allowed.shape[1], 2 * period))
            axes.set_yticks(range(0, allowed.shape[0], 2 * period))
        names = ("compressed chunk", "token of the same chunk", "not seen")
        handles = [
            Patch(facecolor=color, edgecolor="#7a7a7a", linewidth=0.6, label=name)
            for name, color in zip(names, (colors[1], colors[2], colors[0]), strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        add_caption(figure, caption)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """name.svg, name.pdf, name.png in `folder`, without dates: equal rows give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("svg", "pdf", "png")]
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not once per file
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], metadata={"CreationDate": None})
        figure.savefig(paths[2])
    return paths
