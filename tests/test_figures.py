"""Figures: what is drawn, in which colours, and what must never be drawn over each other."""

import numpy as np
import pandas as pd
import pytest

from cat_bench import figures, mask
from cat_bench.columns import GIB
from cat_bench.paper._published import Point

CAPTION = "Figure 0: a test.\nA GPU, bfloat16."


def rows(device: str = "NVIDIA H200", oom_at: int | None = None) -> pd.DataFrame:
    found = []
    for label, factor in (("Dense", 1.0), ("CAT-8", 2.0), ("Something new", 3.0)):
        for batch_size in (1, 16, 512):
            seconds = batch_size / factor
            out = label == "Dense" and batch_size == oom_at
            found.append(
                {
                    "label": label,
                    "batch_size": batch_size,
                    "status": "oom" if out else "ok",
                    "device_name": device,
                    "latency_s": None if out else seconds,
                    "latency_s_low": seconds * 0.9,
                    "latency_s_high": seconds * 1.1,
                    "peak_bytes": GIB * seconds,
                    "speedup": factor,
                    "speedup_low": factor * 0.9,
                    "speedup_high": factor * 1.1,
                    "memory_ratio": factor,
                }
            )
    return pd.DataFrame(found)


def published() -> list[Point]:
    def at(row: str, batch_size: int, value: float, unit: str = "s", kind: str = "digitised"):
        x = {"batch_size": batch_size, "seq_len": 1024}
        return Point("fig2", row, "latency_s", value, unit, kind, x)

    return [
        at("Dense", 16, 2.0),
        at("Dense", 512, 8.0),
        at("CAT-8", 16, 4.0),
        at("CAT-8", 512, 2.0),
        at("CAT-8", 512, 99.0, "x", "claim"),
    ]


def draw(table: pd.DataFrame, points=(), panels=figures.ALL_PANELS, is_smoke=False):
    return figures.efficiency_figure(table, points, figures.BATCH, CAPTION, panels, is_smoke)


def hollow(axes) -> list:
    return [line for line in axes.lines if line.get_markerfacecolor() == "white"]


def legend_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_per_architecture_with_its_values() -> None:
    latency, memory = draw(rows()).axes[:2]
    solid = {tuple(line.get_ydata()) for line in latency.lines if line.get_marker() in "oD"}
    assert (1.0, 16.0, 512.0) in solid  # Dense
    assert (0.5, 8.0, 256.0) in solid  # CAT-8
    assert any(tuple(line.get_ydata()) == (1.0, 16.0, 512.0) for line in memory.lines)  # GiB


def test_interval_bars_span_low_to_high() -> None:
    latency = draw(rows()).axes[0]
    bars = [bar for bar in latency.collections[0].get_segments()]
    assert np.allclose(bars[0][:, 1], [0.9, 1.1])
    assert len(latency.collections) == 3  # one set of bars per architecture


def test_legend_names_each_once_and_marks_the_paper() -> None:
    texts = legend_texts(draw(rows(), published()))
    assert texts == ["Dense", "CAT-8", "Something new", "dotted, hollow: paper (A100, digitised)"]


def test_seconds_of_another_gpu_are_never_drawn_but_ratios_are() -> None:
    latency, _, speedup, _ = draw(rows(), published()).axes
    assert hollow(latency) == []
    (line,) = hollow(speedup)
    assert list(line.get_ydata()) == [0.5, 4.0]  # 2 s / 4 s, 8 s / 2 s; the claim is no point


def test_seconds_of_the_same_gpu_are_drawn() -> None:
    latency = draw(rows("NVIDIA A100 80GB PCIe"), published()).axes[0]
    assert sorted(list(line.get_ydata()) for line in hollow(latency)) == [[2.0, 8.0], [4.0, 2.0]]


def test_paper_alone_is_drawn_where_nothing_was_measured() -> None:
    figure = draw(pd.DataFrame(), published())
    assert len(hollow(figure.axes[0])) == 2
    assert legend_texts(figure) == ["Dense (paper)", "CAT-8 (paper)"]


def test_what_only_the_paper_measured_says_so_in_the_legend() -> None:
    points = [
        Point("fig2", row, "latency_s", 1.0, "s", "digitised", {"batch_size": 16})
        for row in ("Dense", "Mamba2", "BASED (patched)")
    ]
    figure = draw(rows(), points)
    texts = legend_texts(figure)
    assert "Dense" in texts and "Mamba2 (paper)" in texts and "BASED (patched, paper)" in texts
    (ours, *_, paper) = figure.legends[0].get_lines()
    assert ours.get_marker() == "o" and paper.get_marker() in ("", "None", None)


def test_the_papers_points_without_a_place_on_the_axis_are_a_level_line() -> None:
    points = [
        Point("fig6", "Mamba2", "latency_s", 4.0, "s", "digitised", {"d_state": 16}),
        Point("fig6", "Mamba2", "latency_s", 8.0, "s", "digitised", {"d_state": 64}),
        Point("fig2", "Dense", "latency_s", 8.0, "s", "digitised", {"batch_size": 512}),
    ]
    panels = [figures.LATENCY, figures.SPEEDUP]
    figure = figures.efficiency_figure(pd.DataFrame(), points, figures.D_STATE, CAPTION, panels)
    latency, speedup = figure.axes
    dense = [line for line in latency.lines if line.get_color() == figures.LOOKS["Dense"].color]
    assert [list(line.get_ydata()) for line in dense] == [[8.0, 8.0]]
    assert dense[0].get_marker() == "None" and dense[0].get_linestyle() != "-"
    assert [list(line.get_ydata()) for line in hollow(speedup)] == [[2.0, 1.0]]
    in_legend = dict(zip(legend_texts(figure), figure.legends[0].get_lines(), strict=True))
    assert in_legend["Dense (paper)"].get_marker() in ("", "None", None)
    assert in_legend["Mamba2 (paper)"].get_marker() == "P"


