"""Exhibits: plans share cases, statuses are honest, and one device makes one exhibit."""

import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from cat_bench import figures, measurements, predict, spec, stats, store, tables
from cat_bench.case import Case, Record
from cat_bench.columns import DETAIL_COLUMNS, KINDS, OTHER_COLUMNS
from cat_bench.errors import UserError
from cat_bench.paper import (
    _build,
    _curves,
    _lines,
    _one_run,
    _published,
    _settings,
    attention,
    crossover,
    fig7,
    training,
    ttft,
)
from cat_bench.remarks import Remark

EXHIBITS = [f"table{n}" for n in range(1, 14)] + [f"fig{n}" for n in range(2, 9)]
EXHIBITS += ["attention", "crossover", "training", "ttft", "upstream"]  # our own
GPU = {"gpu_name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0",
       "command": "cat-bench paper fig3 --run", "cpu_name": "A CPU", "cpu_cores": 2}  # fmt: skip


def plan(name: str, scale: str = "h100") -> list[Case]:
    return importlib.import_module(f"cat_bench.paper.{name}").plan(scale)


def measure(
    results: Path,
    cases: list[Case],
    status: str = "ok",
    slower: float = 1.0,
    resolved: dict | None = None,
    **environment,
) -> store.Run:
    """A run that closes `cases` with made-up times: CAT twice as fast as Dense."""
    run = store.Run.create(results, "made-up", {**GPU, **environment}, cases, resolved or {})
    for case in cases:
        seconds = (
            slower * case.seq_len * case.batch_size / (2e5 if case.arch.startswith("cat") else 1e5)
        )
        rows = [
            Record(case.key, "latency_s", seconds, "s", [seconds] * 5),
            Record(case.key, "peak_reserved_bytes", seconds * 2**30, "bytes"),
            Record(case.key, "floor_s", seconds / 2, "s"),
            Record(case.key, "step_s", seconds / 100, "s", [seconds / 100] * 100),
            Record(case.key, "tpot_s", seconds / 100, "s", [seconds / 100] * 5),
            Record(case.key, "ttft_s", seconds / 50, "s", [seconds / 50] * 5),
            Record(case.key, "weights_bytes", 1e9, "bytes"),
            Record(case.key, "state_live_bytes", seconds * 1e9, "bytes"),
        ]
        run.append(
            [*(rows if status == "ok" else []), Record(case.key, "case", 1.0, "s", status=status)]
        )
    return run


def status_of(results: Path, name: str, scale: str = "h100") -> _build.Status:
    return next(s for s in _build.statuses(results, scale) if s.name == name)


def render(name: str, results: Path, scale: str = "h100") -> _settings.Content:
    records = _build.find(_build.all_records(results)[0], plan(name, scale)).records
    return _build.exhibit(name).render(records, _build.points_of(name), scale)


def test_every_exhibit_is_found_in_the_papers_order() -> None:
    assert [name for name, _ in spec.exhibits()] == EXHIBITS


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_exhibit_renders_without_a_single_row(name: str, tmp_path) -> None:
    records = _build.all_records(tmp_path)[0]
    content = _build.exhibit(name).render(records, _build.points_of(name), "h100")
    assert content.tables or content.figure
    for table in content.tables:
        assert len(table.text) and not table.text.isna().any().any()


def test_plan_of_the_h100_scale() -> None:
    fig2, fig3 = plan("fig2"), plan("fig3")
    assert {c.batch_size for c in fig2} == {1, 4, 16, 64, 128, 256, 512}
    assert {(c.seq_len, c.prompt_len, c.scale) for c in fig2} == {(1024, 8, "h100")}
    assert {(c.device, c.dtype) for c in fig2} == {("cuda", "bfloat16")}
    assert {c.decode_path for c in fig2} <= {"cuda_graph", "upstream_graph"}
    archs = {c.arch for c in fig2}
    assert {"dense", "dense:width=2048", "cat", "cat:chunk_size=16", "cat:chunk_size=32"} <= archs
    assert {c.batch_size for c in fig3} == {256} and {c.seq_len for c in fig3} == {1024, 2048, 4096}
    assert {c.arch for c in fig3 if c.seq_len == 4096 and "16" in c.arch} == {
        "cat:chunk_size=16,max_len=4096"
    }


def test_a_case_is_the_same_with_any_number_of_repeats(tmp_path) -> None:
    """Rows whose repeats followed the rule close the planned cases; the newest row is shown."""
    planned = plan("fig5")
    three = [case.with_repeats(3) for case in planned]
    assert not {case.key for case in three} & {case.key for case in planned}
    measure(tmp_path, three, commit="aaaaaaaaaaaa")
    assert status_of(tmp_path, "fig5").status == "done"
    measure(tmp_path, planned[:3], slower=2.0, commit="aaaaaaaaaaaa", dirty=True)
    records = _build.all_records(tmp_path)[0]
    found = _build.find(records, planned)
    latest = found.records[(found.records["run"] == "0002-made-up") & found.records["chosen"]]
    assert set(latest["case"]) == {case.key for case in planned[:3]}
    caption = caption_of(_build.exhibit("fig5").render(found.records, [], "h100"))
    told = "Code of 2 commits (aaaaaaaa, aaaaaaaa+; +: and changes): ratios are inside one run."
    assert told in caption


def test_repeats_follow_the_rule_of_the_profiler_at_every_scale() -> None:
    timed = [name for name in EXHIBITS if any(c.suite == "efficiency" for c in plan(name))]
    assert {"fig2", "fig3", "fig6", "fig7", "table3", "crossover", "ttft"} <= set(timed)
    for name in timed:
        for scale in ("smoke", "h100", "paper"):
            assert {c.settings for c in plan(name, scale)} == {()}


def test_the_window_of_gdn_h1_is_half_the_length() -> None:
    """cat_spec.md 1.7. At 1K, and with 8 new tokens after it, the case is the preset's."""
    preset = spec.parse("gdn-h1").text
    for name in ("fig3", "crossover", "training", "ttft"):
        hybrids = {(c.seq_len, c.arch) for c in plan(name) if "hybrid=true" in c.arch}
        assert {arch for seq_len, arch in hybrids if seq_len < 2048} == {preset}
        for seq_len, arch in hybrids:
            window = spec.parse(arch).overrides.get("window", 512)
            assert window == seq_len // 1024 * 512
    assert {c.seq_len for c in plan("fig3") if "window=2048" in c.arch} == {4096}


def test_notes_tell_heads_patterns_strides_windows_and_layers(tmp_path) -> None:
    cases = plan("fig3")
    run = measure(tmp_path, cases, resolved=predict.resolve(cases))
    records = _build.find(_build.all_records(tmp_path)[0], plan("fig3")).records
    content = _build.exhibit("fig3").render(records, [], "h100")
    assert (
        "Settings: GDN heads 6; GDN-H1 heads 6, window 512, 1024, 2048 (half the length); "
        "BASED heads 16, pattern cclcsccclcsc (c convolution, l linear attention, s window "
        "attention), window 128; Sparse-2D stride 8; "
        "Sliding window 512; layers 12 (CAT: of its decoder), Mamba2 24."
    ) in content.tables[0].notes
    (note,) = (n for n in tables.run_table(run).notes if n.startswith("Settings: "))
    assert "GDN heads 6;" in note and "GDN-H1 (window=2048) heads 6, window 2048;" in note
    assert "GDN-H1: window of half the length." in caption_of(content)


