"""Around a sweep: may it start here, how it shows its progress, how it ends for whoever waits.

`runner.execute` between them measures and says nothing. Imports of torch, pandas and rich stand in
the functions that need them: the command line imports this.
"""

import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from cat_bench import planning, spec, store
from cat_bench.case import DEFAULT_TIMEOUT_S, Case
from cat_bench.errors import UserError
from cat_bench.messages import plural, say, warn
from cat_bench.packages import install_command, install_commands, missing

if TYPE_CHECKING:
    from cat_bench.runner import Progress, Summary

EXIT_FAILED_CASES, EXIT_INTERRUPTED = 3, 130


def measure(
    target: store.Run, cases: list[Case], retry: frozenset[str], timeout_s: float
) -> "Summary":
    """Measure into a run folder, with progress on stderr."""
    from cat_bench import runner

    say(f"measuring {plural(len(cases), 'case')} into {target.path}")
    with _progress() as progress:
        summary = runner.execute(cases, target, retry=retry, timeout_s=timeout_s, progress=progress)
    if not summary.interrupted:
        say(f"kept: {target.path}")
    return summary


def exit_after(target: store.Run, summary: "Summary", timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Say how the run ended, on stderr, and leave with its exit code unless all is well."""
    if summary.interrupted:
        num_closed, num_cases = len(target.closed()), len(target.cases())
        say(
            f"interrupted after {num_closed} of {plural(num_cases, 'case')}. Kept: {target.path}. "
            f"Continue: {_resume_command(target, timeout_s)}"
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    bad = {status: getattr(summary, status) for status in ("failed", "unsupported")}
    bad = {status: count for status, count in bad.items() if count}
    if bad:
        told = ", ".join(f"{plural(count, 'case')} {status}" for status, count in bad.items())
        longer_s = max(DEFAULT_TIMEOUT_S, 2 * timeout_s) if summary.timed_out else timeout_s
        again = _resume_command(target, longer_s, "--retry", ",".join(bad))
        say(f"{told}; the rows say why. Again: {again}")
        raise typer.Exit(EXIT_FAILED_CASES)


def _resume_command(target: store.Run, timeout_s: float, *flags: str) -> str:
    """What continues `target`, to be pasted as it is: with the timeout and folder it needs."""
    command = ["cat-bench", "run", "--resume", target.name, *flags]
    if timeout_s != DEFAULT_TIMEOUT_S:
        command += ["--timeout", f"{timeout_s:g}"]
    folder = target.path.resolve().parent
    if folder != store.DEFAULT_RESULTS.resolve() or store.RESULTS_VARIABLE in os.environ:
        command += ["--results", str(folder)]
    return shlex.join(command)


# --- runs that exist -----------------------------------------------------------------------------


def find_run(results: Path, text: str) -> store.Run:
    found = store.find(results, text)
    if found.torn:
        warn(f"the last row of {found.name} was cut short and is left out.")
    return found


def resumed(results: Path, name: str, retry: frozenset[str]) -> store.Run:
    """The run to continue, if this machine may. Nothing is changed before that is clear."""
    from cat_bench import runner

    found = find_run(results, name)
    cases = list(found.cases().values())
    machine = planning.machine("cuda" if any(case.device == "cuda" for case in cases) else "cpu")
    runner.check_resume(found, machine, retry)
    check_machine(cases, runner.open_cases(cases, found, retry))
    repaired = runner.edited_files(found, retry)
    planned_anew = [case for case in cases if spec.name_of(case.arch) in repaired]
    if planned_anew:
        found.extend_plan([], planning.resolve(planned_anew, machine["gpu_name"]))
    found.resume_under(machine)
    return found


def retried(text: str) -> frozenset[str]:
    """{"oom", "failed"} of "oom,failed". Raises UserError for anything but a status to retry."""
    from cat_bench.runner import RETRIABLE

    asked = frozenset(filter(None, text.split(",")))
    if not asked <= RETRIABLE:
        raise UserError(f"--retry '{text}' is unknown.", f"Any of: {','.join(sorted(RETRIABLE))}.")
    return asked


# --- what this machine lacks ---------------------------------------------------------------------


class Lack(NamedTuple):
    """A package that is not here (in any version or a right one), and the path that needs it."""

    package: str
    kind: str  # "decode" or "forward"
    path: str
    arch: str  # its name, without settings


def check_machine(planned: Sequence[Case], open_cases: Sequence[Case] | None = None) -> None:
    """Raises UserError where there is no GPU for `planned`, or each of them lacks a package.

    Where only some lack one it is a warning: each of these that will be measured (`open_cases`, all
    by default) gets a row `unsupported`. A drift reference alone is no reason to run. A CPU that is
    to be measured and busy is a warning, too.
    """
    if open_cases is not None and not open_cases:
        return  # nothing will be measured
    _check_gpu(planned)
    asked = [case for case in planned if "reference" not in dict(case.settings)]
    texts = [
        f"{uses} needs the package {missing(name)}" for name, uses in _by_package(asked).items()
    ]
    if asked and all(_lacks(way) for way in _ways(asked)):
        lacks = sorted({lack for way in _ways(asked) for lack in _lacks(way)})
        installs = install_commands(lack.package for lack in lacks)
        flags = dict.fromkeys(f"--{lack.kind}-path eager" for lack in lacks)
        raise UserError(
            f"no case can run here: {'; '.join(texts)}.",
            f"Start a run with {' '.join(flags)}, or install it: {installs}",
        )
    measured = planned if open_cases is None else open_cases
    if any(case.device == "cpu" for case in measured):
        _warn_of_a_busy_cpu()
    for package, uses in _by_package(measured).items():
        warn(
            f"cases of {uses} will be unsupported: they need the package {missing(package)}. "
            f"Install it: {install_command(package)}"
        )


def _warn_of_a_busy_cpu() -> None:
    from cat_bench import environment

    used = environment.cpu_in_use()
    if used:
        warn(f"{used}. Wait until it is idle, or stop that process.")


def _check_gpu(cases: Iterable[Case]) -> None:
    if any(case.device == "cuda" for case in cases):
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"device cuda was asked for, but torch {torch.__version__} sees no CUDA GPU.",
                "Use --device cpu, or look at `cat-bench doctor`.",
            )


Way = tuple[str, str, str]  # architecture with settings, decode path, forward path


def _ways(cases: Iterable[Case]) -> set[Way]:
    return {(case.arch, case.decode_path, case.forward_path) for case in cases}


def _lacks(way: Way) -> list[Lack]:
    arch, decode_path, forward_path = way
    info = spec.describe(spec.parse(arch).name)
    return [
        Lack(package, kind, path, info.name)
        for kind, path in (("decode", decode_path), ("forward", forward_path))
        for package in info.lacking(kind, path)
    ]


def _by_package(cases: Iterable[Case]) -> dict[str, str]:
    """{"triton": "cat, dense on decode path 'cuda_graph' and cat on forward path 'compile'"}"""
    archs: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for lack in (lack for way in _ways(cases) for lack in _lacks(way)):
        archs[lack.package, lack.kind, lack.path].add(lack.arch)
    uses: dict[str, list[str]] = defaultdict(list)
    for (package, kind, path), names in sorted(archs.items()):
        uses[package].append(f"{', '.join(sorted(names))} on {kind} path '{path}'")
    return {package: " and ".join(texts) for package, texts in uses.items()}


# --- progress ------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator["Progress"]:
    """One bar on a terminal, else one line per case; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_line
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, case: Case | None, eta_s: float | None) -> None:
            text = _case_text(case, eta_s) if case else "done"
            bar.update(task, completed=done, total=total, description=text)

        yield update


def _progress_line(done: int, total: int, case: Case | None, eta_s: float | None) -> None:
    if case:
        say(f"[{done + 1}/{total}] {_case_text(case, eta_s)}")


def _case_text(case: Case, eta_s: float | None) -> str:
    left = "" if eta_s is None else f", about {eta_s:.0f} s left"
    return f"{case.arch}, batch {case.batch_size}, length {case.seq_len}{left}"
