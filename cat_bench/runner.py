"""Cases to rows: skips closed cases, measures each other one in a fresh process, one at a time.

This process is the only writer of the run folder. A case's rows and its closing row are appended in
one write, so an interruption loses the case that was running and nothing else. Out of memory,
a missing package, a crash and a timeout are rows too: the sweep goes on after each.

This module imports no torch: nothing of the driver lies on the GPU that is measured.
"""

import fcntl
import json
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from os import SEEK_END, killpg, sep
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from cat_bench.case import DEFAULT_TIMEOUT_S, Case, Record
from cat_bench.environment import PROJECT, conflicts, worker_process
from cat_bench.errors import UserError
from cat_bench.spec import name_of, resolve
from cat_bench.store import CLOSING, Run
from cat_bench.user_code import source_hash

STDERR_BYTES = 4096  # how much of a failed worker's stderr its row keeps
RETRIABLE = frozenset({"oom", "unsupported", "failed"})
TIMED_OUT = "ended after the timeout of"  # how such an error starts


class Summary(NamedTuple):
    """How many cases ended in which way."""

    ok: int = 0
    oom: int = 0
    unsupported: int = 0
    failed: int = 0
    timed_out: int = 0  # of the failed
    skipped: int = 0  # closed before
    interrupted: bool = False  # by Ctrl-C or SIGTERM; closed cases are kept, resume does the rest


class Progress(Protocol):
    """Called before each case, and once at the end with `case` None.

    `done` of `total` cases are closed, those of earlier sittings counted in. `eta_s` is None until
    a case has been measured in this one.
    """

    def __call__(self, done: int, total: int, case: Case | None, eta_s: float | None) -> None: ...


def no_progress(done: int, total: int, case: Case | None, eta_s: float | None) -> None:
    """Says nothing."""


def execute(
    cases: Iterable[Case],
    run: Run,
    *,
    retry: frozenset[str] | set[str] = frozenset(),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    progress: Progress = no_progress,
) -> Summary:
    """Measure every case that `run` has not closed, and those it closed with a status in `retry`.

    The order is the plan's. `timeout_s` holds for each case. Raises UserError where rows cannot be
    written, and where another process measures into this run.
    """
    _check_retry(retry)
    with _only_writer(run):
        return _execute(cases, run, retry, timeout_s, progress)


def _execute(
    cases: Iterable[Case],
    run: Run,
    retry: frozenset[str] | set[str],
    timeout_s: float,
    progress: Progress,
) -> Summary:
    unique = {case.key: case for case in cases}
    queue = open_cases(unique.values(), run, retry)
    skipped, total = len(unique) - len(queue), len(unique)
    resolved = run.resolved()
    statuses: Counter[str] = Counter()
    durations_s: list[float] = []
    interrupted = False
    workers = Workers()
    try:
        with _terminated_as_interrupted():
            for index, case in enumerate(queue):
                done = skipped + index
                progress(done, total, case, _time_left_s(durations_s, total - done))
                following = queue[index + 1] if index + 1 < len(queue) else None
                rows = _refused(case, resolved) or workers.measure(case, timeout_s, following)
                run.append(rows)
                statuses[rows[-1].status] += 1
                statuses["timed_out"] += (rows[-1].error or "").startswith(TIMED_OUT)
                durations_s.append(rows[-1].value or 0.0)
            progress(total, total, None, 0.0)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        workers.close()
    return Summary(**statuses, skipped=skipped, interrupted=interrupted)


def open_cases(
    cases: Iterable[Case], run: Run, retry: frozenset[str] | set[str] = frozenset()
) -> list[Case]:
    """Those that `run` has not closed, or closed with a status in `retry`."""
    closed = run.closed()
    return [case for case in cases if closed.get(case.key) in {None, *retry}]


def check_resume(
    run: Run, environment: dict[str, Any], retry: frozenset[str] | set[str] = frozenset()
) -> None:
    """Raises UserError where rows measured now must not join those of `run`, or not yet."""
    with _only_writer(run):
        pass  # said before anything is written; `execute` holds the lock itself
    reasons = conflicts(run.environment, environment)
    reasons += _mixed_versions(run, retry)
    if reasons:
        raise UserError(
            f"run {run.name} cannot be continued here: {'; '.join(reasons)}.",
            "Nothing was changed. Start a new run; report and paper read several runs together.",
        )


def edited_files(run: Run, retry: frozenset[str] | set[str] = frozenset()) -> dict[str, str]:
    """Files given by path that open cases need and that are not what they were at the plan: why."""
    waiting, resolved = open_cases(run.cases().values(), run, retry), run.resolved()
    versions = ((case, _other_version(case, resolved)) for case in waiting)
    return {name_of(case.arch): reason for case, reason in versions if reason}


def _other_version(case: Case, resolved: dict[str, dict]) -> str | None:
    """`resolved`: what the plan holds for each case."""
    planned = resolved.get(case.key, {}).get("source_hash")
    if planned is None:  # a file of the project, or a plan from before there was this field
        return None
    name = name_of(case.arch)
    try:
        if source_hash(resolve(name)) == planned:
            return None
    except UserError as error:  # it is gone
        return error.message.rstrip(".")
    return f"{name}, or a file beside it that it imports, has changed since the plan"


def _mixed_versions(run: Run, retry: frozenset[str] | set[str]) -> list[str]:
    """Why rows of a file's new version would stand beside measured ones of its old version.

    A file of which nothing was measured yet may be repaired: its failed cases are then measured.
    """
    closed, edited = run.closed(), edited_files(run, retry)
    kept = {
        name_of(case.arch)
        for key, case in run.cases().items()
        if closed.get(key) in {"ok", "oom"} - retry
    }
    return [reason for name, reason in edited.items() if name in kept]