def test_notes_read_no_meaning_into_the_fields_of_a_users_file(tmp_path) -> None:
    """No heads by GDN's rule, no letters of BASED's, no layers out of a pattern's length."""
    cases = [replace(case, arch="mine.py") for case in plan("fig3")[:1]]
    config = {"pattern": ["a", "b"], "stride": 0.5, "num_layers": 3, "width": 64, "key_width": 8}
    resolved = {cases[0].key: {"label": "Mine", "config": config}}
    notes = tables.run_table(measure(tmp_path, cases, resolved=resolved)).notes
    assert "Settings: Mine stride 0.5; layers 3." in notes


def test_exhibits_share_cases_by_key() -> None:
    keys = {name: {c.key for c in plan(name)} for name in ("fig2", "fig3", "fig5", "table3")}
    assert keys["fig5"] < keys["fig2"] and keys["table3"] < keys["fig2"]
    assert len(keys["fig2"] & keys["fig3"]) >= 4


def test_smoke_is_small_and_shares_no_case_with_another_scale() -> None:
    smoke = {c.key: c for name in EXHIBITS for c in plan(name, "smoke")}
    assert 0 < len(smoke) <= 45 + 3 * len(_settings.UNNAMED)
    assert {(c.device, c.dtype, c.decode_path) for c in smoke.values()} == {
        ("cpu", "float32", "eager")
    }
    assert {c.batch_size for c in smoke.values()} <= {1, 4}
    assert {c.seq_len for c in smoke.values()} <= {32, 64}
    assert all("vocab_size=256" in c.arch for c in smoke.values())
    models = [c for c in smoke.values() if c.suite != "attention"]  # which runs no model
    deep = {c.arch.split(":")[0] for c in models if "num_layers=2" not in c.arch}
    assert deep - set(_settings.UNNAMED) <= {"based"}  # its depth is its pattern of layers
    assert not set(smoke) & {c.key for name in EXHIBITS for c in plan(name)}
    assert not {c.key for c in plan("fig2", "paper")} & {c.key for c in plan("fig2")}


PATHS = ("cuda_graph", "compile")
ALL_SYSTEMS = ("fig2", "fig3", "crossover", "ttft", "training")
PLANS = """
import importlib, json
from cat_bench.paper import _settings
plan = lambda name, scale: importlib.import_module(f"cat_bench.paper.{name}").plan(scale)
names = ("fig2", "fig3", "crossover", "ttft", "training", "fig5")
plans = {name: [case.key for case in plan(name, "h100")] for name in names}
with_mine = [n for n in names if any(c.arch.startswith("mine") for c in plan(n, "h100"))]
missing = _settings.missing(_settings.ARCHITECTURES, "h100")
print(json.dumps([plans, with_mine, missing, _settings.label("mine")]))
"""


