"""One case in one fresh process, so that no case inherits another's memory, graphs or faults.

    python -m cat_bench.worker measure FD     the case comes as JSON on stdin; rows leave as JSON
                                              lines on file descriptor FD, so that nothing which a
                                              library prints can get between them
    python -m cat_bench.worker check NAME...  for doctor: what torch sees, then each architecture
                                              that loads, one JSON line each, on stdout

The closing row (metric "case") says how the case ended: ok, oom or unsupported. Any other exception
ends the process with its traceback on stderr; the runner turns that into a failed row.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch

from cat_bench import checkpoint
from cat_bench.architecture import Architecture, build
from cat_bench.case import Case, Record
from cat_bench.environment import clock_state
from cat_bench.errors import UserError
from cat_bench.packages import install_commands, missing
from cat_bench.profiler import is_out_of_memory
from cat_bench.spec import Spec, describe, parse, resolve
from cat_bench.suites import load
from cat_bench.user_code import FileFault, importable

CLOCK_UNITS = {"sm_clock_hz": "Hz", "memory_clock_hz": "Hz", "temperature_c": "C", "power_w": "W"}


def main() -> None:
    verb, *arguments = sys.argv[1:]
    if verb == "check":
        check(arguments)
    else:
        with os.fdopen(int(arguments[0]), "w", encoding="ascii") as rows:
            run_case(Case.from_dict(json.load(sys.stdin)), rows)


def run_case(case: Case, rows: TextIO) -> None:
    """Measure one case; every row is out as soon as it is known, the closing row comes last."""
    status, error = "ok", None
    try:
        for record in measure(case):
            _write(rows, record)
    except UserError as problem:
        status, error = "unsupported", str(problem)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        status, error = "oom", str(problem) or type(problem).__name__
    _write(rows, Record(case.key, "case", None, "s", status=status, error=error))


def measure(case: Case) -> Iterator[Record]:
    """The rows of the case's suite, between the clocks before and after."""
    set_global_state(case.seed)
    suite = load(case.suite)
    with importable(resolve(parse(case.arch).name)):  # a step may import, too
        model = build_model(case)
        yield from clock_rows(case, "before")
        yield from suite.measure(case, model)
        yield from clock_rows(case, "after")


def set_global_state(seed: int) -> None:
    """All of it, in this one place: seeds, and float32 matrix products in float32 (no TF32)."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")


def build_model(case: Case) -> Architecture:
    """The case's model. Raises UserError where this machine or version cannot do what it asks."""
    spec = parse(case.arch)
    if case.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device 'cuda' is not available: torch {torch.__version__} sees no CUDA GPU.",
            "`cat-bench doctor` says why; --device cpu measures on the CPU.",
        )
    _require_packages(spec, "decode", case.decode_path)
    _require_packages(spec, "forward", case.forward_path)
    try:
        model = build(spec, case.decode_path, case.device, case.dtype, case.seed, case.forward_path)
    except FileFault as fault:  # no lack of this machine: the case failed, or is out of memory
        raise fault.error from None
    if case.weights != "random":
        load_weights(case, spec, model)
    return model


def load_weights(case: Case, spec: Spec, model: Architecture) -> None:
    """The checkpoint of the case. Raises UserError where the folder holds others than planned."""
    if "weights" not in dict(case.settings):
        raise UserError(
            f"weights '{case.weights}' cannot be loaded: the case names no folder.",
            "Plan it again with --weights FOLDER, or leave --weights out for random ones.",
        )
    folder = Path(dict(case.settings)["weights"])
    found = checkpoint.digest(folder)
    if found != case.weights:
        raise UserError(
            f"the weights in {folder} are {found}, but the case was planned with {case.weights}.",
            "Put the planned ones back, or start a new run.",
        )
    checkpoint.check_config(folder, spec, model.config)
    checkpoint.load_into(model, folder, case.device)


def _require_packages(spec: Spec, kind: str, path: str) -> None:
    """A path's missing or unfit package is one sentence, not an ImportError from deep inside."""
    lacking = describe(spec.name).lacking(kind, path)
    if lacking:
        raise UserError(
            f"the {kind} path '{path}' of {spec.text} needs the package "
            f"{' and '.join(map(missing, lacking))}.",
            f"Install it: {install_commands(lacking)}",
        )


def clock_rows(case: Case, when: str) -> Iterator[Record]:
    """One row per number that NVML tells, and one row of value 1 per slow-down reason."""
    state = clock_state() if case.device == "cuda" else {}
    for name, unit in CLOCK_UNITS.items():
        if name in state:
            yield Record(case.key, f"{name}_{when}", state[name], unit)
    for reason in state.get("slow_down_reasons", ()):
        yield Record(case.key, f"slow_down_{reason}_{when}", 1.0, "1")


def check(names: list[str]) -> None:
    """The worker's half of `doctor`: an architecture that does not load ends the process."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _answer({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices})
    for name in names:
        build(parse(name), device="meta")
        _answer(name)


def _write(rows: TextIO, record: Record) -> None:
    rows.write(json.dumps(asdict(record)) + "\n")
    rows.flush()  # what is written survives a kill


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
