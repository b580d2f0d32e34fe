"""Sliding-window transformer: a token sees itself and the `window` - 1 tokens before it.

The blocks are Dense's (Transformer++, CAT paper, Appendix E.3); only the attention is local, as in
Longformer (Beltagy et al., 2020, arXiv:2004.05150):

    o_q = sum_k softmax_k(q_q . k_k / sqrt(e)) v_k    over k with 0 <= q - k < window

The window counts the token itself; implementations that allow a distance of `window` see one token
more. The l layers together reach l (window - 1) tokens back: nothing before that is recalled.
State: a ring of min(window, max_len) rows per layer and nothing else, in the model's dtype (no
recurrent sums). Token p lives in row p mod window, its key rotated by its absolute position before
it is written: softmax is a sum over rows, so their order in the ring does not matter.

Shapes: b batch, t tokens, d width, h heads, e head width (64), s ring rows, l layers, v words.
Try it: cat-bench run efficiency -a swa-64 --quick
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Block,
    attention,
    causal_attention,
    check_width,
    linear_params,
    rope_table,
)

PRESETS = {"swa-512": {"window": 512}, "swa-64": {"window": 64}}
MIN_QUERIES = 256  # queries in one attention call at least, so that small windows fill the device


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    num_layers: int = 12
    window: int = 512  # tokens seen, the token itself included
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    num_kv_heads: int | None = None  # None: as many as query heads
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width, self.num_kv_heads)
        if self.num_layers < 1 or self.vocab_size < 2:
            raise ValueError(
                f"num_layers must be at least 1 and vocab_size at least 2, "
                f"got {self.num_layers} and {self.vocab_size}."
            )
        if self.window < 1:
            raise ValueError(
                f"window must be at least 1 (the token itself counts), got {self.window}."
            )

    @property
    def label(self) -> str:
        return full_label("Sliding", self, told=())


class State(NamedTuple):
    keys: Tensor  # (l, b, h, s, e), rotated; a ring, filled in place
    values: Tensor  # (l, b, h, s, e)
    num_tokens: int  # read so far; token p is in row p mod s


class Model(nn.Module):
    decode_paths = ("eager",)
    max_len = None  # RoPE knows no limit

    def __init__(self, config: Config, decode_path: str = "eager"):
        super().__init__()
        self.config, self.decode_path = config, decode_path
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(
            Block(c.width, c.num_kv_heads, eps=c.norm_eps) for _ in range(c.num_layers)
        )
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied to the embedding
        self.init_weights()

    def init_weights(self) -> None:
        for table in (self.embed, self.head):
            nn.init.normal_(table.weight, std=(2 / (5 * self.config.width)) ** 0.5)
        for block in self.blocks:
            block.init_weights(self.config.num_layers)

    def forward(self, tokens: Tokens) -> Logits:
        ids = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_table(ids, self.config.rope_base)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            x = block(x, rope, lambda q, k, v: window_attention(q, k, v, self.config.window))
        return self.head(self.norm(x))  # (b, t, v)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        kv_heads = c.num_kv_heads or c.width // HEAD_WIDTH
        shape = (c.num_layers, batch_size, kv_heads, min(c.window, max_len), HEAD_WIDTH)
        return State(like.new_zeros(shape), like.new_zeros(shape), 0)

    def reset(self, state: State) -> State:
        return state._replace(num_tokens=0)  # rows that were not written anew are never read

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            past_k, past_v = (last_rows(ring, state.num_tokens) for ring in (keys, values))
            o = window_attention(
                q, torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2), self.config.window
            )
            write_rows(keys, k, state.num_tokens)  # only now: the first queries see what this drops
            write_rows(values, v, state.num_tokens)
            return o

        return self._read(tokens, state, attend)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        """Overwrite the token that just left the window; all of the ring is then in sight."""
        row, end = state.num_tokens % state.keys.shape[3], state.num_tokens + 1

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys[:, :, row], values[:, :, row] = k[:, :, 0], v[:, :, 0]
            return attention(q, keys[:, :, :end], values[:, :, :end])  # rows 0 .. min(end, s) - 1

        return self._read(token[:, None], state, attend)

    def _read(self, tokens: Tokens, state: State, attend: Callable) -> tuple[NextLogits, State]:
        """All layers over the next tokens; attend(q, k, v, keys, values) uses and fills a ring."""
        start, end = state.num_tokens, state.num_tokens + tokens.shape[1]
        self._check_room(end, state)
        rope = rope_table(torch.arange(start, end, device=tokens.device), self.config.rope_base)
        x = self.embed(tokens)  # (b, t, d)
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):
            x = block(x, rope, lambda q, k, v, ring=(keys, values): attend(q, k, v, *ring))
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def _check_room(self, end: int, state: State) -> None:
        """A ring of a whole window never ends; a shorter one would drop tokens still in sight."""
        num_rows = state.keys.shape[3]
        if num_rows < self.config.window and end > num_rows:
            raise ValueError(
                f"the state was made for {num_rows} tokens, fewer than the window of "
                f"{self.config.window}; token {end} was given."
            )

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x min(window, tokens) x kv width x bytes per element."""
        c = self.config
        kv_width = c.num_kv_heads * HEAD_WIDTH if c.num_kv_heads else c.width
        elements = 2 * c.num_layers * batch_size * min(c.window, seq_len) * kv_width
        return elements * self.head.weight.itemsize

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        return self.state_bytes(batch_size, seq_len)

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: the rows in sight, 4 L D each."""
        c = self.config
        weights = c.num_layers * linear_params(c.width, c.num_kv_heads) + c.width * c.vocab_size
        rows = min(c.window, num_tokens)
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                self.state_bytes(batch_size, num_tokens),
                4 * batch_size * c.num_layers * c.width * rows,
            ),
        )


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of the last `t` rows over all rows (in order), each over `window` up to itself.

    Blocks of queries, each with only the keys that it may see: the work grows with t, not t^2.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_keys <= window:
        return causal_attention(q, k, v)
    size, outputs = max(window, MIN_QUERIES), []
    for at in range(0, num_queries, size):
        block = q[:, :, at : at + size]
        end = num_keys - num_queries + at + block.shape[2]
        first = max(0, end - block.shape[2] - window)  # window - 1 would do; kernels like it even
        mask = window_mask(block.shape[2], end - first, window, q.device)
        outputs.append(attention(block, k[:, :, first:end], v[:, :, first:end], mask))
    return torch.cat(outputs, dim=2)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """(t, s) booleans, 0 <= q - k < window: the queries are the last rows of the keys."""
    keys = torch.arange(num_keys, device=device)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= 0) & (distance < window)


def last_rows(ring: Tensor, num_tokens: int) -> Tensor:
    """Rows of the last min(s, num_tokens) tokens, oldest first. ring (b, h, s, e)."""
    num_rows = ring.shape[2]
    ids = torch.arange(max(0, num_tokens - num_rows), num_tokens, device=ring.device)
    return ring[:, :, ids % num_rows]


def write_rows(ring: Tensor, rows: Tensor, start: int) -> None:
    """Put the tokens from number `start` on into the ring, where the last s of them remain."""
    num_rows, num_new = ring.shape[2], rows.shape[2]
    ids = torch.arange(start, start + num_new, device=ring.device)[-num_rows:]
    ring[:, :, ids % num_rows] = rows[:, :, -num_rows:]
