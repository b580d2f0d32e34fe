"""What a plan costs before anything runs: parameters, state, least memory and time, matches.

Models are built on the meta device, which allocates nothing, so the numbers are exact: the same
formulas and modules that are measured later. `--dry-run` prints `plan_table`; plan.json keeps
`resolve`; `--match` changes widths by `matched`.

Try it: cat-bench run efficiency -a dense -a cat-8 --batch-size 64,512 --seq-len 1024 --dry-run
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pandas as pd

from cat_bench.architecture import (
    Architecture,
    build,
    generation_flops,
    load_module,
    make_config,
    prefill_costs,
    step_flops,
)
from cat_bench.case import Case
from cat_bench.errors import UserError
from cat_bench.profiler import Ceilings, weights_bytes
from cat_bench.spec import Source, Spec, describe, parse
from cat_bench.spec import resolve as resolve_name
from cat_bench.user_code import running, source_hash

GIB = 2**30

# Read bandwidth (bytes/s) and bf16 matmul rate (FLOP/s) seen on these GPUs: nominal, not of this
# very device. Measured ceilings (profiler.ceilings) replace them in the rows of a run.
ASSUMED_CEILINGS = {"H100": (2.9e12, 800e12), "H200": (4.2e12, 790e12), "A100": (1.6e12, 200e12)}
# For a plan made where there is none: as gpu_memory_bytes in environment.json of
# results/0042-training-h100 and results/h200/0001-fig3-h100 says; of an A100 as its datasheet does.
ASSUMED_MEMORY_BYTES = {"H100": 85_520_809_984, "H200": 150_754_820_096, "A100": 80e9}
# Dense bfloat16 rate (FLOP/s) by NVML's name: a PCIe or NVL card of the same chip has another one.
DATASHEET_FLOPS_PER_S = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    **dict.fromkeys(
        (
            *("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"),
            *("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        ),
        312e12,
    ),
}
GRADIENT_AND_ADAM = 3  # times the weights: a gradient and two moments, all in the weights' dtype

BUDGETS = ("params", "state", "flops", "latency")
MATCH_TOLERANCE = 0.05
WIDTH_STEP, MAX_WIDTH = 64, 16_384
MAX_GROWTH = 4  # times the parameters of the first architecture, or of the own default if more
ASKING = "asking for its sizes and costs"  # what a user's file is doing here


# --- what each case will be -----------------------------------------------------------------------


def resolve(
    cases: list[Case],
    device_name: str | None = None,
    match: str | None = None,
    first: Spec | None = None,
) -> dict[str, dict]:
    """Case key -> what the plan knows of it; every value fits into JSON.

    `device_name`: of the GPU, for the lower bound; unknown ones give None and a warning. `match`
    and `first`: the budget that the specs were matched by and the spec that gave it; "match_ratio"
    then says how near each case came. Raises UserError for a case too long for its architecture.
    """
    for case in sorted(cases, key=lambda case: -case.seq_len):  # so that one hint serves them all
        with running(_source(case), ASKING):
            _check_length(case, _meta_model(*_key(case)))
    return {case.key: _resolve(case, device_name, match, first) for case in cases}


def _resolve(case: Case, device_name: str | None, match: str | None, first: Spec | None) -> dict:
    with running(_source(case), ASKING):
        row = _row(case, device_name, match, first)
    return row | {"source_hash": source_hash(_source(case))}


def _source(case: Case) -> Source:
    return resolve_name(parse(case.arch).name)


def _row(case: Case, device_name: str | None, match: str | None, first: Spec | None) -> dict:
    model, device_ceilings = _meta_model(*_key(case)), assumed_ceilings(device_name)
    shape = case.batch_size, case.seq_len
    row: dict[str, Any] = {
        "label": model.config.label,
        "config": asdict(model.config),
        "num_params": model.num_params,
        "num_params_non_embedding": model.num_params_non_embedding,
        "weights_bytes": weights_bytes(model),
        "state_bytes": 0 if _trains(case) else model.state_bytes(*shape),
        "state_float_bytes": 0 if _trains(case) else model.state_bytes_float(*shape),
        "training_bytes": GRADIENT_AND_ADAM * weights_bytes(model) if _trains(case) else 0,
        "floor_s": None,
        "floor_source": None,
        "warnings": [],
    }
    if case.device == "cuda" and device_ceilings and _trains(case):
        row["floor_s"] = train_flops(model, *shape) / device_ceilings.matmul_flops_per_s
        row["floor_source"] = device_ceilings.source
    elif case.device == "cuda" and device_ceilings:
        if case.new_tokens:  # suite attention runs no model
            row["floor_s"] = _floor_s(_key(case), *_shape(case), device_ceilings)
            row["floor_source"] = device_ceilings.source
    elif case.device == "cuda":
        row["warnings"].append(_no_ceilings(device_name))
    if match and first and not _is_reference(case):
        _add_match(row, case, match, first, device_ceilings)
    return row


def _no_ceilings(device_name: str | None) -> str:
    known = ", ".join(ASSUMED_CEILINGS)
    if device_name is None:
        return f"No lower bounds: no GPU is seen here. --dry-run --gpu H100 assumes one ({known})."
    return f"No lower bounds: the ceilings of {device_name} are unknown (known: {known})."


def _add_match(
    row: dict, case: Case, match: str, first: Spec, device_ceilings: Ceilings | None
) -> None:
    """How far this case is from the first architecture's budget, at its own batch and length."""
    shape = _shape(case)
    target, amount = (
        _amount(_meta_model(arch, "eager", "eager", case.dtype), match, shape, device_ceilings)
        for arch in (first.text, case.arch)
    )
    row["match_ratio"] = amount / target
    if abs(row["match_ratio"] - 1) > MATCH_TOLERANCE:
        row["warnings"].append(
            f"{case.arch} at batch {case.batch_size}, length {case.seq_len}: {match} is "
            f"{row['match_ratio']:.3f} times that of {first.text}, off by more than 5 %."
        )


