"""Training: time, tokens/s, memory and FLOPs of one training step (paper Appendix B.5).

A step is forward, loss, backward, clipping at 1.0 and AdamW, as in Appendix E.3. On a GPU: float32
weights under bfloat16 autocast and 16,384 tokens a step. Random tokens, the same for every
architecture. Where a model has `hidden` and a head, the logits never exist in full (loss.py).

The forward path of a case is the first that its architecture has of FORWARD_PATHS, or the one asked
for. The loss follows it: eager on the eager path, on a CPU and in float64, else the Triton kernel.

Settings of a case: "autocast" ("bfloat16", or missing: none; the case's dtype is the weights'),
"repeats", "step" ("cuda_graph": replayed as three graphs, see train_graph.py; missing: launched
from Python), and "checkpoint" (activation checkpointing, which an architecture offers by an
attribute `checkpoint_blocks` that its `hidden` follows; it counts what it wraps in
`num_checkpointed`, as language_model.ForwardPath does). The case's prompt_len is 0: nothing is
generated.

Try it: cat-bench run training -a dense -a cat:chunk_size=8 --quick
"""

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cat_bench import spec
from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.spec import Spec
from cat_bench.suites import efficiency

if TYPE_CHECKING:
    from cat_bench.architecture import Architecture, Tokens
    from cat_bench.loss import Implementation
    from cat_bench.profiler import Timing

TOKENS_PER_STEP = 16_384  # on a GPU; divided by the length it is the default batch size
SEQ_LENS = {"cpu": (64,), "cuda": (1024, 4096)}
BATCH_SIZE_CPU = 2
AUTOCAST = {"cpu": "float32", "cuda": "bfloat16"}
FORWARD_PATHS = {"cpu": ("eager",), "cuda": ("compile", "upstream", "eager")}
STEP_PATHS = ("eager", "cuda_graph")  # how the kernels of a step are launched
GRAPHED = ("compile", "upstream")  # forward paths whose step is captured where nobody asks
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 8e-4, (0.9, 0.95), 0.1, 1.0  # Appendix E.3
PARTS = ("forward", "backward", "optimizer")
WARMUPS, REPEATS = 3, 10  # steps; the first warm-up compiles
SMOKE_WARMUPS, SMOKE_REPEATS = 1, 3


# --- plan -----------------------------------------------------------------------------------------


def plan(specs: list[Spec], options: Options) -> list[Case]:
    """Specs x lengths x batch sizes x seeds in the order of efficiency.by_cell, each case once."""
    _check(specs, options)
    if options.seq_lens is None:  # our own choice of lengths must not be too long for anyone
        specs = [_long_enough(one, max(SEQ_LENS[options.device])) for one in specs]
    cases = {
        _case(options, one, batch_size, seq_len, seed): None
        for one in specs
        for seq_len in options.seq_lens or SEQ_LENS[options.device]
        for batch_size in options.batch_sizes or (default_batch_size(options.device, seq_len),)
        for seed in options.seeds
    }
    ordered = efficiency.by_cell(cases)
    if options.reference_every is None:
        return ordered
    return efficiency.with_references(ordered, options, options.reference_every)


def _long_enough(one: Spec, seq_len: int) -> Spec:
    """With a `max_len` of at least `seq_len`, where it has one that the user did not give."""
    field = spec.describe(one.name).fields.get("max_len")
    held = one.overrides.get("max_len", field.default if field else None)
    if not isinstance(held, int) or held >= seq_len or "max_len" in one.given:
        return one
    overrides = dict(sorted({**one.overrides, "max_len": seq_len}.items()))
    return replace(one, overrides=overrides)


