"""The runner: fresh processes, what each kind of ending leaves behind, skipping, resuming.

Workers here are real processes over a tiny architecture and suite, written into a temporary folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cat_bench import runner, user_code
from cat_bench.case import Case, Record
from cat_bench.errors import UserError
from cat_bench.spec import resolve
from cat_bench.store import Run

ROOT = Path(__file__).resolve().parents[1]

ARCHITECTURE = '''"""A model of one number, whose steps fail on request."""

import os
from dataclasses import dataclass

import torch
from torch import nn

REQUIRES = {"upstream": "no_such_package_anywhere"}


@dataclass(frozen=True)
class Config:
    fault: str = "none"


class Model(nn.Module):
    decode_paths = ("eager", "upstream")

    def __init__(self, config, decode_path):
        super().__init__()
        self.config, self.decode_path = config, decode_path
        self.weight = nn.Parameter(torch.rand(()))
        self.max_len = None
        self.num_params = self.num_params_non_embedding = 1

    def forward(self, tokens):
        raise NotImplementedError

    init_state = reset = prefill = state_bytes = state_bytes_float = step_costs = forward

    def step(self, token, state):
        if self.config.fault == "oom":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        if self.config.fault == "library":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        if self.config.fault == "error":
            raise ValueError("the planted fault")
        if self.config.fault == "kill":
            os.kill(os.getpid(), 9)
        return token, state
'''

SUITE = '''"""Two rows, with one step of the model between them."""

import os
import sys
import time
from pathlib import Path

import torch

from cat_bench.case import Record


def plan(specs, options):
    return []


def measure(case, model):
    print("a library prints to stdout", flush=True)
    settings = dict(case.settings)
    yield Record(case.key, "process_id", os.getpid(), "1", [1.0, 2.0])
    model.step(0, 0)
    if "until" in settings:  # hangs until that file exists
        Path(settings["until"] + ".started").write_text(str(os.getpid()))
        while not Path(settings["until"]).exists():
            time.sleep(0.05)
    yield Record(case.key, "drawn", float(torch.rand(())), "1")
    yield Record(case.key, "weight", float(model.weight), "1")
'''

PLUG_IN = '''"""Python imports this at its start: it adds the folder of the fake suite."""

from pathlib import Path

from cat_bench import spec

spec.SUITE_FOLDERS["fake_suites"] = Path(__file__).parent / "fake_suites"
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the fake architecture and suite, on the search path of every worker."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "fake_suites").mkdir()
    (folder / "fake_suites" / "fake.py").write_text(SUITE)
    (folder / "sitecustomize.py").write_text(PLUG_IN)
    (folder / "tiny.py").write_text(ARCHITECTURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def make_case(world: Path, arch: str = "", **fields) -> Case:
    path = f"{world / 'tiny.py'}"
    basics = dict(batch_size=1, prompt_len=1, seq_len=2, dtype="float32", device="cpu")
    return Case(suite="fake", arch=f"{path}:{arch}" if arch else path, **{**basics, **fields})


def new_run(folder: Path, cases: list[Case]) -> Run:
    return Run.create(folder, "test", {"source_hash": "a"}, cases, {})


def values(run: Run, case: Case) -> dict[str, float]:
    rows = run.records()
    rows = rows[rows["case"] == case.key]
    return dict(zip(rows["metric"], rows["value"], strict=True))


def closing(run: Run, case: Case) -> dict:
    rows = run.records()
    return rows[(rows["case"] == case.key) & (rows["metric"] == "case")].iloc[0].to_dict()


# --- how a case can end ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(world, tmp_path_factory):
    """One sweep in which cases end in every way that there is."""
    cases = {
        "first": make_case(world, seed=3),
        "oom": make_case(world, "fault=oom"),
        "library": make_case(world, "fault=library"),
        "error": make_case(world, "fault=error"),
        "kill": make_case(world, "fault=kill"),
        "package": make_case(world, decode_path="upstream"),
        "cuda": make_case(world, device="cuda"),
    }
    run = new_run(tmp_path_factory.mktemp("results"), list(cases.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is a GPU
        patch.setenv("OMP_NUM_THREADS", "1")
        summary = runner.execute(list(cases.values()), run)
    return cases, run, summary


@pytest.mark.slow
def test_every_ending_is_a_row_and_the_sweep_goes_on(sweep):
    cases, run, summary = sweep
    assert summary == runner.Summary(ok=1, oom=2, unsupported=2, failed=2)
    ends = {name: run.closed()[case.key] for name, case in cases.items()}
    assert ends == {
        "first": "ok",
        "oom": "oom",
        "library": "oom",
        "error": "failed",
        "kill": "failed",
        "package": "unsupported",
        "cuda": "unsupported",
    }


@pytest.mark.slow
def test_a_measured_case_keeps_its_rows_and_samples(sweep):
    cases, run, _ = sweep
    found = values(run, cases["first"])
    assert set(found) == {"process_id", "drawn", "weight", "case"}
    assert found["process_id"] != os.getpid()
    assert found["case"] > 0  # wall seconds
    rows = run.records()
    assert rows[rows["metric"] == "process_id"].iloc[0]["samples"] == [1.0, 2.0]


@pytest.mark.slow
def test_the_seed_of_the_case_decides_the_random_numbers(sweep):
    import torch

    cases, run, _ = sweep
    generator = torch.Generator().manual_seed(3)
    weight, drawn = torch.rand((), generator=generator), torch.rand((), generator=generator)
    found = values(run, cases["first"])
    assert found["weight"] == pytest.approx(float(weight))
    assert found["drawn"] == pytest.approx(float(drawn))


@pytest.mark.slow
def test_rows_before_the_fault_are_kept_and_processes_are_fresh(sweep):
    cases, run, _ = sweep
    reached = ["first", "oom", "library", "error", "kill"]
    processes = [values(run, cases[name])["process_id"] for name in reached]
    assert len(set(processes)) == len(reached)
    assert "drawn" not in values(run, cases["oom"])


@pytest.mark.slow
def test_errors_say_what_happened(sweep):
    cases, run, _ = sweep
    error = {name: closing(run, case)["error"] for name, case in cases.items()}
    assert error["first"] is None
    assert error["oom"] == "tried to allocate 1 TiB"
    assert "CUBLAS_STATUS_ALLOC_FAILED" in error["library"]
    assert error["error"].splitlines()[0] == "ValueError: the planted fault"
    assert "Traceback" in error["error"] and str(ROOT) not in error["error"]
    assert "signal 9 (SIGKILL)" in error["kill"] and "memory" in error["kill"]
    assert "needs the package no_such_package_anywhere" in error["package"]
    assert "pip install no_such_package_anywhere" in error["package"]
    assert "'cuda' is not available" in error["cuda"]


@pytest.mark.slow
def test_a_timeout_is_a_failure_and_ends_the_worker(world, tmp_path):
    case = make_case(world, settings=(("until", str(tmp_path / "never")),))
    run = new_run(tmp_path, [case])
    summary = runner.execute([case], run, timeout_s=0.3)
    assert summary == runner.Summary(failed=1, timed_out=1)
    assert closing(run, case)["error"].startswith("ended after the timeout of 0.3 s")
    assert 0.3 <= closing(run, case)["value"] < 30


# --- interruption and resume ----------------------------------------------------------------------

DRIVER = """
import json, signal, sys
from pathlib import Path
from cat_bench import runner
from cat_bench.store import Run