def _check_length(case: Case, model: Architecture) -> None:
    """Raises UserError where the sequence is longer than the architecture holds."""
    if model.max_len is None or case.seq_len <= model.max_len:
        return
    chunk_size = getattr(model.config, "chunk_size", None)
    if chunk_size:
        needed = math.ceil(case.seq_len / chunk_size)
        problem = (
            f"needs {needed} chunk positions; "
            f"max_len={model.max_len} gives {model.max_len // chunk_size}."
        )
    else:
        problem = f"is longer than max_len={model.max_len}."
    spec = parse(case.arch)
    overrides = dict(sorted({**spec.overrides, "max_len": case.seq_len}.items()))
    longer = replace(spec, overrides=overrides).text
    options = "--seq-len" if _trains(case) else "--seq-len, or --prompt-len + --new-tokens"
    shrunk = " (--quick shrinks what is not given, lengths too.)" if case.scale == "smoke" else ""
    raise UserError(
        f"{case.arch}: seq_len={case.seq_len} {problem}",
        f"Use -a {longer}, or at most {model.max_len} tokens: {options}.{shrunk}",
    )


def _is_reference(case: Case) -> bool:
    return any(key == "reference" for key, _ in case.settings)


def _trains(case: Case) -> bool:
    """A training step has no state and no prompt; its gradients and its optimizer take the room."""
    return case.suite == "training"


def _key(case: Case) -> tuple[str, str, str, str]:
    return case.arch, case.decode_path, case.forward_path, case.dtype


def _shape(case: Case) -> tuple[int, int, int]:
    return case.batch_size, case.prompt_len, case.seq_len


@cache
def _meta_model(arch: str, decode_path: str, forward_path: str, dtype: str) -> Architecture:
    return build(parse(arch), decode_path, "meta", dtype, forward_path=forward_path)


# --- the roofline ---------------------------------------------------------------------------------