def default_batch_size(device: str, seq_len: int) -> int:
    return max(1, TOKENS_PER_STEP // seq_len) if device == "cuda" else BATCH_SIZE_CPU


def default_forward_path(name: str, device: str) -> str:
    """The first of FORWARD_PATHS that the architecture's source names; eager where none is."""
    known = spec.describe(name).forward_paths
    return next((path for path in FORWARD_PATHS[device] if path in known), "eager")


def default_step_path(forward_path: str, device: str) -> str:
    """The eager forward path is the specification: launched as it is written."""
    return "cuda_graph" if device == "cuda" and forward_path in GRAPHED else "eager"


def settings_of(autocast: str, **others: str) -> tuple[tuple[str, str], ...]:
    """The settings of a case: autocast where it is not off (float32, float64), and others."""
    chosen = others | ({"autocast": autocast} if autocast == "bfloat16" else {})
    return tuple(sorted(chosen.items()))


def _case(options: Options, one: Spec, batch_size: int, seq_len: int, seed: int) -> Case:
    autocast = options.dtype or AUTOCAST[options.device]
    others = {} if options.repeats is None else {"repeats": str(options.repeats)}
    others |= {"checkpoint": "true"} if options.activation_checkpointing else {}
    forward_path = options.forward_path or default_forward_path(one.name, options.device)
    step_path = options.step_path or default_step_path(forward_path, options.device)
    others |= {} if step_path == "eager" else {"step": step_path}
    return Case(
        suite="training",
        arch=one.text,
        batch_size=batch_size,
        prompt_len=0,
        seq_len=seq_len,
        dtype="float64" if autocast == "float64" else "float32",
        device=options.device,
        seed=seed,
        forward_path=forward_path,
        scale=options.scale,
        settings=settings_of(autocast, **others),
    )


def _check(specs: list[Spec], options: Options) -> None:
    """Raises UserError for the first option that makes no sense."""
    for flag, value in (
        ("--prompt-len", options.prompt_lens),
        ("--new-tokens", options.new_tokens),
        ("--decode-path", options.decode_path),
        ("--implementation", options.implementations),
    ):
        if value is not None:
            raise UserError(f"{flag} means nothing to a training step.", f"Drop {flag}.")
    if options.match in ("latency", "state"):
        raise UserError(
            f"--match {options.match} matches decoding, not training.",
            "Use --match params or flops.",
        )
    if options.step_path not in (None, *STEP_PATHS):
        raise UserError(
            f"--step-path '{options.step_path}' is unknown.", f"It is {' or '.join(STEP_PATHS)}."
        )
    if options.step_path == "cuda_graph" and options.device == "cpu":
        raise UserError(
            "--step-path cuda_graph needs a CUDA GPU, got device cpu.",
            "Use --step-path eager, the only one of a CPU, or --device cuda.",
        )
    efficiency.check_options(specs, options)


# --- measure --------------------------------------------------------------------------------------


def measure(case: Case, model: "Architecture") -> Iterator[Record]:
    """All rows of one case. Out of memory: the rows so far, the memory counters, then the error."""
    import torch

    from cat_bench import profiler
    from cat_bench.loss import output_head

    _follow_settings(case, model)
    yield _row(case, "num_params", model.num_params, "1")
    yield _row(case, "num_params_non_embedding", model.num_params_non_embedding, "1")
    yield _row(case, "weights_bytes", profiler.weights_bytes(model), "bytes")
    yield _row(case, "chunked_loss", float(output_head(model) is not None), "1")  # 0: all logits
    ceiling = profiler.matmul_flops_per_s(case.device, autocast_of(case), _protocol(case)[1])
    if case.device == "cuda":
        torch.cuda.empty_cache()
    yield _row(case, "matmul_flops_per_s", ceiling, "FLOP/s")
    step = Step(case, model)
    try:
        timing = yield from _timed_rows(case, step)
    except RuntimeError as error:
        if profiler.is_out_of_memory(error):
            yield from _memory_rows(case, profiler.memory_counters(case.device))
        raise
    yield from _flops_rows(case, model, timing, ceiling)


def _follow_settings(case: Case, model: Any) -> None:
    """Raises UserError where a setting asks for what the architecture does not offer."""
    if "checkpoint" not in dict(case.settings):
        return
    if not hasattr(model, "checkpoint_blocks"):
        raise UserError(
            f"{case.arch} offers no activation checkpointing (it has no `checkpoint_blocks`).",
            "Run it without --activation-checkpointing.",
        )
    model.checkpoint_blocks = True


def _check_checkpointing(case: Case, model: Any) -> None:
    """Raises UserError, after a forward pass, where a model has let `checkpoint_blocks` lie."""
    if "checkpoint" not in dict(case.settings) or getattr(model, "num_checkpointed", 0):
        return
    raise UserError(
        f"{case.arch} ignores activation checkpointing: with `checkpoint_blocks` set its forward "
        "pass checkpointed 0 blocks (`num_checkpointed`), expected at least 1.",
        "Call `self.checkpointed(block)` in its `hidden` (see language_model.ForwardPath), or run "
        "it without --activation-checkpointing.",
    )


class Step:
    """Forward, loss, backward, clipping and AdamW on one batch of random tokens.

    Launched from Python; once `capture` was called, replayed as CUDA graphs. `loss` is that of the
    last step, before its update.
    """

    def __init__(self, case: Case, model: Any):
        import torch

        self.case, self.model = case, model.train()
        self.tokens = random_tokens(case, model.config.vocab_size)  # (b, t + 1)
        self.implementation = implementation(case)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, on_part: Callable[[], object] = lambda: None) -> None:
        """`on_part()` is called after the forward, the backward and the optimizer part."""
        launched = (self._forward, self._backward, self._update_and_forget)
        for part in [graph.replay for graph in self.graphs] or launched:
            part()
            on_part()

    def capture(self) -> None:
        """From now on a call replays graphs. Trains a few steps; UserError where it is impossible.

        Gradients are not forgotten in a graph: the next replay writes them anew, where they lie.
        """
        from cat_bench.train_graph import captured

        # Only said now: launched from Python such an optimizer warns. The fused kernel, whose step
        # counters lie on the device, is the same.
        self.optimizer.param_groups[0]["capturable"] = True
        parts = (self._forward, self._backward, self._update)
        self.graphs = captured(self, dict(zip(PARTS, parts, strict=True)))

    def _forward(self) -> None:
        """Leaves the loss with its graph of autograd.

        Autocast keeps the weights that it has cast until this context ends, within one part: so a
        replay casts the weights of its own time, as often as a step from Python does.
        """
        import torch

        from cat_bench.loss import next_token_loss

        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        half = autocast_of(self.case) == "bfloat16"
        with torch.autocast(self.case.device, torch.bfloat16, enabled=half):
            self.loss = next_token_loss(self.model, inputs, targets, self.implementation)
        _check_checkpointing(self.case, self.model)

    def _backward(self) -> None:
        """Leaves the gradients, and the loss without what autograd held for it."""
        loss, self.loss = self.loss, self.loss.detach()
        loss.backward()

    def _update_and_forget(self) -> None:
        self._update()
        self.optimizer.zero_grad()

    def _update(self) -> None:
        """clip_grad_norm_ and AdamW, whose launches also do the clipping, without a wait.

        PyTorch's fused kernel divides gradients by `grad_scale`, where torch.amp.GradScaler leaves
        it. The optimizer keeps it, so it is taken away again: a bare step() later would divide by
        the norm of this one. The kernel reads float32 alone, so a clipped gradient in float64 is
        exact to 1e-7 only. Ours does the same with less memory traffic.
        """
        import torch

        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        scale = ((norm + 1e-6) / CLIP).clamp(min=1).float()  # 1e-6 as in clip_grad_norm_
        if self.implementation == "triton" and self.case.dtype == "float32":
            from cat_bench.adamw_kernel import update_

            update_(self.optimizer, scale)
            return
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.grad_scale

    @property
    def optimizer_bytes(self) -> int:
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in held if hasattr(value, "nbytes"))

    @property
    def gradient_bytes(self) -> int:
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