@pytest.mark.parametrize(("fast", "joins"), [(True, [*ALL_SYSTEMS]), (False, [])])
def test_a_file_that_nobody_names_joins_all_systems_without_an_edit(
    tmp_path, fast: bool, joins: list[str]
) -> None:
    """In a copy of the packages and a process of its own, as a user would add it."""
    for package in ("cat_bench", "baselines", "recall_tasks"):
        shutil.copytree(spec.PACKAGE.parent / package, tmp_path / package)
    decode, forward = (f'("eager", "{path}")' if fast else '("eager",)' for path in PATHS)
    mine = f"class Model:\n    decode_paths = {decode}\n    forward_paths = {forward}\n"
    source = f"class Config:\n    width: int = 1024\n\n{mine}"
    (tmp_path / "baselines" / "mine.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", PLANS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    plans, with_mine, missing, label = json.loads(done.stdout)
    assert (with_mine, label) == (joins, "mine")
    assert any(re.fullmatch(r".*mine.* \(no fast decode path\)", text) for text in missing) != fast
    for name, keys in plans.items():
        assert {case.key for case in plan(name)} <= set(keys)  # all others stay what they were


def test_a_named_file_appears_once_it_is_there(tmp_path, monkeypatch) -> None:
    assert "CAT-8" not in _settings.LABELS.values()
    for path in spec.BASELINES.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    fields = "    width: int = 1024\n    d_state: int = 128\n    num_layers: int = 24\n"
    source = (
        f"class Config:\n{fields}\n\nclass Model:\n    decode_paths = ('eager', 'upstream_graph')\n"
    )
    (tmp_path / "mamba2.py").write_text(source)
    monkeypatch.setattr(spec, "BASELINES", tmp_path)
    new = [c for c in plan("fig2") if c.arch == "mamba2"]
    assert len(new) == 7 and {c.decode_path for c in new} == {"upstream_graph"}
    assert {c.arch for c in plan("fig6")} >= {"mamba2", "mamba2:d_state=16"}
    (tiny, _) = [c for c in plan("fig2", "smoke") if c.arch.startswith("mamba2")]
    assert tiny.arch == "mamba2:num_layers=2,width=64"
    assert "mamba2" not in " ".join(_settings.missing(_settings.ARCHITECTURES, "h100"))


def test_a_baseline_without_a_fast_path_is_not_timed_on_a_gpu(tmp_path, monkeypatch) -> None:
    source = "class Config:\n    width: int = 1024\n\nclass Model:\n    decode_paths = ('eager',)\n"
    (tmp_path / "mamba2.py").write_text(source)
    monkeypatch.setattr(spec, "BASELINES", tmp_path)
    assert not [c for c in plan("fig2") if c.arch.startswith("mamba2")]
    assert [c for c in plan("fig2", "smoke") if c.arch.startswith("mamba2")]
    assert "mamba2 (no fast decode path)" in _settings.missing(["mamba2"], "h100")


def test_statuses_without_any_run(tmp_path) -> None:
    found = {s.name: s for s in _build.statuses(tmp_path, "h100")}
    assert list(found) == EXHIBITS
    assert found["table1"].status == "not built (needs suites: pretrain, perplexity, lm_eval)"
    assert found["fig2"].status == found["fig3"].status == "not run"
    assert found["fig4"].status == "done"
    with pytest.raises(UserError, match="unknown scale 'big'"):
        _build.statuses(tmp_path, "big")


def test_partial_then_done_then_stale(tmp_path) -> None:
    cases = plan("fig5")
    measure(tmp_path, cases[:7])
    assert status_of(tmp_path, "fig5").status == f"partial 7/{len(cases)}"
    measure(tmp_path, cases[7:])  # several runs together
    assert status_of(tmp_path, "fig5").status == "done"
    built = _build.build(["fig5"], "h100", tmp_path)
    assert built.statuses[0].status == "done"
    index = tmp_path / "paper" / "h100" / "index.json"
    index.write_text(json.dumps({"fig5": ["another plan"]}))
    assert status_of(tmp_path, "fig5").status == "stale"
    _build.build(["fig5"], "h100", tmp_path)
    assert status_of(tmp_path, "fig5").status == "done"


def test_missing_architectures_and_oom_are_in_the_detail(tmp_path) -> None:
    measure(tmp_path, plan("table3"), status="oom")
    status = status_of(tmp_path, "table3")
    assert status.status == "done in part"
    assert "needs suites: pretrain, swde" in status.detail and "oom" in status.detail


def test_one_exhibit_comes_from_one_device_and_the_newest_closing_wins(tmp_path) -> None:
    cases = plan("fig5")
    measure(tmp_path, cases[:3], gpu_name="NVIDIA A100")
    measure(tmp_path, cases[:5], status="oom")
    newest = measure(tmp_path, cases[:4])
    found = _build.find(_build.all_records(tmp_path)[0], cases)
    assert found.device == "NVIDIA H200" and found.others == ("NVIDIA A100",)
    assert set(found.records["device_name"]) == {"NVIDIA H200"}
    first = found.records[found.records["case"] == cases[0].key]
    assert set(first[first["chosen"]]["run"]) == {newest.name}
    assert sorted(found.statuses.values()) == ["ok"] * 4 + ["oom"]


def test_a_complete_other_machine_neither_stops_nor_stands_in_for_this_one(tmp_path) -> None:
    """--run on an H100 where an H200 has every case: all are missing, then the H100's are drawn."""
    cases = plan("fig5")
    measure(tmp_path, cases)
    records = _build.all_records(tmp_path)[0]
    assert _build.missing_cases(["fig5"], "h100", records) == []
    asked: list = []

    def run_missing(missing: list) -> None:
        asked.extend(missing)
        measure(tmp_path, missing[:2], gpu_name="NVIDIA H100")

    built = _build.build(["fig5"], "h100", tmp_path, run_missing, device="NVIDIA H100")
    assert [case.key for case in asked] == [case.key for case in cases]
    assert built.statuses[0].status == f"partial 2/{len(cases)}"
    assert "on NVIDIA H100" in built.statuses[0].detail
    built = _build.build(["fig5"], "h100", tmp_path, lambda _: None, device="NVIDIA A100")
    assert "on NVIDIA H200" in built.statuses[0].detail  # nothing of its own: drawn as without it
    found = _build.find(_build.all_records(tmp_path)[0], cases, device="NVIDIA A100")
    assert found.records.empty and found.others == ("NVIDIA H100", "NVIDIA H200")


def test_what_was_unsupported_is_missing_once_its_package_is_here(tmp_path, monkeypatch) -> None:
    cases = plan("fig5")
    measure(tmp_path, cases, status="unsupported")
    records = _build.all_records(tmp_path)[0]
    lacking = {"triton"}
    monkeypatch.setattr(spec, "is_installed", lambda name: name not in lacking)
    assert _build.missing_cases(["fig5"], "h100", records) == []
    lacking.clear()
    assert _build.missing_cases(["fig5"], "h100", records) == cases


def test_runs_made_at_the_same_time_are_not_mixed(tmp_path, monkeypatch) -> None:
    """The highest folder number wins for every case, whichever run closed it last."""
    cases = plan("fig5")[:2]
    runs = [measure(tmp_path, []), measure(tmp_path, [])]
    moments = iter(range(10, 100))
    monkeypatch.setattr(store, "_now", lambda: f"2026-01-01T00:00:{next(moments)}.000Z")
    for run, case in ((0, 0), (1, 0), (1, 1), (0, 1)):
        runs[run].extend_plan([cases[case]], {})
        runs[run].append([Record(cases[case].key, "case", 1.0, "s")])
    records = _build.find(_build.all_records(tmp_path)[0], cases).records
    assert set(records.loc[records["chosen"], "run"]) == {"0002-made-up"}
    assert set(records["run"]) == {"0001-made-up", "0002-made-up"}  # for ratios inside a run


def test_another_setting_than_the_repeats_makes_another_case(tmp_path) -> None:
    """A run with 3 repeats serves the plan too; a later one by the rule wins."""
    cases = plan("fig5")[:2]
    older = measure(tmp_path, [case.with_repeats(3) for case in cases])
    newer = measure(tmp_path, cases[:1])
    measure(tmp_path, [replace(cases[1], settings=(("weights", "some"),))])  # another case
    found = _build.find(_build.all_records(tmp_path)[0], cases)
    assert found.statuses == {case.key: "ok" for case in cases}
    chosen = found.records[found.records["chosen"]].groupby("case")["run"].unique()
    assert [list(chosen[case.key]) for case in cases] == [[newer.name], [older.name]]


def test_headings_and_captions_name_the_runs(tmp_path) -> None:
    cases = plan("fig5")
    names = [measure(tmp_path, part).name for part in (cases, cases[:-1])]
    found = _build.find(_build.all_records(tmp_path)[0], cases)
    content = _build.exhibit("fig5").render(found.records, _build.points_of("fig5"), "h100")
    assert [f"runs {', '.join(names)}." in table.heading for table in content.tables] == [True] * 2
    assert f"runs {', '.join(names)}." in caption_of(content)
    measure(tmp_path, plan("table3"))
    found = _build.find(_build.all_records(tmp_path)[0], plan("table3"))
    (table,) = _build.exhibit("table3").render(found.records, _published.points("table3"), "h100")[
        0
    ]
    assert "; run 0003-made-up." in table.heading and _curves.PEAKS in table.notes


def caption_of(content: _settings.Content) -> str:
    return content.figure.get_supxlabel().replace("\n", " ")


def test_captions_say_how_peaks_differ_and_where_intervals_are(tmp_path) -> None:
    measure(tmp_path, plan("fig5"))
    records = _build.find(_build.all_records(tmp_path)[0], plan("fig5")).records
    says = caption_of(_build.exhibit("fig5").render(records, _build.points_of("fig5"), "h100"))
    assert says.count(_curves.PEAKS) == 1
    assert "95 % intervals are narrower than the markers where no bar is visible." in says


def test_figures_of_the_paper_alone_say_whose_rows_are_missing(tmp_path, monkeypatch) -> None:
    """Dense is measured; what these figures are about is not there."""
    monkeypatch.setattr(_settings, "_lacks", lambda name, _: "" if name == "dense" else "no file")
    measure(tmp_path, plan("fig7"))
    for name, subject in (("fig6", "Mamba2"), ("fig7", "BASED"), ("fig8", "BASED")):
        records = _build.find(_build.all_records(tmp_path)[0], plan(name)).records
        says = caption_of(_build.exhibit(name).render(records, _build.points_of(name), "h100"))
        assert f"No row of {subject} yet: the paper's points" in says
    monkeypatch.undo()  # now all can be timed, and none is
    nothing = _build.all_records(tmp_path / "empty")[0]
    content = _build.exhibit("fig2").render(nothing, _build.points_of("fig2"), "h100")
    assert "No row of ours yet" in caption_of(content)


def test_figure_6_has_dense_as_one_level_line(tmp_path) -> None:
    nothing = _build.all_records(tmp_path)[0]
    content = _build.exhibit("fig6").render(nothing, _build.points_of("fig6"), "h100")
    dense = [line for line in content.figure.axes[0].lines if line.get_color() == "#000000"]
    assert [list(line.get_ydata()) for line in dense] == [[11.68, 11.68]]
    assert len(content.figure.axes[1].lines) == 2  # Mamba2 against the paper's Dense, and 1
    assert (content.plotted["label"] == "Dense").sum() == 1


def test_a_ratio_takes_dense_from_its_own_run(tmp_path) -> None:
    """Also where a newer run measured Dense again: speeds of two runs make no ratio."""
    cases = plan("fig5")
    dense = next(case for case in cases if case.arch.startswith("dense"))
    cat = next(c for c in cases if c.arch.startswith("cat") and c.batch_size == dense.batch_size)
    first = measure(tmp_path, [dense, cat])
    newer = measure(tmp_path, [dense], slower=10.0)
    found = _build.find(_build.all_records(tmp_path)[0], cases)
    names = _build.exhibit("fig5").ARCHITECTURES
    rows = _curves.measured(found.records, names, cases, "h100").set_index("case")
    assert dict(rows["run"]) == {dense.key: newer.name, cat.key: first.name}
    assert rows.loc[cat.key, "speedup"] == pytest.approx(2.0)


def test_figures_7_and_8_say_that_kept_scores_are_not_reproduced(tmp_path) -> None:
    """evaluation_spec.md 4.3: 105.4 GB at batch 256 and length 4096, of all tokens and GPT-2's ids;
    here of the new ones and of the padded vocabulary.
    """
    (longest,) = {fig7.score_bytes(c) for c in plan("fig7") if c.seq_len == 4096}
    assert longest == 256 * (4096 - 8) * 50_432 * 2 and round(longest / 1e9, 1) == 105.6
    measure(tmp_path, plan("fig7"))
    for name in ("fig7", "fig8"):
        content = render(name, tmp_path)
        table = content.tables[0]
        assert fig7.CACHE in table.notes and fig7.CACHE in caption_of(content)
        assert table.notes[-1].startswith("Not reproduced and not timed: scores kept.")
        assert table.notes[-1].endswith("24.4, 49.1, 98.3 GiB more at lengths 1024, 2048, 4096.")
        assert any("keeps none" in remark for remark in _published.remarks(name))


def test_build_measures_what_is_missing_once_and_writes_all_files(tmp_path) -> None:
    asked: list[list[Case]] = []

    def run_missing(cases: list[Case]) -> None:
        asked.append(cases)
        measure(tmp_path, cases)

    measure(tmp_path, plan("fig5")[:2])
    built = _build.build(["fig3", "fig4", "table2"], "h100", tmp_path, run_missing)
    assert [len(cases) for cases in asked] == [len(plan("fig3"))]
    names = {path.name for path in built.files}
    assert names == {
        *(f"fig3.{e}" for e in ("svg", "pdf", "png", "csv")),
        *(f"fig3_{table}.{e}" for table in ("table", "steps") for e in ("md", "tex", "csv")),
        *(f"fig4.{e}" for e in ("svg", "pdf", "png")),
        *(f"table2.{e}" for e in ("md", "tex", "csv")),
    }
    assert all(path.stat().st_size for path in built.files)
    page = built.report_html.read_text()
    assert page.count("<svg") == 2 and "NVIDIA H200, driver 580.1" in page
    assert "cat-bench paper fig3 --run" in page
    assert "The four scores of this row average 13.85." in page  # the paper's remarks
    assert not re.search(r"(src|href)=\"(?!#)", page.replace("xlink:href", ""))
    assert "<h3>Figure 3: latency and memory over the length, per token</h3>" in page
    assert page.count("<table>") == page.count('<div class="wide"><table>') + 1  # the contents
    assert "<th" in page.split("per token</h3>")[1].split("</table>")[0]
    table = (tmp_path / "paper" / "h100" / "fig3_table.md").read_text()
    assert "2.00x faster [2.00, 2.00]" in table and "50 %" in table
    assert "latency, CAT-8 against Dense: lower at all 3 common points from 1024 to 4096." in table


def test_an_exhibit_rendered_alone_takes_its_place_in_the_report(tmp_path) -> None:
    def anchors(page: str) -> list[str]:
        return re.findall('<section id="(.*?)">', page)

    broken = tmp_path / "0001-broken"
    broken.mkdir()
    _build.build(["table2", "fig4", "fig5"], "h100", tmp_path)
    broken.rmdir()
    measure(tmp_path, plan("fig5"))
    built = _build.build(["fig5"], "h100", tmp_path)
    assert [status.name for status in built.statuses] == ["fig5"]
    page = built.report_html.read_text()
    in_order = [name for name, _ in spec.exhibits() if name in ("table2", "fig4", "fig5")]
    assert anchors(page) == in_order  # and no warning of a run that was broken
    assert page.count("<svg") == 2 and page.count('href="#fig4"') == 1
    assert "The four scores of this row average 13.85." in page  # of table2
    fig5 = page.split('<section id="fig5">')[1].split("</section>")[0]
    assert "done" in fig5 and "not run" not in fig5 and "2.00x faster" in fig5
    assert "not run" not in page.split("<section")[0]  # the contents
    assert _build.build(["fig5"], "h100", tmp_path).report_html.read_text() == page
    (tmp_path / "paper" / "h100" / "report.html").unlink()
    again = _build.build(["fig4"], "h100", tmp_path)
    assert anchors(again.report_html.read_text()) == ["fig4"]


def test_a_broken_run_stops_no_figure(tmp_path) -> None:
    measure(tmp_path, plan("fig5")[:1])
    broken = tmp_path / "0002-broken"
    broken.mkdir()
    (broken / "environment.json").write_text("{")
    assert status_of(tmp_path, "fig5").status.startswith("partial 1/")
    built = _build.build(["table1"], "h100", tmp_path)
    (text,) = built.skipped
    assert text.startswith("0002-broken is left out: ") and "environment.json" in text
    page = html.unescape(built.report_html.read_text())
    assert "Warning: run folders that cannot be read" in page and text in page


def test_one_bad_value_leaves_out_its_run_alone(tmp_path) -> None:
    measure(tmp_path, plan("fig5")[:1])
    measure(tmp_path, plan("fig5")[1:2])
    path = store.folders(tmp_path)[1] / "records.jsonl"
    first, *rest = path.read_text().splitlines()
    lines = [json.dumps({**json.loads(first), "value": "x"}), *rest]
    path.write_text("\n".join(lines) + "\n")
    _, runs, skipped = _build.all_records(tmp_path)
    assert [run.name for run in runs] == [store.folders(tmp_path)[0].name]
    assert "records.jsonl, line 1" in skipped[0] and "value is 'x'" in skipped[0]


def test_smoke_tables_and_figures_are_stamped(tmp_path) -> None:
    measure(tmp_path, plan("fig2", "smoke"), gpu_name=None)
    _build.build(["fig2", "table3"], "smoke", tmp_path)
    folder = tmp_path / "paper" / "smoke"
    for name in ("fig2_table.md", "table3.md"):
        assert figures.SMOKE_STAMP in (folder / name).read_text()
    assert "| Dense-2D" in (folder / "fig2_table.md").read_text()  # the tiny one, by its role


def test_published_tables_show_the_papers_cells_and_no_number_of_ours() -> None:
    content = _build.exhibit("table8").render(None, _published.points("table8"), "h100")
    text = content.tables[0].text
    cat16 = text[text["method"] == "CAT-16"].iloc[0]
    assert cat16["mean"] == "0.428"  # printed; the recomputed 0.430 is a remark
    assert set(text["ours"]) == {"not built"}
    best = content.tables[0].best
    assert text["method"][best["PIQA"]].to_list() == ["Dense"]


def test_remarks_on_the_papers_cells_stand_under_its_table_and_once_on_the_page(tmp_path) -> None:
    theoretical = "Theoretical, not measured (marked * in the paper)."
    _build.build(["table3"], "h100", tmp_path)
    folder = tmp_path / "paper" / "h100"
    for ending in ("md", "tex"):
        text = (folder / f"table3.{ending}").read_text()
        assert f"Paper, Sparse-2D, speed-up, memory reduction: {theoretical}" in text
        assert "Paper, CAT-8, speed-up: The plotted points of Figure 2 give 1.19x" in text
    page = html.unescape((folder / "report.html").read_text())
    assert page.count(theoretical) == 1 and page.count("give 1.19x") == 1
    assert "Remark: Batch 512, length 1024." in page  # on the whole table: no note of a cell


def test_tables_tell_rows_of_one_label_apart() -> None:
    text = (
        _build.exhibit("table13").render(None, _published.points("table13"), "h100").tables[0].text
    )
    assert list(text["decoder layers"]) == ["12", "8"]
    assert list(text["FineWeb ppl"]) == ["20.7", "21.8"]


def test_table3_puts_our_ratios_beside_the_papers(tmp_path) -> None:
    measure(tmp_path, plan("table3"))
    records = _build.all_records(tmp_path)[0]
    text = (
        _build.exhibit("table3").render(records, _published.points("table3"), "h100").tables[0].text
    )
    cat8 = text[text["method"] == "CAT-8"].iloc[0]
    assert cat8["speed-up (paper)"] == "1.4x"
    assert cat8["speed-up (ours)"] == "2.00x faster [2.00, 2.00]"
    assert cat8["SWDE % (ours)"] == "not built"


def test_crossings_are_interpolated_on_logarithmic_axes() -> None:
    dense = {1.0: 1.0, 4.0: 4.0, 16.0: 16.0}
    flat = {1.0: 2.0, 4.0: 2.0, 16.0: 2.0}
    assert _curves.crossings(flat, dense) == [pytest.approx((1.0, 4.0, 2.0))]
    assert _curves.crossing_text(flat, dense, figures.BATCH) == (
        "crosses at batch size about 2 (interpolated), lower at 16"
    )
    # at a point where both are equal the lines touch or cross, as those beside it tell
    assert len(_curves.crossings(flat, {1.0: 1.0, 4.0: 2.0, 16.0: 4.0})) == 1
    assert _curves.crossings(flat, {1.0: 1.0, 4.0: 2.0, 16.0: 1.0}) == []
    assert _one_run.turns({1.0: -1.0, 2.0: 0.0, 3.0: 1.0}) == [((1.0, -1.0), (3.0, 1.0))]
    assert _curves.crossing_text(dense, {1.0: 0.5, 16.0: 1.0}, figures.BATCH) == (
        "higher at all 2 common points from 1 to 16"
    )
    assert _curves.crossing_text(dense, {1.0: 1.0}, figures.BATCH) == "too few common points"


def test_no_crossing_is_invented_between_points_that_were_planned_but_not_measured(
    tmp_path,
) -> None:
    """Batch 1 and 256 alone: where between them the lines cross is not known, and drawn so."""
    axis = figures.BATCH.planned_by(plan("fig5"))
    far = [{1.0: 2.0, 256.0: 2.0, 512.0: 2.0}, {1.0: 1.0, 256.0: 2.5, 512.0: 4.0}]
    assert _curves.crossing_text(*far, axis) == (
        "crosses between batch size 1 and 256, lower at 512"
    )
    near = [{256.0: 2.0, 512.0: 2.0}, {256.0: 1.0, 512.0: 4.0}]
    assert "about 362 (interpolated)" in _curves.crossing_text(*near, axis)
    measure(tmp_path, [c for c in plan("fig5") if c.batch_size in (1, 256, 512)])
    content = render("fig5", tmp_path)
    assert figures.GAPS in caption_of(content)
    drawn = content.figure.axes[0].lines
    thin = [line for line in drawn if line.get_linewidth() == figures.GAP_DASHES["linewidth"]]
    assert {tuple(line.get_xdata()) for line in thin} == {(1.0, 256.0)}
    whole = [line for line in drawn if line not in thin]
    assert all(pd.isna(line.get_xdata()[1]) for line in whole if len(line.get_xdata()) == 4)
    measure(tmp_path, plan("fig5"))
    assert figures.GAPS not in caption_of(render("fig5", tmp_path))


def test_exhibits_name_what_they_lack(tmp_path) -> None:
    """In the caption and under the table: systems without any row, then single cells."""
    cases = [c for c in plan("fig3") if c.arch != "mamba2" or c.seq_len == 1024]
    cases = [c for c in cases if not c.arch.startswith("based")]
    measure(tmp_path, cases)
    content = render("fig3", tmp_path)
    lacks, planned = len(plan("fig3")) - len(cases), len(plan("fig3"))
    said = f"Not measured, {lacks} of {planned} cases: Mamba2 (length 2048, 4096); BASED."
    assert said in caption_of(content) and said in content.tables[0].notes
    assert not any("Not measured" in note for note in render("table3", tmp_path).tables[0].notes)
    measure(tmp_path, [c for c in plan("ttft") if c.arch == "dense" and c.prompt_len > 4096])
    note = next(n for n in render("ttft", tmp_path).tables[0].notes if n.startswith("Not measured"))
    assert "Dense (prompt 1024, 4096); Dense-2D, CAT-8" in note


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("fig2", {"batch": "64", "length": "1024"}),
        ("fig3", {"batch": "256", "length": "2048"}),
        ("fig7", {"batch": "256", "length": "2048"}),
        ("ttft", {"prompt": "4096"}),
        ("crossover", {"batch": "16", "length": "4096"}),
    ],
)
def test_nobody_is_best_at_a_setting_of_which_a_planned_case_is_missing(
    name: str, where: dict[str, str], tmp_path
) -> None:
    fields = {"batch": "batch_size", "length": "seq_len", "prompt": "prompt_len"}
    cases = plan(name)
    missing = next(
        case
        for case in cases
        if not case.arch.startswith("cat")
        if all(str(getattr(case, fields[word])) == size for word, size in where.items())
    )
    measure(tmp_path, [case for case in cases if case != missing])
    made = render(name, tmp_path).tables[2 if name == "crossover" else 0]
    here = pd.concat([made.text[word] == size for word, size in where.items()], axis=1).all(axis=1)
    has_best = made.best.any(axis=1)
    assert here.any() and not has_best[here].any()
    assert has_best[~here].any()