def assumed_ceilings(device_name: str | None) -> Ceilings | None:
    """Nominal ceilings of a known GPU by its name; None for all others: never a wrong figure."""
    for name, (bandwidth, rate) in ASSUMED_CEILINGS.items():
        if device_name and name in device_name:
            return Ceilings(bandwidth, rate, "assumed")
    return None


def generation_floor_s(
    model: Architecture, batch_size: int, prompt_len: int, seq_len: int, ceilings: Ceilings
) -> float:
    """The least seconds of a generation: that of its prompt, and per step the sum over parts of the
    slower of reading and computing (evaluation_spec.md 4.3).
    """
    read, rate = ceilings.read_bandwidth_bytes_per_s, ceilings.matmul_flops_per_s
    steps_s = sum(
        max(cost.num_bytes / read, cost.flops / rate)
        for n in range(prompt_len + 1, seq_len)
        for cost in model.step_costs(batch_size, n)
    )
    return prompt_floor_s(model, batch_size, prompt_len, ceilings) + steps_s


def prompt_floor_s(
    model: Architecture, batch_size: int, prompt_len: int, ceilings: Ceilings
) -> float:
    """The least seconds of a prefill: the slower of moving all its bytes and computing all its
    FLOPs. A prompt's parts may overlap: keys are written while the next ones are computed.
    """
    costs = prefill_costs(model, batch_size, prompt_len)
    return max(
        sum(cost.num_bytes for cost in costs) / ceilings.read_bandwidth_bytes_per_s,
        sum(cost.flops for cost in costs) / ceilings.matmul_flops_per_s,
    )


def train_flops(model: Architecture, batch_size: int, seq_len: int) -> float:
    """Useful FLOPs of one training step: a backward pass costs two forward passes."""
    return 3 * generation_flops(model, batch_size, seq_len)


def datasheet_flops_per_s(device_name: str) -> float | None:
    """The maker's bfloat16 rate of a GPU, for MFU; None for all others: never a wrong figure."""
    return DATASHEET_FLOPS_PER_S.get(device_name)


def mean_step_flops(model: Architecture, batch_size: int, prompt_len: int, seq_len: int) -> float:
    """FLOPs of the whole batch per new token, averaged over a generation."""
    steps = range(prompt_len, seq_len)
    return sum(step_flops(model, batch_size, n) for n in steps) / len(steps)


@cache
def _floor_s(
    key: tuple[str, str, str, str],
    batch_size: int,
    prompt_len: int,
    seq_len: int,
    ceilings: Ceilings,
) -> float:
    return generation_floor_s(_meta_model(*key), batch_size, prompt_len, seq_len, ceilings)


# --- the table of --dry-run -----------------------------------------------------------------------


LEAST = "needs at least GiB"
LEAST_NOTE = (
    f"{LEAST} = weights + state (training: + gradients + Adam); activations (of training, and of "
    "prompts read in one call) come on top."
)


def least_bytes(row: dict) -> int:
    """Weights and state (training: gradients and optimizer); activations are not predicted."""
    return row["weights_bytes"] + row["state_bytes"] + row["training_bytes"]


