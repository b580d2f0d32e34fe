"""What every architecture is: the protocol, the shape letters, and how one is loaded by its spec.

Shape letters of the whole project: b batch, t tokens, s cache rows, d width, h heads, e head width,
v vocabulary, k chunks, c chunk size, l layers.

An architecture is a file that exports `Config` (frozen dataclass; its defaults are the paper's) and
`Model(config, decode_path="eager")`; where it has several ways to run `forward`, a third argument
`forward_path="eager"`. CAT lives in cat_bench/cat.py, all others in baselines/, a user's own
anywhere (`--arch path/to/mine.py:width=512`); what it imports may lie beside it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cat_bench.errors import UserError
from cat_bench.spec import Spec, members, resolve
from cat_bench.user_code import explained, import_file, running

Tokens = Int[Tensor, "b t"]
Token = Int[Tensor, "b"]
Logits = Float[Tensor, "b t v"]
NextLogits = Float[Tensor, "b v"]
State = Any  # a NamedTuple, private to its file

POSITIVE = ("norm_eps", "rope_base")  # settings that mean the same in every Config that has them
IMPORTING = "importing it"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Cost(NamedTuple):
    """What one part of a decoding step must at least do (evaluation_spec.md 4.3)."""

    part: str  # "weights", "state", "compressor"
    num_bytes: float  # to move, whole batch; the write of a single cache row is left out
    flops: float  # 2 per multiply-add, whole batch


@runtime_checkable  # for run-time checkers of the signatures
class Architecture(Protocol):
    """A torch module. State goes in and comes out; nothing about a sequence hides in the module.

    `build` refuses a Model that lacks one of these members, unless spec.OPTIONAL names it.

    `prefill` and `step` use a state up: its buffers are filled in place, so only the state they
    return is valid. `reset` makes an empty one of any of them.
    """

    decode_paths: tuple[str, ...]  # class attribute: "eager", then the fastest first
    decode_path: str  # the one in use: stored with every number
    # Optional, ("eager",) where missing: ways to run `forward`, given to Model as `forward_path`.
    forward_paths: tuple[str, ...]
    # Optional, () where missing: `float32_forward_paths`, those of them whose kernels sum in
    # float32 whatever they are given, so that `build` refuses them in float64.
    config: Any
    max_len: int | None  # longest sequence it can hold; None: no limit

    num_params: int
    num_params_non_embedding: int  # without token embeddings, head, position tables, dummy

    def forward(self, tokens: Tokens) -> Logits:
        """Logits of every next token: row t predicts token t + 1. (b, t) -> (b, t, v)."""
        ...

    def init_state(self, batch_size: int, max_len: int) -> State:
        """All that decoding `max_len` tokens needs; a graphed path captures here.

        From here on under torch.inference_mode() or torch.no_grad(), one of the two throughout, as
        generate.greedy does: a state is written in place.
        """
        ...

    def reset(self, state: State) -> State:
        """The same buffers (and captured graphs), empty again."""
        ...

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` (any number >= 1, repeatable) into the state; logits of the next token,
        which may be a buffer that the next call overwrites.
        """
        ...

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        """Read one token per row. The logits may be a buffer that the next step overwrites."""
        ...

    def step_kind(self, num_tokens: int) -> str:
        """Class of the step that reads token number `num_tokens` (1-based). Optional, "step" where
        missing; CAT has two. See the function below.
        """
        ...

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Bytes of every tensor of the state, by formula, allocating nothing."""
        ...

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        """The same without token ids and counters: the table of evaluation_spec.md 4.4."""
        ...

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Least bytes and FLOPs, part by part, of the step that reads token number `num_tokens`."""
        ...

    # Optional: prefill_costs(batch_size, num_tokens), those of a prompt; see the function below.
    #
    # Optional, for training (cat_bench/loss.py, suites/training.py):
    # - `hidden(tokens)`, a method, (b, t) -> (b, t, d), beside `head`, an nn.Linear without bias
    #   with head(hidden(tokens)) = forward(tokens): the loss is then taken from the two, and the
    #   logits never exist in full. Any other attribute of these names is left alone.
    # - `checkpoint_blocks`, a bool that --activation-checkpointing sets and `hidden` (or `forward`)
    #   follows, and `num_checkpointed`, which counts the calls that it wrapped;
    #   language_model.ForwardPath has both.


def full_label(label: str, config: Any, told: tuple[str, ...]) -> str:
    """`label`, and in brackets every field of `config` that differs from its default and that the
    label does not tell: two different models never share a name in a table.
    """
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if field.name not in told and getattr(config, field.name) != field.default
    ]
    return f"{label} ({', '.join(changed)})" if changed else label


def step_kind(model: Architecture, num_tokens: int) -> str:
    """By the method of this name, which is optional: most architectures have one kind of step."""
    return model.step_kind(num_tokens) if hasattr(model, "step_kind") else "step"