def test_attention_ranks_only_where_every_implementation_was_measured(tmp_path) -> None:
    cases = [
        case
        for case in plan("attention")
        if case.seq_len != 16_384 or dict(case.settings)["implementation"] != "fused"
    ]
    run = store.Run.create(tmp_path, "attention", GPU, cases, {})
    order = ("flex_permuted", "flex_interleaved", "causal", "fused", "two_part", "eager")
    for case in cases:
        seconds = 1.0 + order.index(dict(case.settings)["implementation"])
        run.append(
            [
                Record(case.key, "forward_s", seconds, "s", [seconds] * 5),
                Record(case.key, "forward_backward_s", seconds, "s", [seconds] * 5),
                Record(case.key, "case", 1.0, "s"),
            ]
        )
    made = render("attention", tmp_path).tables[0]
    ours = made.text[made.best["forward + backward ms [95 % CI]"]]
    assert set(ours["implementation"]) == {"flex_permuted"}
    assert list(ours["length"]) == ["1024", "4096", "65536"]


def test_training_ranks_no_replayed_step_with_one_launched_from_python(tmp_path) -> None:
    cases, step = plan("training"), "step s [95 % CI]"
    old = [case for case in cases if case.seq_len == 4096 and case.arch.startswith("based")]
    new = [case for case in cases if case not in old]
    for some in (new, [training.earlier(case) for case in old]):
        run = store.Run.create(tmp_path, "training", GPU, some, {})
        for case in some:
            seconds = 1.0 + (case.arch != "dense")
            rows = [Record(case.key, "train_step_s", seconds, "s", [seconds] * 5)]
            run.append([*rows, Record(case.key, "case", 1.0, "s")])
    records = _build._found("training", "h100", _build.all_records(tmp_path)[0]).records
    made = _build.exhibit("training").render(records, [], "h100").tables[0]
    assert set(made.text["length"][made.best[step]]) == {"1024"}