def plan_table(
    cases: list[Case],
    resolved: dict[str, dict],
    memory_bytes: float | None = None,
    memory_of: str = "",
) -> pd.DataFrame:
    """The plan as people read it: one row per shape of an architecture, units in the headers.

    With `memory_bytes` it says which cases cannot fit; `memory_of` says in what ("host"). Of suite
    attention, which runs no model, it says which implementations are timed.
    """
    if all(case.suite == "attention" for case in cases):
        return _attention_table(cases, resolved)
    fit_column = ""
    if memory_bytes is not None:
        fit_column = f"fits in {memory_bytes / GIB:.1f} GiB{memory_of and f' ({memory_of})'}"
    # Planned cases replace a reference case of the same shape.
    references_first = sorted(cases, key=lambda case: not _is_reference(case))
    unique = {(case.arch, _shape(case), case.seed): case for case in references_first}
    several_prompts = len({case.prompt_len for case in cases}) > 1
    matched_plan = any("match_ratio" in resolved[case.key] for case in cases)
    rows = []
    for case in sorted(unique.values(), key=lambda c: (c.arch, c.seq_len, c.batch_size, c.seed)):
        row = resolved[case.key]
        room = memory_bytes is None or least_bytes(row) <= memory_bytes
        text = {
            "architecture": row["label"],
            "batch": str(case.batch_size),
            "seq len tokens": str(case.seq_len),
            "params M": _number(row["num_params"] / 1e6),
            "non-embedding M": _number(row["num_params_non_embedding"] / 1e6),
            "weights GiB": _number(row["weights_bytes"] / GIB),
            "state GiB": _number(row["state_bytes"] / GIB),
            "gradients + Adam GiB": _number(row["training_bytes"] / GIB),
            LEAST: _number(least_bytes(row) / GIB),
        }
        if several_prompts:
            text["prompt tokens"] = str(case.prompt_len)
        if not any(_trains(case) for case in cases):
            del text["gradients + Adam GiB"]
        if fit_column:
            text[fit_column] = "not ruled out" if room else "NO"
        text["floor s"] = _number(row["floor_s"]) if room else "-"
        if matched_plan:
            text["width"] = str(row["config"].get("width", "-"))
            text["budget ratio"] = f"{row['match_ratio']:.3f}" if "match_ratio" in row else "-"
        rows.append(text)
    return pd.DataFrame(rows)


def _attention_table(cases: list[Case], resolved: dict[str, dict]) -> pd.DataFrame:
    timed: dict[tuple[str, int, int], dict[str, None]] = {}  # names in order, each once
    labels: dict[str, set[str]] = {}
    for case in sorted(cases, key=lambda c: (c.arch, c.seq_len, c.batch_size)):
        label = resolved[case.key]["label"]
        labels.setdefault(label.partition(" (")[0], set()).add(label)
        names = timed.setdefault((label, case.seq_len, case.batch_size), {})
        names[dict(case.settings)["implementation"]] = None
    rows = [
        (_short(label, labels), str(batch_size), str(seq_len), ", ".join(names))
        for (label, seq_len, batch_size), names in timed.items()
    ]
    columns = ["attention of", "batch", "seq len tokens", "implementations"]
    return pd.DataFrame(rows, columns=columns)


def _short(label: str, labels: dict[str, set[str]]) -> str:
    """Without the settings of its small model, where that leaves one attention of that name."""
    short = label.partition(" (")[0]
    return short if len(labels[short]) == 1 else label


