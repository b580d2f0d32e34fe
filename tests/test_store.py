"""The store loses nothing: torn lines, retries, resumes, broken files, wrong folders."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_bench import store
from cat_bench.case import Case, Record
from cat_bench.errors import UserError
from cat_bench.store import Run

ENVIRONMENT = {"cpu_name": "Some CPU", "gpu_name": "NVIDIA H100", "torch": "2.13.0"}
CASE = Case(
    suite="efficiency",
    arch="cat:chunk_size=8",
    batch_size=4,
    prompt_len=8,
    seq_len=64,
    dtype="float32",
    device="cpu",
    settings=(("reference", "0"),),
)
DENSE = replace(CASE, arch="dense", device="cuda", settings=())
RESOLVED = {
    CASE.key: {"label": "CAT-8", "config": {"chunk_size": 8, "width": 64}, "num_params": 5},
    DENSE.key: {"label": "Dense", "config": {"width": 64}},
}


def rows(case: Case = CASE, latency_s: float = 2.0, status: str = "ok") -> list[Record]:
    """A case's rows as a worker returns them."""
    latency = Record(case.key, "latency_s", latency_s, "s", samples=[latency_s, latency_s + 1])
    return [latency, Record(case.key, "case", 9.0, "s", status=status)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to show that nothing was changed."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "fig2", ENVIRONMENT, [CASE, DENSE], RESOLVED)


# --- round trips


def test_a_new_run_holds_its_plan_and_environment(run: Run):
    again = Run.open(run.path)
    assert again.name == "0001-fig2"
    assert again.environment == ENVIRONMENT
    assert again.cases() == {CASE.key: CASE, DENSE.key: DENSE}
    assert again.resolved() == RESOLVED
    assert again.closed() == {}
    assert again.records().empty


def test_rows_come_back_with_environment_and_time(run: Run):
    run.append(rows())
    found = Run.open(run.path).records()
    assert tuple(found.columns) == store.COLUMNS
    assert list(found["metric"]) == ["latency_s", "case"]
    assert list(found["value"]) == [2.0, 9.0]
    assert found["samples"][0] == [2.0, 3.0]
    assert set(found["environment"]) == {store.digest(ENVIRONMENT)}
    assert set(found["schema"]) == {store.SCHEMA}
    assert (pd.Timestamp.now(tz="UTC") - pd.to_datetime(found["at"][0])).total_seconds() < 60


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
measured = st.builds(
    Record,
    case=st.sampled_from([CASE.key, DENSE.key]),
    metric=texts.filter(lambda name: name != "case"),
    value=st.none() | finite,
    unit=texts,
    samples=st.lists(finite, max_size=5),
    status=st.sampled_from(["ok", "oom", "unsupported", "failed"]),
    error=st.none() | texts,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(measured, max_size=6, unique_by=lambda record: (record.case, record.metric)))
def test_any_record_comes_back_as_it_was(records: list[Record]):
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder), "round trip", {}, [CASE, DENSE])
        run.append(records)
        run.append([Record(key, "case", 1.0, "s") for key in (CASE.key, DENSE.key)])
        found = run.records()
    found = found[found["metric"] != "case"].drop(columns=["environment", "at", "schema"])
    back = {(row["case"], row["metric"]): row for row in found.to_dict("records")}
    assert len(back) == len(found) == len(records)
    for record in records:
        row = back[record.case, record.metric]
        if record.value is None:
            assert math.isnan(row.pop("value"))
            row["value"] = None
        expected = asdict(record)
        assert row == {name: expected[name] for name in row}


