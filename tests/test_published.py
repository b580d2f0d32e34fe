"""published.toml: complete, as printed, consistent with itself, and refused when malformed."""

from collections import Counter
from pathlib import Path

import pytest

from cat_bench.errors import UserError
from cat_bench.paper._published import (
    KINDS,
    LABELS,
    PUBLISHED,
    UNITS,
    Point,
    load,
    points,
    remarks,
    source,
)

# Numbers in the table itself (rows x columns) and beside it (claims, recomputed values).
COUNTS = {
    "table1": (6 * 4, 0),
    "table2": (6 * 5, 3),
    "table3": (4 * 3, 4),
    "table4": (10, 0),
    "table5": (5 * 2, 0),
    "table6": (4 * 5, 0),
    "table7": (4 * 5, 0),
    "table8": (7 * 7, 1),
    "table9": (7 * 3, 0),
    "table10": (2, 0),
    "table11": (6, 0),
    "table12": (4, 0),
    "table13": (2 * 2, 6),
    "fig2": (5 * 4 * 2, 7),
    "fig3": (5 * 3 * 2, 6),
    "fig4": (0, 0),  # a drawing
    "fig5": (4 * 4 * 2, 0),
    "fig6": (4, 0),
    "fig7": (4, 0),
    "fig8": (4, 0),
    "text": (0, 19),
}

# Typed from the paper (tables) and from the list of digitised points (figures), not from the file.
SPOT_CHECKS = [
    ("table1", "Mamba2", "fineweb_ppl", {}, 19.9),
    ("table1", "CAT-16", "lambada_ppl", {}, 46.0),
    ("table1", "GDN", "wikitext_ppl", {}, 26.6),
    ("table2", "Mamba2", "squad", {}, 20.5),
    ("table2", "CAT-16", "mean", {}, 14.0),
    ("table3", "GDN-H1", "speedup", {}, 0.7),
    ("table3", "GDN-H1", "memory_reduction", {}, 2.5),
    ("table4", "BASED-2x", "wikitext103_ppl", {}, 17.2),
    ("table4", "CAT-64", "wikitext103_ppl", {}, 17.3),
    ("table5", "Dense", "state_paper", {}, 16384),
    ("table5", "Sliding", "solved", {}, 0),
    ("table6", "CAT-32", "swde", {}, 7.9),
    ("table7", "GDN-H1", "drop", {}, 18.1),
    ("table7", "Sparse-2D", "mean", {}, 16.7),
    ("table8", "CAT-8", "arc_challenge", {}, 0.269),
    ("table8", "GDN-H1", "openbookqa", {}, 0.192),
    ("table9", "Dense", "lambada_ppl", {}, 48.87),
    ("table9", "GDN", "wikitext_ppl", {}, 26.50),
    ("table10", "CAT-16", "wikitext103_ppl", {"width": 768}, 17.6),
    ("table11", "CAT-4", "wikitext103_ppl", {"decoder_width": 768}, 19.8),
    ("table11", "CAT-8", "wikitext103_ppl", {"decoder_width": 768}, 20.4),
    ("table12", "CAT-16", "wikitext103_ppl", {"compressor_layers": 3}, 17.7),
    ("table13", "CAT-8", "fineweb_ppl", {"num_layers": 8}, 21.8),
    ("fig2", "CAT-8", "latency_s", {"batch_size": 512}, 9.82),
    ("fig2", "BASED (unpatched)", "peak_memory_gib", {"batch_size": 256}, 2.95),
    ("fig3", "Dense", "peak_memory_gib", {"seq_len": 4096}, 56.7),
    ("fig3", "BASED (patched)", "latency_s", {"seq_len": 2048}, 8.1),
    ("fig5", "CAT-32", "latency_s", {"batch_size": 512}, 7.26),
    ("fig6", "Mamba2", "latency_s", {"d_state": 32}, 5.55),
    ("fig7", "BASED (patched)", "latency_s", {"seq_len": 4096}, 16.2),
    ("fig8", "BASED (unpatched)", "peak_memory_gib", {"seq_len": 1024}, 2.95),
    ("text", "Dense", "num_params", {}, 257e6),
]


def in_table(exhibit: str) -> list[Point]:
    return [point for point in points(exhibit) if point.kind in ("printed", "digitised")]


def find(exhibit: str, row: str, metric: str, kind: str | None = None, **x: object) -> Point:
    found = [
        point
        for point in points(exhibit)
        if (point.row, point.metric) == (row, metric)
        and (point.kind == kind if kind else point.kind in ("printed", "digitised", "claim"))
        and x.items() <= point.x.items()
    ]
    assert len(found) == 1, f"{exhibit}, {row}, {metric}, {x}: {len(found)} points"
    return found[0]