def _number(value: float | None) -> str:
    """Two decimals, or two significant digits where that would be nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


# --- equal budgets --------------------------------------------------------------------------------


def matched(
    specs: list[Spec],
    budget: str,
    batch_size: int,
    seq_len: int,
    *,
    prompt_len: int = 8,
    dtype: str = "bfloat16",
    device_name: str | None = None,
) -> list[Spec]:
    """The specs, every one after the first with the `width` that brings it nearest to the first's
    budget: parameters, state bytes of one sequence, training FLOPs of one, or floor latency.

    `latency` uses the ceilings of a known GPU, else those of an H100: only their ratio matters.
    Raises UserError where a width cannot be chosen, where none comes near the budget, and where the
    nearest has more than MAX_GROWTH times the parameters that its architecture or the first has.
    Widths are 64 apart, so small models may stay further from a budget than MATCH_TOLERANCE:
    `resolve` warns of that.
    """
    if budget not in BUDGETS:
        raise UserError(f"--match '{budget}' is unknown.", f"It is one of: {', '.join(BUDGETS)}.")
    shape, device_ceilings = (batch_size, prompt_len, seq_len), assumed_ceilings(device_name)

    def amount(spec: Spec) -> float:
        with running(resolve_name(spec.name), ASKING):
            return _amount(build(spec, "eager", "meta", dtype), budget, shape, device_ceilings)

    return [specs[0], *(_match(spec, specs[0], budget, amount) for spec in specs[1:])]


def _match(spec: Spec, first: Spec, budget: str, amount: Callable[[Spec], float]) -> Spec:
    """`spec` at the width nearest to the budget of `first`. Raises UserError where none is near."""
    candidates, target = _widths(spec), amount(first)
    nearest = _nearest(candidates, amount, target)
    ratio = amount(nearest) / target
    between = amount(candidates[0]) <= target <= amount(candidates[-1])
    if abs(ratio - 1) > MATCH_TOLERANCE and not between:
        raise UserError(
            f"--match {budget}: no width of {spec.text} comes near {first.text}; the nearest, "
            f"{_width(nearest)}, gives {ratio:.2f} times its {budget}.",
            "Put another -a first, match another budget, or drop --match and give sizes yourself.",
        )
    usual = [first, *(one for one in candidates if one == spec)]  # at its default width
    params, of_first = _num_params(nearest), _num_params(first)
    if params > MAX_GROWTH * max(map(_num_params, usual)):
        raise UserError(
            f"--match {budget}: {spec.text} comes near {first.text} only at width "
            f"{_width(nearest)}, with {params / 1e6:,.0f} M parameters, "
            f"{params / of_first:.0f} times as many.",
            f"Put another -a first, match another budget, or drop --match and give "
            f"-a {nearest.text}",
        )
    return nearest


def _num_params(spec: Spec) -> int:
    with running(resolve_name(spec.name), ASKING):
        return build(spec, device="meta").num_params


def _width(spec: Spec) -> int:
    return make_config(spec).width


def _amount(
    model: Architecture,
    budget: str,
    shape: tuple[int, int, int],
    device_ceilings: Ceilings | None,
) -> float:
    batch_size, prompt_len, seq_len = shape
    if budget == "params":
        return model.num_params
    if budget == "state":
        return model.state_bytes(1, seq_len)
    if budget == "flops":
        return train_flops(model, 1, seq_len)
    used = device_ceilings or Ceilings(*ASSUMED_CEILINGS["H100"], "assumed")
    return generation_floor_s(model, batch_size, prompt_len, seq_len, used)


def _nearest(candidates: list[Spec], amount: Callable[[Spec], float], target: float) -> Spec:
    """Bisection: every budget grows with the width. Nearest by ratio."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if amount(candidates[middle]) < target:
            low = middle + 1
        else:
            high = middle
    neighbours = candidates[max(0, low - 1) : low + 1]
    return min(neighbours, key=lambda one: abs(math.log(amount(one) / target)))


def _widths(spec: Spec) -> list[Spec]:
    """The spec at every multiple of 64 that its Config accepts, ascending."""
    config, source = load_module(spec).Config, resolve_name(spec.name)
    if "width" not in describe(spec.name).fields:
        raise UserError(
            f"--match chooses the setting 'width', which {spec.name} does not have.",
            "Leave this architecture out, or give its sizes yourself and drop --match.",
        )
    if "width" in spec.given or "width" in spec.overrides:
        where = "one is given" if "width" in spec.given else "its width is set by the preset"
        raise UserError(
            f"{spec.typed or spec.text}: --match chooses the width, but {where}.",
            "Leave the width to --match, or put this -a first: the first one sets the budget.",
        )
    accepted = []
    for width in range(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP):
        overrides = dict(sorted({**spec.overrides, "width": width}.items()))
        if _accepts(config, overrides, source):
            # Through the parser: a width that equals the default must not stand in the text.
            accepted.append(parse(replace(spec, overrides=overrides).text))
    if not accepted:
        raise UserError(f"{spec.text}: no width fits its other settings.", "Change those.")
    return accepted


def _accepts(config: type, overrides: dict[str, Any], source: Source) -> bool:
    with running(source, "making its Config"):
        try:
            config(**overrides)
        except ValueError:  # how a Config says that values do not fit
            return False
    return True