def implementation(case: Case) -> "Implementation":
    """Of the loss, and of the update of float32 weights: Triton kernels, which compute in float32,
    where a fast forward path runs on a GPU.
    """
    is_fast = case.device == "cuda" and case.forward_path != "eager"
    return "triton" if is_fast and case.dtype != "float64" else "eager"


def random_tokens(case: Case, vocab_size: int) -> "Tokens":
    """(b, t + 1) ids of the whole vocabulary, the same for every architecture and device."""
    import torch

    generator = torch.Generator("cpu").manual_seed(case.seed)
    shape = (case.batch_size, case.seq_len + 1)
    return torch.randint(0, vocab_size, shape, generator=generator).to(case.device)


def autocast_of(case: Case) -> str:
    """The dtype of the matrix products."""
    return dict(case.settings).get("autocast", case.dtype)


def _protocol(case: Case) -> tuple[int, int]:
    """Warm-ups and repeats."""
    smoke = case.scale == "smoke"
    repeats = dict(case.settings).get("repeats", SMOKE_REPEATS if smoke else REPEATS)
    return SMOKE_WARMUPS if smoke else WARMUPS, int(repeats)


def _timed_rows(case: Case, step: Step) -> Generator[Record, None, "Timing"]:
    """Everything that trains; returns the timing of whole steps."""
    import torch

    from cat_bench import profiler

    warmups, repeats = _protocol(case)
    meter = profiler.energy_meter(case.device)
    is_captured = "step" in dict(case.settings)
    launched = 1 if is_captured else repeats
    timing = profiler.timed(lambda _: step(), case.device, warmups, launched, meter)
    yield _row(case, "compile_s", timing.warmups[0].host_s, "s")  # the first step, with all tuning
    memory = profiler.memory_counters(case.device)  # from Python: replays allocate nothing
    if is_captured:
        capture_s, _ = profiler.stopwatch(step.capture, case.device)
        yield _row(case, "capture_s", capture_s, "s")
        memory["graph_pool_bytes"] = profiler.graph_pool_bytes(torch.cuda.memory_snapshot())
        timing = profiler.timed(lambda _: step(), case.device, warmups, repeats, meter)
    yield from _step_rows(case, timing)
    yield from _memory_rows(case, memory)
    yield from _part_rows(case, step, repeats)
    held: list[int] = []
    step(lambda: held.append(step.gradient_bytes))
    yield _row(case, "gradients_bytes", max(held), "bytes")
    yield _row(case, "optimizer_bytes", step.optimizer_bytes, "bytes")
    loss = float(step.loss)
    yield _row(case, "loss", loss, "1")
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss}: the times of such a step mean nothing.")
    return timing


