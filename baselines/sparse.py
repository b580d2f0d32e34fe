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
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from cat_bench import mask
from cat_bench.architecture import Cost, full_label
from cat_bench.blocks import HEAD_WIDTH, Attend, attention, check_width
from cat_bench.chunk_attention import MAX_FUSED_CHUNK, chunk_attention
from cat_bench.errors import UserError, require_cuda
from cat_bench.graph import CapturedStep, Rows
from cat_bench.language_model import Transformer, check_counts

PRESETS = {
    "sparse-2d": {"width": 2048},
    "sparse-wikitext": {  # paper C.1, E.4
        "stride": 4, "width": 768, "num_layers": 6, "vocab_size": 32_000
    },
    "sparse-mqar": {"stride": 4, "width": 64, "num_layers": 2, "vocab_size": 8192},  # C.2, E.5
}  # fmt: skip
REQUIRES = {"cuda_graph": "triton", "compile": "triton"}


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
        check_counts(self.num_layers, self.vocab_size)

    @property
    def label(self) -> str:
        name = "Sparse-2D" if self.width == 2048 else "Sparse"
        return full_label(name, self, told=("width",) if self.width in (1024, 2048) else ())


class State(NamedTuple):
    """Rows 0..N//S - 1 of the cache are summary columns, the last S rows the open block.

    The last token of a block is the last of its rows and a summary column. As a row of the block no
    later token reads it, so a graphed step writes it into its column alone.
    """

    keys: Tensor  # (l, b, h, s, e), rotated; filled in place
    values: Tensor  # (l, b, h, s, e)
    num_tokens: int  # tokens read so far
    captured: CapturedStep | None  # decode path cuda_graph: the step, tied to these buffers


class Model(Transformer):
    decode_paths = ("eager", "cuda_graph")
    forward_paths = ("eager", "compile")
    float32_forward_paths = ("compile",)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        """Raises UserError for a stride that the kernels of `compile` cannot take."""
        if forward_path == "compile" and config.stride > MAX_FUSED_CHUNK:
            raise UserError(
                f"the forward path 'compile' of strided attention takes strides up to "
                f"{MAX_FUSED_CHUNK}, got {config.stride}.",
                "Use --forward-path eager.",
            )
        super().__init__(config, decode_path, forward_path)

    def attend_all(self, num_tokens: int, device: torch.device) -> Attend:
        if self.forward_path == "compile":
            require_cuda("the forward path 'compile' of strided attention", device.type)
            return fused_attention(self.config.stride)
        seen = strided_mask(0, num_tokens, self.config.stride, device)
        return lambda q, k, v: attention(q, k, v, mask=seen)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        num_rows = max_len // c.stride + c.stride
        shape = (c.num_layers, batch_size, self.num_kv_heads, num_rows, HEAD_WIDTH)
        buffers = State(like.new_zeros(shape), like.new_zeros(shape), 0, None)
        captured = self.capture(
            buffers, max_len, lambda position: strided_rows(position, c.stride, num_rows)
        )
        return buffers._replace(captured=captured)

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        """The new queries read the live rows of the cache and all new keys; only then is the cache
        written, because new rows may replace those of a block that has closed.
        """
        all_k = torch.cat([*self._live(keys, start), k], dim=2)
        all_v = torch.cat([*self._live(values, start), v], dim=2)
        self._store(k, keys, start)
        self._store(v, values, start)
        return self._attend_live(start, start + k.shape[2], q.device)(q, all_k, all_v)

    def _attend_live(self, start: int, end: int, device: torch.device) -> Attend:
        """Attention of the tokens start .. end - 1 over the live rows, then over themselves.

        On `cuda_graph` a first prompt goes through the kernels of chunk_attention, whose work grows
        with t / S; else the pattern is a mask, which costs what Dense costs.
        """
        stride = self.config.stride
        if end - start == 1:  # it sees all that is live: no mask tensor, so flash kernels apply
            return attention
        if start == 0 and self.decode_path != "eager" and stride <= MAX_FUSED_CHUNK:
            return fused_attention(stride)
        seen = strided_mask(start, end, stride, device)
        return lambda q, k, v: attention(q, k, v, mask=seen)

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

    def check_room(self, end: int, state: State) -> None:
        columns = state.keys.shape[3] - self.config.stride
        if end // self.config.stride > columns:
            raise ValueError(
                f"the state has room for {columns} blocks of {self.config.stride} tokens; "
                f"token {end} closes block {end // self.config.stride}."
            )

    # Costs (cat_spec.md 5).

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x (N/S + S) rows x kv width x bytes per element."""
        return batch_size * (seq_len // self.config.stride + self.config.stride) * self.row_bytes

    def tokens_passing(self, num_tokens: int) -> list[int]:
        """All but two: the last one reads summary rows, which the one before makes of all rows."""
        num_blocks = len(self.blocks)
        return [num_tokens] * (num_blocks - 2) + [1] * min(2, num_blocks)

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: the rows that are seen, 4 D L."""
        columns, offset = divmod(num_tokens - 1, self.config.stride)
        return self.costs(batch_size, columns + offset + 1)


def sees(query: Tensor, key: Tensor, stride: int) -> Tensor:
    """The definition, on absolute positions: own block so far, and the last of every block."""
    return mask.sees(query, key, stride, offset=stride - 1)


@lru_cache
def fused_attention(stride: int) -> Attend:
    """The pattern on chunk_attention's kernels. One function per stride, for torch.compile."""
    return partial(chunk_attention, chunk_size=stride, summary="last", implementation="fused")


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def strided_mask(start: int, end: int, stride: int, device: torch.device) -> Tensor:
    """(t, live + t) booleans: queries start..end - 1 over the live rows, then over themselves."""
    num_columns, num_open = divmod(start, stride)
    new = torch.arange(start, end, device=device)
    columns = torch.arange(num_columns, device=device) * stride + stride - 1
    open_block = torch.arange(start - num_open, start, device=device)
    return sees(new[:, None], torch.cat([columns, open_block, new]), stride)


def strided_rows(position: Tensor, stride: int, num_rows: int) -> Rows:
    """For a graphed step: the token at `position` (b,) sees the columns and its open block."""
    block, offset = position // stride, position % stride
    first_open = num_rows - stride
    return Rows(
        write=torch.where(offset == stride - 1, block, first_open + offset),
        rope_id=position,
        first_end=block,
        second_start=torch.full_like(position, first_open),
        second_end=first_open + offset,
    )