def by_row(exhibit: str) -> dict[str, dict[str, Point]]:
    rows: dict[str, dict[str, Point]] = {}
    for point in in_table(exhibit):
        rows.setdefault(point.row, {})[point.metric] = point
    return rows


# ---- Complete and well formed


def test_every_exhibit_has_its_number_of_points():
    got = {name: (len(in_table(name)), len(points(name)) - len(in_table(name))) for name in COUNTS}
    assert got == COUNTS
    assert {point.exhibit for point in load()} == COUNTS.keys() - {"fig4"}
    assert len(load()) == sum(cells + outside for cells, outside in COUNTS.values())


def test_kinds_units_and_labels():
    for point in load():
        assert point.kind in KINDS and point.unit in UNITS and point.row in LABELS
    assert {point.kind for point in load() if point.exhibit.startswith("table")} == {
        *("printed", "claim", "recomputed")
    }
    assert {point.kind for name in ("fig2", "fig3") for point in points(name)} == {
        *("digitised", "claim", "recomputed")
    }


def test_no_duplicates():
    identities = Counter(
        (p.exhibit, p.row, p.metric, p.kind, tuple(sorted(p.x.items()))) for p in load()
    )
    assert [identity for identity, count in identities.items() if count > 1] == []


def test_numbers_outside_the_tables_name_their_source():
    assert all(p.remark for p in load() if p.kind in ("claim", "recomputed"))


def test_efficiency_points_carry_both_coordinates():
    for name in ("fig2", "fig3", "fig5", "fig6"):
        assert all({"batch_size", "seq_len"} <= point.x.keys() for point in in_table(name))


def test_source_names_the_hardware_and_the_protocol():
    got = source()
    assert got["device"] == "NVIDIA A100 80GB PCIe"
    assert (got["prompt_len"], got["warmups"], got["repeats"]) == (8, 3, 3)
    assert got["decode_path"] == "cuda_graph"


# ---- As printed


@pytest.mark.parametrize(("exhibit", "row", "metric", "x", "value"), SPOT_CHECKS)
def test_spot_checks(exhibit: str, row: str, metric: str, x: dict, value: float):
    assert find(exhibit, row, metric, **x).value == value


def test_mqar_marks():
    marks = {row: cells["solved"].value for row, cells in by_row("table5").items()}
    assert marks == {"Dense": 1, "Sparse": 0, "Sliding": 0, "BASED": 1, "CAT-4": 1}


def test_headline_claims():
    fig2, fig3 = {"over": "Dense", "batch_size": 512}, {"over": "Dense", "seq_len": 4096}
    assert find("fig2", "CAT-8", "speedup", "claim", **fig2).value == 1.4
    assert find("fig2", "CAT-8", "memory_reduction", "claim", **fig2).value == 3.4
    assert find("fig3", "CAT-16", "speedup", "claim", **fig3).value == 3
    assert find("fig3", "CAT-16", "memory_reduction", "claim", **fig3).value == 7
    assert find("text", "CAT", "training_time_ratio", seq_len=1024).value == 2
    assert find("table13", "CAT-8", "latency_s").value == 6.6


# ---- Consistent with itself, or remarked


@pytest.mark.parametrize(
    ("exhibit", "half_digit"),
    [("table2", 0.05), ("table6", 0.05), ("table7", 0.05), ("table8", 5e-4), ("table9", 5e-3)],
)
def test_printed_means_are_the_means_of_their_rows(exhibit: str, half_digit: float):
    for row, cells in by_row(exhibit).items():
        printed = cells.pop("mean")
        mean = sum(cell.value for cell in cells.values()) / len(cells)
        if abs(mean - printed.value) <= half_digit + 1e-9:
            assert not printed.remark
        else:
            recomputed = find(exhibit, row, "mean", "recomputed")
            assert recomputed.value == pytest.approx(mean, abs=1e-9) and printed.remark


def test_only_two_means_are_wrong():
    wrong = [(p.exhibit, p.row, p.value) for p in load() if p.metric == "mean" and p.remark]
    printed = [entry for entry in wrong if entry[2] in (14.1, 0.428)]
    assert printed == [("table2", "GDN", 14.1), ("table8", "CAT-16", 0.428)]


