"""Efficiency: latency, throughput, time to first token, memory, energy; by batch size and length.

Paper Figures 2, 3, 5 to 8 and Table 3; the definitions are evaluation_spec.md 4. Random weights in
the case's dtype, a seeded prompt, greedy decoding without an end: every architecture makes exactly
seq_len - prompt_len tokens, of which the prefill gives the first. With one new token there is no
step: rows of steps and rates are left out, and the latency is the time to first token.

Settings of a case: "repeats" (the user's --repeats) and "reference" (0, 1, ...: the same Dense case
over and over, whose drift shows whether the machine changed during a run).

Try it: cat-bench run efficiency -a dense -a cat:chunk_size=8 --quick
        cat-bench run efficiency -a dense -a cat-8:max_len=16385 --prompt-len 1024,4096,16384
        --new-tokens 1 --batch-size 1                           (time to first token, on a GPU)
"""

import itertools
import random
import statistics
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.spec import Spec, describe, parse

if TYPE_CHECKING:
    from cat_bench.architecture import Architecture
    from cat_bench.profiler import Ceilings, StepTime, Timing

PROMPT_LEN = 8  # tokens; paper B.1
REFERENCE = ("dense", 16, 1024)  # architecture, batch size, seq_len
REFERENCE_EVERY = 20  # cases of a sweep for the paper; evaluation_spec.md 4.1
EXAMPLES = {
    "--batch-size": 64,
    "--seq-len": 1024,
    "--prompt-len": PROMPT_LEN,
    "--new-tokens": 1,
    "--repeats": 10,
    "--reference-every": REFERENCE_EVERY,
}
GRIDS = {"cpu": ((1, 4), (64,)), "cuda": ((1, 16, 64, 256), (1024,))}  # batch sizes, seq_lens
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
SMOKE_WARMUPS, SMOKE_REPEATS = 1, 3
MIN_RATE_TOKENS = 8  # new tokens; fewer are no decoding, and most of their time is no step's
MAX_CLOCK_DIFFERENCE = 0.02  # host clock against CUDA events
MAX_STEP_SUM_DIFFERENCE = 0.03  # sum of the instrumented steps against decode_s


# --- plan -----------------------------------------------------------------------------------------


def plan(specs: list[Spec], options: Options) -> list[Case]:
    """Specs x batch sizes x lengths x seeds in the order of `by_cell`, each case once."""
    _check(specs, options)
    cases = {
        _case(options, spec.text, batch_size, prompt_len, seq_len, seed): None
        for spec in specs
        for batch_size in options.batch_sizes or GRIDS[options.device][0]
        for prompt_len, seq_len in _lengths(options)
        for seed in options.seeds
    }
    ordered = by_cell(cases)
    if options.reference_every is None:
        return ordered
    return with_references(ordered, options, options.reference_every)


def _lengths(options: Options) -> list[tuple[int, int]]:
    """(prompt_len, seq_len) of every case: --new-tokens after each prompt, else all pairs."""
    prompt_lens = options.prompt_lens or (PROMPT_LEN,)
    if options.new_tokens is not None:
        return [(prompt_len, prompt_len + options.new_tokens) for prompt_len in prompt_lens]
    seq_lens = options.seq_lens or GRIDS[options.device][1]
    return list(itertools.product(prompt_lens, seq_lens))


def _case(
    options: Options,
    arch: str,
    batch_size: int,
    prompt_len: int,
    seq_len: int,
    seed: int,
    **settings: int,
) -> Case:
    if options.repeats is not None:
        settings["repeats"] = options.repeats
    return Case(
        suite="efficiency",
        arch=arch,
        batch_size=batch_size,
        prompt_len=prompt_len,
        seq_len=seq_len,
        dtype=options.dtype or DTYPES[options.device],
        device=options.device,
        seed=seed,
        decode_path=options.decode_path or describe(parse(arch).name).fastest(options.device),
        scale=options.scale,
        settings=tuple(sorted((key, str(value)) for key, value in settings.items())),
    )