def _refused(case: Case, resolved: dict[str, dict]) -> list[Record]:
    """The closing row of a case whose file was edited during the run; [] for all others."""
    reason = _other_version(case, resolved)
    if reason is None:
        return []
    error = f"not measured: {reason}. Start a new run."
    return [Record(case.key, CLOSING, 0.0, "s", status="failed", error=error)]


class Workers:
    """Fresh processes, each for one case; the next one may import its libraries meanwhile.

    Only before a case on a GPU: there the imports take seconds of the GPU's time and a CPU core
    that nobody else needs, whereas on a CPU they would disturb what is being timed.
    """

    def __init__(self) -> None:
        self.waiting: Worker | None = None

    def measure(self, case: Case, timeout_s: float, following: Case | None = None) -> list[Record]:
        """The rows of one case, the closing row last. `following` is measured next."""
        worker, self.waiting = self.waiting or Worker(), None
        try:
            worker.start(case)
            if following is not None and case.device == following.device == "cuda":
                self.waiting = Worker()
            return worker.finish(timeout_s)
        finally:
            worker.close()

    def close(self) -> None:
        if self.waiting is not None:
            self.waiting.close()


class Worker:
    """One process of worker.py, which imports its libraries and then waits for a case.

    Whatever happens to it is in the rows. It never outlives `close`.
    """

    def __init__(self) -> None:
        # Files, not pipes: nobody has to read while the worker runs, and they outlive its death.
        self.rows, self.log = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        command, variables = worker_process("measure", str(self.rows.fileno()))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.log,  # stdout of this process carries results
            stderr=self.log,
            env=variables,
            pass_fds=(self.rows.fileno(),),
            process_group=0,  # Ctrl-C reaches this process only, which then ends the whole group
        )

    def start(self, case: Case) -> None:
        self.case, self.oom_kills, self.start_s = case, _oom_kills(), time.perf_counter()

    def finish(self, timeout_s: float) -> list[Record]:
        """Hand over the case, wait, and return its rows."""
        timed_out = False
        try:
            self.process.communicate(json.dumps(asdict(self.case)).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            self._kill()
        wall_s = time.perf_counter() - self.start_s
        records = _read_rows(self.rows)
        if not records or records[-1].metric != CLOSING:  # the worker did not come to its end
            tail = _tail(self.log)
            if timed_out:
                reason = f"{TIMED_OUT} {timeout_s:g} s"
            else:
                killed = _oom_kills() > self.oom_kills
                reason = reason_of_death(self.process.returncode, killed, tail)
            error = f"{reason}\n{tail}".strip()
            records.append(Record(self.case.key, CLOSING, None, "s", status="failed", error=error))
        return [*records[:-1], replace(records[-1], value=wall_s)]

    def close(self) -> None:
        self._kill()
        self.rows.close()
        self.log.close()

    def _kill(self) -> None:
        if self.process.poll() is None:
            killpg(self.process.pid, signal.SIGKILL)  # compilers that it started, too
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _read_rows(file: IO[bytes]) -> list[Record]:
    """All whole lines; what follows the last newline was cut short."""
    file.seek(0)
    return [Record(**json.loads(line)) for line in file.read().split(b"\n")[:-1]]


def _tail(log: IO[bytes]) -> str:
    """The end of stderr, without the project's own path: rows are read on other machines."""
    size = log.seek(0, SEEK_END)
    log.seek(max(0, size - STDERR_BYTES))
    return log.read().decode("utf-8", "replace").replace(f"{PROJECT}{sep}", "").strip()


def reason_of_death(exit_code: int, out_of_host_memory: bool, tail: str) -> str:
    """One line: why the worker ended before its closing row. `tail` is the end of its stderr."""
    if exit_code == 1 and tail:  # Python's own end after an exception: its last line names it
        return tail.splitlines()[-1]
    if exit_code >= 0:
        return f"the worker ended with exit code {exit_code} before it was done"
    names = {number.value: number.name for number in signal.Signals}
    reason = f"the worker was killed by signal {-exit_code} ({names.get(-exit_code, 'unnamed')})"
    if -exit_code != signal.SIGKILL:
        return reason
    if out_of_host_memory:
        return f"{reason}: host memory was short, and the kernel's out-of-memory killer ran"
    return f"{reason}; nothing shows that host memory was short"


def _oom_kills() -> int:
    """How many processes of this machine the kernel has killed for memory; 0 where it is silent."""
    path = Path("/proc/vmstat")
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _time_left_s(durations_s: Sequence[float], num_cases: int) -> float | None:
    return sum(durations_s) / len(durations_s) * num_cases if durations_s else None


def _check_retry(retry: frozenset[str] | set[str]) -> None:
    unknown = sorted(set(retry) - RETRIABLE)
    if unknown:
        raise UserError(
            f"cannot retry cases of status '{unknown[0]}'; expected some of: "
            f"{', '.join(sorted(RETRIABLE))}.",
            "Example: --retry oom,failed",
        )


@contextmanager
def _only_writer(run: Run) -> Iterator[None]:
    """A lock on the run that ends with this process, however it ends: two would mix their rows."""
    path = run.path / "plan.json"
    try:
        file = path.open("r+b")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}.", "Check the permissions of that folder."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run {run.name} is being measured by another process.",
                "Wait until it has ended, or start a new run.",
            ) from error
        except OSError:  # a file system without locks cannot tell
            pass
        yield


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, a batch system's way to stop a job, ends a sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