signal.signal(signal.SIGINT, signal.default_int_handler)  # also when started in the background
run = Run.open(Path(sys.argv[1]))
summary = runner.execute(run.cases().values(), run)
print(json.dumps(summary._asdict()))
sys.exit(130 if summary.interrupted else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_keeps_closed_cases_and_resumes(world, tmp_path, stop):
    until = tmp_path / "go"
    first, second = make_case(world), make_case(world, settings=(("until", str(until)),))
    run = new_run(tmp_path, [first, second])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(world), str(ROOT)])},
    )
    started = Path(f"{until}.started")
    _wait_for(started)
    worker = int(started.read_text())
    driver.send_signal(stop)
    printed, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert json.loads(printed) == runner.Summary(ok=1, interrupted=True)._asdict()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert run.closed() == {first.key: "ok"}
    before = values(run, first)

    until.touch()
    assert runner.execute([first, second], run) == runner.Summary(ok=1, skipped=1)
    assert run.closed() == {first.key: "ok", second.key: "ok"}
    assert values(run, first) == before


def _wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline_s, f"{path} did not appear"
        time.sleep(0.05)


# --- the sweep itself, with the process replaced --------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Replaces the worker: every case ends with the status that its suite is named after."""
    keys = []

    def instead(_, case: Case, timeout_s: float, following: Case | None) -> list[Record]:
        keys.append(case.key)
        if case.suite == "interrupt":
            raise KeyboardInterrupt
        return [
            Record(case.key, "latency_s", 1.0, "s"),
            Record(case.key, "case", 10.0, "s", status=case.suite),
        ]

    monkeypatch.setattr(runner.Workers, "measure", instead)
    return keys


