"""What the baselines share around their blocks: embedding, final norm, untied head, and counts.

A convenience, not a duty: an architecture needs only the protocol of architecture.py. `config` must
have width, num_layers, vocab_size and norm_eps; a block must have `init_weights(num_layers)`.

Shapes: b batch, t tokens, d width, v vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens
from cat_bench.blocks import HEAD_WIDTH, Attend, Block, linear_params, rope_table
from cat_bench.errors import UserError
from cat_bench.graph import CapturedStep, Rows, block_step, fast_block, norm_linear, plain_block

SHORT_PROMPT = 16  # tokens


class ForwardPath(nn.Module):
    """Runs blocks as they are on the forward path "eager", else compiled, one block at a time."""

    forward_path: str
    checkpoint_blocks: bool = False  # keep only the inputs of blocks for the backward pass
    num_checkpointed: int = 0  # calls that `checkpointed` wrapped so far; 0: `hidden` never asked
    memory_budget: float = 1.0  # share that torch.compile may keep of what it would for backward

    def on_forward_path(self, run: Callable) -> Callable:
        """`run`, a block or a function of one, or what torch.compile makes of it.

        Blocks of one shape share one compilation, so depth costs no compile time. Every length, and
        every mode of gradients or autocast, is compiled anew: UserError where they are too many.
        """
        if self.forward_path == "eager":
            return self.checkpointed(run)
        compiled = self.__dict__.setdefault("_compiled", {})
        if run not in compiled:
            compiled[run] = traced(torch.compile(run, dynamic=False), self.memory_budget)
        return self.checkpointed(compiled[run])

    def checkpointed(self, run: Callable) -> Callable:
        """`run`, whose activations are made again in the backward pass if `checkpoint_blocks`."""
        if not (self.checkpoint_blocks and torch.is_grad_enabled()):
            return run
        self.num_checkpointed += 1
        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def traced(compiled: Callable, memory_budget: float) -> Callable:
    """`compiled`, which is traced when it meets a new shape: with that budget for activations, and
    never beyond the compiler's limit, where it would go on eagerly with a line in a log.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    # Made once: this runs for every block of every step.
    budget = functorch.patch(activation_memory_budget=memory_budget)
    no_silence = dynamo.patch(fail_on_recompile_limit_hit=True)

    def run(*args: Any, **options: Any) -> Any:
        with budget, no_silence:
            try:
                return compiled(*args, **options)
            except FailOnRecompileLimitHit as error:
                raise UserError(
                    f"the forward path 'compile' was compiled {dynamo.recompile_limit} times in "
                    "this process and would be once more: each length, model size, and mode of "
                    "gradients or autocast is one.",
                    "Pad the tokens to few lengths, call torch._dynamo.reset() between models, "
                    "raise torch._dynamo.config.recompile_limit, or use --forward-path eager.",
                ) from error

    return run


def _undefined(model: nn.Module, method: str) -> NotImplementedError:
    """What a base class raises for a method that only its subclasses can know."""
    return NotImplementedError(f"the class {type(model).__name__} must define {method}")


def check_counts(num_layers: int, vocab_size: int) -> None:
    """Raises ValueError for a model without layers, or with nothing to choose from."""
    if num_layers < 1 or vocab_size < 2:
        raise ValueError(
            f"num_layers must be at least 1 and vocab_size at least 2, "
            f"got {num_layers} and {vocab_size}."
        )


class LanguageModel(ForwardPath):
    decode_paths: tuple[str, ...] = ("eager",)
    forward_paths: tuple[str, ...] = ("eager",)
    max_len: int | None = None  # RoPE and recurrences know no limit

    def __init__(
        self, config: Any, blocks: Iterable[nn.Module], decode_path: str, forward_path: str
    ):
        super().__init__()
        self.config, self.decode_path, self.forward_path = config, decode_path, forward_path
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)  # not tied to `embed`
        self.init_weights()

    def init_weights(self) -> None:
        """Tables normal, std sqrt(2 / 5d) (cat_spec.md 1.5); blocks as they say themselves."""
        for table in (self.embed, self.head):
            nn.init.normal_(table.weight, std=(2 / (5 * self.config.width)) ** 0.5)
        for block in self.blocks:
            block.init_weights(self.config.num_layers)

    def hidden(self, tokens: Tokens) -> Tensor:
        """Final hidden states (b, t, d), normalised: what the head reads."""
        raise _undefined(self, "hidden(tokens)")

    def forward(self, tokens: Tokens) -> Logits:
        return self.head(self.hidden(tokens))

    def read_by_steps(self, tokens: Tokens, state: Any) -> tuple[NextLogits, Any]:
        """A prompt of up to SHORT_PROMPT tokens on the captured step of a recurrent state.

        It needs no memory of its own, where the kernels of prompts hold the states of a layer two
        or three times over. The logits are those of the last step: the next one overwrites them.
        """
        for token in tokens.unbind(1):
            logits, state = self.step(token, state)
        return logits, state

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    @abstractmethod  # `build` names them all where a subclass lacks some
    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """As in the class Architecture."""

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        """All of it: no token ids, and counters lie on the host."""
        return self.state_bytes(batch_size, seq_len)

    @abstractmethod
    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """As in the class Architecture."""

    def prefill_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """The step of the last token; of the tokens before it the matrices and `pair_flops` of the
        blocks that they must pass. Nobody reads their logits.

        The state is written once. What a recurrence computes is left out: it has several forms.
        """
        last = self.step_costs(batch_size, num_tokens)
        passing = self.tokens_passing(num_tokens)
        before = self.pair_flops(num_tokens, passing)
        for block, count in zip(self.blocks, passing, strict=True):
            matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
            before += 2 * (count - 1) * matrices
        before *= batch_size
        most = {"state": self.state_bytes(batch_size, num_tokens)}
        once = (c._replace(num_bytes=min(c.num_bytes, most.get(c.part, math.inf))) for c in last)
        return (*once, Cost("tokens before", 0, before))

    def tokens_passing(self, num_tokens: int) -> list[int]:
        """How many tokens of a prompt, its last ones, must pass each block for the logits of the
        last: one passes the last block, and below a block all that it looks back at.
        """
        passing = [1]
        for block in list(self.blocks)[:0:-1]:
            passing.append(min(num_tokens, passing[-1] + self.looks_back(block, num_tokens)))
        return passing[::-1]

    def looks_back(self, block: nn.Module, num_tokens: int) -> int:
        """How many tokens before its own a token reads in `block`: all."""
        return num_tokens

    def pair_flops(self, num_tokens: int, passing: list[int]) -> float:
        """Of the attention layers, for one sequence: all of `passing` but the last token."""
        return 0