def test_what_crossover_lacks_is_said_by_batch_and_length_and_stays_short(tmp_path) -> None:
    measure(tmp_path, [c for c in plan("crossover") if c.batch_size not in (16, 64)])
    (note,) = (n for n in render("crossover", tmp_path).tables[0].notes if "Not measured" in n)
    lines = (
        f"{prompt + 256} of prompt {prompt}" for prompt in (768, 1792, 3840, 7936, 16128, 32512)
    )
    where = f"batch 16 x length 1024 of prompt 8, {', '.join(lines)}"
    assert f"all ({where} and batch 64 x length 1024 of prompt 8)." in note
    some = [c for n, c in enumerate(plan("crossover")) if n % 3 == 0]
    measure(tmp_path / "other", some)
    (note,) = (
        n for n in render("crossover", tmp_path / "other").tables[0].notes if "Not measured" in n
    )
    assert len(note) <= 400 and note.endswith(" ...")


def test_remarks_of_a_run_stand_under_its_rows_and_marked_values_decide_nothing(
    tmp_path,
) -> None:
    run = measure(tmp_path, plan("fig2"))
    remark = {"text": "Stale.", "architectures": ["mamba2"], "metrics": ["peak_reserved_bytes"]}
    (run.path / "remarks.json").write_text(json.dumps([remark]))
    content, said = render("fig2", tmp_path), f"Remark on {run.name}: Stale."
    notes = content.tables[0].notes
    assert said in notes and said in caption_of(content)
    against = "CAT-8 against Mamba2: "
    assert f"peak memory, {against}too few common points (without points under a remark)." in notes
    assert f"latency, {against}lower at all 7 common points from 1 to 512." in notes
    everything = crossover._measured(
        _build.find(_build.all_records(tmp_path)[0], plan("crossover")).records, "h100"
    )
    pair = "CAT-8", "Mamba2", "batch_size"
    assert _one_run.crossing(everything, *pair, "peak_bytes") == "-"
    assert _one_run.crossing(everything, *pair, "tpot_s").startswith("lower from")
    # nobody is known to be smallest where one of the values is stale
    assert _one_run.best(everything, "tpot_s") and not _one_run.best(everything, "peak_bytes")
    assert not any("Stale" in note for note in render("fig5", tmp_path).tables[0].notes)
    remark["metrics"] = ["tpot_s"]  # then nobody is known to be fastest, but somebody smallest
    (run.path / "remarks.json").write_text(json.dumps([remark]))
    text = render("crossover", tmp_path).tables[0].text
    assert set(text["fastest"]) == {"-"} and "-" not in set(text["smallest"])
    (run.path / "remarks.json").write_text(json.dumps([remark | {"batch_sizes": [4]}]))
    by_batch = render("crossover", tmp_path).tables[0].text.set_index("batch")["fastest"]
    assert by_batch["4"] == "-" and "-" not in set(by_batch.drop("4"))
    # unless present code cannot have made it one of the first two
    (run.path / "remarks.json").write_text(json.dumps([remark | {"at_least": 0.99}]))
    text = render("crossover", tmp_path).tables[0].text
    assert "-" not in set(text["fastest"]) and "Mamba2" not in set(text["fastest"])
    (run.path / "remarks.json").write_text(json.dumps([remark | {"batch_sizes": [5]}]))
    _, runs, skipped = _build.all_records(tmp_path)
    assert runs == [] and "batch_sizes [5], which this run lacks; it has 1, 4," in skipped[0]
    (run.path / "remarks.json").write_text("[")
    _, runs, skipped = _build.all_records(tmp_path)
    assert runs == [] and "remarks.json is broken" in skipped[0]