def test_table1_agrees_with_tables_8_and_9_or_says_so():
    """Table 1 cuts where it should round: less than one unit of its last digit, and remarked."""
    accuracy, perplexity = by_row("table8"), by_row("table9")
    for row, cells in by_row("table1").items():
        assert cells["lm_eval_mean"].value == pytest.approx(100 * accuracy[row]["mean"].value)
        for metric in ("wikitext_ppl", "lambada_ppl"):
            difference = abs(cells[metric].value - perplexity[row][metric].value)
            assert difference <= 0.05 + 1e-9 or cells[metric].remark
            assert difference <= 0.1 + 1e-9


@pytest.mark.parametrize("exhibit", ["table3", "table6", "table7"])
def test_recall_rows_repeat_table2(exhibit: str):
    for row, cells in by_row(exhibit).items():
        for metric in cells.keys() & {"swde", "drop", "squad", "triviaqa", "mean"}:
            if row in by_row("table2"):
                assert cells[metric].value == by_row("table2")[row][metric].value


def test_table13_starts_from_cat_8():
    first = {"num_layers": 12, "compressor_layers": 6}
    expected = find("table1", "CAT-8", "fineweb_ppl").value
    assert find("table13", "CAT-8", "fineweb_ppl", **first).value == expected
    expected = find("table2", "CAT-8", "mean").value
    assert find("table13", "CAT-8", "recall_mean", **first).value == expected


@pytest.mark.parametrize(
    ("exhibit", "row", "over", "metric", "column", "x"),
    [
        ("fig2", "CAT-8", "Dense", "speedup", "latency_s", {"batch_size": 512}),
        ("fig2", "CAT-16", "Dense", "speedup", "latency_s", {"batch_size": 512}),
        ("fig2", "CAT-8", "Mamba2", "speedup", "latency_s", {"batch_size": 512}),
        ("fig2", "CAT-8", "Dense", "memory_reduction", "peak_memory_gib", {"batch_size": 512}),
        ("fig3", "CAT-8", "Dense", "speedup", "latency_s", {"seq_len": 4096}),
        ("fig3", "CAT-16", "Dense", "speedup", "latency_s", {"seq_len": 4096}),
        ("fig3", "CAT-8", "Dense", "memory_reduction", "peak_memory_gib", {"seq_len": 4096}),
        ("fig3", "CAT-16", "Dense", "memory_reduction", "peak_memory_gib", {"seq_len": 4096}),
    ],
)
def test_recomputed_ratios(exhibit: str, row: str, over: str, metric: str, column: str, x: dict):
    other, ours = (find(exhibit, name, column, **x).value for name in (over, row))
    recomputed = find(exhibit, row, metric, "recomputed", over=over, **x)
    assert recomputed.value == pytest.approx(other / ours, abs=0.005)


def test_recomputed_gaps():
    swde = {row: cells["swde"].value for row, cells in by_row("table2").items()}
    sparse = find("table3", "Sparse-2D", "swde").value
    mean = {row: cells["mean"].value for row, cells in by_row("table2").items()}
    shallow = find("table13", "CAT-8", "recall_mean", num_layers=8).value
    for exhibit, metric, low, ours, high in (
        ("table2", "swde_gap_closed", swde["GDN"], swde["CAT-8"], swde["Dense"]),
        ("table3", "swde_gap_closed", sparse, swde["CAT-8"], swde["Dense"]),
        ("table13", "recall_gap_closed", mean["Mamba2"], shallow, mean["Dense"]),
    ):
        got = find(exhibit, "CAT-8", metric, "recomputed").value
        assert got == pytest.approx(100 * (ours - low) / (high - low), abs=0.05)


def test_figures_agree_where_they_meet():
    """Batch 256 at length 1024 is in Figures 2 and 3: two readings within 3 %, but for BASED."""
    for row in ("Dense", "CAT-8", "CAT-16", "Mamba2"):
        for metric in ("latency_s", "peak_memory_gib"):
            one = find("fig2", row, metric, batch_size=256).value
            other = find("fig3", row, metric, seq_len=1024).value
            assert one == pytest.approx(other, rel=0.03)


def test_borrowed_figure_points_are_those_of_their_source():
    for point in in_table("fig5"):
        if point.row != "CAT-32":
            x = {"batch_size": point.x["batch_size"]}
            assert point.value == find("fig2", point.row, point.metric, **x).value
    for point in in_table("fig7") + in_table("fig8"):
        exhibit = "fig2" if point.row == "BASED (unpatched)" else "fig3"
        assert point.value == find(exhibit, point.row, point.metric, **point.x).value
        assert "Read off Figure" in point.remark