class Transformer(LanguageModel):
    """Blocks of attention and SwiGLU over rows of a cache: who sees whom is the subclass's.

    A State of a subclass has `keys`, `values` (l, b, g, s, e), `num_tokens` and `captured`.
    """

    def __init__(self, config: Any, decode_path: str, forward_path: str):
        c = config
        blocks = [Block(c.width, c.num_kv_heads, eps=c.norm_eps) for _ in range(c.num_layers)]
        super().__init__(config, blocks, decode_path, forward_path)

    def attend_all(self, num_tokens: int, device: torch.device) -> Attend:
        """The attention of the parallel forward, (q, k, v) -> (b, h, t, e), on `forward_path`."""
        raise _undefined(self, "attend_all(num_tokens, device)")

    def hidden(self, tokens: Tokens) -> Tensor:
        ids = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_table(ids, self.config.rope_base)
        attend = self.attend_all(tokens.shape[1], tokens.device)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            x = self.on_forward_path(block)(x, rope, attend)
        return self.norm(x)

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        """Attention of the tokens start, start + 1, ... over a layer's cached rows and themselves.

        q (b, h, t, e), k v (b, g, t, e) -> (b, h, t, e). Their rows that later tokens read go into
        keys, values (b, g, s, e), in place.
        """
        raise _undefined(self, "attend_cached(q, k, v, keys, values, start)")

    def check_room(self, end: int, state: Any) -> None:
        """Raises ValueError where the state has no room for token number `end`."""
        raise _undefined(self, "check_room(end, state)")

    def reset(self, state: Any) -> Any:
        return state._replace(num_tokens=0)  # rows that were not written anew are never read

    def prefill(self, tokens: Tokens, state: Any) -> tuple[NextLogits, Any]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        start, end = state.num_tokens, state.num_tokens + tokens.shape[1]
        self.check_room(end, state)
        rope = rope_table(torch.arange(start, end, device=tokens.device), self.config.rope_base)
        x = self.embed(tokens)  # (b, t, d)
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):
            attend = partial(self.attend_cached, keys=keys, values=values, start=start)
            x = self.prefill_block(block, x, rope, attend)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: Any) -> tuple[NextLogits, Any]:
        """The captured step where there is one; else a prefill of one token."""
        if state.captured is None:
            return self.prefill(token[:, None], state)
        self.check_room(state.num_tokens + 1, state)
        logits = state.captured(token, state.num_tokens)
        return logits, state._replace(num_tokens=state.num_tokens + 1)

    def capture(
        self, buffers: Any, max_len: int, rows_of: Callable[[Tensor], Rows]
    ) -> CapturedStep | None:
        """The step as a graph; `rows_of` gives the rows of a position (b,). None: eager."""
        if self.decode_path == "eager":
            return None
        device = self.head.weight.device
        rope = rope_table(torch.arange(max_len, device=device), self.config.rope_base)

        def run(token: Tensor, position: Tensor) -> Tensor:
            rows, x = rows_of(position), self.embed(token)
            for block, keys, values in zip(self.blocks, buffers.keys, buffers.values, strict=True):
                x = block_step(block, x, keys, values, rows, rope)
            return norm_linear(x, self.norm, self.head.weight)

        return CapturedStep(run, buffers.keys.shape[1], device, end=max_len)

    @property
    def prefill_block(self) -> Callable:
        """What runs a block in prefill, (block, x, rope, attend) -> x: fused on a fast path."""
        return plain_block if self.decode_path == "eager" else fast_block

    @property
    def num_kv_heads(self) -> int:
        return self.blocks[0].num_kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of a key and a value of one token, in all layers."""
        kv_width = self.num_kv_heads * HEAD_WIDTH
        return 2 * self.config.num_layers * kv_width * self.head.weight.itemsize

    def pair_flops(self, num_tokens: int, passing: list[int]) -> float:
        steps = (self.step_costs(1, n) for n in range(1, num_tokens))
        so_far = [0, *accumulate(state.flops / len(self.blocks) for _, state in steps)]
        return sum(so_far[-1] - so_far[num_tokens - count] for count in passing)

    def costs(self, batch_size: int, num_rows: int) -> tuple[Cost, ...]:
        """A step that sees `num_rows` rows: every matrix once, 2 FLOP per weight; 4 L D per row."""
        c = self.config
        weights = c.num_layers * linear_params(c.width, c.num_kv_heads) + c.width * c.vocab_size
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                batch_size * num_rows * self.row_bytes,
                4 * batch_size * c.num_layers * c.width * num_rows,
            ),
        )