STORED = {  # metrics as records.jsonl calls them
    *("forward_s", "backward_s", "optimizer_s", "ttft_s", "tpot_s", "compile_s", "capture_s"),
    *("peak_allocated_bytes", "state_bytes", "graph_pool_bytes", "energy_per_token_j"),
    *("weights_bytes", "gradients_bytes", "optimizer_bytes", "train_flops", "first_call_s"),
    *("num_params", "num_params_non_embedding"),
}
NOT_MEASURED = {  # columns that no metric stands behind
    *("label", "batch_size", "seq_len", "prompt_len", "loop", "heads", "implementation"),
    *("forward_path", "suite", "seed", "status", "n", "boundary_share"),
    *("run", "sooner_run", "sooner_2d_run"),
    *training.CLAIMS,
}


def test_every_column_and_panel_that_is_derived_tells_from_what() -> None:
    """Else a remark on the metric would leave it unmarked."""
    columns = [column for suite, _ in KINDS.values() for column in suite]
    columns += [*OTHER_COLUMNS, *DETAIL_COLUMNS, *_curves.COLUMNS]
    columns += [*training.COLUMNS, *ttft.COLUMNS, *crossover.LINE_COLUMNS]
    panels = [*figures.ALL_PANELS, *attention.PANELS, *crossover.PANELS, *ttft.PANELS]
    keys = {key.removesuffix("_low").removesuffix("_high") for c in columns for key in c.keys}
    keys |= {panel.value for panel in panels}
    told = STORED | NOT_MEASURED | set(measurements.DERIVED_FROM)
    assert keys - told == set()
    assert (STORED | NOT_MEASURED) - keys == set()


@pytest.mark.parametrize(
    ("metric", "marked"),
    [
        ("latency_s", {"latency_s", "speedup", "speedup_2d", "loop_ratio", "floor_share"}),
        ("train_step_s", {"latency_s", "tokens_per_s", "mfu", "time_ratio", "time_2d_ratio"}),
        ("forward_backward_s", {"latency_s", "time_s", "forward_backward_flops_per_s"}),
        ("forward_s", {"forward_s", "forward_flops_per_s"}),
        ("ttft_s", {"ttft_s", "sooner", "sooner_2d"}),
        ("tpot_s", {"tpot_s", "tokens_per_s", "faster"}),
        ("step_s", {"step_mean_s", "step_p50_s", "step_last_s", "step_boundary_p99_s"}),
        ("peak_reserved_bytes", {"peak_bytes", "memory_ratio"}),
        ("peak_allocated_bytes", {"peak_allocated_bytes", "allocated_bytes", "bytes_ratio"}),
        ("state_bytes", {"state_bytes", "state_ratio"}),
        ("state_live_bytes", {"held_bytes"}),
    ],
)
def test_a_remark_marks_what_is_derived_from_its_metric(metric: str, marked: set[str]) -> None:
    row = pd.Series({"remarks": (Remark("Stale.", ("dense",), (metric,)),)})
    assert {name for name in marked if measurements.is_marked(row, name)} == marked
    times, sizes = (
        {"speedup", "speedup_2d", "floor_share", "faster", "sooner", "tokens_per_s"},
        {"peak_bytes", "memory_ratio", "state_ratio", "held_bytes", "allocated_ratio"},
    )
    for name in {"num_params"} | (times if metric.endswith("_bytes") else sizes):
        assert not measurements.is_marked(row, name)