def _step_rows(case: Case, timing: "Timing") -> Iterator[Record]:
    tokens = case.batch_size * case.seq_len
    yield _sampled(case, "train_step_s", timing.latency_s, "s")
    yield _sampled(case, "host_latency_s", timing.host_latency_s, "s")
    yield _sampled(case, "tokens_per_s", [tokens / s for s in timing.latency_s], "tokens/s")
    energy_j = timing.energy_j
    if energy_j:  # the mean, for only the sum over all repeats is free of the counter's own steps
        mean_j = statistics.fmean(energy_j)
        yield _row(case, "energy_j", mean_j, "J", energy_j)
        yield _row(case, "energy_per_token_j", mean_j / tokens, "J", [j / tokens for j in energy_j])


def _part_rows(case: Case, step: Step, repeats: int) -> Iterator[Record]:
    """Forward with loss, backward, and optimizer with clipping: timed apart from the repeats.

    On a GPU also how long Python takes to launch a step, or to replay its graphs: close to the
    step, it is what bounds it.
    """
    from cat_bench.profiler import Marks, synchronize

    parts: list[list[float]] = []
    launches_s: list[float] = []
    for _ in range(repeats):
        marks = Marks(case.device)
        start_s = time.perf_counter()
        marks.add()
        step(marks.add)
        launches_s.append(time.perf_counter() - start_s)
        synchronize(case.device)
        parts.append(marks.intervals_s())
    for name, samples in zip(PARTS, zip(*parts, strict=True), strict=True):
        yield _sampled(case, f"{name}_s", list(samples), "s")
    if case.device == "cuda":
        yield _sampled(case, "launch_s", launches_s, "s")


def _memory_rows(case: Case, counters: dict[str, int]) -> Iterator[Record]:
    """Peaks of the last step that was launched from Python."""
    for name, num_bytes in counters.items():
        yield _row(case, name, num_bytes, "bytes")


def _flops_rows(
    case: Case, model: "Architecture", timing: "Timing", ceiling: float
) -> Iterator[Record]:
    """Useful FLOPs by formula, over the datasheet (mfu) and over the measured matmul rate."""
    import torch

    from cat_bench.predict import datasheet_flops_per_s, train_flops

    flops = train_flops(model, case.batch_size, case.seq_len)
    rate = flops / statistics.median(timing.latency_s)
    yield _row(case, "train_flops", flops, "FLOP")
    yield _row(case, "matmul_flops_ratio", rate / ceiling, "1")
    name = torch.cuda.get_device_name() if case.device == "cuda" else ""
    datasheet = datasheet_flops_per_s(name)
    if datasheet and autocast_of(case) == "bfloat16":
        yield _row(case, "mfu", rate / datasheet, "1")


def _row(case: Case, metric: str, value: float, unit: str, samples: Sequence[float] = ()) -> Record:
    return Record(case.key, metric, value, unit, list(samples))


def _sampled(case: Case, metric: str, samples: list[float], unit: str) -> Record:
    return _row(case, metric, statistics.median(samples), unit, samples)