def by_cell(cases: Iterable[Case]) -> list[Case]:
    """Cases of one shape together, Dense (of any width) first, the others in a seeded random order.

    Together, because those are compared: they are measured close in time, and an interruption
    leaves whole comparisons. Random, because a slow drift of the machine must not favour one side.
    Dense first, because ratios to it are taken within one run: without it the others have none. It
    has the coolest GPU of its shape, then, which favours it if anyone; reference cases show drift.
    """
    shuffled, cells = list(cases), {}
    random.Random(0).shuffle(shuffled)
    for case in shuffled:
        shape = case.suite, case.batch_size, case.prompt_len, case.seq_len, case.dtype
        cells.setdefault(shape, []).append(case)
    return [case for cell in cells.values() for case in sorted(cell, key=_is_not_dense)]


def _is_not_dense(case: Case) -> bool:
    return case.arch.partition(":")[0] != "dense"


def with_references(cases: list[Case], options: Options, every: int) -> list[Case]:
    """The reference case before the first, every k-th, and after the last case.

    `options` are those of the cases: device, dtype, scale and seed.
    """
    numbers = itertools.count()
    planned: list[Case] = []
    for index, case in enumerate(cases):
        if index % every == 0:
            planned.append(_reference(options, next(numbers)))
        planned.append(case)
    return [*planned, _reference(options, next(numbers))]


def _reference(options: Options, number: int) -> Case:
    arch, batch_size, seq_len = REFERENCE
    return _case(options, arch, batch_size, PROMPT_LEN, seq_len, options.seeds[0], reference=number)


def _check(specs: list[Spec], options: Options) -> None:
    """Raises UserError for the first option that makes no sense."""
    check_options(specs, options)
    if options.activation_checkpointing:
        raise UserError(
            "--activation-checkpointing changes training only.", "Use it with `run training`."
        )
    for flag, value, what, suite in (
        ("--step-path", options.step_path, "a training step is launched", "training"),
        ("--forward-path", options.forward_path, "training's forward pass is computed", "training"),
        ("--implementation", options.implementations, "attention alone is computed", "attention"),
    ):
        if value is not None:
            raise UserError(
                f"{flag} says how {what}.",
                f"Drop it (--decode-path is for decoding), or use it with `run {suite}`.",
            )
    if options.seq_lens is not None and options.new_tokens is not None:
        raise UserError(
            "--seq-len and --new-tokens both say how long a sequence becomes.",
            "Drop one of them: --new-tokens N means a --seq-len of the prompt + N.",
        )
    for prompt_len, seq_len in _lengths(options):
        if prompt_len >= seq_len:
            raise UserError(
                f"--prompt-len {prompt_len} leaves nothing to generate in --seq-len {seq_len}, "
                f"which counts prompt and new tokens.",
                f"Use a --prompt-len below {seq_len}, a longer --seq-len, or --new-tokens N alone.",
            )


def check_options(specs: list[Spec], options: Options) -> None:
    """Raises UserError for the first option that makes no sense in any suite that times models."""
    if not specs:
        raise UserError("no architecture was given.", "Add one, for example -a dense.")
    if options.device not in GRIDS:
        raise UserError(f"--device '{options.device}' is unknown.", "It is cpu or cuda.")
    if options.dtype not in (None, "float32", "bfloat16", "float64"):
        raise UserError(
            f"--dtype '{options.dtype}' is unknown.", "It is float32, bfloat16 or float64."
        )
    check_counts("--batch-size", options.batch_sizes)
    check_counts("--seq-len", options.seq_lens)
    check_counts("--prompt-len", options.prompt_lens)
    for flag, value in (
        ("--new-tokens", options.new_tokens),
        ("--repeats", options.repeats),
        ("--reference-every", options.reference_every),
    ):
        check_counts(flag, None if value is None else [value])
    if not options.seeds or min(options.seeds) < 0:
        raise UserError(
            f"--seed {', '.join(map(str, options.seeds)) or 'is empty'}: seeds are 0 or more.",
            "Example: --seed 0,1,2",
        )


