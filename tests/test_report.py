"""Tables from rows that are written down here, in every format, to the letter."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from cat_bench import columns, compare, measurements, notes, printing, report, store, tables
from cat_bench.case import Case, Record
from cat_bench.columns import DEFINITIONS, EFFICIENCY_COLUMNS, GIB, Column, digits, whole
from cat_bench.compare import compare_table
from cat_bench.errors import UserError
from cat_bench.paper._published import Point

GPU = {
    "gpu_name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0+cu130", "cuda": "13.0",
    "command": "cat-bench run efficiency <b>", "cpu_name": "A CPU", "cpu_cores": 2,
}  # fmt: skip
LABELS = {
    "dense": "Dense", "dense:width=2048": "Dense-2D", "cat": "CAT-8", "cat:chunk_size=16": "CAT-16"
}  # fmt: skip


def case(arch: str = "dense", batch_size: int = 256, **fields) -> Case:
    return Case(
        "efficiency", arch, batch_size, 8, 1024, "bfloat16", "cuda",
        **{"decode_path": "cuda_graph", **fields},
    )  # fmt: skip


def timed(key: str, seconds: float, gib: float, spread: float = 0.0, n: int = 5) -> list[Record]:
    samples = [seconds * (1 + spread * (i - n // 2)) for i in range(n)]
    return [
        Record(key, "latency_s", seconds, "s", samples),
        Record(key, "tokens_per_s", 260_096 / seconds, "tokens/s"),
        Record(key, "peak_reserved_bytes", gib * GIB, "bytes"),
        Record(key, "state_bytes", gib / 2 * GIB, "bytes"),
        Record(key, "floor_s", seconds / 2, "s"),
        Record(key, "case", 60.0, "s"),
    ]


def closed(key: str, status: str, error: str | None = None) -> list[Record]:
    return [Record(key, "case", 1.0, "s", status=status, error=error)]


def make_run(
    folder: Path, name: str = "fig", environment: dict | None = None, rows: list | None = None
) -> store.Run:
    """A run of Dense, CAT-8 (twice as fast) and CAT-16 (out of memory), unless `rows` are given."""
    if rows is None:
        rows = [
            (case("dense"), lambda key: timed(key, 4.0, 12.0)),
            (case("cat"), lambda key: timed(key, 2.0, 3.0)),
            (case("cat:chunk_size=16"), lambda key: closed(key, "oom", "out of memory")),
        ]
    cases = [planned for planned, _ in rows]
    resolved = {c.key: {"label": LABELS[c.arch.split(",")[0]], "config": {}} for c in cases}
    run = store.Run.create(
        folder, name, GPU if environment is None else environment, cases, resolved
    )
    for planned, records in rows:
        if records:
            run.append(records(planned.key))
    return run


def normal(text: str) -> list[str]:
    """Lines with runs of blanks as one, so that a golden table does not depend on padding."""
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_show_prints_units_intervals_ratios_and_oom(tmp_path) -> None:
    lines = normal(report.terminal(tables.run_table(make_run(tmp_path))))
    assert lines[:6] == [
        "0001-fig",
        "NVIDIA H200, driver 580.1, torch 2.11.0, CUDA 13.0 · bfloat16 · cuda_graph · "
        "prompt 8 tokens",
        "architecture batch length latency s [95 % CI] tok/s peak GiB state GiB vs Dense "
        "% of floor n",
        "Dense 256 1024 4.00 [4.00, 4.00] 65,024 12.0 6.00 1.00x 50 % 5",
        "CAT-8 256 1024 2.00 [2.00, 2.00] 130,048 3.00 1.50 2.00x faster [2.00, 2.00] 50 % 5",
        "CAT-16 256 1024 oom - - - - - -",
    ]
    assert lines[6].startswith("latency = median time of a whole generation")
    assert lines[10].startswith("Intervals of fewer than 6 repeats are their range")
    assert "94 % at n = 5" in lines[10] and len(lines) == 11


def test_the_floor_is_held_to_the_best_ceilings_of_the_run(tmp_path) -> None:
    """One case measured its bandwidth on a busy device: its floor must not flatter it."""

    def rows(bandwidth: float):
        extra = ("read_bandwidth_bytes_per_s", bandwidth, "bytes/s")
        return lambda key: [Record(key, *extra), *timed(key, 2.0, 1.0)]

    run = make_run(
        tmp_path, rows=[(case(batch_size=64), rows(4e12)), (case(batch_size=128), rows(3e12))]
    )
    assert list(measurements.measured(measurements.frame([run]))["floor_share"]) == [0.5, 0.375]
    reference = case(batch_size=16, settings=(("reference", "0"),))
    run = make_run(
        tmp_path, rows=[(reference, rows(4e12)), (case(batch_size=128), rows(3e12))]
    )  # a reference is in no table, but its ceilings count
    assert list(measurements.measured(measurements.frame([run]))["floor_share"]) == [0.375]


def test_the_floor_is_lowered_by_the_worse_of_its_ceilings_within_its_own_run(tmp_path) -> None:
    """Shares 3/4 and 1/2 of the run's best: half of floor / latency = 1/2, whichever was worse."""

    def rows(bandwidth: float, rate: float):
        def records(key: str) -> list[Record]:
            return [
                Record(key, "read_bandwidth_bytes_per_s", bandwidth, "bytes/s"),
                Record(key, "matmul_flops_per_s", rate, "FLOP/s"),
                *timed(key, 2.0, 1.0),
            ]

        return records

    best, low_rate, low_bandwidth = (case(batch_size=size) for size in (16, 64, 128))
    run = make_run(
        tmp_path,
        rows=[
            (best, rows(4e12, 8e14)),
            (low_rate, rows(3e12, 4e14)),
            (low_bandwidth, rows(2e12, 6e14)),
        ],
    )
    faster = make_run(tmp_path, "other", rows=[(best, rows(8e12, 32e14))])
    rows = measurements.measured(measurements.frame([run, faster]))
    assert list(rows["floor_share"]) == [0.5, 0.25, 0.25, 0.5]
    said = " ".join(columns.defined(DEFINITIONS))
    assert "in the case's own process, lowered by the share by which the worse of them" in said


