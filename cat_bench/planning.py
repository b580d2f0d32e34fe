"""From the flags of `run` to cases: device and machine, plan, equal budgets, checkpoint, plan text.

Everything heavy is imported inside the function that needs it: the command line imports this.
"""

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from cat_bench import spec
from cat_bench.case import Case, Options
from cat_bench.errors import UserError
from cat_bench.messages import plural, warn


def plan(
    suite: str | None, arch: list[str], options: Options, gpu_name: str | None
) -> tuple[list[Case], spec.Spec | None]:
    """The cases, and the spec that sets the budget where --match asks for one."""
    if suite is None:
        raise UserError("run needs a suite.", "Example: cat-bench run efficiency -a dense -a cat-8")
    from cat_bench import suites

    if options.match and options.scale == "smoke":
        raise UserError(
            "--match chooses widths, but --quick sets them all to tiny ones.", "Drop one of them."
        )
    planner = suites.load(suite)
    specs = [spec.parse(text) for text in arch]
    _check_names(specs)
    _check_path(specs, "decode", options.decode_path)
    _check_path(specs, "forward", options.forward_path)
    if options.scale == "smoke":
        specs = [_tiny(one) for one in specs]
    cases = planner.plan(specs, options)
    if options.scale != "smoke":  # sizes there are nobody's
        for warning in _unlike_windows(specs, {case.seq_len for case in cases}):
            warn(warning)
    if options.match is None:
        return cases, None
    return planner.plan(_matched(specs, cases, options.match, gpu_name), options), specs[0]


def _tiny(one: spec.Spec) -> spec.Spec:
    """`spec.tiny`. Raises UserError where no Config has such settings: in the user's own words
    where they do not fit at full size either, else saying where the others come from.
    """
    from cat_bench.architecture import make_config

    small = spec.tiny(one)
    try:
        make_config(small)
    except UserError as error:
        make_config(one)
        made = ", ".join(
            key for key in small.overrides if small.overrides[key] != one.overrides.get(key)
        )
        raise UserError(
            error.message,
            f"--quick shrinks what is not given, here {made}: give it, or drop --quick.",
        ) from error
    return small


def _check_names(specs: list[spec.Spec]) -> None:
    """Raises UserError where two names mean one file: it would stand twice in every table."""
    names: dict[Path, str] = {}
    for one in specs:
        first = names.setdefault(spec.resolve(one.name).path, one.name)
        if first != one.name:
            raise UserError(
                f"-a {first} and -a {one.name} are the same file.", f"Write {first} for both."
            )


def _check_path(specs: list[spec.Spec], kind: str, asked: str | None) -> None:
    """Raises UserError where an architecture has no such decode or forward path: before anyone asks
    for the packages of a path, which may be those of the other kind.

    Its class is asked, not its source: a user's Model may inherit them.
    """
    if asked is None:
        return
    from cat_bench.architecture import load_module

    for one in specs:
        known = getattr(load_module(one).Model, f"{kind}_paths", ("eager",))
        if asked not in known:
            raise UserError(
                f"{one.text} has no {kind} path '{asked}'.{spec.did_you_mean(asked, known)}",
                f"Its {kind} paths: {', '.join(known)}.",
            )