def check_counts(flag: str, values: Sequence[int] | None) -> None:
    """Raises UserError where `values` of `flag` are empty or not all 1 or more. None: not given."""
    if values is not None and len(values) == 0:
        raise UserError(f"{flag} is empty.", f"Example: {flag} {EXAMPLES[flag]}")
    for value in values or ():
        if value < 1:
            raise UserError(
                f"{flag} {value} is impossible: it must be 1 or more.",
                f"Example: {flag} {EXAMPLES[flag]}",
            )


# --- measure --------------------------------------------------------------------------------------


def measure(case: Case, model: "Architecture") -> Iterator[Record]:
    """All rows of one case, in the order in which they become known.

    Out of memory: the rows so far, the memory counters at that moment, then the error itself.
    """
    from cat_bench.profiler import is_out_of_memory

    yield from _size_rows(case, model)
    measured = _ceilings(case)
    try:
        generation = yield from _timed_rows(case, model)  # its buffers are free again afterwards
    except RuntimeError as error:
        if is_out_of_memory(error):
            yield from _memory_rows(case, model)
        raise
    yield from _floor_rows(case, model, generation, measured)


def _timed_rows(case: Case, model: "Architecture") -> Generator[Record, None, "Timing"]:
    """Everything that runs the model; returns the timing of whole generations."""
    from cat_bench import generate, profiler

    warmups, repeats = protocol(case)
    shape = case.batch_size, case.seq_len
    prompt = generate.prompt_tokens(
        case.batch_size, case.prompt_len, case.seed, case.device, model.config.vocab_size
    )
    tokens = generate.token_buffer(*shape, case.device)
    compile_s, state = profiler.stopwatch(lambda: generate.new_state(model, *shape), case.device)
    yield _row(case, "compile_s", compile_s, "s")
    yield _row(case, "state_live_bytes", profiler.state_live_bytes(state), "bytes")

    steps: list[StepTime] = []

    def instrumented(_: object = None) -> None:
        steps[:] = profiler.step_times(model, prompt, state, tokens, case.device)

    generation = profiler.timed(
        lambda mark: generate.greedy(model, prompt, case.new_tokens, state, tokens, mark),
        case.device,
        warmups,
        repeats,
        profiler.energy_meter(case.device),
        first=instrumented,
    )
    yield from _generation_rows(case, generation)
    yield from _memory_rows(case, model)

    if case.new_tokens == 1:  # the whole generation is the first token: no need to time it twice
        yield _sampled(case, "ttft_s", generation.latency_s, "s")
        return generation
    first_token = profiler.timed(
        lambda mark: generate.first_token(model, prompt, state, tokens),
        case.device,
        warmups,
        repeats,
    )
    yield _sampled(case, "ttft_s", first_token.latency_s, "s")
    if statistics.median(generation.host_latency_s) < profiler.LONG_S:
        instrumented()  # once more: the first steps of all are a part of so short a generation
    yield from _step_rows(case, steps, generation)
    return generation


def protocol(case: Case) -> tuple[int | None, int | None]:
    """Warm-ups and repeats; None: by the rule of profiler.py."""
    smoke = case.scale == "smoke"
    asked = dict(case.settings).get("repeats")
    repeats = int(asked) if asked else SMOKE_REPEATS if smoke else None
    return SMOKE_WARMUPS if smoke else None, repeats


def _size_rows(case: Case, model: Any) -> Iterator[Record]:
    """What needs no measurement, only the model."""
    from cat_bench.predict import mean_step_flops
    from cat_bench.profiler import weights_bytes

    shape = case.batch_size, case.seq_len
    yield _row(case, "num_params", model.num_params, "1")
    yield _row(case, "num_params_non_embedding", model.num_params_non_embedding, "1")
    yield _row(case, "weights_bytes", weights_bytes(model), "bytes")
    yield _row(case, "state_bytes", model.state_bytes(*shape), "bytes")
    yield _row(case, "state_float_bytes", model.state_bytes_float(*shape), "bytes")
    yield _row(
        case,
        "step_flops",
        mean_step_flops(model, case.batch_size, case.prompt_len, case.seq_len),
        "FLOP",
    )