def test_details_show_percentiles_and_chunk_closing_steps_apart(tmp_path) -> None:
    steps = [0.001] * 7 + [0.003]

    def rows(key: str) -> list[Record]:
        return [
            Record(key, "num_params", 968_819_712, "1"),
            Record(key, "num_params_non_embedding", 710_474_752, "1"),
            Record(key, "ttft_s", 0.0104, "s", [0.0104] * 5),
            Record(key, "step_s", 0.001, "s", steps * 10),
            Record(key, "step_inner_s", 0.001, "s", [0.001] * 70),
            Record(key, "step_boundary_s", 0.003, "s", [0.003] * 10),
            *timed(key, 2.0, 1.0),
        ]

    made = tables.details_table(
        measurements.frame([make_run(tmp_path, rows=[(case("cat"), rows)])])
    )
    assert made.text.iloc[0].to_dict() == {
        "architecture": "CAT-8", "batch": "256", "length": "1024",
        "TTFT ms": "10.4 [10.4, 10.4]", "step ms mean": "1.25",
        "p50 / p90 / p95 / p99": "1.00 / 3.00 / 3.00 / 3.00",
        "inner": "1.00 / 1.00 / 1.00 / 1.00", "boundary": "3.00 / 3.00 / 3.00 / 3.00",
        "boundary %": "12 %", "first 10 %": "1.25", "last 10 %": "1.25",
    }  # fmt: skip
    assert tables.details_table(measurements.frame([make_run(tmp_path, "no-steps")])) is None


def test_unfinished_and_failed_cases_are_said(tmp_path) -> None:
    rows = [
        (case("dense"), lambda key: closed(key, "failed", "Traceback\nValueError: no")),
        (case("cat"), None),
    ]
    run = make_run(tmp_path, rows=rows)
    made = tables.run_table(run)
    key = next(iter(run.cases()))
    assert f"failed: Dense, batch 256, length 1024: ValueError: no (case {key})" in made.notes
    assert made.notes[-1] == "1 of 2 cases have not run: continue with --resume."
    assert "failed" in made.text.iloc[0].to_list()


def test_only_shown_columns_are_defined(tmp_path) -> None:
    rows = [(case("dense"), lambda key: closed(key, "failed", "no"))]
    definition, failure = tables.run_table(make_run(tmp_path, rows=rows)).notes
    assert definition == "latency = median time of a whole generation, prefill included."
    assert failure.startswith("failed: ")

    def with_first_token(key: str) -> list[Record]:
        return [Record(key, "ttft_s", 0.01, "s", [0.01] * 5), *timed(key, 2.0, 1.0)]

    run = make_run(tmp_path, rows=[(case("dense"), with_first_token)])
    details = tables.details_table(measurements.frame([run]))
    assert details is not None and details.notes == ("TTFT = prefill and first token.",)
    for lines, table_columns in (
        (columns.DETAIL_DEFINITIONS, columns.DETAIL_COLUMNS),
        *((lines, shown) for shown, lines in columns.KINDS.values()),
    ):
        titles = {column.title for column in table_columns}
        assert all({*needed} <= titles for line in lines for needed in line.values())
        assert columns.defined(lines, titles) == columns.defined(lines)


def test_remarks_of_a_run_stand_under_its_table_and_are_checked(tmp_path) -> None:
    run = make_run(tmp_path)
    remark = {"text": "Old peak.", "architectures": ["CAT-8"], "metrics": ["peak_reserved_bytes"]}
    path = run.path / "remarks.json"
    path.write_text(json.dumps([remark]))
    said = "Remark on 0001-fig: Old peak."
    assert said in tables.run_table(run).notes and said in report.report_text([run], "markdown")
    rows = measurements.measured(measurements.frame([run])).set_index("label")
    assert measurements.is_marked(rows.loc["CAT-8"], "peak_bytes")
    assert not measurements.is_marked(rows.loc["CAT-8"], "latency_s")
    assert not measurements.is_marked(rows.loc["Dense"], "peak_bytes")
    for wrong, words in (
        ({"architectures": ["CAT-80"]}, r"CAT-80.*it has .*CAT-8"),
        ({"metrics": ["peak"]}, "peak.*peak_reserved_bytes"),
        ({"architectures": []}, "expected a list of names"),
        ({"metrics": "latency_s"}, "expected a list of names"),
        ({"metrics": [["latency_s"]]}, "expected a list of names"),
        ({"text": "two\nlines"}, "expected one line"),
        ({"text": "two\rlines"}, "expected one line"),
        ({"author": "me"}, "expected an object of text, architectures, metrics"),
        ({"at_least": 1.5}, "got at_least 1.5, expected a share from 0 to 1"),
        ({"at_least": True}, "got at_least True, expected a share"),
    ):
        path.write_text(json.dumps([remark | wrong]))
        with pytest.raises(UserError, match=words):
            tables.run_table(run)