def plain_case(suite: str, batch_size: int = 1) -> Case:
    return Case(suite, "dense", batch_size, 1, 2, "float32", "cpu")


@pytest.mark.parametrize(("device", "first"), [("cuda", "new new"), ("cpu", "new end")])
def test_the_next_worker_waits_while_a_gpu_is_measured(monkeypatch, tmp_path, device, first):
    """One process a case, each ended; on a CPU none runs beside the one that is timed."""
    told = []

    class FakeWorker:
        def __init__(self):
            told.append("new")

        def start(self, case: Case) -> None:
            self.case = case

        def finish(self, timeout_s: float) -> list[Record]:
            return [Record(self.case.key, "case", 1.0, "s")]

        def close(self) -> None:
            told.append("end")

    monkeypatch.setattr(runner, "Worker", FakeWorker)
    cases = [replace(plain_case("ok", n), device=device) for n in (1, 2, 3)]
    assert runner.execute(cases, new_run(tmp_path, cases)) == runner.Summary(ok=3)
    assert (told.count("new"), told.count("end"), " ".join(told[:2])) == (3, 3, first)


def test_closed_cases_are_skipped_and_doubles_measured_once(measured, tmp_path):
    a, b = plain_case("ok", 1), plain_case("ok", 2)
    run = new_run(tmp_path, [a, b])
    assert runner.execute([a, a], run) == runner.Summary(ok=1)
    assert runner.execute([a, b, a], run) == runner.Summary(ok=1, skipped=1)
    assert measured == [a.key, b.key]


@pytest.mark.parametrize("retry", [{"oom"}, {"failed"}, {"oom", "failed"}])
def test_retry_measures_only_these_statuses_again(measured, tmp_path, retry):
    cases = [plain_case(status) for status in ("ok", "oom", "unsupported", "failed")]
    run = new_run(tmp_path, cases)
    runner.execute(cases, run)
    del measured[:]
    summary = runner.execute(cases, run, retry=retry)
    assert measured == [case.key for case in cases if case.suite in retry]
    assert summary.skipped == 4 - len(retry)


def test_retry_of_an_unknown_status_is_refused(measured, tmp_path):
    with pytest.raises(UserError, match="'okay'; expected some of: failed, oom, unsupported"):
        runner.execute([], new_run(tmp_path, []), retry={"okay"})


def test_interrupt_counts_what_was_closed(measured, tmp_path):
    cases = [plain_case("ok"), plain_case("interrupt"), plain_case("oom")]
    run = new_run(tmp_path, cases)
    assert runner.execute(cases, run) == runner.Summary(ok=1, interrupted=True)
    assert run.closed() == {cases[0].key: "ok"}


def test_progress_tells_the_next_case_and_the_time_left(measured, tmp_path):
    cases = [plain_case("ok", size) for size in (1, 2, 3, 4)]
    run = new_run(tmp_path, cases)
    runner.execute(cases[:1], run)
    seen = []
    runner.execute(cases, run, progress=lambda *args: seen.append(args))
    assert seen == [
        (1, 4, cases[1], None),
        (2, 4, cases[2], 20.0),
        (3, 4, cases[3], 10.0),
        (4, 4, None, 0.0),
    ]