def _unlike_windows(specs: list[spec.Spec], seq_lens: set[int]) -> list[str]:
    """A warning for each hybrid whose window nobody gave, at lengths of which it is not half, as
    the paper's is (cat_spec.md 1.7). A few new tokens after a long prompt make no difference.
    """
    from cat_bench.architecture import make_config

    warnings = []
    for one in specs:
        window = getattr(config := make_config(one), "window", None)
        if not getattr(config, "hybrid", False) or window is None or "window" in one.given:
            continue
        for n in sorted(n for n in seq_lens if abs(2 * window - n) > 0.05 * n):
            half = replace(one, overrides={**one.overrides, "window": n // 2}).text
            warnings.append(
                f"{one.typed} at length {n} has a window of {window} tokens; the paper's is half "
                f"of the length: -a {half}"
            )
    return warnings


def _matched(
    specs: list[spec.Spec], cases: list[Case], match: str, gpu_name: str | None
) -> list[spec.Spec]:
    """The specs at equal budgets, at the largest batch and length of the plan."""
    from cat_bench import predict

    largest = max(cases, key=lambda case: (case.batch_size, case.seq_len))
    return predict.matched(
        specs,
        match,
        largest.batch_size,
        largest.seq_len,
        prompt_len=largest.prompt_len,
        dtype=largest.dtype,
        device_name=gpu_name,
    )


def with_weights(cases: list[Case], folder: Path) -> list[Case]:
    """The cases with a checkpoint in place of random weights; drift references keep those.

    A case is identified by what the folder holds; where it lies is a setting.
    """
    from cat_bench import checkpoint
    from cat_bench.architecture import build

    digest = checkpoint.digest(folder)
    planned = []
    for case in cases:
        if all(name != "reference" for name, _ in case.settings):
            parsed = spec.parse(case.arch)
            model = build(parsed, device="meta")
            checkpoint.check_config(folder, parsed, model.config)
            checkpoint.check_tensors(folder, parsed, model)
            settings = tuple(sorted([*case.settings, ("weights", str(folder))]))
            case = replace(case, weights=digest, settings=settings)
        planned.append(case)
    return planned


def resolve(
    cases: list[Case],
    gpu_name: str | None,
    match: str | None = None,
    first: spec.Spec | None = None,
) -> dict[str, dict]:
    """What each case will be; a case that is impossible on any machine is refused here."""
    from cat_bench import predict

    resolved = predict.resolve(cases, gpu_name, match, first)
    told = (text for row in resolved.values() for text in row["warnings"])
    for warning in dict.fromkeys([*told, *_unlike_paths(cases)]):
        warn(warning)
    return resolved


def _unlike_paths(cases: list[Case]) -> list[str]:
    """A warning where some cases of a GPU run eagerly beside others on a fast path: launches bound
    the first, so a ratio of the two says little about architectures.
    """
    archs: dict[tuple[str, str, bool], dict[str, None]] = defaultdict(dict)
    for case in cases:
        settings = dict(case.settings)
        if case.device == "cuda" and "reference" not in settings:
            paths = {"decode": case.decode_path, "forward": case.forward_path}
            if case.suite == "training":
                paths = {"step": settings.get("step", "eager")}
            for kind, path in paths.items():
                archs[case.suite, kind, path == "eager"][case.arch] = None
    return [
        f"{', '.join(slow)}: {kind} path eager, bound by launches, beside a fast one of "
        f"{', '.join(archs[suite, kind, False])}: "
        f"{'no ratio is taken' if kind == 'step' else 'their ratios say little'}. Compare them "
        f"with --{kind}-path eager."
        for (suite, kind, is_eager), slow in list(archs.items())
        if is_eager and (suite, kind, False) in archs
    ]


def plan_line(cases: list[Case]) -> str:
    """What the cases share: "6 cases, 2 architectures, bfloat16, cuda, cuda_graph, seed 0".

    Forward paths are told where one of them is not eager, then the suite's settings.
    """
    parts = [
        plural(len(cases), "case"),
        plural(len({case.arch for case in cases}), "architecture"),
    ]
    for name in ("dtype", "device", "decode_path"):
        parts.append("/".join(sorted({getattr(case, name) for case in cases})))
    forward_paths = sorted({case.forward_path for case in cases})
    parts += [] if forward_paths == ["eager"] else [f"forward {'/'.join(forward_paths)}"]
    settings = {f"{k} {v}" for case in cases for k, v in case.settings if k != "reference"}
    parts += sorted(settings)
    return ", ".join([*parts, "seed " + "/".join(str(s) for s in sorted({c.seed for c in cases}))])


# --- flags ---------------------------------------------------------------------------------------


def counts(flag: str, text: str | None) -> tuple[int, ...] | None:
    """(1, 64) of "1,64". Raises UserError for anything but whole numbers."""
    if text is None:
        return None
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{flag} '{text}' is not a list of whole numbers.",
            f"Example: {flag} {'0,1,2' if flag == '--seed' else '1,64'}",
        ) from error


def names(text: str | None) -> tuple[str, ...] | None:
    """("fused", "causal") of "fused,causal"."""
    return None if text is None else tuple(text.split(","))


def device(asked: str | None, gpu: str | None, dry_run: bool, quick: bool) -> str:
    """The asked one; else the GPU where there is one. --gpu means cuda, --quick the CPU."""
    asked = _with_gpu(asked, gpu, dry_run, quick)
    if quick:
        if asked not in (None, "cpu"):
            raise UserError(f"--quick runs on the CPU, got --device {asked}.", "Drop one of them.")
        return "cpu"
    if asked is not None:
        return asked
    from cat_bench.environment import nvml_device

    return "cpu" if nvml_device() is None else "cuda"


def _with_gpu(asked: str | None, gpu: str | None, dry_run: bool, quick: bool) -> str | None:
    """The device that --device and --gpu ask for together."""
    if gpu is None:
        return asked
    if not dry_run:
        raise UserError("--gpu only predicts.", "Add --dry-run, or drop --gpu.")
    if quick or asked not in (None, "cuda"):
        other = "--quick" if quick else f"--device {asked}"
        raise UserError(f"--gpu {gpu} predicts for cuda, got {other}.", "Drop one of them.")
    return "cuda"


# --- the machine of a plan -----------------------------------------------------------------------


def machine(device: str, gpu: str | None = None) -> dict[str, Any]:
    """What environment.json will hold; for --gpu with the name and memory of that GPU."""
    from cat_bench import environment

    captured = environment.capture(sys.argv)
    line = {"machine_line": environment.machine_line(captured, device)}
    return captured | line | _assumed_gpu(gpu)


def _assumed_gpu(gpu: str | None) -> dict[str, Any]:
    """What the plan takes from the environment, for a GPU that need not be here."""
    from cat_bench.predict import ASSUMED_MEMORY_BYTES

    if gpu is None:
        return {}
    if gpu not in ASSUMED_MEMORY_BYTES:
        raise UserError(
            f"--gpu '{gpu}' is unknown.", f"It is one of: {', '.join(ASSUMED_MEMORY_BYTES)}."
        )
    return {"gpu_name": gpu, "gpu_memory_bytes": ASSUMED_MEMORY_BYTES[gpu]}


def memory(device: str, machine: dict[str, Any], gpu: str | None) -> tuple[float | None, str]:
    """Bytes that a plan must fit into, and what has them: "host", "H100, assumed"."""
    if device == "cpu":
        return machine["host_memory_bytes"], "host"
    return machine.get("gpu_memory_bytes"), f"{gpu}, assumed" if gpu else ""