def test_table3_marks_what_a_remark_is_about(tmp_path) -> None:
    run, ours = measure(tmp_path, plan("table3")), ["speed-up (ours)", "memory reduction (ours)"]
    for metric, speedup, memory in (
        ("latency_s", "1.00x\N{DAGGER}", "1.00x"),
        ("peak_reserved_bytes", "1.00x", "1.00x\N{DAGGER}"),
    ):
        remark = {"text": "Stale.", "architectures": ["mamba2"], "metrics": [metric]}
        (run.path / "remarks.json").write_text(json.dumps([remark]))
        text = render("table3", tmp_path).tables[0].text.set_index("method")
        assert list(text.loc["Mamba2", ours]) == [speedup, memory]
        assert list(text.loc["CAT-16", ours]) == ["2.00x faster [2.00, 2.00]", "2.00x"]


# --- our own exhibits: crossover and ttft ---------------------------------------------------------


def test_crossover_decodes_at_a_length_and_shares_all_other_cases() -> None:
    at_lengths = crossover.at_lengths("h100")
    assert {(c.batch_size, c.seq_len - c.prompt_len) for c in at_lengths} == {(16, 256)}
    assert {c.seq_len for c in at_lengths} == {2**power for power in range(10, 16)}
    cats = [c.arch for c in at_lengths if c.seq_len == 32_768 and c.arch.startswith("cat")]
    assert len(cats) == 3 and all("max_len=32768" in arch for arch in cats)
    figures_2_and_3 = {c.key for name in ("fig2", "fig3") for c in plan(name)}
    assert {c.key for c in plan("crossover")} == figures_2_and_3 | {c.key for c in at_lengths}


def test_our_exhibits_add_few_smoke_cases() -> None:
    shared = {c.key for name in ("fig2", "fig3") for c in plan(name, "smoke")}
    assert {c.key for c in plan("crossover", "smoke")} <= shared
    new = {c.key for c in plan("ttft", "smoke")} - shared
    assert len(new) == 3
    assert {(c.batch_size, c.prompt_len, c.seq_len) for c in plan("ttft")} == {
        (1, prompt, prompt + 8) for prompt in (1024, 4096, 16_384, 32_768)
    }


def test_lines_are_named_at_their_ends_and_maps_say_who_wins(tmp_path) -> None:
    measure(tmp_path, plan("crossover", "smoke"), gpu_name=None)
    built = _build.build(["crossover"], "smoke", tmp_path)
    assert built.statuses[0].status == "done"
    records = _build.find(_build.all_records(tmp_path)[0], plan("crossover", "smoke")).records
    content = _build.exhibit("crossover").render(records, [], "smoke")
    names = {_settings.label(name) for name in _build.exhibit("fig3").ARCHITECTURES}
    for axes in content.figure.axes[:4]:
        assert {text.get_text() for text in axes.texts} == names
        heights = sorted(text.get_position()[1] for text in axes.texts)
        assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.065
    assert content.figure.axes[4].get_title(loc="left") == "(e) fastest per token"
    assert {"CAT-8", "1.00x ~"} <= {text.get_text() for text in content.figure.axes[4].texts}
    winners, crossings, lines = content.tables
    assert set(winners.text["fastest"]) <= {"CAT-8", "CAT-16", "CAT-32"}
    assert set(crossings.text["time, batch 4"]) == {"lower from 32 to 64"}
    assert "2.00x faster [2.00, 2.00]" in set(lines.text["vs Dense"])


def test_crossover_renders_without_any_of_its_lines(tmp_path) -> None:
    measure(tmp_path, plan("fig2"))
    records = _build.find(_build.all_records(tmp_path)[0], plan("crossover")).records
    content = _build.exhibit("crossover").render(records, [], "h100")
    assert [table.suffix for table in content.tables] == ["table", "crossings"]


def test_a_winner_and_a_crossing_are_of_one_run(tmp_path) -> None:
    """A newer run, ten times as slow, has one architecture only: it says nothing."""
    cases = plan("crossover")
    cats = [c for c in cases if c.arch.startswith("cat") and c.batch_size == 256]
    dense = [c for c in cases if c.arch == "dense" and c.batch_size == 256]
    first = measure(tmp_path, [*cats, *dense])
    newer = measure(tmp_path, cats, slower=10.0)
    found = _build.find(_build.all_records(tmp_path)[0], cases)
    everything = crossover._measured(found.records, "h100")
    (won, *_) = _one_run.best(everything, "tpot_s")
    assert won.run == first.name and won.label.startswith("CAT") and won.num_compared == 4
    assert _one_run.crossing(everything, "CAT-8", "Dense", "seq_len", "tpot_s") == (
        "lower from 1024.0 to 4096.0"
    )
    shown = everything[everything["is_chosen"] & (everything["label"] == "CAT-8")]
    assert set(shown["run"]) == {newer.name} and shown["faster"].isna().all()


def test_a_setting_without_all_its_systems_names_none_and_says_how_many(tmp_path) -> None:
    measure(tmp_path, [c for c in plan("crossover") if c.arch in ("dense", "cat")])
    text = render("crossover", tmp_path).tables[0].text
    assert set(text["fastest"]) == set(text["smallest"]) == set(text["run"]) == {"-"}
    assert "2 of 11" in set(text["of"]) and all(" of 1" in cell for cell in text["of"])


def test_crossings_are_said_as_intervals() -> None:
    rows = [
        {"run": "0001-a", "label": label, "seq_len": x, "status": "ok", "tpot_s": y}
        for label, line in (("CAT-8", (2, 2, 2)), ("Dense", (1, 3, 1)))
        for x, y in zip((1024, 2048, 4096), line, strict=True)
    ]
    text = _one_run.crossing(
        pd.DataFrame(rows), "CAT-8", "Dense", "seq_len", "tpot_s", _lines.tokens
    )
    assert text == "higher at 1K, crosses between 1K and 2K, crosses between 2K and 4K"


def test_equal_lines_are_neither_higher_nor_lower() -> None:
    def said(*ratios: float) -> str:
        rows = [
            {"run": "0001-a", "label": label, "seq_len": float(x), "status": "ok", "tpot_s": y}
            for x, ratio in enumerate(ratios, 1)
            for label, y in (("A", ratio), ("B", 1.0))
        ]
        return _one_run.crossing(pd.DataFrame(rows), "A", "B", "seq_len", "tpot_s")

    assert said(1, 0.5, 2) == "lower at 2.0, crosses between 2.0 and 3.0"
    assert said(1, 0.5) == "lower from 2.0 to 2.0"
    assert said(1, 1) == "-"


def test_out_of_memory_is_a_result_and_does_not_win() -> None:
    rows = [
        {
            "run": "0001-a", "label": label, "batch_size": 256, "seq_len": 4096, "prompt_len": 8,
            "status": status, "tpot_s": value,
        }
        for label, status, value in (("A", "ok", 1.0), ("B", "ok", 2.0), ("C", "oom", None))
    ]  # fmt: skip
    (won,) = _one_run.best(pd.DataFrame(rows), "tpot_s")
    assert (won.label, won.second, won.num_compared) == ("A", "B", 3)