def test_a_remark_without_metrics_is_said_and_marks_nothing(tmp_path) -> None:
    run = make_run(tmp_path)
    remark = {"text": "Older code.", "architectures": ["CAT-8"], "metrics": []}
    (run.path / "remarks.json").write_text(json.dumps([remark]))
    notes = tables.run_table(run).notes
    assert "Remark on 0001-fig: Older code." in notes
    assert "†" not in report.report_text([run], "markdown")
    rows = measurements.measured(measurements.frame([run])).set_index("label")
    assert not measurements.is_marked(rows.loc["CAT-8"], "latency_s")


def test_ratios_to_dense_2d_across_runs_are_warned_of_too(tmp_path) -> None:
    wide = (case("dense:width=2048"), lambda key: timed(key, 8.0, 1.0))
    cat = (case("cat"), lambda key: timed(key, 2.0, 1.0))
    runs = [make_run(tmp_path, rows=[row]) for row in (wide, cat)]
    rows = measurements.measured(measurements.frame(runs))
    assert notes.foreign_dense(rows) == (
        "warning: ratios to Dense-2D across runs: 0002-fig against 0001-fig.",
    )


def test_no_closed_case_is_no_error(tmp_path) -> None:
    made = tables.run_table(make_run(tmp_path, rows=[(case("dense"), None)]))
    assert "No case is closed yet." in report.terminal(made)
    assert json.loads(report.as_json(made))["rows"] == []


def test_fewer_than_three_samples_have_no_interval(tmp_path) -> None:
    rows = [
        (case("dense"), lambda key: timed(key, 4.0, 12.0, n=2)),
        (case("cat"), lambda key: timed(key, 2.0, 3.0, n=2)),
    ]
    text = tables.run_table(make_run(tmp_path, rows=rows)).text
    assert list(text["latency s [95 % CI]"]) == ["4.00", "2.00"]
    assert text["vs Dense"][1] == "2.00x faster"


def test_a_dense_of_another_suite_hides_no_stand_in() -> None:
    """Attention alone calls its rows Dense, also where a tiny one stands in for it elsewhere."""
    same = {name: 1 for name in measurements.SAME_SETTING}
    same |= {"run": "a", "commit": "c", "seed": 0, "decode_path": "eager", "forward_path": "eager"}
    rows = pd.DataFrame(
        [
            same | {"suite": suite, "label": label, "arch": arch, "latency_s.samples": [1.0] * 3}
            for suite, label, arch in (
                ("attention", "Dense", "dense:num_layers=1"),
                ("efficiency", "Dense (width=64)", "dense:width=64"),
                ("efficiency", "CAT-8", "cat:width=32"),
            )
        ]
    )
    assert measurements.dense_of(rows, rows.iloc[2])["label"] == "Dense (width=64)"


@pytest.mark.parametrize(
    "run, commit, expected",
    [
        ("0003-c", "c", "0003-c"),  # its own
        ("0004-d", "d", "0003-c"),  # 1 away, not 5
        ("0006-d", "d", "0003-c"),  # 3 and 3 away: the older
        ("0001-a", "a", "0002-b"),
        ("0010-d", "b", "0002-b"),  # of the same commit, though others are nearer
        ("mine", "d", "0002-b"),  # without a number
    ],
)
def test_the_dense_of_another_run_is_of_its_commit_or_made_next_to_it(
    run: str, commit: str, expected: str
) -> None:
    same = dict.fromkeys(measurements.SAME_SETTING, 1)
    same |= {"seed": 0, "decode_path": "eager", "forward_path": "eager"}
    same |= {"latency_s.samples": [1.0] * 3}
    dense = same | {"label": "Dense", "arch": "dense"}
    rows = [dense | {"run": each, "commit": each[-1]} for each in ("0002-b", "0003-c", "0009-e")]
    rows += [same | {"run": "0005-x", "commit": "x", "label": "GDN", "arch": "gated_deltanet"}]
    rows += [same | {"run": run, "commit": commit, "label": "CAT-8", "arch": "cat"}]
    for order in (rows, rows[::-1]):
        frame = pd.DataFrame(order)
        cat = next(row for _, row in frame.iterrows() if row["arch"] == "cat")
        assert measurements.dense_of(frame, cat)["run"] == expected


def test_dense_of_another_setting_is_no_reference(tmp_path) -> None:
    rows = [
        (case("dense", 1), lambda key: timed(key, 4.0, 12.0)),
        (case("cat", 256), lambda key: timed(key, 2.0, 3.0)),
    ]
    rows = measurements.measured(measurements.frame([make_run(tmp_path, rows=rows)]))
    assert rows.set_index("label")["speedup"].isna()["CAT-8"]


def test_reference_cases_stay_out_of_the_table_and_show_drift(tmp_path) -> None:
    first, last = (case("dense", 16, settings=(("reference", str(i)),)) for i in (0, 1))
    rows = [
        (first, lambda key: timed(key, 1.0, 1.0)),
        (case("cat"), lambda key: timed(key, 2.0, 3.0)),
        (last, lambda key: timed(key, 1.1, 1.0)),
    ]
    made = tables.run_table(make_run(tmp_path, rows=rows))
    assert list(made.text["architecture"]) == ["CAT-8"]
    assert made.notes[-1] == (
        "warning: reference case of 0001-fig: 1.00 s first, 1.10 s last, drift +10.0 %."
    )


