"""Figures: what is drawn, in which colours, and what must never be drawn over each other."""

import numpy as np
import pandas as pd
import pytest

from cat_bench import figures, mask, report
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
                    "peak_bytes": report.GIB * seconds,
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
    assert texts == ["Dense", "CAT-8", "Something new", "paper (A100, digitised)"]


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
    assert legend_texts(figure) == ["Dense", "CAT-8", "paper (A100, digitised)"]


def test_out_of_memory_is_a_cross_at_the_upper_edge() -> None:
    figure = draw(rows(oom_at=512))
    (cross,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [512.0] and 0.9 < cross.get_ydata()[0] <= 1
    assert cross.get_color() == figures.LOOKS["Dense"].color
    assert "out of memory" in legend_texts(figure)
    dense = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert list(dense[0].get_xdata()) == [1.0, 16.0]


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
    assert figures.look("BASED (patched)") == figures.LOOKS["BASED"]
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