def test_names_stand_apart_and_inside() -> None:
    heights = _lines.spread({"a": 0.99, "b": 1.0, "c": 0.98, "d": 0.1}, 0.1)
    assert heights == pytest.approx({"c": 0.8, "a": 0.9, "b": 1.0, "d": 0.1})


def test_loops_of_a_pair_stand_side_by_side(tmp_path) -> None:
    """Also pairs of `run upstream`, of scale custom, until the exhibit's own are measured."""
    cases = plan("upstream")
    assert {spec.parse(case.arch).name for case in cases} == {"mamba2", "gated_deltanet"}
    older = [replace(case, scale="custom") for case in cases]
    for loop, slower in (("ours", 1.0), ("upstream", 2.0)):
        chosen = [case for case in older if case.settings == (("loop", loop),)]
        measure(tmp_path, chosen, slower=slower, resolved=None)
    built = _build.build(["upstream"], "h100", tmp_path)
    assert built.statuses[0].status == "partial 0/8"
    assert "8 of an earlier plan" in built.statuses[0].detail
    run = measure(tmp_path, cases)  # both loops take the same time
    _build.build(["upstream"], "h100", tmp_path)
    table = (tmp_path / "paper" / "h100" / "upstream.md").read_text()
    assert table.count("1.00 [1.00, 1.00]") == 4 and run.name in table
    (smoke,) = render("upstream", tmp_path, "smoke").tables
    assert set(smoke.text["loop ratio"]) == {"needs a CUDA GPU"}
    assert status_of(tmp_path, "upstream", "smoke").status == "nothing to measure at this scale"
    assert status_of(tmp_path, "fig4", "smoke").status == "done"  # drawn, not measured


def test_time_to_first_token_has_ratios_of_its_own_run(tmp_path) -> None:
    measure(tmp_path, plan("ttft"))
    built = _build.build(["ttft"], "h100", tmp_path)
    assert built.statuses[0].status.startswith("done")
    table = (tmp_path / "paper" / "h100" / "ttft_table.md").read_text()
    cat8 = next(line for line in table.splitlines() if line.startswith("| CAT-8"))
    assert cat8.count("2.00x faster [2.00, 2.00]") == 2  # Dense and Dense-2D
    assert "bound by launching kernels from Python" in table


def test_a_ratio_is_of_the_newest_run_that_has_both_which_is_named(tmp_path) -> None:
    """A newer run, twice as slow, without the references: its times, the older run's ratios."""
    cats = [c for c in plan("ttft") if c.arch.startswith("cat") and c.prompt_len == 16_384]
    others = [c for c in plan("ttft") if c.arch.startswith("dense")]
    measure(tmp_path, [*cats, *others])

    def cat8() -> pd.Series:
        text = render("ttft", tmp_path).tables[0].text
        return text[(text["architecture"] == "CAT-8") & (text["prompt"] == "16384")].iloc[0]

    assert set(cat8()[["vs Dense", "vs Dense-2D"]]) == {"2.00x faster [2.00, 2.00]"}
    measure(tmp_path, cats, slower=2.0)
    assert cat8()["TTFT ms [95 % CI]"].startswith("3")  # 2 x 16,392 / 2e5 / 50 s
    assert set(cat8()[["vs Dense", "vs Dense-2D"]]) == {"2.00x faster [2.00, 2.00] (0001)"}
    assert "the older one whose number follows" in render("ttft", tmp_path).tables[0].notes[0]
    measure(tmp_path, [c for c in others if c.prompt_len == 16_384], slower=3.0)
    assert cat8()["vs Dense"] == "2.00x faster [2.00, 2.00] (0001)"  # never across two runs
    older = measure(tmp_path, cats, status="oom").path.parent / "0001-made-up"
    assert set(cat8()[["vs Dense", "vs Dense-2D"]]) <= {"-", "oom", ""}
    measure(tmp_path, cats, slower=2.0)
    assert cat8()["vs Dense"].endswith("(0001)")
    remark = {"text": "Stale.", "architectures": ["cat"], "metrics": ["ttft_s"]}
    (older / "remarks.json").write_text(json.dumps([remark]))
    assert older.name in {run.name for run in _build.all_records(tmp_path)[1]}
    assert set(cat8()[["vs Dense", "vs Dense-2D"]]) == {"-"}


def test_a_panel_of_ratios_without_its_reference_says_so_instead_of_naming_ticks(tmp_path) -> None:
    measure(tmp_path, [c for c in plan("ttft") if "width=2048" not in c.arch])
    times, ratios = render("ttft", tmp_path).figure.axes
    assert "not run: Dense-2D" in {text.get_text() for text in ratios.texts}
    assert len(ratios.get_yticks()) == 0 and len(times.get_yticks()) > 1
    measure(tmp_path, [c for c in plan("ttft")])
    assert not {"not run: Dense-2D"} & {
        text.get_text() for text in render("ttft", tmp_path).figure.axes[1].texts
    }


def test_no_leader_crosses_the_panel_in_a_lines_colour(tmp_path) -> None:
    """CAT-8 ends at the first prompt: its name stands there, without a leader."""
    measure(tmp_path, [c for c in plan("ttft") if c.arch == "dense" or c.prompt_len == 1024])
    texts = {text.get_text(): text for text in render("ttft", tmp_path).figure.axes[0].texts}
    assert texts["CAT-8"].xy[0] == 1024 and texts["CAT-8"].arrow_patch is None
    color = texts["Dense"].arrow_patch.get_edgecolor()[:3]
    assert len(set(color)) == 1 and color != (0, 0, 0)  # grey


def test_a_margin_that_prints_as_one_names_no_clear_winner() -> None:
    def best(*ends: float) -> _one_run.Best:
        margin = stats.Interval(*ends, 5)
        return _one_run.Best(1, 1024, 8, "0001-a", "Sliding", 1.0, "BASED", margin, 2)

    assert not best(1.002, 1.001, 1.004).is_clear
    assert not best(1.02, 0.99, 1.04).is_clear
    assert best(1.02, 1.01, 1.04).is_clear


def test_nobody_has_won_where_a_planned_architecture_is_missing() -> None:
    margin = stats.Interval(1.5, 1.4, 1.6, 5)
    full, part = (
        _one_run.Best(batch, 1024, 8, "0001-a", "CAT-32", 1.0, "Dense", margin, number)
        for batch, number in ((64, 11), (128, 5))
    )
    planned = Counter({(64, 1024, 8): 11, (128, 1024, 8): 11})
    complete = crossover._complete([full, part], planned)
    assert crossover._map(complete) == [(64, 1024, "CAT-32", "1.50x")]


def test_figure_6_names_each_state_size_in_its_table() -> None:
    rows = pd.DataFrame({"label": ["Mamba2", "Mamba2", "Dense"], "d_state": [64, 16, None]})
    labels = list(_curves._with_d_state(rows)["label"])
    assert labels == ["Dense", "Mamba2, d_state 16", "Mamba2, d_state 64"]


def test_unknown_exhibit() -> None:
    with pytest.raises(UserError, match="unknown exhibit 'fig99'"):
        _build.exhibit("fig99")
