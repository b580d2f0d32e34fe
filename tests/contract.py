"""The contract that every architecture keeps, one function per promise.

Each `check_*` takes a Subject (a Config and a Model class with tiny settings) and raises
AssertionError where the promise is broken. Only the protocol of cat_bench/architecture.py is
assumed, so key-value caches, ring buffers and recurrent states all fit. The checks are plain
functions, so that test_faults.py can run them against planted faults.

A module may hold a literal `TINY = {...}`: overrides for configurations that the settings below
cannot make small (a layer pattern that needs three layers, say).

Shapes: b batch, t tokens, v vocabulary.
"""

import dataclasses
import inspect
import math
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from cat_bench import spec
from cat_bench.architecture import (
    DTYPES,
    Architecture,
    generation_flops,
    load_module,
    missing_members,
    prefill_costs,
    step_kind,
)
from cat_bench.errors import UserError
from cat_bench.loss import output_head

SEQ_LEN = 22  # tokens; a multiple of neither chunk size below, so the last chunk stays open
PROMPTS = (1, 3, 4, 5, 8, SEQ_LEN)  # tokens: before, on and after a chunk boundary
# Correct code differs by a few 1e-15; the smallest planted fault moves logits by more than 1e-3.
TOLERANCE = 1e-10
WEIGHT_STD = 0.15  # the usual initial weights are too small to show a fault
# Units of finfo(dtype).eps. Sums of bfloat16 products are kept in float32, so fewer of them.
ROUNDINGS = {"float32": 16, "bfloat16": 4}

