"""Strided sparse transformer: every token sees its own block and the last token of earlier blocks.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers", the "fixed" pattern in one
head, on the blocks of Dense (cat_spec.md 1.7). With stride S, the query at position q sees key k if

    k <= q  and  (q // S == k // S  or  k mod S == S - 1).

Stride 4:  key    0 1 2 3 4 5 6 7 8    Position 3 closes block 0: its key is a summary column, kept
           q = 6  . . . x x x x        for ever. No other key is read after its block has closed.
           q = 8  . . . x . . . x x

`sparse-2d` has twice the width, as in the paper's tables; its cache is then as large as that of
CAT with chunks of S. State: N // S summary columns and the S rows of the open block, per layer.

Shapes: b batch, t new tokens, d width, h heads, e head width (64), s cache rows, l layers, v words.
Try it: cat-bench run efficiency -a sparse:stride=8 --quick
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import HEAD_WIDTH, Block, attention, check_width, linear_params, rope_table

PRESETS = {"sparse-2d": {"width": 2048}}


@dataclass(frozen=True)
class Config:
    stride: int = 8  # S, tokens per block; the paper's table 3
    width: int = 1024  # D in the paper
    num_layers: int = 12
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    num_kv_heads: int | None = None  # None: as many as query heads
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width, self.num_kv_heads)
        if self.stride < 1:
            raise ValueError(
                f"stride must be at least 1 (1 sees every token, as Dense does), got {self.stride}."
            )
        if self.num_layers < 1 or self.vocab_size < 2:
            raise ValueError(
                f"num_layers must be at least 1 and vocab_size at least 2, "
                f"got {self.num_layers} and {self.vocab_size}."
            )

    @property
    def label(self) -> str:
        name = "Sparse-2D" if self.width == 2048 else "Sparse"
        return full_label(name, self, told=("width",) if self.width in (1024, 2048) else ())


class State(NamedTuple):
    """Rows 0..N//S - 1 of the cache are summary columns, the last S rows the open block.

    The last token of a block is the last of its rows and a summary column: it is written twice.
    """

    keys: Tensor  # (l, b, h, s, e), rotated; filled in place
    values: Tensor  # (l, b, h, s, e)
    num_tokens: int  # tokens read so far


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
        num_tokens, c = tokens.shape[1], self.config
        rope = rope_table(torch.arange(num_tokens, device=tokens.device), c.rope_base)
        seen = strided_mask(0, num_tokens, c.stride, tokens.device)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            x = block(x, rope, lambda q, k, v: attention(q, k, v, mask=seen))
        return self.head(self.norm(x))  # (b, t, v)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        kv_heads = c.num_kv_heads or c.width // HEAD_WIDTH
        shape = (c.num_layers, batch_size, kv_heads, max_len // c.stride + c.stride, HEAD_WIDTH)
        return State(like.new_zeros(shape), like.new_zeros(shape), num_tokens=0)

    def reset(self, state: State) -> State:
        return state._replace(num_tokens=0)  # rows past the counter are never read

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one.

        The new queries read the live rows of the cache and all new keys; only then is the cache
        written, because new rows may replace those of a block that has closed.
        """
        start, end = state.num_tokens, state.num_tokens + tokens.shape[1]
        self._check_room(end, state)
        new = torch.arange(start, end, device=tokens.device)
        rope = rope_table(new, self.config.rope_base)
        # A single new token sees all that is live: no mask tensor, so that flash kernels apply.
        one = end - start == 1
        seen = None if one else strided_mask(start, end, self.config.stride, tokens.device)
        x = self.embed(tokens)  # (b, t, d)
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                all_k = torch.cat([*self._live(keys, start), k], dim=2)
                all_v = torch.cat([*self._live(values, start), v], dim=2)
                self._store(k, keys, start)
                self._store(v, values, start)
                return attention(q, all_k, all_v, mask=seen)

            x = block(x, rope, attend)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        return self.prefill(token[:, None], state)

    def _live(self, cache: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rows of (b, h, s, e) that the token at position `start` may read, in order of position:
        the summary columns, then its open block so far.
        """
        num_columns, num_open = divmod(start, self.config.stride)
        first_open = cache.shape[2] - self.config.stride
        return cache[:, :, :num_columns], cache[:, :, first_open : first_open + num_open]

    def _store(self, new: Tensor, cache: Tensor, start: int) -> None:
        """Write the rows (b, h, t, e) of positions start, start + 1, ... that later tokens read."""
        stride, end = self.config.stride, start + new.shape[2]
        first, last = start // stride, end // stride  # columns first..last - 1 close here
        columns = new[:, :, (first + 1) * stride - 1 - start :: stride]
        cache[:, :, first:last] = columns
        block_start = (end - 1) // stride * stride  # of the last new token: a full block stays
        tail_start = max(start, block_start)
        first_open = cache.shape[2] - stride - block_start  # position p lies in row first_open + p
        cache[:, :, first_open + tail_start : first_open + end] = new[:, :, tail_start - start :]

    def _check_room(self, end: int, state: State) -> None:
        columns = state.keys.shape[3] - self.config.stride
        if end // self.config.stride > columns:
            raise ValueError(
                f"the state has room for {columns} blocks of {self.config.stride} tokens; "
                f"token {end} closes block {end // self.config.stride}."
            )

    # Costs (cat_spec.md 5).

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x (N/S + S) rows x kv width x bytes per element."""
        return batch_size * (seq_len // self.config.stride + self.config.stride) * self._row_bytes()

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        return self.state_bytes(batch_size, seq_len)  # no token ids; the counter is on the host

    def _row_bytes(self) -> int:
        c = self.config
        kv_width = c.num_kv_heads * HEAD_WIDTH if c.num_kv_heads else c.width
        return 2 * c.num_layers * kv_width * self.head.weight.itemsize

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: the rows that are seen, 4 D L."""
        c = self.config
        weights = c.num_layers * linear_params(c.width, c.num_kv_heads) + c.width * c.vocab_size
        columns, offset = divmod(num_tokens - 1, c.stride)
        rows = columns + offset + 1
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                batch_size * rows * self._row_bytes(),
                4 * batch_size * c.num_layers * c.width * rows,
            ),
        )


def sees(query: Tensor, key: Tensor, stride: int) -> Tensor:
    """The definition, on absolute positions: own block so far, and the last of every block."""
    return (key <= query) & ((query // stride == key // stride) | (key % stride == stride - 1))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def strided_mask(start: int, end: int, stride: int, device: torch.device) -> Tensor:
    """(t, live + t) booleans: queries start..end - 1 over the live rows, then over themselves."""
    num_columns, num_open = divmod(start, stride)
    new = torch.arange(start, end, device=device)
    columns = torch.arange(num_columns, device=device) * stride + stride - 1
    open_block = torch.arange(start - num_open, start, device=device)
    return sees(new[:, None], torch.cat([columns, open_block, new]), stride)