def _generation_rows(case: Case, timing: "Timing") -> Iterator[Record]:
    """Formulas of evaluation_spec.md 4.1: decode_s leaves the prefill and the first token out."""
    new, new_all = case.new_tokens, case.batch_size * case.new_tokens
    yield _row(case, "first_call_s", timing.warmups[0].host_s, "s")
    yield _sampled(case, "latency_s", timing.latency_s, "s")
    yield _sampled(case, "host_latency_s", timing.host_latency_s, "s")
    if new > 1:
        decode_s = timing.decode_s
        yield _sampled(case, "decode_s", decode_s, "s")
        yield _sampled(case, "tpot_s", [s / (new - 1) for s in decode_s], "s")
    if new >= MIN_RATE_TOKENS:
        yield _sampled(case, "tokens_per_s", [new_all / s for s in decode_s], "tokens/s")
        yield _sampled(case, "tokens_per_s_user", [new / s for s in decode_s], "tokens/s")
    if abs(timing.clock_difference) > MAX_CLOCK_DIFFERENCE:
        yield _row(case, "clock_difference", timing.clock_difference, "1")
    energy_j = timing.energy_j
    if energy_j:  # the mean, for only the sum over all repeats is free of the counter's own steps
        mean_j = statistics.fmean(energy_j)
        yield _row(case, "energy_j", mean_j, "J", energy_j)
        yield _row(
            case, "energy_per_token_j", mean_j / new_all, "J", [j / new_all for j in energy_j]
        )


def _memory_rows(case: Case, model: Any) -> Iterator[Record]:
    from cat_bench.profiler import memory_counters, weights_bytes

    counters = memory_counters(case.device)
    for name, num_bytes in counters.items():
        yield _row(case, name, num_bytes, "bytes")
    if "peak_allocated_bytes" in counters:
        known = weights_bytes(model) + model.state_bytes(case.batch_size, case.seq_len)
        workspace = counters["peak_allocated_bytes"] - known
        yield _row(case, "workspace_bytes", workspace, "bytes")


def _step_rows(case: Case, steps: "list[StepTime]", timing: "Timing") -> Iterator[Record]:
    """Every step, in order; once more by class where the architecture has classes."""
    durations_s = [step.duration_s for step in steps]
    yield _sampled(case, "step_s", durations_s, "s")
    for kind in sorted({step.kind for step in steps} - {"step"}):
        of_kind = [step.duration_s for step in steps if step.kind == kind]
        yield _sampled(case, f"step_{kind}_s", of_kind, "s")
    difference = sum(durations_s) / statistics.median(timing.decode_s) - 1
    if abs(difference) > MAX_STEP_SUM_DIFFERENCE:
        yield _row(case, "step_sum_difference", difference, "1")


def _ceilings(case: Case) -> "Ceilings":
    """Measured before the state exists: right after gigabytes were freed, reads are slower."""
    import torch

    from cat_bench.profiler import ceilings

    measured = ceilings(case.device, case.dtype, repeats=3 if case.scale == "smoke" else 10)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return measured


def _floor_rows(case: Case, model: Any, timing: "Timing", measured: "Ceilings") -> Iterator[Record]:
    """The least that a generation can take on this device, from ceilings of the same process."""
    from cat_bench.predict import generation_floor_s

    bandwidth = measured.read_bandwidth_bytes_per_s
    yield _row(case, "read_bandwidth_bytes_per_s", bandwidth, "bytes/s")
    yield _row(case, "matmul_flops_per_s", measured.matmul_flops_per_s, "FLOP/s")
    shape = case.batch_size, case.prompt_len, case.seq_len
    floor_s = generation_floor_s(model, *shape, measured)
    ratio = floor_s / statistics.median(timing.latency_s)
    yield _row(case, "floor_s", floor_s, "s")
    yield _row(case, "latency_floor_ratio", ratio, "1")


def _row(case: Case, metric: str, value: float, unit: str, samples: Sequence[float] = ()) -> Record:
    return Record(case.key, metric, value, unit, list(samples))


def _sampled(case: Case, metric: str, samples: list[float], unit: str) -> Record:
    return _row(case, metric, statistics.median(samples), unit, samples)