def test_drifting_repeats_and_disagreeing_clocks_are_flagged(tmp_path) -> None:
    def drifting(key: str) -> list[Record]:
        host = Record(key, "host_latency_s", 4.4, "s")
        return [host, *timed(key, 4.0, 12.0, spread=0.05)]

    notes = tables.run_table(make_run(tmp_path, rows=[(case("dense"), drifting)])).notes
    assert any("repeats drift by" in note for note in notes)
    assert any("host clock differs from CUDA events by +10.0 %" in note for note in notes)


def test_json_and_csv_hold_si_units(tmp_path) -> None:
    made = tables.run_table(make_run(tmp_path))
    rows = json.loads(report.as_json(made))["rows"]
    assert rows[1]["latency_s"] == 2.0 and rows[1]["peak_bytes"] == 3 * 2**30
    assert rows[2]["latency_s"] is None and rows[2]["status"] == "oom"
    header, _, second, _ = report.as_csv(made).splitlines()
    assert dict(zip(header.split(","), second.split(","), strict=True))["speedup"] == "2.0"


def test_markdown_golden(tmp_path) -> None:
    shown = (EFFICIENCY_COLUMNS[0], *EFFICIENCY_COLUMNS[3:6])
    made = tables.table(measurements.measured(measurements.frame([make_run(tmp_path)])), shown)
    lines = normal(report.as_markdown(made))
    assert re.sub("-+", "-", lines.pop(1)) == "|:-|-:|-:|-:|"
    assert lines == [
        "| architecture | latency s [95 % CI] | tok/s | peak GiB |",
        "| Dense | 4.00 [4.00, 4.00] | 65,024 | 12.0 |",
        "| CAT-8 | **2.00 [2.00, 2.00]** | **130,048** | **3.00** |",
        "| CAT-16 | oom | - | - |",
    ]


def test_latex_golden(tmp_path) -> None:
    shown = (EFFICIENCY_COLUMNS[0], *EFFICIENCY_COLUMNS[3:6])
    made = tables.table(measurements.measured(measurements.frame([make_run(tmp_path)])), shown)
    assert report.as_latex(made).strip().splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"architecture & latency s [95 \% CI] & tok/s & peak GiB \\",
        r"\midrule",
        r"Dense & 4.00 [4.00, 4.00] & 65,024 & 12.0 \\",
        r"CAT-8 & \textbf{2.00 [2.00, 2.00]} & \textbf{130,048} & \textbf{3.00} \\",
        r"CAT-16 & oom & - & - \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_html_is_one_escaped_file_without_network(tmp_path) -> None:
    page = report.report_text([make_run(tmp_path)], "html")
    assert page.startswith("<!doctype html>") and page.count("<table>") == 1
    assert "cat-bench run efficiency &lt;b&gt;" in page and "<b>2.00 [2.00, 2.00]</b>" in page
    assert not re.search(r"(src|href)=\"(?!#)", page) and "http" not in page
    section = report.Section("x", svgs=("<?xml version='1.0'?>\n<svg>drawn</svg>",))
    assert "<svg>drawn</svg>" in report.html_page("x", [section])
    assert "<?xml" not in report.html_page("x", [section])


def test_sections_of_a_page_are_shown_again_as_they_are(tmp_path) -> None:
    made = tables.run_table(make_run(tmp_path))
    svg = "<svg><text>a &lt; b</text></svg>"
    sections = [
        report.Section("A & B", "fig2", "done (on <GPU>)", (made, made), (svg,), ("a < b",)),
        report.Section("Empty", "table1"),
    ]
    page = report.html_page("x", sections)
    assert report.html_page("x", report.sections_of(page)) == page
    assert page.count("<svg>") == 1 and page.count("a &lt; b") == 2


def test_report_joins_runs_and_adds_the_papers_ratios(tmp_path) -> None:
    x = {"batch_size": 256, "seq_len": 1024}
    points = [
        Point("fig2", row, "latency_s", value, "s", "digitised", x)
        for row, value in (("Dense", 6.0), ("CAT-8", 5.0))
    ]
    points.append(Point("fig2", "CAT-8", "speedup", 9.0, "x", "claim", x))
    dense, cat = (
        make_run(tmp_path, name, rows=[(case(arch), lambda key, s=s: timed(key, s, 1.0))])
        for name, arch, s in (("a", "dense", 4.0), ("b", "cat", 2.0))
    )
    text = report.report_text([dense, cat], "markdown", points)
    assert "2.00x faster" in text  # Dense of the other run on the same device
    assert re.search(r"CAT-8 .*\| +1.20x faster \|", text)
    with pytest.raises(UserError, match="unknown format 'xml'"):
        report.report_text([dense], "xml")


def test_a_report_never_mixes_scales_or_devices_in_one_table(tmp_path) -> None:
    smoke = replace(case("dense"), device="cpu", scale="smoke", decode_path="eager")
    runs = [
        make_run(tmp_path),
        make_run(tmp_path, rows=[(smoke, lambda key: timed(key, 1.0, 1.0))]),
    ]
    tables = report.report_text(runs, "markdown").split("**0001-fig, 0002-fig**")[1:]
    assert len(tables) == 2
    assert "meaningless" not in tables[0] and "meaningless" in tables[1]
    assert {row["scale"] for row in json.loads(report.report_text(runs, "json"))["rows"]} == {
        "custom", "smoke",
    }  # fmt: skip


