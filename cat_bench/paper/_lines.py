"""Figures of our own exhibits: lines that are named at their ends, and maps of who wins where.

Try it: cat-bench paper crossover --scale smoke
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from cat_bench import figures

NAME_GAP = 0.066  # of the axes' height, between two names at 6.5 points
LEADER = "0.75"  # grey, of names' leaders: in the line's colour they would read as more of it
PANEL_IN, MAP_CELL_IN = 2.5, 0.27  # inches: heights
SMALL = {"font.size": 7.5, "axes.labelsize": 8, "lines.markersize": 4}


class Won(NamedTuple):
    """One cell of a map: the best architecture at a batch size and length."""

    batch_size: int
    seq_len: int
    label: str
    margin: str  # to the second, short: "1.4x"


class Map(NamedTuple):
    title: str
    cells: Sequence[Won]


def line_figure(
    rows: pd.DataFrame,
    panels: Sequence[figures.Panel],
    axis: figures.Axis,
    caption: str,
    maps: Sequence[Map] = (),
    is_smoke: bool = False,
) -> Figure:
    """`panels` two in a row, then `maps` two in a row. Smoke rows carry the stamp.

    Without rows the maps stand alone, where there are any.
    """
    maps = [drawn for drawn in maps if drawn.cells]
    panels = [] if maps and rows.empty else panels
    if len(rows) and (rows["status"] == "oom").any():
        caption += " x: out of memory."  # there is no legend that could say it
    heights = [PANEL_IN] * -(-len(panels) // 2)
    heights += [0.6 + MAP_CELL_IN * len({w.batch_size for w in m.cells}) for m in maps[::2]]
    caption_in = figures.CAPTION_LINE_IN * len(figures.caption_lines(caption))
    with matplotlib.rc_context(figures.STYLE | SMALL):
        size = (figures.WIDTH_IN, sum(heights) + caption_in + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
        labels = list(dict.fromkeys(rows["label"])) if len(rows) else []
        letters = iter("abcdefgh")
        for axes, panel in zip(grid.flat, panels, strict=False):
            figures.draw_panel(axes, panel, rows, [], axis, labels)
            axes.set_title(f"({next(letters)}) {panel.title}")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(x)))
            if rows.empty:  # as for y: no tick names a number that nobody measured
                axes.set_xticks([])
                axes.minorticks_off()
            _name_lines(axes, panel, rows, axis, labels)
        for axes, drawn in zip(grid.flat[-2:], maps, strict=False):
            _draw_map(axes, drawn)
            axes.set_title(f"({next(letters)}) {drawn.title}")
        for axes in grid.flat[len(panels) : 2 * -(-len(panels) // 2)]:
            axes.remove()  # an odd number of panels
        if is_smoke and len(rows):
            figure.suptitle(figures.SMOKE_STAMP, size=10, weight="bold", color="#b00020")
        figures.add_caption(figure, caption)
    return figure


def tokens(number: float) -> str:
    """4096 -> "4K"; other numbers as they are."""
    return f"{number / 1024:.0f}K" if number >= 1024 and number % 1024 == 0 else f"{number:.0f}"


def _name_lines(
    axes: Axes, panel: figures.Panel, rows: pd.DataFrame, axis: figures.Axis, labels: list[str]
) -> None:
    """Each label at the right edge, as near to its line's end as the others leave room.

    That of a line which ends before the others stands at its end: a leader across the panel would
    read as more of the line.
    """
    axes.set_ylim(axes.get_ylim())  # from here on a fraction of the height means one value
    ends: dict[str, tuple[float, float]] = {}
    for label in labels:
        line = rows[(rows["label"] == label) & (rows["status"] == "ok")]
        line = line[line[panel.value].notna()].sort_values(axis.name) if panel.value in line else []
        if len(line):
            last = line.iloc[-1]
            ends[label] = (float(last[axis.name]), float(last[panel.value]) / panel.divisor)
    last_x = max((x for x, _ in ends.values()), default=0.0)
    for label in [label for label, (x, _) in ends.items() if x < last_x]:
        axes.annotate(
            label, ends.pop(label), (5, 0), textcoords="offset points", fontsize=6.5, va="center",
            color=figures.look(label, labels.index(label)).color, annotation_clip=False,
        )  # fmt: skip
    to_fraction = axes.transAxes.inverted()
    wanted = {
        label: float(to_fraction.transform(axes.transData.transform(end))[1])
        for label, end in ends.items()
    }
    for label, height in spread(wanted, NAME_GAP).items():
        color = figures.look(label, labels.index(label)).color
        axes.annotate(
            label, ends[label], (1.05, height), textcoords="axes fraction", color=color,
            fontsize=6.5, va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": LEADER, "linewidth": 0.4, "shrinkA": 1,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread(wanted: dict[str, float], gap: float) -> dict[str, float]:
    """Heights in the same order, `gap` apart at least, inside of 0 to 1 where there is room.

    Neighbours that touch move as one group, whose centre stays where theirs was.
    """

    def inside(centre: float, count: int) -> float:
        margin = gap * (count - 1) / 2
        return max(margin, min(centre, 1 - margin))

    groups: list[tuple[list[str], float]] = []  # labels from below, height of the group's centre
    for label in sorted(wanted, key=lambda name: wanted[name]):
        members, centre = [label], inside(wanted[label], 1)
        while groups and centre - groups[-1][1] < gap * (len(members) + len(groups[-1][0])) / 2:
            below, other = groups.pop()
            total = len(below) + len(members)
            centre = inside((centre * len(members) + other * len(below)) / total, total)
            members = below + members
        groups.append((members, centre))
    return {
        label: centre + gap * (place - (len(members) - 1) / 2)
        for members, centre in groups
        for place, label in enumerate(members)
    }


def _draw_map(axes: Axes, drawn: Map) -> None:
    """One box per measured cell, in the winner's colour; what was not measured stays empty."""
    batches = sorted({won.batch_size for won in drawn.cells}, reverse=True)
    lengths = sorted({won.seq_len for won in drawn.cells})
    for won in drawn.cells:
        x, y = lengths.index(won.seq_len), batches.index(won.batch_size)
        color = figures.look(won.label).color
        box = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=color, alpha=0.28, linewidth=0)
        axes.add_patch(box)
        axes.text(x, y - 0.19, won.label, ha="center", va="center", fontsize=6, weight="bold")
        axes.text(x, y + 0.23, won.margin, ha="center", va="center", fontsize=5.5)
    axes.set(xlabel="Sequence length (tokens)", ylabel="Batch size")
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(batches) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.grid(False)