def tick_labels(axes) -> list[str]:
    """Those of the y axis that can be seen."""
    low, high = axes.get_ylim()
    format_tick = axes.yaxis.get_major_formatter()
    return [format_tick(tick) for tick in axes.get_yticks() if low <= tick <= high]


@pytest.mark.parametrize("factor", [1.0, 1.04, 1.3, 1.51, 1.7, 2.3, 4.1, 9.0, 77.0, 3e4])
@pytest.mark.parametrize("start", [0.0043, 0.11, 0.19, 1.01, 2.05, 3.3, 7.1, 420.0])
def test_every_y_axis_has_two_labels_and_is_linear_only_where_values_are_close(
    start: float, factor: float
) -> None:
    table = rows()[lambda t: t["label"] == "CAT-8"].iloc[:2]
    table = table.assign(latency_s=[start, start * factor], latency_s_low=None, latency_s_high=None)
    figure = draw(table.astype({"latency_s_low": float, "latency_s_high": float}))
    axes = figure.axes[0]
    assert axes.get_yscale() == ("log" if factor >= 1.5 else "linear")
    assert factor >= 1.5 or axes.get_ylim()[0] == 0
    assert len(set(tick_labels(axes))) >= 2


@pytest.mark.parametrize("largest", [3.0, 30.0])
def test_ratios_follow_the_same_rule_whatever_their_size(largest: float) -> None:
    """Figure 2's memory reduction stays below 10, Figure 3's does not."""
    table = rows().assign(memory_ratio=[1.0] * 3 + [0.5, 2.0, largest] + [2.0] * 3)
    reduction = draw(table).axes[3]
    assert reduction.get_yscale() == "log" and len(tick_labels(reduction)) >= 2


def test_out_of_memory_is_a_cross_at_the_upper_edge() -> None:
    figure = draw(rows(oom_at=512))
    (cross,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [512.0] and 0.9 < cross.get_ydata()[0] <= 1
    assert cross.get_color() == figures.LOOKS["Dense"].color
    assert "out of memory" in legend_texts(figure)
    dense = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert list(dense[0].get_xdata()) == [1.0, 16.0]


def test_two_out_of_memory_at_one_x_stand_side_by_side() -> None:
    table = rows()
    out = (table["batch_size"] == 512) & table["label"].isin(["Dense", "CAT-8"])
    axes = draw(table.assign(status=table["status"].mask(out, "oom"))).axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    places = [line.get_transform().transform((512.0, 1.0))[0] for line in crosses]
    assert len(crosses) == 2 and abs(places[0] - places[1]) > 5  # pixels
    assert len({line.get_color() for line in crosses}) == 2


def test_smoke_is_stamped_and_carries_no_published_point() -> None:
    figure = draw(rows(), published(), is_smoke=True)
    assert figure.legends[0].get_title().get_text() == figures.SMOKE_STAMP
    assert all(hollow(axes) == [] for axes in figure.axes)
    assert draw(rows()).legends[0].get_title().get_text() == ""


def test_what_has_no_place_on_the_axis_is_a_level_line() -> None:
    table = rows().assign(d_state=lambda t: t["batch_size"].where(t["label"] != "Dense"))
    table = table[(table["label"] != "Dense") | (table["batch_size"] == 16)]
    figure = figures.efficiency_figure(table, (), figures.D_STATE, CAPTION, [figures.LATENCY])
    assert any(list(line.get_ydata()) == [16.0, 16.0] for line in figure.axes[0].lines)


def test_known_looks_differ_and_unknown_ones_get_one_too() -> None:
    pairs = {(look.color, look.marker) for look in figures.LOOKS.values()}
    assert len(pairs) == len(figures.LOOKS)  # the line style alone must not have to tell them apart
    patched, unpatched = (figures.look(f"BASED ({word})") for word in ("patched", "unpatched"))
    assert patched == figures.LOOKS["BASED"]
    assert patched.color != unpatched.color and patched.marker != unpatched.marker
    assert figures.look("mine", 0) != figures.look("mine too", 1)


@pytest.mark.parametrize("compact", [True, False])
def test_mask_figure_shows_the_mask_and_tells_slots_from_tokens(compact: bool) -> None:
    allowed = mask.allowed(17, 4) if compact else mask.published_allowed(16, 4)
    period = 4 if compact else 5
    figure = figures.mask_figure([("(a) mask", allowed, period)], CAPTION)
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert np.array_equal(image > 0, allowed)
    assert set(np.unique(image[:, ::period])) == {0, 1}  # slots
    assert 1 not in image[:, [n for n in range(len(allowed)) if n % period]]


def test_saved_in_three_formats_and_the_same_bytes_again(tmp_path) -> None:
    first = figures.save(draw(rows(), published()), tmp_path / "a", "fig")
    second = figures.save(draw(rows(), published()), tmp_path / "b", "fig")
    assert [path.name for path in first] == ["fig.svg", "fig.pdf", "fig.png"]
    assert all(path.stat().st_size > 5_000 for path in first)
    assert first[0].read_bytes() == second[0].read_bytes()
    assert first[1].read_bytes() == second[1].read_bytes()