def two_suites(folder: Path) -> list[store.Run]:
    """A run of suite efficiency and one of suite training."""
    trained = replace(case("dense"), suite="training", prompt_len=0)

    def steps(key: str) -> list[Record]:
        step = Record(key, "train_step_s", 0.5, "s", [0.5] * 5)
        return [step, Record(key, "mfu", 0.4, "1"), *closed(key, "ok")]

    return [make_run(folder), make_run(folder, "training", rows=[(trained, steps)])]


def test_a_report_has_one_table_per_suite(tmp_path) -> None:
    runs = two_suites(tmp_path)
    text = report.report_text(runs, "table")
    first, second = (normal(part) for part in text.split("\n\n"))
    assert first[0] == "0001-fig, 0002-training: suite efficiency"
    assert "tok/s peak GiB state GiB" in first[2] and "MFU" not in first[2]
    assert second[0] == "0001-fig, 0002-training: suite training"
    assert "step s [95 % CI]" in second[2] and "MFU" in second[2] and "GiB" not in second[2]
    for form, mark in (("markdown", "|:--"), ("latex", r"\toprule"), ("html", "<table>")):
        assert report.report_text(runs, form).count(mark) == 2
    suites = [row["suite"] for row in json.loads(report.report_text(runs, "json"))["rows"]]
    assert sorted(suites) == ["efficiency"] * 3 + ["training"]
    with pytest.raises(UserError, match="CSV holds one table, .* suites efficiency, training"):
        report.report_text(runs, "csv")
    points = [Point("fig2", "Dense", "latency_s", 1.0, "s", "digitised", {})]
    with pytest.raises(UserError, match="--published has times of generation .* suite training"):
        report.report_text(runs[1:], "table", points)


def test_show_prints_each_suite_of_a_run(tmp_path, capsys) -> None:
    cases = [case("dense"), replace(case("dense"), suite="training", prompt_len=0)]
    ends = ("oom", "failed")
    rows = [(c, partial(closed, status=end)) for c, end in zip(cases, ends, strict=True)]
    run = make_run(tmp_path, rows=rows)
    printing.print_run(run, as_json=False)
    first, second = (normal(part) for part in capsys.readouterr().out.split("\n\n"))
    assert "latency s [95 % CI]" in first[2] and "oom" in first[3]
    assert "step s [95 % CI]" in second[2] and "failed" in second[3]
    printing.print_run(run, as_json=True)
    shown = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["suite"], row["status"]) for row in shown} == {
        ("efficiency", "oom"), ("training", "failed"),
    }  # fmt: skip


def test_compare_recommends_one_table_only_of_one_suite(tmp_path) -> None:
    for other, hint in (("efficiency", "cat-bench report A B"), ("training", "of one suite")):
        runs = two_suites(tmp_path / other)
        if other == "efficiency":
            rows = [(case("dense", 1), lambda key: timed(key, 1.0, 1.0))]
            runs[1] = make_run(tmp_path / other, rows=rows)
        with pytest.raises(UserError) as error:
            compare_table(*runs)
        assert hint in error.value.hint


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "html", "json"])
def test_a_report_of_nothing_says_so(tmp_path, form: str) -> None:
    run = make_run(tmp_path, rows=[(case("dense"), None)])
    assert "No case is closed yet." in report.report_text([run], form)
    with pytest.raises(UserError, match="no case is closed yet"):
        report.report_text([run], "csv")


