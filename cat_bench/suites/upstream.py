"""Fairness: our decode loop against the authors' own generate; evaluation_spec.md 4.5.

An architecture takes part where its file exports

    upstream_generate(model) -> Callable[[Tensor (b, p), int], Tensor (b, seq_len)]

which builds the authors' program around the weights of `model`; it takes a prompt and the final
length and returns prompt and greedy tokens, in their best configuration (CUDA graphs where they
have them). A literal UPSTREAM_LACKS = {setting: reason} there names what their program cannot have:
the plan refuses it, before our side is measured. Nothing is wrapped for Dense, Sparse, Sliding
window, CAT and BASED: no package ships a graphed static-cache loop for them.

Two cases per shape, equal but for the setting "loop", each in its fresh process: "ours" is
generate.greedy on the fastest decode path, "upstream" the whole call of theirs. Both have the same
weights, prompt, dtype, warm-ups and repeats; neither keeps scores. `decode_path` names our side in
both. What is built, tuned and captured once stands apart, in compile_s and first_call_s. Tables
print loop_ratio = our latency / theirs; above 1.05 the architecture is `underserved`.

Try it: cat-bench run upstream -a mamba2 --batch-size 1,64 --seq-len 1024
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.packages import install_command, is_installed, missing
from cat_bench.spec import ArchitectureInfo, Spec, architectures, describe, parse
from cat_bench.suites import efficiency

if TYPE_CHECKING:
    from torch import Tensor

    from cat_bench.architecture import Architecture
    from cat_bench.profiler import Timing

    Generate = Callable[[Tensor], Tensor]  # prompt (b, p) -> prompt and new tokens (b, t)

LOOPS = ("ours", "upstream")
EXPORT = "upstream_generate"


def plan(specs: list[Spec], options: Options) -> list[Case]:
    """The cases of suite efficiency, once per loop: the two of a pair run one after the other.

    Who runs first alternates from pair to pair, so that a drift favours neither side.
    """
    for spec in specs:
        _check_export(spec, options.dtype)
    planned, order = [], itertools.cycle((LOOPS, LOOPS[::-1]))
    for case in efficiency.plan(specs, options):
        if any(key == "reference" for key, _ in case.settings):
            planned.append(case)  # an efficiency case, the same in every run
        else:
            planned += [_with_loop(case, loop, options.decode_path) for loop in next(order)]
    return planned


def _with_loop(case: Case, loop: str, decode_path: str | None) -> Case:
    fastest = describe(parse(case.arch).name).fastest(case.device)
    settings = tuple(sorted([*case.settings, ("loop", loop)]))
    return replace(case, suite="upstream", decode_path=decode_path or fastest, settings=settings)


def _check_export(spec: Spec, dtype: str | None) -> None:
    """Raises UserError where the file has no program of the authors, or none with such settings or
    in such a dtype: the kernels of their packages sum in float32.
    """
    info, problem = describe(spec.name), f"{spec.text} has no upstream program to compare with"
    if EXPORT not in info.exports:
        able = [info.name for info in architectures() if EXPORT in info.exports]
        raise UserError(
            f"{problem}: its file exports no {EXPORT}.",
            f"Those that do: {', '.join(able) or 'none yet'}.",
        )
    for setting, reason in info.upstream_lacks.items():
        if setting in spec.overrides:
            raise UserError(f"{problem}: {reason}.", f"{spec.name} without {setting} has one.")
    if dtype == "float64" and _packages(info):
        raise UserError(
            f"the upstream program of {spec.text} computes in float32, so dtype float64 would be "
            "untrue.",
            "Use --dtype float32 or bfloat16.",
        )


def _packages(info: ArchitectureInfo) -> set[str]:
    """What the authors' program is of: the paths upstream and upstream_graph require it."""
    paths = [path for path in info.decode_paths if path.startswith("upstream")]
    return {name for path in paths for name in info.packages("decode", path)}


# --- measure --------------------------------------------------------------------------------------


def measure(case: Case, model: "Architecture") -> Iterator[Record]:
    """Raises UserError where the authors' program cannot run here: the case is unsupported."""
    from cat_bench import generate, profiler

    prompt = generate.prompt_tokens(
        case.batch_size, case.prompt_len, case.seed, case.device, model.config.vocab_size
    )
    build = _ours if dict(case.settings)["loop"] == "ours" else _upstream
    compile_s, run = profiler.stopwatch(lambda: build(case, model), case.device)
    yield Record(case.key, "compile_s", compile_s, "s")
    last: dict[str, Tensor] = {}

    def generation(mark: Callable[[], None]) -> None:
        last["tokens"] = run(prompt)

    timing = profiler.timed(generation, case.device, *efficiency.protocol(case))
    _check_tokens(case, last["tokens"], prompt)
    yield from _rows(case, timing)


def _ours(case: Case, model: "Architecture") -> "Generate":
    from cat_bench import generate

    shape = case.batch_size, case.seq_len
    state, tokens = generate.new_state(model, *shape), generate.token_buffer(*shape, case.device)
    return lambda prompt: generate.greedy(model, prompt, case.new_tokens, state, tokens)


def _upstream(case: Case, model: "Architecture") -> "Generate":
    import torch

    from cat_bench.architecture import load_module

    spec = parse(case.arch)
    _check_kernels(case, describe(spec.name))
    run = getattr(load_module(spec), EXPORT)(model)
    # As `greedy` runs: a program without a decorator of its own must not build autograd's graph.
    return torch.inference_mode()(lambda prompt: run(prompt, case.seq_len))


def _check_kernels(case: Case, info: ArchitectureInfo) -> None:
    """Raises UserError where a package of the authors is missing, or the device is not theirs."""
    packages = _packages(info)
    for package in sorted(packages):
        if not is_installed(package):
            raise UserError(
                f"the upstream program of {case.arch} needs the package {missing(package)}.",
                f"Install it: {install_command(package)}",
            )
    if packages and case.device != "cuda":
        raise UserError(
            f"the upstream program of {case.arch} has kernels for GPUs only, got device "
            f"'{case.device}'.",
            "Use --device cuda.",
        )


def _check_tokens(case: Case, tokens: "Tensor", prompt: "Tensor") -> None:
    """A loop that stops early or drops the prompt would win: that is a fault, not a result."""
    shape = (case.batch_size, case.seq_len)
    if tuple(tokens.shape) != shape or not tokens[:, : case.prompt_len].equal(prompt):
        raise ValueError(
            f"the loop returned tokens of shape {tuple(tokens.shape)}, "
            f"expected {shape} beginning with the prompt."
        )


def _rows(case: Case, timing: "Timing") -> Iterator[Record]:
    yield Record(case.key, "first_call_s", timing.warmups[0].host_s, "s")
    for metric, samples in (
        ("latency_s", timing.latency_s),
        ("host_latency_s", timing.host_latency_s),
    ):
        yield Record(case.key, metric, statistics.median(samples), "s", samples)