def test_remarks_name_the_contradictions():
    expected = {
        "table2": "13.85",
        "table5": "keys or values",
        "table8": "0.430",
        "table13": "never gate on it",
        "fig2": "GDN was never timed",
        "fig3": "patched",
        "fig5": "caption fixes the batch size",
    }
    for exhibit, text in expected.items():
        assert any(text in remark for remark in remarks(exhibit)), exhibit
    assert "1.19x" in find("table3", "CAT-8", "speedup").remark
    assert "~1.7" in find("fig2", "Mamba2", "latency_s", batch_size=16).remark
    assert remarks("table6") == []


def test_table_1_is_table_9_with_one_digit_except_where_it_says_so():
    """Rounded or cut; the remark names the one cell that is neither."""
    printed = {(p.row, p.metric): p.value for p in points("table9")}
    others = []
    for point in points("table1"):
        full = printed.get((point.row, point.metric))
        if full is not None and abs(point.value - full) > 0.095:
            others.append((point.row, point.metric, point.value, full))
    assert others == [("GDN", "wikitext_ppl", 26.6, 26.50)]
    (remark,) = [text for text in remarks("table1") if "those of Table 9" in text]
    assert "cut" in remark and "but for GDN's WikiText (26.6; Table 9: 26.50)" in remark


def test_remarks_say_which_number_they_are_about():
    assert "GDN, mean: The four scores of this row average 13.85." in remarks("table2")
    assert "GDN, mean, recomputed 13.85 %: Printed as 14.1." in remarks("table2")
    assert "Mamba2, latency_s, batch_size=16: Approximate, read as ~1.7." in remarks("fig2")
    for name in COUNTS:
        assert len(remarks(name)) == len(set(remarks(name)))


# ---- Errors

GOOD = """
schema = 1
source = { device = "A100" }
[exhibit.table1]
kind = "printed"
columns = { fineweb_ppl = "1" }
coordinates = ["width"]
x = { num_layers = 6 }
rows = [["Dense", 64, 21.2], ["CAT-8", 64, 20.7]]
notes = [{ row = "CAT-8", text = "A remark." }]
points = [{ row = "CAT-8", metric = "mean", value = 1, unit = "%", kind = "claim", remark = "S." }]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "published.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_small_file_becomes_flat_points(tmp_path: Path):
    x = {"num_layers": 6, "width": 64}
    assert load(write(tmp_path, GOOD)) == [
        Point("table1", "Dense", "fineweb_ppl", 21.2, "1", "printed", x),
        Point("table1", "CAT-8", "fineweb_ppl", 20.7, "1", "printed", x, "A remark."),
        Point("table1", "CAT-8", "mean", 1.0, "%", "claim", {}, "S."),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "expected 1"),
        ("schema = 1", "schema = ", "not valid TOML"),
        ('source = { device = "A100" }', "sauce = 1", "unknown keys"),
        ("columns =", "colums =", "unknown keys"),
        ('kind = "printed"', 'kind = "guessed"', "expected one of printed"),
        ('fineweb_ppl = "1"', 'fineweb_ppl = "seconds"', "expected one of 1, %"),
        ('["Dense", 64, 21.2]', '["Dense", 64]', "got 2 cells, expected 3"),
        ('["Dense", 64, 21.2]', '["Dence", 64, 21.2]', "'Dence'"),
        ('["Dense", 64, 21.2]', '["Dense", 64, "21.2"]', "finite number"),
        ('["Dense", 64, 21.2]', '["Dense", 64, nan]', "finite number"),
        ('["Dense", 64, 21.2]', '["Dense", 64, true]', "finite number"),
        ('["Dense", 64, 21.2]', '["Dense", true, 21.2]', "number or a text"),
        ('["Dense", 64, 21.2]', '["CAT-8", 64, 21.2]', "twice"),
        ('row = "CAT-8", text', 'row = "CAT-16", text', "matches no cell"),
        ('coordinates = ["width"]', "coordinates = 1", "expected an array"),
        ("rows =", 'remarks = [""]\nrows =', "expected a text"),
        ('text = "A remark."', 'text = ""', "expected a text"),
        (', remark = "S."', "", "expected a text"),
        ("value = 1", 'value = "1"', "finite number"),
        ("x = { num_layers = 6 }", "x = 6", "expected a table"),
        ("notes = [", "notes = 1 #[", "expected an array"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(UserError) as error:
        load(write(tmp_path, GOOD.replace(old, new, 1)))
    assert message in error.value.message and "published" in str(error.value)


def test_a_missing_file_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "nowhere.toml")


def test_an_unknown_exhibit_lists_the_known_ones():
    for ask in (points, remarks):
        with pytest.raises(UserError) as error:
            ask("table14")
        assert "table14" in error.value.message and "table13" in error.value.hint


def test_file_is_ascii():
    assert PUBLISHED.read_bytes().isascii()