def test_files_are_strict_json_even_with_nan(run: Run):
    run.append(
        [
            Record(CASE.key, "perplexity", math.inf, "1", samples=[1.0, math.nan]),
            Record(CASE.key, "case", 1.0, "s"),
        ]
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run.path / "records.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=refuse)
    assert first["value"] is None and first["samples"] == [1.0, None]
    assert first["error"] == "the value was inf"
    found = run.records()
    assert math.isnan(found["value"][0])
    assert found["samples"][0][0] == 1.0 and math.isnan(found["samples"][0][1])


# --- attempts


def test_later_rows_win_and_a_retry_replaces_the_case_whole(run: Run):
    counter = Record(CASE.key, "peak_allocated_bytes", 7.0, "bytes")
    run.append([counter, *rows(status="oom")])
    run.append(rows(latency_s=5.0))
    assert run.closed() == {CASE.key: "ok"}
    found = run.records().set_index("metric")
    assert found.loc["latency_s", "value"] == 5.0
    assert list(found.index) == ["latency_s", "case"]  # no bytes of the attempt that failed


def test_a_case_without_closing_row_is_not_run(run: Run):
    run.append(rows())
    run.append(rows(DENSE)[:1])
    assert run.closed() == {CASE.key: "ok"}
    assert set(run.records()["case"]) == {CASE.key}
    assert set(run.records(open_cases=True)["case"]) == {CASE.key, DENSE.key}
    assert set(store.frame([run])["label"]) == {"CAT-8"}


def test_an_unfinished_retry_does_not_touch_the_closed_attempt(run: Run):
    run.append(rows(latency_s=2.0))
    run.append(rows(latency_s=5.0)[:1])
    assert run.records().set_index("metric").loc["latency_s", "value"] == 2.0
    unfinished = run.records(open_cases=True).set_index("metric")
    assert list(unfinished["value"]) == [5.0]


def test_closing_rows_are_written_last(run: Run):
    run.append([*reversed(rows()), *reversed(rows(DENSE))])
    lines = (run.path / "records.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["metric"] for line in lines]
    assert metrics == ["latency_s", "latency_s", "case", "case"]


# --- interruptions


@pytest.mark.parametrize("num_bytes", [1, 2, 40, 200])
def test_a_torn_last_line_is_dropped_then_cut_off(run: Run, num_bytes: int):
    run.append(rows())
    path = run.path / "records.jsonl"
    whole = path.read_bytes()
    run.append(rows(DENSE))
    torn = whole + path.read_bytes()[len(whole) :][:num_bytes]
    path.write_bytes(torn)

    again = Run.open(run.path)
    assert again.torn
    assert again.closed() == {CASE.key: "ok"}
    assert len(again.records()) == 2
    assert path.read_bytes() == torn  # readers change nothing

    again.append(rows(DENSE))
    assert not again.torn
    assert path.read_bytes().startswith(whole)
    assert again.closed() == {CASE.key: "ok", DENSE.key: "ok"}


def test_a_whole_row_without_newline_counts_as_torn(run: Run):
    run.append(rows())
    path = run.path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # the closing row's newline did not arrive
    assert run.torn
    assert run.closed() == {}
    run.append(rows(DENSE))
    assert run.closed() == {DENSE.key: "ok"}
    assert len(path.read_text().splitlines()) == 3


def test_a_torn_first_line(run: Run):
    (run.path / "records.jsonl").write_bytes(b'{"case": "ab')
    assert run.torn and run.records().empty
    run.append(rows())
    assert not run.torn and run.closed() == {CASE.key: "ok"}


def test_an_untouched_run_is_not_torn(run: Run):
    assert not run.torn
    run.append(rows())
    assert not run.torn


WRITER = """
import sys
from pathlib import Path
from cat_bench.case import Record
from cat_bench.store import Run
run = Run.open(Path(sys.argv[1]))
for number in range(100_000):
    samples = [float(number)] * 200
    key = f"{number:012x}"
    run.append([Record(key, "a", 1.0, "s", samples), Record(key, "case", 1.0, "s")])
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def test_a_killed_writer_loses_no_closed_case(run: Run):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run.path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(20)  # at least 20 cases are written
        process.kill()
    acknowledged = 20
    run.append(rows())
    found = run.records()
    assert len(run.closed()) >= acknowledged + 1
    assert (found.groupby("case").size() == 2).all()  # every closed case is whole


# --- broken input


@pytest.mark.parametrize(
    "broken",
    [b"{oops\n", b"\n", b"3\n", b"\xff\xfe\n", b'{"case": "ab"}\n'],
    ids=["not JSON", "empty", "not an object", "not text", "fields missing"],
)
def test_a_broken_line_in_the_middle_names_file_and_line(run: Run, broken: bytes):
    path = run.path / "records.jsonl"
    run.append(rows())
    path.write_bytes(path.read_bytes() + broken)
    run.append(rows(DENSE))
    before = content(run.path)
    for read in (run.records, run.closed, lambda: store.frame([run])):
        with pytest.raises(UserError, match=r"records\.jsonl, line 3 "):
            read()
    assert content(run.path) == before


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("value", "x", "value is 'x', expected a number or null"),
        ("samples", "abc", "samples is 'abc', expected a list of numbers"),
        ("samples", [1.0, "x"], "samples hold 'x', expected a list of numbers"),
        ("status", None, "status is None, expected a text"),
        ("case", ["a"], "expected a text"),
    ],
)
def test_a_value_of_another_type_names_file_and_line(
    run: Run, field: str, value: object, words: str
):
    run.append(rows())
    path = run.path / "records.jsonl"
    first, *rest = path.read_text().splitlines()
    lines = [json.dumps({**json.loads(first), field: value}), *rest]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"records\.jsonl, line 1 is not a row: .*{words}"):
        store.frame([run])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "is None, expected an object"),
        ({"label": "x", "config": "width"}, "config 'width', expected an object"),
        ({"label": 5, "config": {}}, "label 5, expected a text"),
    ],
)
def test_a_plan_that_resolved_to_something_else_is_refused(run: Run, entry: object, words: str):
    path = run.path / "plan.json"
    plan = json.loads(path.read_text())
    plan["resolved"][CASE.key] = entry
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=rf"plan\.json .*{CASE.key} .*{words}") as caught:
        store.frame([run])
    assert caught.value.hint


@pytest.mark.parametrize("field", ["torch", "commit", "gpu_name", "command"])
def test_an_environment_of_another_type_is_refused(run: Run, field: str):
    path = run.path / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 5}))
    with pytest.raises(UserError, match=rf"environment\.json has {field} 5, expected a text") as e:
        Run.open(run.path)
    assert e.value.hint


@pytest.mark.parametrize("schema, words", [(99, "newer cat-bench: schema 99"), ("1", "'1'")])
def test_a_row_of_another_schema_is_refused(run: Run, schema: object, words: str):
    run.append(rows())
    path = run.path / "records.jsonl"
    path.write_text(path.read_text().replace('"schema": 1', f'"schema": {json.dumps(schema)}'))
    with pytest.raises(UserError, match=words) as caught:
        run.records()
    assert "line 1" in caught.value.message and caught.value.hint


def test_a_plan_of_a_newer_schema_is_refused(run: Run):
    path = run.path / "plan.json"
    path.write_text(json.dumps({"schema": 99, "cases": {}, "resolved": {}}))
    with pytest.raises(UserError, match="newer cat-bench"):
        Run.open(run.path)


@pytest.mark.parametrize("name", ["environment.json", "plan.json"])
@pytest.mark.parametrize(
    "text, words",
    [(None, "is missing"), ("{", "is broken"), ("[1]", "expected an object"), ("", "is broken")],
)
def test_a_broken_folder_is_refused_and_left_alone(
    run: Run, name: str, text: str | None, words: str
):
    (run.path / name).unlink()
    if text is not None:
        (run.path / name).write_text(text)
    before = content(run.path)
    with pytest.raises(UserError, match=words) as caught:
        Run.open(run.path)
    assert name in caught.value.message and caught.value.hint
    assert content(run.path) == before


@pytest.mark.parametrize(
    "plan",
    [
        {"schema": 1, "cases": {}},
        {"schema": 1, "cases": [], "resolved": {}},
        {"cases": {}, "resolved": {}},
    ],
)
def test_a_plan_with_parts_missing_is_refused(run: Run, plan: dict):
    (run.path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"plan\.json"):
        Run.open(run.path)


def test_a_case_that_this_version_cannot_read(run: Run):
    path = run.path / "plan.json"
    path.write_text(path.read_text().replace('"suite"', '"colour"'))
    with pytest.raises(UserError, match="cannot read"):
        Run.open(run.path).cases()


def test_rows_of_a_case_that_nobody_planned(run: Run):
    run.append([Record("0" * 12, "case", 1.0, "s")])
    with pytest.raises(UserError, match="000000000000"):
        store.frame([run])


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        Run.open(tmp_path / "file")


def test_a_refused_write_is_a_sentence(tmp_path: Path, run: Run):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        Run.create(tmp_path / "file", "x", {})
    with pytest.raises(UserError, match="cannot write"):
        Run.create(tmp_path / "file" / "below", "x", {})
    (run.path / "records.jsonl").unlink(missing_ok=True)
    (run.path / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*records\.jsonl: Is a directory"):
        run.append(rows())


# --- plan, environment


def test_the_plan_grows_and_keeps_what_it_has(run: Run):
    run.append(rows())
    more = replace(CASE, batch_size=16)
    run.extend_plan([more, CASE], {more.key: {"label": "CAT-8"}})
    again = Run.open(run.path)
    assert list(again.cases().values()) == [CASE, DENSE, more]
    assert again.resolved() == {**RESOLVED, more.key: {"label": "CAT-8"}}
    assert again.closed() == {CASE.key: "ok"}


def test_the_plan_is_replaced_at_once_or_not_at_all(run: Run, monkeypatch: pytest.MonkeyPatch):
    before = (run.path / "plan.json").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        run.extend_plan([replace(CASE, seed=1)], {})
    assert (run.path / "plan.json").read_bytes() == before


def test_a_reader_of_the_plan_never_sees_a_part_of_it(run: Run):
    with (run.path / "plan.json").open() as reader:  # began before the plan grew
        run.extend_plan([replace(CASE, seed=1)], {})
        assert len(json.load(reader)["cases"]) == 2
    assert len(run.cases()) == 3


def test_rows_keep_the_key_that_they_were_run_with(run: Run):
    """A field added to Case later changes keys; old rows must still find their case."""
    run.append(rows())
    for name in ("plan.json", "records.jsonl"):
        path = run.path / name
        path.write_text(path.read_text().replace(CASE.key, "a" * 12))
    assert list(store.frame([run])["arch"]) == [CASE.arch] * 2


def test_a_resume_keeps_both_environments(run: Run):
    run.append(rows())
    later = {**ENVIRONMENT, "command": "cat-bench run --resume 1"}
    again = Run.open(run.path)
    again.resume_under(later)
    again.append(rows(DENSE))
    found = Run.open(run.path)
    assert found.environment == ENVIRONMENT
    assert found.environments() == {store.digest(each): each for each in (ENVIRONMENT, later)}
    by_case = found.records().set_index("case")["environment"]
    assert set(by_case[CASE.key]) == {store.digest(ENVIRONMENT)}
    assert set(by_case[DENSE.key]) == {store.digest(later)}


def test_the_digest_ignores_the_order_of_keys():
    assert store.digest({"a": 1, "b": 2}) == store.digest({"b": 2, "a": 1})
    assert store.digest({"a": 1}) != store.digest({"a": 2})
    assert len(store.digest({})) == 12


# --- frame


def test_frame_describes_every_row(run: Run):
    run.append([*rows(), *rows(DENSE)])
    found = store.frame([run])
    assert len(found) == 4
    cat = found[found["label"] == "CAT-8"].iloc[0]
    assert cat["run"] == "0001-fig2"
    assert cat["arch"] == "cat:chunk_size=8" and cat["batch_size"] == 4
    assert cat["settings"] == (("reference", "0"),)
    assert cat["device_name"] == "Some CPU"
    assert cat["samples"] == [2.0, 3.0] and cat["value"] == 2.0 and cat["unit"] == "s"
    dense = found[found["label"] == "Dense"].iloc[0]
    assert dense["device_name"] == "NVIDIA H100"
    assert dense["config.chunk_size"] is None and dense["config.width"] == 64


def test_config_fields_keep_their_type_where_others_lack_them(run: Run):
    run.append([*rows(), *rows(DENSE)])
    found = store.frame([run])["config.chunk_size"]
    assert [str(value) for value in found] == ["8", "8", "None", "None"]  # not 8.0


def test_frame_joins_runs_and_keeps_them_apart(run: Run, tmp_path: Path):
    other = Run.create(tmp_path, "fig3", ENVIRONMENT, [CASE], RESOLVED)
    run.append(rows())
    other.append(rows(latency_s=4.0))
    found = store.frame([run, other])
    latency = found[found["metric"] == "latency_s"].set_index("run")["value"]
    assert dict(latency) == {"0001-fig2": 2.0, "0002-fig3": 4.0}


def test_frame_without_rows_has_its_columns(run: Run):
    for found in (store.frame([run]), store.frame([])):
        assert found.empty
        assert {"run", "label", "device_name", "suite", "metric", "value"} <= set(found.columns)


def test_a_case_that_resolved_to_nothing_is_labelled_by_its_spec(tmp_path: Path):
    run = Run.create(tmp_path, "bare", {}, [CASE])
    run.append(rows())
    found = store.frame([run])
    assert set(found["label"]) == {"cat:chunk_size=8"}
    assert set(found["device_name"]) == {"unknown"}


# --- names


@pytest.mark.parametrize(
    "name, folder",
    [
        ("fig2", "0001-fig2"),
        ("../../etc/passwd", "0001-etc-passwd"),
        ("two words", "0001-two-words"),
        ("", "0001-run"),
        ("...", "0001-run"),
        ("x" * 300, "0001-" + "x" * 60),
        ("Gr\u00fc\u00dfe", "0001-Gr-e"),
    ],
)
def test_names_are_safe_folder_names(tmp_path: Path, name: str, folder: str):
    run = Run.create(tmp_path / "results", name, {})
    assert run.path == tmp_path / "results" / folder
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]


def test_numbers_go_on_after_the_highest(tmp_path: Path):
    (tmp_path / "0007-old").mkdir()
    (tmp_path / "paper").mkdir()
    (tmp_path / "9999.txt").write_text("")
    names = [Run.create(tmp_path, name, {}).name for name in ("a", "a")]
    assert names == ["0008-a", "0009-a"]
    (tmp_path / "9999-full").mkdir()
    assert Run.create(tmp_path, "a", {}).name == "10000-a"
    assert [path.name for path in store.folders(tmp_path)][-1] == "10000-a"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("fig2", "fig3", "fig3", "12"):
        Run.create(tmp_path / "results", name, {})
    return tmp_path / "results"


@pytest.mark.parametrize(
    "text, folder",
    [
        ("0001-fig2", "0001-fig2"),
        ("fig2", "0001-fig2"),
        ("1", "0001-fig2"),
        ("0003", "0003-fig3"),
        ("12", "0004-12"),
        ("4", "0004-12"),
    ],
)
def test_find(results: Path, text: str, folder: str):
    assert store.find(results, text).name == folder


def test_find_by_path(results: Path):
    assert store.find(results, f"{results}/0002-fig3/").name == "0002-fig3"
    assert store.find(results.parent / "elsewhere", str(results / "0002-fig3")).name == "0002-fig3"


@pytest.mark.parametrize("text", ["ab/0001-before", "ab/0001-before/", "ab/0001", "ab/before"])
def test_find_below_a_subfolder(results: Path, text: str):
    Run.create(results / "ab", "before", {})
    assert store.find(results, text).path == results / "ab" / "0001-before"
    with pytest.raises(UserError, match="no run '9' in .*ab"):
        store.find(results, "ab/9")
    with pytest.raises(UserError, match="no run 'none/9'"):
        store.find(results, "none/9")


def test_a_run_of_another_folder_is_not_taken_for_one_of_a_subfolder(
    results: Path, monkeypatch: pytest.MonkeyPatch
):
    Run.create(results / "ab", "before", {})
    monkeypatch.chdir(results)  # where 0002-fig3 is a path
    with pytest.raises(UserError, match="no run '0002-fig3' in ab"):
        store.find(Path(), "ab/0002-fig3")


def test_find_refuses_to_guess(results: Path):
    with pytest.raises(UserError, match="several runs: 0002-fig3, 0003-fig3"):
        store.find(results, "fig3")


@pytest.mark.parametrize("text", ["fgi2", "0001-fig22", "FIG2"])
def test_find_names_near_runs(results: Path, text: str):
    with pytest.raises(UserError, match="no run") as caught:
        store.find(results, text)
    assert "Did you mean: " in caught.value.hint and "0001-fig2" in caught.value.hint


@pytest.mark.parametrize("text", ["", "99", "zebra"])
def test_find_lists_the_latest_runs(results: Path, text: str):
    with pytest.raises(UserError, match="no run") as caught:
        store.find(results, text)
    assert "Latest runs: 0001-fig2, 0002-fig3, 0003-fig3, 0004-12" in caught.value.hint


def test_find_without_any_run(tmp_path: Path):
    with pytest.raises(UserError, match="no run 'fig2'") as caught:
        store.find(tmp_path / "results", "fig2")
    assert "no runs in" in caught.value.hint


# --- speed and imports


def test_twenty_thousand_records_read_in_half_a_second(run: Run):
    cases = [replace(CASE, seed=seed) for seed in range(1000)]
    run.extend_plan(cases, {})
    metrics = [f"metric_{number}_s" for number in range(19)] + ["case"]
    samples = [0.123456789] * 10
    run.append([Record(case.key, name, 1.0, "s", samples) for case in cases for name in metrics])

    def seconds() -> float:
        start = time.process_time()  # of this process: others on the machine do not count
        assert len(run.records()) == 20_000
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_every_stored_field_and_metric_is_documented():
    project = Path(store.__file__).parents[1]
    readme = (project / "results" / "README.md").read_text(encoding="utf-8")
    suite = (project / "cat_bench" / "suites" / "efficiency.py").read_text(encoding="utf-8")
    metrics = re.findall(r'_(?:row|sampled)\(\s*case,\s*"(\w+)"', suite)
    assert len(metrics) > 20
    names = {*metrics, *store.COLUMNS, *store.CASE_FIELDS}
    assert [name for name in sorted(names) if f"`{name}`" not in readme] == []


def test_listing_and_finding_runs_needs_no_pandas_and_no_torch(run: Run):
    program = (
        "import sys; from pathlib import Path; from cat_bench import store;"
        "run = store.find(Path(sys.argv[1]), '1'); run.closed(); run.cases();"
        "print(sorted({'pandas', 'numpy', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(run.path.parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_rows_of_a_torn_attempt_never_join_the_next_one(tmp_path: Path, monkeypatch) -> None:
    """A process died inside `append`; the case ran again and ended without that metric."""
    case = Case("efficiency", "dense", 1, 8, 16, "float32", "cpu")
    run = Run.create(tmp_path, "torn", {}, [case])
    monkeypatch.setattr(store, "_now", lambda: "2026-01-01T00:00:00.000Z")
    run.append([Record(case.key, "latency_s", 1.0, "s")])  # its closing row never arrived
    monkeypatch.setattr(store, "_now", lambda: "2026-01-01T00:00:01.000Z")
    again = [Record(case.key, "weights_bytes", 2.0, "bytes"), Record(case.key, "case", 1.0, "s")]
    run.append(again)
    assert set(run.records()["metric"]) == {"weights_bytes", "case"}