def test_a_users_file_labelled_dense_is_no_reference(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(LABELS, "mine.py", "Dense")
    rows = [
        (case("mine.py"), lambda key: timed(key, 1.0, 1.0)),
        (case("dense"), lambda key: timed(key, 4.0, 1.0)),
        (case("cat"), lambda key: timed(key, 2.0, 1.0)),
    ]
    found = measurements.measured(measurements.frame([make_run(tmp_path, rows=rows)]))
    assert dict(zip(found["arch"], found["speedup"], strict=True)) == {
        "mine.py": 4.0,
        "dense": 1.0,
        "cat": 2.0,
    }
    alone = measurements.measured(measurements.frame([make_run(tmp_path, rows=rows[::2])]))
    assert "speedup" not in alone  # no Dense here


def test_rows_of_one_label_tell_the_settings_that_differ(tmp_path, monkeypatch) -> None:
    """Where specs share a label at one shape, and only there."""
    specs = [f"mine.py:num_layers={n},width=64" for n in (1, 3)]
    for arch in (*(text.split(",")[0] for text in specs), "other.py"):
        monkeypatch.setitem(LABELS, arch, "Mine")
    rows = [(case(arch), lambda key: timed(key, 1.0, 1.0)) for arch in (*specs, "other.py")]
    made = tables.run_table(make_run(tmp_path, rows=rows))
    assert list(made.text["architecture"]) == [
        "Mine (mine.py, num_layers=1, width=64)",
        "Mine (mine.py, num_layers=3, width=64)",
        "Mine (other.py)",
    ]
    run = make_run(tmp_path, rows=rows[:2])
    assert list(tables.run_table(run).text["architecture"]) == [
        "Mine (num_layers=1)",
        "Mine (num_layers=3)",
    ]
    full = tables.full_table(measurements.frame([run]))
    assert list(full.text["architecture"]) == ["Mine (num_layers=1)", "Mine (num_layers=3)"]
    apart = [rows[0], (case(specs[1], batch_size=4), rows[1][1])]
    text = tables.run_table(make_run(tmp_path, rows=apart)).text
    assert set(text["architecture"]) == {"Mine"}  # the batch tells them apart


def test_of_several_dense_the_first_is_the_reference(tmp_path) -> None:
    """Of a run's own seeds, or of older runs where it has none: 4 s over 2 s, never 6 s."""
    first, second, cat = (
        (case("dense"), lambda key: timed(key, 4.0, 1.0)),
        (case("dense", seed=1), lambda key: timed(key, 6.0, 1.0)),
        (case("cat"), lambda key: timed(key, 2.0, 1.0)),
    )
    together = [make_run(tmp_path / "one", rows=[first, second, cat])]
    apart = [make_run(tmp_path / "more", rows=[row]) for row in (first, second, cat)]
    for runs in (together, apart):
        rows = measurements.measured(measurements.frame(runs)).set_index("label")
        assert rows.loc["CAT-8", "speedup"] == 2.0
        assert rows.loc["CAT-8", "dense_run"] == "0001-fig"


def test_two_dense_of_other_sizes_are_no_reference(tmp_path) -> None:
    """Which Dense is meant must not depend on the order in which cases ran."""
    archs = {"dense:width=512": "Dense (width=512)", "dense:width=256": "Dense (width=256)"}
    archs["cat"] = "CAT-8"
    cases = [case(arch) for arch in archs]
    resolved = {c.key: {"label": archs[c.arch], "config": {}} for c in cases}
    run = store.Run.create(tmp_path, "sizes", GPU, cases, resolved)
    for planned in cases:
        run.append(timed(planned.key, 1.0, 1.0))
    assert "speedup" not in measurements.measured(measurements.frame([run]))


def test_case_text_shows_samples_and_environment(tmp_path) -> None:
    run = make_run(tmp_path)
    key = case("cat").key
    text = report.case_text(run, key[:6])
    assert "latency_s: 2 s  ok\n  samples: 2, 2, 2, 2, 2" in text
    assert '  arch: "cat"' in text and '  gpu_name: "NVIDIA H200"' in text
    with pytest.raises(UserError, match="'zzz' is no case of 0001-fig, which has 3 cases"):
        report.case_text(run, "zzz")


def compared(tmp_path: Path, seconds: float, n: int = 10, **options) -> tables.Table:
    runs = [
        make_run(tmp_path, "a", rows=[(case("dense"), lambda key: timed(key, 4.0, 1.0, 0.001, n))]),
        make_run(
            tmp_path, "b", rows=[(case("dense"), lambda key: timed(key, seconds, 1.0, 0.001, n))]
        ),
    ]
    return compare_table(*runs, **options)


@pytest.mark.parametrize(
    ("seconds", "mark", "num_worse"), [(5.0, "+", 1), (3.0, "-", 0), (4.04, "~", 0)]
)
def test_compare_marks(tmp_path, seconds: float, mark: str, num_worse: int) -> None:
    made = compared(tmp_path, seconds)
    assert (made.text["mark"][0], made.num_worse) == (mark, num_worse)
    assert made.notes[0] == f"{num_worse} of 1 comparable cases got worse."


def test_compare_golden_line(tmp_path) -> None:
    lines = normal(report.terminal(compared(tmp_path, 5.0)))
    assert "Dense 256 1024 4.00 s -> 5.00 s 1.25x slower [1.25, 1.26] +" in lines


def test_three_repeats_give_no_verdict(tmp_path) -> None:
    made = compared(tmp_path, 5.0, n=3)
    assert made.text["mark"][0] == "~" and made.num_worse == 0
    assert made.text["remark"][0] == "3 repeats cannot separate these"


def test_compare_pairs_cases_whatever_repeats_asked_for(tmp_path) -> None:
    dense = case("dense")
    a = make_run(tmp_path, "a", rows=[(dense, lambda key: timed(key, 4.0, 1.0, 0.001, 10))])
    ten = [(dense.with_repeats(10), lambda key: timed(key, 5.0, 1.0, 0.001, 10))]
    made = compare_table(a, make_run(tmp_path, "b", rows=ten))
    assert made.text["mark"].tolist() == ["+"]
    assert made.notes[0] == "1 of 1 comparable cases got worse."


def test_compare_refuses_runs_with_nothing_to_compare(tmp_path) -> None:
    a = make_run(tmp_path, "a")
    row = [(case("dense", 1), lambda key: timed(key, 1.0, 1.0))]
    with pytest.raises(UserError, match="0001-a and 0002-b share no case: they differ in batch_si"):
        compare_table(a, make_run(tmp_path, "b", rows=row))
    crossed = [(("dense", 1), ("cat", 256)), (("dense", 256), ("cat", 1))]
    runs = [
        make_run(tmp_path, "c", rows=[(case(*one), lambda key: timed(key, 1.0, 1.0)) for one in of])
        for of in crossed
    ]
    with pytest.raises(UserError, match="share no case: no two of them have the same settings"):
        compare_table(*runs)
    failed = [(case("dense"), lambda key: closed(key, "oom"))]
    runs = [make_run(tmp_path, "d", rows=failed) for _ in range(2)]
    with pytest.raises(UserError, match="can be compared: oom -> oom"):
        compare_table(*runs)
    with pytest.raises(UserError, match="0007-e has no finished case"):
        compare_table(a, make_run(tmp_path, "e", rows=[(case("dense"), None)]))


def test_compare_says_the_remarks_of_both_runs(tmp_path) -> None:
    runs = [make_run(tmp_path, name) for name in ("a", "b")]
    for run in runs:
        remark = {"text": f"Of {run.name}.", "architectures": ["Dense"], "metrics": ["latency_s"]}
        (run.path / "remarks.json").write_text(json.dumps([remark]))
    notes = compare_table(*runs).notes
    said = [note for note in notes if note.startswith("Remark")]
    assert said == [f"Remark on {run.name}: Of {run.name}." for run in runs]


def test_newly_failing_and_missing_cases(tmp_path) -> None:
    a = make_run(tmp_path, "a")
    rows = [
        (case("dense"), lambda key: closed(key, "oom")),
        (case("cat", 1), lambda key: timed(key, 1.0, 1.0)),
    ]
    made = compare_table(a, make_run(tmp_path, "b", rows=rows))
    marks = dict(zip(zip(made.text["architecture"], made.text["batch"], strict=True),
                     made.text["mark"], strict=True))  # fmt: skip
    assert marks == {("Dense", "256"): "!"}
    assert made.num_worse == 1
    assert "3 cases are in one of the runs only." in made.notes[0]
    made = compare_table(a, make_run(tmp_path, "c", rows=rows[:1] + [(case("cat"), rows[0][1])]))
    assert "1 case is in one of the runs only." in made.notes[0]


def test_other_gpu_is_refused_unless_ratios_are_asked_for(tmp_path) -> None:
    a = make_run(tmp_path, "a")
    slower = [
        (case("dense"), lambda key: timed(key, 8.0, 1.0)),
        (case("cat"), lambda key: timed(key, 8.0, 1.0)),
    ]
    b = make_run(tmp_path, "b", {**GPU, "gpu_name": "NVIDIA A100"}, slower)
    with pytest.raises(UserError, match="different machines.*\n.*--across-machines"):
        compare_table(a, b)
    made = compare_table(a, b, across_machines=True)
    by_label = made.text.set_index("architecture")
    assert by_label.loc["Dense", "mark"] == "~"
    assert by_label.loc["CAT-8", "mark"] == "+"
    assert by_label.loc["CAT-8", "change"] == "2.00x -> 1.00x Dense"


def speedup(ratio: float, low: float, high: float) -> pd.Series:
    ends = {"speedup": ratio, "speedup_low": low, "speedup_high": high, "speedup_n": 10}
    return pd.Series(ends)


@pytest.mark.parametrize(
    ("b", "factors", "mark"),
    [
        ((2.05, 2.05, 2.05), (1.025, 1.025, 1.025), "~"),  # within 3 %
        ((2.1, 2.1, 2.1), (1.05, 1.05, 1.05), "-"),
        ((1.9, 1.9, 1.9), (0.95, 0.95, 0.95), "+"),
        ((1.95, 1.95, 1.95), (0.975, 0.975, 0.975), "~"),
    ],
)
def test_ratios_across_machines_need_the_margin_too(b, factors, mark: str) -> None:
    found = compare._compare_ratios(speedup(2.0, 2.0, 2.0), speedup(*b))
    ends = found["factor"], found["factor_low"], found["factor_high"]
    assert (ends, found["mark"]) == (pytest.approx(factors), mark)


def test_ratios_across_machines_divide_by_the_opposite_end() -> None:
    """By the same end both intervals would lie apart: 2.1 / 1.6 and 2.4 / 2.2 are above 1."""
    found = compare._compare_ratios(speedup(2.0, 1.6, 2.2), speedup(2.3, 2.1, 2.4))
    ends = found["factor"], found["factor_low"], found["factor_high"]
    assert ends == pytest.approx((2.3 / 2.0, 2.1 / 2.2, 2.4 / 1.6))
    assert found["mark"] == "~"


@pytest.mark.parametrize(("n", "mark"), [(3, "~"), (10, "+")])
def test_ratios_of_three_repeats_give_no_verdict_either(tmp_path, n: int, mark: str) -> None:
    runs = []
    for gpu, seconds in (("NVIDIA H200", 2.0), ("NVIDIA A100", 4.0)):
        rows = [
            (case(arch), partial(timed, seconds=s, gib=1.0, spread=0.001, n=count))
            for arch, s, count in (("dense", 4.0, 10), ("cat", seconds, n))
        ]
        runs.append(make_run(tmp_path, "a", {**GPU, "gpu_name": gpu}, rows))
    made = compare_table(*runs, across_machines=True)
    cat = made.text.set_index("architecture").loc["CAT-8"]
    assert (cat["mark"], made.num_worse) == (mark, int(mark == "+"))
    assert cat["remark"] == ("3 repeats cannot separate these" if n == 3 else "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (1.005, "1.00"), (12345.6, "12,346"), (0, "0.00"), (float("nan"), "-")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_best_needs_a_rival() -> None:
    rows = pd.DataFrame({"label": ["a", "b", "c"], "n": [1.0, 2.0, 5.0], "g": [1, 1, 2]})
    made = tables.table(rows, [Column("n", ("n",), whole, max)], by=["g"])
    assert list(made.best["n"]) == [False, True, False]


def best_of(key: str, values: list[float], runs: str = "aaa", **columns) -> list[bool]:
    """Which of three rows have the most of `key` in bold."""
    rows = pd.DataFrame({"label": ["x", "y", "z"], key: values, "run": list(runs), **columns})
    return list(tables.table(rows, [Column("it", (key,), whole, max)]).best["it"])


def test_bytes_are_exact_inside_a_run_and_drift_between_runs() -> None:
    second, nobody = [False, True, False], [False] * 3
    assert best_of("peak_bytes", [100.0, 102.0, 50.0]) == second
    assert best_of("peak_bytes", [100.0, 102.0, 50.0], "aab") == second
    assert best_of("peak_bytes", [100.0, 102.0, 50.0], "aba") == nobody
    assert best_of("peak_bytes", [98.0, 102.0, 50.0], "aba") == second
    assert best_of("peak_bytes", [102.0, 102.0, 50.0]) == [True, True, False]


def test_a_resident_set_drifts_where_counted_bytes_do_not() -> None:
    on_cpu = {"device": ["cpu"] * 3}
    assert best_of("peak_bytes", [100.0, 102.0, 50.0], **on_cpu) == [False] * 3
    assert best_of("peak_bytes", [98.0, 102.0, 50.0], **on_cpu) == [False, True, False]
    assert best_of("state_bytes", [100.0, 102.0, 50.0], **on_cpu) == [False, True, False]


@pytest.mark.parametrize("runs", ["aaa", "aba"])
def test_a_rate_is_best_only_beyond_the_margin_of_drift(runs: str) -> None:
    assert best_of("tokens_per_s", [231_680.0, 231_714.0, 95_411.0], runs) == [False] * 3
    assert best_of("tokens_per_s", [98.0, 100.0, 50.0], runs) == [False] * 3
    assert best_of("tokens_per_s", [96.0, 100.0, 50.0], runs) == [False, True, False]
    assert best_of("tokens_per_s", [100.0, 100.0, 50.0], runs) == [False] * 3


def test_a_time_is_best_only_where_samples_that_could_tell_it_apart_do() -> None:
    few, many = ([[90.0, 100.0, 101.0] * n, [80.0, 110.0, 150.0] * n] for n in (1, 3))
    for samples, expected in ((few, [False, True, False]), (many, [False] * 3)):
        columns = {"latency_s.samples": [*samples, [50.0] * len(samples[0])]}
        assert best_of("latency_s", [100.0, 110.0, 50.0], **columns) == expected


def test_nobody_is_best_where_some_rows_are_not_ranked() -> None:
    ranked = {"is_ranked": [True, True, True]}, {"is_ranked": [True, True, False]}
    assert [best_of("state_bytes", [1.0, 2.0, 3.0], **one) for one in ranked] == [
        [False, False, True],
        [False] * 3,
    ]


def test_a_value_under_a_remark_has_a_dagger_and_its_group_no_best(tmp_path) -> None:
    run = make_run(tmp_path)
    remark = {"text": "Stale.", "architectures": ["CAT-8"], "metrics": ["latency_s"]}
    (run.path / "remarks.json").write_text(json.dumps([remark]))
    made = tables.run_table(run)
    cells = made.text.set_index("architecture")
    assert cells.loc["CAT-8", "latency s [95 % CI]"].endswith("]\N{DAGGER}")
    assert "\N{DAGGER}" not in "".join(cells.loc["Dense"])
    assert "\N{DAGGER}" not in cells.loc["CAT-8", "peak GiB"]
    assert not made.best["latency s [95 % CI]"].any() and made.best["peak GiB"].any()
    assert "\N{DAGGER} in tables, a ring in figures: a value that a remark is about." in made.notes


def test_a_short_prompt_that_takes_much_of_a_latency_is_told() -> None:
    rows = pd.DataFrame(
        {
            "label": ["a", "b", "c", "d"],
            "device": ["cuda", "cuda", "cpu", "cuda"],
            "prompt_len": [8, 8, 8, 4096],
            "batch_size": 1,
            "latency_s": 1.0,
            "ttft_s": [0.1, 0.01, 0.1, 0.1],
        }
    )
    (note,) = notes.prompt_share(rows)
    assert note.endswith("is of latency: a 10 % (batch 1).")
    assert notes.prompt_share(rows[1:]) == ()


def test_ratios_to_a_dense_that_is_not_shown_are_told() -> None:
    one = {"suite": "efficiency", "batch_size": 1, "seq_len": 8, "prompt_len": 8}
    rows = pd.DataFrame(
        [
            {**one, "label": "Dense", "run": "0002-b", "dense_run": "0002-b"},
            {**one, "label": "CAT-8", "run": "0001-a", "dense_run": "0001-a"},
            {**one, "label": "GDN", "run": "0002-b", "dense_run": "0002-b"},
        ]
    ).assign(latency_s=1.0, device_name="H100")
    assert notes.hidden_dense(rows) == (
        "Ratios of 0001-a: to the Dense of that run; shown is a newer one's.",
    )
    assert notes.hidden_dense(rows[rows["run"] == "0002-b"]) == ()


def test_no_torch() -> None:
    code = "import sys, cat_bench.report, cat_bench.figures, cat_bench.paper._build;"
    code += "sys.exit('torch' in sys.modules)"
    root = Path(report.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