def test_a_second_writer_is_refused_until_the_first_has_ended(measured, tmp_path):
    case = plain_case("ok")
    run = new_run(tmp_path, [case])
    refusals = []

    def second_writer(*_):
        for attempt in (
            lambda: runner.execute([case], Run.open(run.path)),
            lambda: runner.check_resume(Run.open(run.path), {"source_hash": "a"}),
        ):
            with pytest.raises(UserError) as caught:
                attempt()
            refusals.append(str(caught.value))

    assert runner.execute([case], run, progress=second_writer).ok == 1
    assert len(refusals) == 4  # before the case and at the end
    for refusal in refusals:
        assert "run 0001-test is being measured by another process" in refusal
        assert "Wait" in refusal and "start a new run" in refusal
    assert measured == [case.key]
    assert runner.execute([case], run).skipped == 1


def test_sigterm_is_itself_again_after_the_sweep(measured, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    runner.execute([plain_case("ok")], new_run(tmp_path, [plain_case("ok")]))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("key", "now", "says"),
    [
        ("gpu_name", "NVIDIA A100 80GB PCIe", "GPU was NVIDIA H200, is NVIDIA A100 80GB PCIe"),
        ("source_hash", "b", "source hash of cat-bench was a, is b"),
    ],
)
def test_resume_elsewhere_is_refused(tmp_path, key, now, says):
    environment = {"gpu_name": "NVIDIA H200", "source_hash": "a"}
    run = Run.create(tmp_path, "test", environment, [], {})
    runner.check_resume(run, dict(environment))
    with pytest.raises(UserError, match="0001-test cannot be continued here") as caught:
        runner.check_resume(run, {**environment, key: now})
    assert says in caught.value.message
    assert "Start a new run" in caught.value.hint


@pytest.fixture
def edited(world, tmp_path):
    """Two cases of a file, one of a file of ours; the file has changed since they were planned."""
    mine = tmp_path / "mine.py"
    mine.write_text(ARCHITECTURE)
    cases = [replace(plain_case("ok", size), arch=str(mine)) for size in (1, 2)]
    planned = user_code.source_hash(resolve(str(mine)))
    resolved = {case.key: {"source_hash": planned} for case in cases}
    run = Run.create(tmp_path, "test", {}, [*cases, plain_case("ok")], resolved)
    mine.write_text(ARCHITECTURE + "# edited\n")
    return run


@pytest.mark.parametrize(
    ("status", "retry", "mixed"),
    [
        ("ok", set(), True),
        ("oom", set(), True),
        ("oom", {"oom"}, False),  # measured again
        ("failed", set(), False),
        (None, set(), False),
    ],
)
def test_a_resume_is_refused_where_two_versions_would_be_measured(edited, status, retry, mixed):
    key = next(iter(edited.cases()))
    if status is not None:
        edited.append([Record(key, "case", 1.0, "s", status=status)])
    assert len(runner.edited_files(edited, retry)) == 1
    if not mixed:
        runner.check_resume(edited, {}, retry)
        return
    with pytest.raises(UserError, match="mine.py, or a file beside it .* changed since the plan"):
        runner.check_resume(edited, {}, retry)


def test_a_file_of_closed_cases_may_change(edited):
    for key in list(edited.cases())[:2]:
        edited.append([Record(key, "case", 1.0, "s")])
    assert runner.edited_files(edited) == {}
    runner.check_resume(edited, {})


def test_a_file_that_is_edited_during_a_sweep_is_not_measured(measured, edited):
    cases = edited.cases().values()
    assert runner.execute(cases, edited) == runner.Summary(ok=1, failed=2)
    assert [edited.cases()[key].arch for key in measured] == ["dense"]
    error = closing(edited, next(iter(cases)))["error"]
    assert error.startswith("not measured: ") and "has changed since the plan" in error