TINY = {
    "width": 64,
    "num_layers": 2,
    "vocab_size": 97,
    "max_len": 48,
    "chunk_size": 3,
    "window": 6,
    "stride": 4,
    "d_state": 16,
}
# Besides these, every bool field is flipped and every other choice of a Literal field is taken.
VARIANTS = (
    {},
    {"chunk_size": 4, "decoder_width": 64},
    {"chunk_size": 1},
    {"chunk_size": 1, "rope": "growing"},
    {"num_kv_heads": 1, "width": 128},
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One architecture with one tiny configuration."""

    label: str  # "cat[chunk_size=4]", the test's name
    config: Any
    model_class: type

    def model(
        self,
        dtype: str = "float64",
        decode_path: str = "eager",
        device: str = "cpu",
        std: float = WEIGHT_STD,
        forward_path: str = "eager",
    ) -> Architecture:
        """A fresh model with large random weights, the same ones in every dtype."""
        chosen = {} if forward_path == "eager" else {"forward_path": forward_path}
        torch.manual_seed(0)  # vectors that start at random are the same in every model
        model = self.model_class(self.config, decode_path, **chosen).double()
        missing = missing_members(model)
        assert not missing, f"the class Model must define {', '.join(missing)}"
        return randomise(model, std).to(device, DTYPES[dtype]).eval()

    def tokens(self, batch_size: int, seq_len: int = SEQ_LEN, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, seq_len)
        return torch.randint(self.config.vocab_size, shape, generator=generator)


def randomise(model: torch.nn.Module, std: float = WEIGHT_STD, seed: int = 2) -> torch.nn.Module:
    """Matrices become N(0, std); vectors (norms, decay rates) keep their value plus N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.copy_(noise if parameter.ndim >= 2 else parameter + noise)
    return model


def subjects() -> list[Subject]:
    """Every architecture in the tree, and the file in $CAT_BENCH_ARCH, in every tiny variant."""
    names = [info.name for info in spec.architectures()]
    outside = os.environ.get("CAT_BENCH_ARCH")
    return [s for name in names + [outside] * bool(outside) for s in subjects_of(name)]


def subjects_of(name: str) -> list[Subject]:
    """The tiny variants of one architecture, found from the fields of its Config."""
    parsed = spec.parse(name)
    module = load_module(parsed)
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    tiny = {**TINY, **getattr(module, "TINY", {}), **parsed.overrides}
    base = {key: value for key, value in tiny.items() if key in fields}
    found = []
    for variant in (*VARIANTS, *choices(module.Config)):
        if set(variant) <= set(fields):
            inside = ",".join(f"{key}={value}" for key, value in variant.items())
            label = f"{parsed.name}[{inside}]" if variant else parsed.name
            found.append(Subject(label, module.Config(**(base | variant)), module.Model))
    return found


def choices(config_class: type) -> Iterator[dict[str, Any]]:
    """One override for each other value of each bool or Literal field."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        values = (True, False) if kind is bool else ()
        values = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else values
        yield from ({field.name: value} for value in values if value != field.default)


# Helpers: decoding through the protocol, comparing, walking a state


@torch.no_grad()
def forward(model: Architecture, tokens: Tensor) -> Tensor:
    return model.forward(tokens)


@torch.no_grad()
def decode(
    model: Architecture, tokens: Tensor, segments: Sequence[int], state: Any = None
) -> tuple[Tensor, Any]:
    """Prefill the segments one after another, then step through all other tokens.

    Returns the logits from the last prefilled token on, and the last state.
    """
    state = model.init_state(*tokens.shape) if state is None else state
    position = 0
    for length in segments:
        logits, state = model.prefill(tokens[:, position : position + length], state)
        position += length
    rows = [logits.clone()]  # a step may overwrite the logits of the step before
    for token in tokens[:, position:].unbind(1):
        logits, state = model.step(token, state)
        rows.append(logits.clone())
    return torch.stack(rows, dim=1), state


def assert_same(got: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    scale = max(1.0, expected.abs().max().item())
    difference = (got - expected).abs().max().item()
    message = f"{what}: logits differ by {difference:.2e} on a scale of {scale:.2g}"
    assert difference <= tolerance * scale, message  # false for NaN too


def relative_norm(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def walk(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from walk(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from walk(getattr(value, field.name))


def storages(state: Any, floating_only: bool = False) -> dict[int, int]:
    """Address -> bytes of every distinct block of memory behind the state."""
    kept = (t for t in walk(state) if t.is_floating_point() or not floating_only)
    blocks = (tensor.untyped_storage() for tensor in kept)
    return {block.data_ptr(): block.nbytes() for block in blocks if block.nbytes()}


# Decoding


def check_prefill_and_steps_equal_forward(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(2)
    expected = forward(model, tokens)
    for prompt_len in PROMPTS:
        end = SEQ_LEN if prompt_len == 1 else prompt_len + 6
        got, _ = decode(model, tokens[:, :end], [prompt_len])
        what = f"prompt of {prompt_len} tokens, then steps"
        assert_same(got, expected[:, prompt_len - 1 : end], what)


def check_segments_equal_one_prefill(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(2)
    expected = forward(model, tokens)
    for segments in [(1, 1), (3, 5), (4, 4, 1), (5, 3), (8, 1, 7), (2, SEQ_LEN - 2)]:
        end = sum(segments)
        got, _ = decode(model, tokens[:, : end + 4], segments)
        assert_same(got, expected[:, end - 1 : end + 4], f"prefill in segments of {segments}")


def check_prefill_after_steps(subject: Subject) -> None:
    """A prompt may follow generated tokens, as in a second turn."""
    model, tokens = subject.model(), subject.tokens(2)
    _, state = decode(model, tokens[:, :7], [3], model.init_state(*tokens.shape))
    with torch.no_grad():
        logits, _ = model.prefill(tokens[:, 7:], state)
    assert_same(logits, forward(model, tokens)[:, -1], "3 tokens, 4 steps, then a prompt")


@torch.no_grad()
def check_state_does_not_grow(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(2)
    state = model.init_state(*tokens.shape)
    allocated = sum(storages(state).values())
    _, state = model.prefill(tokens[:, :2], state)
    for position in range(2, SEQ_LEN):
        _, state = model.step(tokens[:, position], state)
        held = sum(storages(state).values())
        assert held == allocated, f"{held} bytes after {position + 1} tokens, {allocated} before"


def check_states_share_no_memory(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(2)
    other = subject.tokens(2, seed=3)
    first, second = (model.init_state(*tokens.shape) for _ in range(2))
    assert not storages(first).keys() & storages(second).keys(), "two states share memory"
    # Interleaved, each must give what it gives alone: nothing hides in the module either.
    with torch.no_grad():
        _, first = model.prefill(tokens[:, :5], first)
        _, second = model.prefill(other[:, :3], second)
        for position in range(5, SEQ_LEN):
            logits, first = model.step(tokens[:, position], first)
            last = logits.clone()
            _, second = model.step(other[:, position - 2], second)
    assert_same(last, forward(model, tokens)[:, -1], "one of two interleaved states")


def check_reset_empties_the_state(subject: Subject) -> None:
    """A used state, emptied, must serve a shorter and an equally long sequence like a new one."""
    model, tokens = subject.model(), subject.tokens(2)
    _, state = decode(model, subject.tokens(2, seed=3), [4])
    for seq_len in (SEQ_LEN - 7, SEQ_LEN):
        got, state = decode(model, tokens[:, :seq_len], [2], model.reset(state))
        expected = forward(model, tokens[:, :seq_len])[:, 1:]
        assert_same(got, expected, f"{seq_len} tokens in a used state")


def check_ragged_batch_equals_rows_alone(subject: Subject) -> None:
    """Only where prefill takes `lengths`: unequal prompts, padded on the right with any id."""
    model = subject.model()
    if "lengths" not in inspect.signature(model.prefill).parameters:
        return
    lengths = torch.tensor([1, 3, 4, 5, 8, 13])
    tokens = subject.tokens(len(lengths))
    expected = forward(model, tokens)
    num_steps = SEQ_LEN - int(lengths.max())
    for pad in (0, subject.config.vocab_size - 1):
        padded = tokens[:, : int(lengths.max())].clone()
        padded[torch.arange(padded.shape[1]) >= lengths[:, None]] = pad
        rows = ragged_decode(model, tokens, padded, lengths, num_steps)
        positions = lengths[:, None] - 1 + torch.arange(num_steps + 1)  # (b, steps + 1)
        alone = expected[torch.arange(len(lengths))[:, None], positions]
        assert_same(rows, alone, f"prompts of {lengths.tolist()} tokens, padded with id {pad}")


@torch.no_grad()
def ragged_decode(
    model: Architecture, tokens: Tensor, padded: Tensor, lengths: Tensor, num_steps: int
) -> Tensor:
    """Logits (b, num_steps + 1, v) of every row's own continuation."""
    state = model.init_state(*tokens.shape)
    logits, state = model.prefill(padded, state, lengths=lengths.to(tokens.device))
    rows = [logits.clone()]
    for step in range(num_steps):
        token = tokens.gather(1, (lengths.to(tokens.device) + step)[:, None])[:, 0]
        logits, state = model.step(token, state)
        rows.append(logits.clone())
    return torch.stack(rows, dim=1)


# Causality and independence


def check_later_tokens_change_no_earlier_logits(subject: Subject) -> None:
    """At every position t: row t of the batch has all tokens after t replaced."""
    model, tokens = subject.model(), subject.tokens(1)
    expected = forward(model, tokens)
    after = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)  # (row t, position > t)
    replaced = torch.where(after, (tokens + 1) % subject.config.vocab_size, tokens)
    got = forward(model, replaced)
    moved = (got - expected).abs().amax(-1)  # (row t, position)
    leak = moved.masked_fill(after, 0.0).amax(1)  # (row t,)
    assert leak.max() <= TOLERANCE, f"logits at {leak.argmax()} or before see a later token"