def prefill_costs(model: Architecture, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
    """Least bytes and FLOPs of reading a prompt of `num_tokens` into an empty state.

    By the method of this name, which is optional: any `prefill` ends with what the step of the last
    token does, so that step is the bound where it is missing.
    """
    return getattr(model, "prefill_costs", model.step_costs)(batch_size, num_tokens)


def step_flops(model: Architecture, batch_size: int, num_tokens: int) -> float:
    """FLOPs of one decoding step of the whole batch."""
    return sum(cost.flops for cost in model.step_costs(batch_size, num_tokens))


def generation_flops(model: Architecture, batch_size: int, seq_len: int) -> float:
    """FLOPs of reading `seq_len` tokens, as of one forward pass; training takes 3 times that."""
    return sum(step_flops(model, batch_size, n) for n in range(1, seq_len + 1))


def load_module(spec: Spec) -> ModuleType:
    """Import the architecture's file. Raises UserError where it cannot be imported, or lacks Config
    or Model. What a Model lacks is told by `build`, all at once.
    """
    source = resolve(spec.name)
    try:
        with running(source, IMPORTING):
            module = import_module(source.module) if source.module else import_file(source.path)
    except (ImportError, SyntaxError) as error:  # of a file of ours: a package may be missing
        raise explained(source, IMPORTING, error) from error
    for export in ("Config", "Model"):
        if not hasattr(module, export):
            raise UserError(
                f"{source.path} exports no {export}; an architecture exports Config and Model.",
                "baselines/dense.py is the example to follow.",
            )
    paths = getattr(module.Model, "decode_paths", ("eager",))
    if not isinstance(paths, tuple | list):
        raise UserError(
            f"{source.path}: Model.decode_paths must be a tuple of names, got {paths!r}.",
            'Write into the class: decode_paths = ("eager",)',
        )
    return module


def make_config(spec: Spec) -> Any:
    """The resolved Config. Raises UserError with the Config's reason where values do not fit."""
    return _config(load_module(spec), spec)


def _config(module: ModuleType, spec: Spec) -> Any:
    with running(resolve(spec.name), "making its Config"):
        try:
            config = module.Config(**spec.overrides)
        except ValueError as error:  # how a Config says that values do not fit
            raise UserError(f"{spec.text}: {error}") from error
    for name in POSITIVE:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise UserError(f"{spec.text}: {name} must be a positive number, got {value}.")
    return config


def build(
    spec: Spec,
    decode_path: str = "eager",
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    forward_path: str = "eager",
) -> Architecture:
    """A model with random weights, made directly on `device` ("meta" allocates nothing).

    Raises UserError for an unknown name, key or value, for a path or members that it lacks, for
    sizes that no tensor can have, and for whatever a user's own file raises.
    """
    module = load_module(spec)
    config = _config(module, spec)
    decode_paths = getattr(module.Model, "decode_paths", ("eager",))
    if decode_path not in decode_paths:
        have = ", ".join(decode_paths)
        raise UserError(f"{spec.text} has no decode path '{decode_path}'; it has: {have}.")
    forward_paths = getattr(module.Model, "forward_paths", ("eager",))
    if forward_path not in forward_paths:
        raise UserError(
            f"{spec.text} has no forward path '{forward_path}'; it has: {', '.join(forward_paths)}."
        )
    if dtype == "float64":
        _check_float64(spec, module.Model, decode_path, forward_path)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with running(resolve(spec.name), "building its Model"), _countable(spec):
            chosen = {} if forward_path == "eager" else {"forward_path": forward_path}
            with torch.device(device):
                model = module.Model(config, decode_path, **chosen)
    finally:
        torch.set_default_dtype(before)
    missing = missing_members(model)
    if missing:
        raise UserError(
            f"{spec.name}: the class Model must define {', '.join(missing)}.",
            "The class Architecture in cat_bench/architecture.py says what each of them is.",
        )
    return model.eval()


def missing_members(model: Any) -> list[str]:
    """What of the protocol a model lacks. A method that is abstract, or nn.Module's own `forward`,
    does not count.
    """
    return [name for name in members() if not _has(model, name)]


def _has(model: Any, name: str) -> bool:
    if name in vars(model) or not hasattr(type(model), name):
        return hasattr(model, name)  # a property is not asked: it may raise
    found = getattr(type(model), name)
    return found is not torch.nn.Module.forward and not getattr(
        found, "__isabstractmethod__", False
    )


def _check_float64(spec: Spec, model: type, decode_path: str, forward_path: str) -> None:
    """Raises UserError for a path that computes in float32: every decode path but eager, and the
    forward paths that the architecture names.
    """
    in_float32 = getattr(model, "float32_forward_paths", ())
    for kind, path, is_float32 in (
        ("decode", decode_path, decode_path != "eager"),
        ("forward", forward_path, forward_path in in_float32),
    ):
        if is_float32:
            raise UserError(
                f"the {kind} path '{path}' of {spec.text} computes in float32, so dtype float64 "
                "would be untrue.",
                f"Use --{kind}-path eager, or --dtype float32.",
            )


@contextmanager
def _countable(spec: Spec) -> Iterator[None]:
    """Raises UserError where torch cannot count the bytes of a tensor in 64 bits."""
    try:
        yield
    except (RuntimeError, TypeError) as error:  # torch raises either, and no type of its own
        if "overflow" not in str(error).lower():
            raise
        raise UserError(
            f"{spec.text}: a tensor of this model would have more bytes than 64 bits can count.",
            "Choose smaller sizes.",
        ) from error