def test_the_driver_needs_no_torch():
    code = "import cat_bench.runner, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_code", "out_of_memory", "says"),
    [
        (3, False, "exit code 3"),
        (-11, True, "signal 11 (SIGSEGV)"),
        (-9, True, "signal 9 (SIGKILL): host memory was short"),
        (-9, False, "signal 9 (SIGKILL); nothing shows that host memory was short"),
    ],
)
def test_reason_of_death(exit_code, out_of_memory, says):
    assert says in runner.reason_of_death(exit_code, out_of_memory, "")


def test_reason_of_an_exception_is_its_last_line():
    log = "Traceback (most recent call last):\n  File x\nValueError: boom"
    assert runner.reason_of_death(1, False, log) == "ValueError: boom"


def test_clock_rows_are_one_number_each(monkeypatch):
    from cat_bench import worker

    state = {"sm_clock_hz": 1.755e9, "power_w": 352.5, "slow_down_reasons": ["sw_power_cap"]}
    monkeypatch.setattr(worker, "clock_state", lambda: state)
    case = Case("fake", "dense", 1, 1, 2, "float32", "cuda")
    rows = {row.metric: (row.value, row.unit) for row in worker.clock_rows(case, "after")}
    assert rows == {
        "sm_clock_hz_after": (1.755e9, "Hz"),
        "power_w_after": (352.5, "W"),
        "slow_down_sw_power_cap_after": (1.0, "1"),
    }
    on_cpu = Case("fake", "dense", 1, 1, 2, "float32", "cpu")
    assert list(worker.clock_rows(on_cpu, "after")) == []


def test_only_lack_of_memory_is_out_of_memory():
    import torch

    from cat_bench.profiler import is_out_of_memory

    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_weights_that_cannot_be_loaded_are_never_random_instead(world):
    from cat_bench.worker import build_model

    with pytest.raises(UserError, match="weights 'abc' cannot be loaded"):
        build_model(make_case(world, weights="abc"))


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError, "planted"), (RuntimeError, "CUDA out of memory"), (OSError, "disk")],
)
def test_a_model_that_fails_in_the_worker_is_no_lack_of_the_machine(tmp_path, error, text):
    """The error itself leaves: the row is then failed with its traceback, or out of memory."""
    from cat_bench.worker import build_model

    line = "        super().__init__()\n"
    assert ARCHITECTURE.count(line) == 1
    raising = f"        raise {error.__name__}({text!r})\n"
    (tmp_path / "tiny.py").write_text(ARCHITECTURE.replace(line, raising))
    with pytest.raises(error, match=text):
        build_model(make_case(tmp_path))


def test_a_step_may_import_what_lies_beside_its_file(tmp_path, monkeypatch):
    from cat_bench import worker

    (tmp_path / "cat_bench_beside.py").write_text("VALUE = 7\n")
    late = "        import cat_bench_beside\n        return cat_bench_beside.VALUE\n"
    step = "    def step(self, token, state):\n"
    (tmp_path / "tiny.py").write_text(ARCHITECTURE.replace(step, step + late))
    case = make_case(tmp_path)

    class Suite:
        @staticmethod
        def measure(case, model):
            yield Record(case.key, "step", model.step(0, 0), "1")

    monkeypatch.setattr(worker, "load", lambda name: Suite)
    assert [record.value for record in worker.measure(case)] == [7]


def test_an_unknown_forward_path_is_refused(world):
    from cat_bench.worker import build_model

    with pytest.raises(UserError, match="no forward path 'flex'; it has: eager"):
        build_model(make_case(world, forward_path="flex"))


@pytest.mark.parametrize("path", ["decode_path", "forward_path"])
def test_on_a_gpu_a_missing_package_is_named_with_its_install_command(world, monkeypatch, path):
    import torch

    from cat_bench.worker import build_model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="needs the package no_such_package_anywhere") as error:
        build_model(make_case(world, device="cuda", **{path: "upstream"}))
    assert error.value.hint == "Install it: pip install no_such_package_anywhere"