def check_every_token_changes_later_logits(subject: Subject) -> None:
    """Token t must move its own prediction (row t) and the next one."""
    model, tokens = subject.model(), subject.tokens(1)
    expected = forward(model, tokens)
    here = torch.eye(SEQ_LEN, dtype=torch.bool)  # (row t, position t)
    changed = torch.where(here, (tokens + 1) % subject.config.vocab_size, tokens)
    moved = (forward(model, changed) - expected).abs().amax(-1)  # (changed token, position)
    assert (moved.diagonal() > 1e-8).all(), "a token does not move the logits that follow it"
    assert (moved.diagonal(1) > 1e-8).all(), "a token is forgotten by the next one"


def check_prefix_lengths_agree(subject: Subject) -> None:
    """The logits of a token do not depend on how long the sequence is (bucketing, padding)."""
    model, tokens = subject.model(), subject.tokens(2)
    expected = forward(model, tokens)
    for length in range(1, SEQ_LEN):
        got = forward(model, tokens[:, :length])
        assert_same(got, expected[:, :length], f"the first {length} tokens alone")


def check_row_alone_equals_row_in_batch(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(3)
    together, decoded = forward(model, tokens), decode(model, tokens, [4])[0]
    for row in range(len(tokens)):
        alone = tokens[row : row + 1]
        assert_same(forward(model, alone), together[row : row + 1], f"forward of row {row} alone")
        got, _ = decode(model, alone, [4])
        assert_same(got, decoded[row : row + 1], f"decoding row {row} alone")


def check_head_of_hidden_equals_forward(subject: Subject) -> None:
    """Only where training takes its loss from `hidden` and the head instead of from `forward`."""
    model, tokens = subject.model(), subject.tokens(2)
    head = output_head(model)
    if head is not None:
        with torch.no_grad():
            got = head(model.hidden(tokens))
        assert_same(got, forward(model, tokens), "head(hidden(tokens)) against forward(tokens)")


# Costs


def check_state_bytes_equal_the_allocation(subject: Subject) -> None:
    for dtype in ("float64", "bfloat16"):
        model = subject.model(dtype)
        for batch_size, seq_len in [(1, 1), (1, 12), (3, 26), (2, 48)]:
            state = model.init_state(batch_size, seq_len)
            where = f"batch {batch_size}, {seq_len} tokens, {dtype}"
            held = sum(storages(state).values())
            told = model.state_bytes(batch_size, seq_len)
            assert told == held, f"{where}: state_bytes says {told}, the state holds {held}"
            held = sum(storages(state, floating_only=True).values())
            told = model.state_bytes_float(batch_size, seq_len)
            assert told == held, f"{where}: state_bytes_float says {told}, the state holds {held}"


def check_parameter_counts(subject: Subject) -> None:
    model = subject.model()
    held = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_params == held, f"num_params says {model.num_params}, the model has {held}"
    assert 0 < model.num_params_non_embedding < held
    with torch.device("meta"):
        planned = subject.model_class(subject.config)
    assert planned.num_params == held, "another count on the meta device"
    assert planned.num_params_non_embedding == model.num_params_non_embedding


def check_step_costs(subject: Subject) -> None:
    model = subject.model()
    for num_tokens in range(1, SEQ_LEN + 1):
        one, two = (model.step_costs(batch, num_tokens) for batch in (1, 2))
        assert isinstance(step_kind(model, num_tokens), str)
        for cost in (*one, *two):
            assert all(math.isfinite(x) and x >= 0 for x in (cost.num_bytes, cost.flops)), cost
        flops_one, flops_two = (sum(cost.flops for cost in costs) for costs in (one, two))
        assert flops_one > 0 and math.isclose(flops_two, 2 * flops_one), "FLOPs grow with the batch"
        read_one, read_two = (sum(cost.num_bytes for cost in costs) for costs in (one, two))
        assert 0 < read_one <= read_two <= 2 * read_one, "weights are read once for all rows"
    assert generation_flops(model, 1, 8) < generation_flops(model, 1, 16)


def check_step_costs_are_those_of_a_step(subject: Subject) -> None:
    """The last step of every kind: FLOPs near those of its products (what it computes without one,
    as an outer product, is not counted), bytes between the matrices it reads and all that there is.
    """
    model, tokens = subject.model("float32"), subject.tokens(2)
    state, done = model.init_state(*tokens.shape), {}
    for num_tokens, token in enumerate(tokens.unbind(1), start=1):
        counter, products = FlopCounterMode(display=False), Products()
        with counter, products, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            _, state = model.step(token, state)
        done[step_kind(model, num_tokens)] = num_tokens, counter.get_total_flops(), products.read
    weights = storages(list(model.parameters()))
    most = sum(weights.values()) + 2 * model.state_bytes(*tokens.shape)  # read and written
    for kind, (num_tokens, counted, read) in done.items():
        costs = model.step_costs(len(tokens), num_tokens)
        told = sum(cost.flops for cost in costs)
        where = f"token {num_tokens}, step kind '{kind}'"
        assert 0.8 <= counted / told <= 1.05, f"{where}: {told} FLOPs told, {counted} counted"
        told, least = (
            sum(c.num_bytes for c in costs),
            sum(weights[a] for a in weights.keys() & read),
        )
        assert least <= told <= most, f"{where}: {told} bytes told, from {least} to {most} moved"


class Products(TorchDispatchMode):
    """`read`: the addresses of what entered a matrix product or a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in flop_registry:
            self.read |= storages(args).keys()
        return func(*args, **(kwargs or {}))


def check_prefill_costs(subject: Subject) -> None:
    """A bound never exceeds what a prefill multiplies, nor what the step of one token moves."""
    model = subject.model("float32")
    for num_tokens in PROMPTS[1:]:  # one token of a recurrence needs no matrix product
        told = sum(cost.flops for cost in prefill_costs(model, 2, num_tokens))
        counted = counted_flops(model, subject.tokens(2, num_tokens))
        assert told <= counted, f"{num_tokens} tokens: {told} FLOPs told, {counted} done"
    prompt, step = prefill_costs(model, 2, 1), model.step_costs(2, 1)
    assert 0 < sum(cost.num_bytes for cost in prompt) <= sum(cost.num_bytes for cost in step)


def counted_flops(model: Architecture, tokens: Tensor) -> int:
    """Matrix products of one prefill, in the form in which attention has no kernel of its own."""
    state = model.init_state(len(tokens), SEQ_LEN)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.prefill(tokens, state)
    return counter.get_total_flops()


def check_declared_paths_and_label(subject: Subject) -> None:
    model = subject.model()
    assert subject.model_class.decode_paths[0] == "eager", "the eager path is the specification"
    assert model.decode_path == "eager"
    assert model.config == subject.config
    assert isinstance(subject.config.label, str) and subject.config.label
    assert subject.config.__dataclass_params__.frozen


def check_too_long_is_refused(subject: Subject) -> None:
    """Beyond the longest sequence: a clear error, from every way in; up to it: none."""
    model = subject.model()
    if model.max_len is None:
        return
    tokens = subject.tokens(1, 2 * model.max_len)
    assert_refused(lambda: forward(model, tokens), "forward of 2 max_len tokens")
    assert_refused(lambda: model.init_state(1, model.max_len + 1), "a state of max_len + 1 tokens")
    fitting = tokens[:, : model.max_len]
    got, _ = decode(model, fitting, [model.max_len - 2])
    assert_same(got, forward(model, fitting)[:, -3:], "max_len tokens")


def assert_refused(action: Callable[[], Any], what: str) -> None:
    try:
        action()
    except (UserError, ValueError) as error:
        assert str(error), f"{what}: refused without a reason"
    else:
        raise AssertionError(f"{what}: not refused")


# Numbers


def check_gradients_reach_every_parameter(subject: Subject) -> None:
    model, tokens = subject.model(), subject.tokens(2)
    with torch.inference_mode():  # tensors cached by a scoring pass must not spoil training
        model.forward(tokens[:, :-1])
    logits = model.forward(tokens[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    # With chunks of one token every decoder row is a slot, and no token is embedded there.
    no_tokens = getattr(subject.config, "chunk_size", None) == 1
    for name, parameter in model.named_parameters():
        if no_tokens and name == "decoder.embed.weight":
            continue
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


def check_low_precision(subject: Subject) -> None:
    """The same rounded weights in both dtypes, so only the arithmetic differs.

    Weights five times smaller than elsewhere, as after training: with saturated softmaxes the
    rounding of one layer is amplified by the next, and the check would measure that.
    """
    tokens, std = subject.tokens(2), WEIGHT_STD / 5
    for dtype in ("float32", "bfloat16"):
        rounded, reference = subject.model(dtype, std=std), subject.model(std=std)
        reference.load_state_dict(rounded.state_dict())
        expected = forward(reference, tokens)
        limit = ROUNDINGS[dtype] * torch.finfo(DTYPES[dtype]).eps
        for what, got in [
            ("forward", forward(rounded, tokens)),
            ("prefill and steps", decode(rounded, tokens, [1])[0]),
        ]:
            error = relative_norm(got, expected)
            message = f"{what} in {dtype}: relative error {error:.2e}, limit {limit:.2e}."
            assert error < limit, message + eps_hint(rounded)


def eps_hint(model: torch.nn.Module) -> str:
    """What may be wrong with low precision and no rounding."""
    norms = (module for module in model.modules() if isinstance(module, torch.nn.RMSNorm))
    if all(norm.eps is not None for norm in norms):
        return ""
    return " An nn.RMSNorm without eps takes that of its dtype, 0.0078 in bfloat16: give it one."


CHECKS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
