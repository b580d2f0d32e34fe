"""Compress-and-Attend Transformer (CAT): decode each token from compressed chunks of the past.

A bidirectional compressor turns every closed chunk of C tokens into one vector (a slot) in the
decoder's residual stream; the causal decoder reads the slots so far and the raw tokens of the
current chunk only (paper sections 2 and B.2). Compact layout: row r of N + 1 is a slot where
r mod C == 0 and stands for token x_{r-1} elsewhere; row t + 1 holds the logits after token t.
See mask.py for a drawing. Cache: K slots + C rows instead of N.

Shapes: b batch, t tokens, k chunks, c chunk size, d compressor width, D decoder width, l layers,
h heads, e head width (64), s = max_len / c + c cache rows, v vocabulary.
Try it: cat-bench run efficiency -a cat:chunk_size=8 --quick
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Attend,
    Block,
    Rope,
    attention,
    causal_attention,
    check_width,
    linear_params,
    rope_table,
)
from cat_bench.chunk_attention import MAX_FUSED_CHUNK, chunk_attention
from cat_bench.chunk_block import chunk_block
from cat_bench.errors import UserError, require_cuda
from cat_bench.graph import (
    CapturedStep,
    Rows,
    block_step,
    block_step_reference,
    fast_block,
    norm_linear,
    plain_block,
)
from cat_bench.language_model import ForwardPath
from cat_bench.short_attention import MAX_SHORT, short_block

PRESETS = {
    "cat-4": {"chunk_size": 4},
    "cat-8": {"chunk_size": 8},
    "cat-16": {"chunk_size": 16},
    "cat-32": {"chunk_size": 32},
    "cat-4-q": {"chunk_size": 4, "compressor_layers": 3},
    "cat-8-q": {"chunk_size": 8, "compressor_layers": 3},
    "cat-16-q": {"chunk_size": 16, "compressor_layers": 3},
    "cat-32-q": {"chunk_size": 32, "compressor_layers": 3},
    "cat-1x": {"chunk_size": 8, "decoder_width": 1024},
    "cat-1x-q": {"chunk_size": 8, "decoder_width": 1024, "compressor_layers": 3},
    # WikiText-103 (paper C.1, E.4): Llama-2's vocabulary; D_d = 1536 and L_c = 3 follow.
    "cat-8-wikitext": {
        "chunk_size": 8, "width": 768, "num_layers": 6, "vocab_size": 32_000, "max_len": 512
    },
    "cat-16-wikitext": {
        "chunk_size": 16, "width": 768, "num_layers": 6, "vocab_size": 32_000, "max_len": 512
    },
    "cat-32-wikitext": {
        "chunk_size": 32, "width": 768, "num_layers": 6, "vocab_size": 32_000, "max_len": 512
    },
    "cat-64-wikitext": {
        "chunk_size": 64, "width": 768, "num_layers": 6, "vocab_size": 32_000, "max_len": 512
    },
    # MQAR (paper C.2, E.5): D = D_d = 64; L_c = 1 follows.
    "cat-mqar": {
        "chunk_size": 4, "width": 64, "decoder_width": 64, "num_layers": 2, "vocab_size": 8192,
        "max_len": 256,
    },
}  # fmt: skip
REQUIRES = {"cuda_graph": "triton", "compile": "triton"}
LAYOUT_VERSION = 1  # compact N + 1 rows; raised when a checkpoint would mean something else


@dataclass(frozen=True)
class Config:
    chunk_size: int = 8  # C
    width: int = 1024  # D, compressor
    decoder_width: int | None = None  # D_d; None: twice the width, as in the paper
    num_layers: int = 12  # L, decoder
    compressor_layers: int | None = None  # L_c; None: half the decoder's (later code: a quarter)
    max_len: int = 1024  # tokens; sets the number of chunk positions
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    num_kv_heads: int | None = None  # decoder only; None: as many as query heads
    qk_norm: bool = False
    rope: Literal["restart", "growing"] = "restart"  # ids j, or chunk + j (cat_spec.md 1.4)
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.chunk_size < 1 or self.chunk_size > self.max_len:
            raise ValueError(
                f"chunk_size must lie between 1 and max_len={self.max_len}, got {self.chunk_size}."
            )
        if self.rope not in ("restart", "growing"):
            raise ValueError(f"rope must be 'restart' or 'growing', got '{self.rope}'.")
        layers = (self.num_layers, self.depth_c)
        if min(layers) < 1 or self.vocab_size < 2:  # an explicit 0 is no default
            raise ValueError(
                f"layers must be at least 1 and vocab_size at least 2, got decoder and compressor "
                f"layers {layers} and {self.vocab_size}."
            )
        check_width(self.width)
        check_width(self.width_d, self.num_kv_heads)

    @property
    def width_d(self) -> int:
        """D_d, resolved."""
        return 2 * self.width if self.decoder_width is None else self.decoder_width

    @property
    def depth_c(self) -> int:
        """L_c, resolved."""
        if self.compressor_layers is None:
            return max(1, self.num_layers // 2)
        return self.compressor_layers

    @property
    def num_positions(self) -> int:
        """K_max: chunks that have a learned position."""
        return self.max_len // self.chunk_size

    @property
    def label(self) -> str:
        """CAT-8, CAT-8-q (a quarter of the layers in the compressor), CAT-1x-8 (D_d = D)."""
        name = "CAT-1x" if self.width_d == self.width else "CAT"
        quarter = "-q" if 4 * self.depth_c == self.num_layers else ""
        told = ("chunk_size", "max_len")  # max_len only sets how many chunk positions there are
        told += ("decoder_width",) if self.width_d in (self.width, 2 * self.width) else ()
        if self.depth_c in (self.num_layers // 2, self.num_layers // 4):
            told += ("compressor_layers",)
        return full_label(f"{name}-{self.chunk_size}{quarter}", self, told)


class State(NamedTuple):
    """In chunk i, rows 0..i of the cache are slots and rows i+1..i+C-1 its raw tokens, so that what
    a query sees is one range. The slot of a closed chunk replaces the first of its raw tokens.
    """

    keys: Tensor  # (l, b, h, s, e), rotated; filled in place
    values: Tensor  # (l, b, h, s, e)
    open_tokens: Tensor  # (b, c) int64, ids of the open chunk
    lengths: np.ndarray  # (b,) tokens read so far; on the host, so that no step waits for the GPU
    captured: dict[str, CapturedStep]  # decode path cuda_graph: "inner", "boundary", "ragged"


class Compressor(nn.Module):
    """f: (b, k, c) tokens and k chunk indices -> (b, k, D) slots (cat_spec.md 1.2)."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.width)  # not shared with the decoder
        self.positions = nn.Embedding(c.num_positions, c.width)  # p_i, one per absolute chunk index
        self.blocks = nn.ModuleList(
            Block(c.width, qk_norm=c.qk_norm, eps=c.norm_eps) for _ in range(c.depth_c)
        )
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.proj = nn.Linear(c.chunk_size * c.width, c.width_d, bias=False)

    def forward(
        self, chunks: Tensor, indices: Tensor, run_block=plain_block, rope: Rope | None = None
    ) -> Tensor:
        """chunks (b, k, c) ids; indices (k,) or (b, k), each below `num_positions`.

        `run_block`: graph.fast_block for inference on the Triton kernels. `rope`: a table that
        begins with ids 0 .. c, where one is at hand: making one takes a dozen launches.
        """
        batch_size, num_chunks, chunk_size = chunks.shape
        position = self.positions(indices).expand(batch_size, num_chunks, -1)
        x = torch.cat([position[:, :, None], self.embed(chunks)], dim=2)  # (b, k, 1 + c, d)
        x = x.flatten(0, 1)  # all chunks side by side in the batch: no attention across them
        if rope is None:
            rope = rope_table(torch.arange(1 + chunk_size, device=x.device), self.config.rope_base)
        rope = rope[0][: 1 + chunk_size], rope[1][: 1 + chunk_size]
        for block in self.blocks:
            x = run_block(block, x, rope)  # bidirectional
        x = self.norm(x[:, 1:])  # p_i has done its work
        return self.proj(x.flatten(1)).unflatten(0, (batch_size, num_chunks))


class Decoder(nn.Module):
    """The causal half: its blocks, token embedding, first slot (`dummy`) and head."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.dummy = nn.Parameter(torch.empty(1, c.width_d))  # slot 0: there is no chunk before it
        self.embed = nn.Embedding(c.vocab_size, c.width_d)
        self.blocks = nn.ModuleList(
            Block(c.width_d, c.num_kv_heads, c.qk_norm, c.norm_eps) for _ in range(c.num_layers)
        )
        self.norm = nn.RMSNorm(c.width_d, eps=c.norm_eps)
        self.head = nn.Linear(c.width_d, c.vocab_size, bias=False)


class Model(ForwardPath):
    decode_paths = ("eager", "cuda_graph")
    forward_paths = ("eager", "compile")
    float32_forward_paths = ("compile",)
    memory_budget = 0.9  # 5.9 of 32.2 GiB less for 2 % more time (16 x 1024 tokens, H100)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        """Raises UserError for a chunk size that the kernels of `compile` cannot take."""
        if forward_path == "compile" and config.chunk_size > MAX_FUSED_CHUNK:
            raise UserError(
                f"the forward path 'compile' of CAT takes chunk sizes up to {MAX_FUSED_CHUNK}, "
                f"got {config.chunk_size}.",
                "Use --forward-path eager.",
            )
        super().__init__()
        self.config, self.decode_path, self.forward_path = config, decode_path, forward_path
        self.compressor = Compressor(config)
        self.decoder = Decoder(config)
        self.init_weights()

    @property
    def max_len(self) -> int:
        return self.config.max_len

    def init_weights(self) -> None:
        """cat_spec.md 1.5: std sqrt(2 / 5d), d = D in the compressor and proj, else D_d."""
        c, f, g = self.config, self.compressor, self.decoder
        for weight in (f.embed.weight, f.positions.weight, f.proj.weight):
            nn.init.normal_(weight, std=(2 / (5 * c.width)) ** 0.5)
        for weight in (g.dummy, g.embed.weight, g.head.weight):
            nn.init.normal_(weight, std=(2 / (5 * c.width_d)) ** 0.5)
        for part in (f, g):
            for block in part.blocks:
                block.init_weights(len(part.blocks))

    # Parallel forward: training and scoring.

    def forward(self, tokens: Tokens) -> Logits:
        return self.decoder.head(self.hidden(tokens))

    def hidden(self, tokens: Tokens) -> Tensor:
        """Final hidden states (b, t, D): row t is read by the head as the logits after token t.

        Raises ValueError where the tokens need more chunk positions than the config has.
        """
        num_tokens, c = tokens.shape[1], self.config
        attend = self._attend_all(tokens.device)
        x = self._rows(tokens)  # (b, t + 1, D)
        row = torch.arange(num_tokens + 1, device=tokens.device)
        rope = self._rope(row // c.chunk_size, row % c.chunk_size)
        for block in self.decoder.blocks:
            x = self._decoder_block(block, x, rope, attend)
        return self.decoder.norm(x[:, 1:])  # row 0 would be p(x_0), which is not trained

    def _attend_all(self, device: torch.device) -> Attend:
        if self.forward_path == "compile":
            require_cuda("the forward path 'compile' of CAT", device.type)
            return fused_attention(self.config.chunk_size)
        size = self.config.chunk_size
        return partial(chunk_attention, chunk_size=size, implementation="eager")

    def _decoder_block(self, block: Block, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """On the forward path; rotated inside the kernels where these know how."""
        c = self.config
        plain = block.q_norm is None and block.num_kv_heads == block.num_heads
        if self.forward_path != "eager" and plain and c.rope == "restart":
            return self.on_forward_path(chunk_block)(block, x, rope, c.chunk_size)
        return self.on_forward_path(block)(x, rope, attend)

    def _training_block(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        """A block of the compressor on the forward path."""
        if self.forward_path != "eager" and block.q_norm is None and x.shape[1] <= MAX_SHORT:
            return self.on_forward_path(short_block)(block, x, rope)
        return self.on_forward_path(block)(x, rope, attention)

    def _rows(self, tokens: Tensor) -> Tensor:
        """Decoder inputs in the compact layout: group i is [slot i, C - 1 tokens of chunk i]."""
        num_tokens, chunk_size = tokens.shape[1], self.config.chunk_size
        num_groups = num_tokens // chunk_size + 1
        closed = tokens[:, : (num_groups - 1) * chunk_size].unflatten(1, (-1, chunk_size))
        slots = self._compress(closed, 0, self._training_block)
        slots = torch.cat([self._dummy(len(tokens)), slots], dim=1)
        padded = F.pad(tokens, (1, num_groups * chunk_size - num_tokens - 1))  # row r: token r - 1
        raw = self.decoder.embed(padded.unflatten(1, (-1, chunk_size))[:, :, 1:])
        return torch.cat([slots[:, :, None], raw], dim=2).flatten(1, 2)[:, : num_tokens + 1]

    def _dummy(self, batch_size: int) -> Tensor:
        return self.decoder.dummy.expand(batch_size, 1, -1)

    @property
    def _prefill_block(self) -> Callable:
        return plain_block if self.decode_path == "eager" else fast_block

    def _compress(self, chunks: Tensor, first_index: int, run_block=plain_block) -> Tensor:
        """Slots (b, k, D) of the k consecutive chunks that start at chunk `first_index`."""
        batch_size, num_chunks = chunks.shape[:2]
        end = first_index + num_chunks
        if end > self.config.num_positions:
            raise ValueError(
                f"{end} chunks of {self.config.chunk_size} tokens were given; "
                f"max_len={self.config.max_len} has positions for {self.config.num_positions}."
            )
        if num_chunks == 0:
            return self.decoder.dummy.new_empty(batch_size, 0, self.config.width_d)
        indices = torch.arange(first_index, end, device=chunks.device)
        return self.compressor(chunks, indices, run_block)

    def _rope(self, chunk: Tensor, offset: Tensor) -> Rope:
        growing = self.config.rope == "growing"
        return rope_table(chunk + offset if growing else offset, self.config.rope_base)

    # Generation: state, prefill, step (cat_spec.md 4).

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.decoder.head.weight
        if max_len > c.max_len:
            raise ValueError(f"a state of {max_len} tokens was asked for; max_len={c.max_len}.")
        kv_heads = c.num_kv_heads or c.width_d // HEAD_WIDTH
        num_rows = max_len // c.chunk_size + c.chunk_size
        shape = (c.num_layers, batch_size, kv_heads, num_rows, HEAD_WIDTH)
        state = State(
            keys=like.new_zeros(shape),
            values=like.new_zeros(shape),
            open_tokens=torch.zeros(
                batch_size, c.chunk_size, dtype=torch.int64, device=like.device
            ),
            lengths=np.zeros(batch_size, dtype=np.int64),
            captured={},
        )
        if self.decode_path == "cuda_graph":
            self._capture(state, "boundary")
            if c.chunk_size > 1:  # with chunks of one token, every step closes one
                self._capture(state, "inner")
        return state

    def reset(self, state: State) -> State:
        return state._replace(lengths=np.zeros_like(state.lengths))  # stale rows are never read

    def prefill(
        self, tokens: Tokens, state: State, lengths: Tensor | None = None
    ) -> tuple[NextLogits, State]:
        """Read `tokens`; only slots and the tail of the open chunk enter the decoder.

        `lengths` (b,): a ragged batch, padded on the right with any id. One batched compressor call
        for all chunks that close. 1 + P // C + P mod C decoder rows for a prompt of P.
        """
        given = np.full(len(tokens), tokens.shape[1])
        if lengths is not None:
            given = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
        start, end = state.lengths, state.lengths + given
        self._check_room(tokens, given, end, state)
        if _uniform(start) and _uniform(given):
            logits = self._prefill_uniform(tokens[:, : given[0]], state, int(start[0]))
        elif start.max() == 0:
            if self.decode_path == "cuda_graph" and "ragged" not in state.captured:
                self._capture(state, "ragged")  # while the state is empty: capturing runs the step
            logits = self._prefill_ragged(tokens, state, given)
        else:
            return self._prefill_by_steps(tokens, state, given)
        return logits, state._replace(lengths=end)

    def _prefill_uniform(self, tokens: Tensor, state: State, start: int) -> Tensor:
        """All rows at the same length. Keys in causal order: slots 0..i, then open tokens 1..j."""
        size = self.config.chunk_size
        end = start + tokens.shape[1]
        first, (chunk, offset) = start // size, divmod(end, size)
        unread = torch.cat([state.open_tokens[:, : start % size], tokens], dim=1)
        closed = unread[:, : (chunk - first) * size].unflatten(1, (-1, size))
        tail = unread[:, (chunk - first) * size :]  # (b, offset)
        state.open_tokens[:, :offset] = tail
        slots = self._compress(closed, first, self._prefill_block)
        if start == 0:
            slots = torch.cat([self._dummy(len(tokens)), slots], dim=1)
        seen_tail = 0 if chunk > first or start == 0 else start % size  # rows already in the cache
        raw = self.decoder.embed(tail[:, seen_tail:])
        x = torch.cat([slots, raw], dim=1)
        new_slots = torch.arange(chunk + 1 - slots.shape[1], chunk + 1, device=tokens.device)
        new_raw = torch.arange(seen_tail + 1, offset + 1, device=tokens.device)
        seen = chunk + 1 + offset
        new = slice(seen - x.shape[1], seen)
        rope = self._rope(
            torch.cat([new_slots, torch.full_like(new_raw, chunk)]),
            torch.cat([torch.zeros_like(new_slots), new_raw]),
        )
        for block, keys, values in zip(self.decoder.blocks, state.keys, state.values, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                keys[:, :, new], values[:, :, new] = k, v
                return causal_attention(q, keys[:, :, :seen], values[:, :, :seen])

            x = self._prefill_block(block, x, rope, attend)
        return self.decoder.head(self.decoder.norm(x[:, -1]))

    def _prefill_ragged(self, tokens: Tensor, state: State, lengths: np.ndarray) -> Tensor:
        """Rows of unequal length into an empty state: slots and tails padded on the right."""
        size, device = self.config.chunk_size, tokens.device
        chunk, offset = (torch.as_tensor(part, device=device) for part in np.divmod(lengths, size))
        num_chunks, num_tail = int(lengths.max()) // size, int((lengths % size).max())
        padding = torch.arange(tokens.shape[1], device=device) >= (chunk * size + offset)[:, None]
        tokens = tokens.masked_fill(padding, 0)  # any id may pad, also one outside the vocabulary
        tail_at = (chunk * size)[:, None] + torch.arange(num_tail, device=device)
        tail = tokens.gather(1, tail_at.clamp(max=tokens.shape[1] - 1))
        state.open_tokens[:, :num_tail] = tail
        closed, run_block = (
            tokens[:, : num_chunks * size].unflatten(1, (-1, size)),
            self._prefill_block,
        )
        slots = torch.cat([self._dummy(len(tokens)), self._compress(closed, 0, run_block)], dim=1)
        x = torch.cat([slots, self.decoder.embed(tail)], dim=1)
        slot_ids, raw_ids = (torch.arange(n, device=device) for n in (num_chunks + 1, num_tail))
        rope = self._rope(
            torch.cat([slot_ids.expand(len(x), -1), chunk[:, None].expand(-1, num_tail)], dim=1),
            torch.cat([torch.zeros_like(slot_ids), raw_ids + 1]),
        )
        rope = tuple(part.expand(len(x), -1, -1) for part in rope)
        order = torch.arange(x.shape[1], device=device)
        missing = (order > chunk[:, None]) & (order <= num_chunks)  # (b, s): slots of longer rows
        is_tail = order[:, None] > num_chunks
        seen = (order[:, None] >= order) & ~(is_tail & missing[:, None])  # (b, rows, rows)
        row, tail_rows = torch.arange(len(x), device=device)[:, None], chunk[:, None] + 1 + raw_ids
        for block, keys, values in zip(self.decoder.blocks, state.keys, state.values, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                for cache, new in ((keys, k), (values, v)):
                    cache[:, :, slot_ids] = new[:, :, : num_chunks + 1]
                    cache[row, :, tail_rows] = new[:, :, num_chunks + 1 :].transpose(1, 2)
                return attention(q, k, v, mask=seen[:, None])

            x = run_block(block, x, rope, attend)
        last = torch.where(offset > 0, num_chunks + offset, chunk)
        x = x[torch.arange(len(x), device=device), last]
        return self.decoder.head(self.decoder.norm(x))

    def _prefill_by_steps(
        self, tokens: Tensor, state: State, lengths: np.ndarray
    ) -> tuple[Tensor, State]:
        """A further segment on a ragged state: equal lengths only, token by token."""
        if not _uniform(lengths):
            raise ValueError("a second ragged segment is not supported; give equal lengths.")
        for token in tokens.unbind(1)[: lengths[0]]:
            logits, state = self.step(token, state)
        return logits, state

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        """One decoder row per sequence; a sequence whose chunk closes here compresses it first."""
        lengths = state.lengths + 1
        self._check_room(token[:, None], np.ones_like(lengths), lengths, state)
        if self.decode_path == "eager":
            if _uniform(lengths):
                return self.prefill(token[:, None], state)
            row = torch.as_tensor(lengths, device=token.device)
            ids = torch.arange(self.config.max_len + 1, device=token.device)
            rope = rope_table(ids, self.config.rope_base)
            logits = self._step_rows(token, row, state, rope, "ragged", block_step_reference)
            return logits, state._replace(lengths=lengths)
        if _uniform(lengths):
            logits = state.captured[self.step_kind(int(lengths[0]))](token, int(lengths[0]))
        else:  # unequal rows share the inner graph wherever no chunk closes
            closes = (lengths % self.config.chunk_size == 0).any()
            step = state.captured["ragged" if closes else "inner"]
            logits = step(token, torch.from_numpy(lengths))
        return logits, state._replace(lengths=lengths)

    def _step_rows(
        self, token, row, state: State, rope: Rope, kind: str, run_block, out: Tensor | None = None
    ) -> Tensor:
        """The step without host values: each sequence has its own row (b,), r = i C + j.

        kind: "inner" no chunk closes, "boundary" all do, "ragged" some may. `out`: for the logits.
        """
        c, eager = self.config, run_block is block_step_reference
        places = chunk_rows_reference if eager else chunk_rows
        at, rope_id, closed = places(token, row, state.open_tokens, c.rope == "growing")
        rows = Rows(write=at, rope_id=rope_id, first_end=at)
        if kind == "inner":
            x = self.decoder.embed(token)
        else:
            fast = plain_block if eager else fast_block
            x = self.compressor(state.open_tokens[:, None], closed[:, None], fast, rope)[:, 0]
            if kind == "ragged":
                closes = (row % c.chunk_size == 0)[:, None]
                x = torch.where(closes, x, self.decoder.embed(token))
        for block, keys, values in zip(self.decoder.blocks, state.keys, state.values, strict=True):
            x = run_block(block, x, keys, values, rows, rope)
        if eager:
            return self.decoder.head(self.decoder.norm(x))
        return norm_linear(x, self.decoder.norm, self.decoder.head.weight, out)

    def _capture(self, state: State, kind: str) -> None:
        size, device = self.config.chunk_size, state.keys.device
        ids = torch.arange(self.config.max_len + 1, device=device)
        rope = rope_table(ids, self.config.rope_base)
        first = next(iter(state.captured.values()), None)
        buffers = state._replace(captured={})  # no cycle: a dropped state frees its memory at once
        logits = first.logits if first else None  # one buffer for all graphs
        state.captured[kind] = CapturedStep(
            lambda token, row: self._step_rows(token, row, buffers, rope, kind, block_step, logits),
            batch_size=len(state.open_tokens),
            device=device,
            first_row=size if kind == "boundary" else 1,
            pool=first.graph.pool() if first else None,
        )

    def _check_room(self, tokens: Tensor, given: np.ndarray, end: np.ndarray, state: State) -> None:
        if given.min() < 1 or given.max() > tokens.shape[1]:
            raise ValueError(
                f"lengths must lie between 1 and {tokens.shape[1]}, "
                f"got {given.min()} to {given.max()}."
            )
        slots = state.keys.shape[3] - self.config.chunk_size  # the dummy not counted
        if end.max() // self.config.chunk_size > slots:
            raise ValueError(
                f"the state has room for {slots} chunks of {self.config.chunk_size} tokens; "
                f"token {end.max()} needs chunk {end.max() // self.config.chunk_size}."
            )

    # Costs (cat_spec.md 1.6, 5).

    def step_kind(self, num_tokens: int) -> str:
        """A "boundary" step closes a chunk: it compresses it and writes its slot."""
        return "boundary" if num_tokens % self.config.chunk_size == 0 else "inner"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        f, g = self.compressor, self.decoder
        tables = (f.embed.weight, f.positions.weight, g.dummy, g.embed.weight, g.head.weight)
        return self.num_params - sum(table.numel() for table in tables)

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Cache rows, and the ids of the open chunk (8 bytes each)."""
        ids = batch_size * self.config.chunk_size * 8
        return self.state_bytes_float(batch_size, seq_len) + ids

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x (N/C + C) rows x kv width x bytes per element."""
        rows = seq_len // self.config.chunk_size + self.config.chunk_size
        return batch_size * rows * self._row_bytes()

    def _row_bytes(self) -> int:
        c = self.config
        kv_width = c.num_kv_heads * HEAD_WIDTH if c.num_kv_heads else c.width_d
        return 2 * c.num_layers * kv_width * self.decoder.head.weight.itemsize

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Decoder matrices; live cache rows; and the compressor where the token closes a chunk."""
        c, itemsize = self.config, self.decoder.head.weight.itemsize
        chunk, offset = divmod(num_tokens, c.chunk_size)
        weights = c.num_layers * linear_params(c.width_d, c.num_kv_heads) + c.width_d * c.vocab_size
        rows = chunk + 1 + offset
        costs = [
            Cost("weights", weights * itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                batch_size * rows * self._row_bytes(),
                4 * batch_size * c.num_layers * c.width_d * rows,
            ),
        ]
        if offset == 0:
            costs.append(self._compressor_cost(batch_size))
        return tuple(costs)

    def prefill_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """As `prefill` does it: the compressor for every closed chunk at once, and a decoder row
        per slot and token of the tail. The last row is a step's; the dummy's is equal everywhere.

        Nobody reads what the last block makes of the rows before the last one, nor what the
        compressor's last block makes of p_i.
        """
        c = self.config
        num_chunks, offset = divmod(num_tokens, c.chunk_size)
        rows = 1 + num_chunks + offset
        weights, state, *_ = self.step_costs(batch_size, num_tokens)
        block = linear_params(c.width_d, c.num_kv_heads)
        rows_before = 1 + batch_size * (rows - 2)
        pairs_before = batch_size * (rows * (rows - 1) // 2 - 1)  # the dummy sees itself alone
        before = 2 * block * rows_before + 4 * c.width_d * pairs_before
        costs = (weights, state, Cost("rows before", 0, (c.num_layers - 1) * before))
        if num_chunks == 0:
            return costs
        compressor = self._compressor_cost(batch_size * num_chunks)
        unread = 2 * batch_size * num_chunks * linear_params(c.width)
        return (*costs, compressor._replace(flops=compressor.flops - unread))

    def _compressor_cost(self, num_chunks: int) -> Cost:
        """Of compressing so many chunks side by side, as cat_spec.md 5 counts it: p_i in full."""
        c = self.config
        blocks, proj = c.depth_c * linear_params(c.width), c.chunk_size * c.width * c.width_d
        per_chunk = 2 * blocks * (c.chunk_size + 1) + 2 * proj
        per_chunk += 4 * c.width * c.depth_c * (c.chunk_size + 1) ** 2
        itemsize = self.decoder.head.weight.itemsize
        return Cost("compressor", (blocks + proj) * itemsize, num_chunks * per_chunk)


def chunk_rows_reference(
    token: Tensor, row: Tensor, open_tokens: Tensor, growing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Put `token` into its open chunk; of row r = i C + j (b,): cache row, rotation id, and i - 1.

    open_tokens (b, c) is changed in place. i - 1 is the chunk that closes where j = 0; 0 in chunk
    0, which closes nothing.
    """
    size = open_tokens.shape[1]
    open_tokens.scatter_(1, ((row - 1) % size)[:, None], token[:, None])
    chunk, offset = row // size, row % size
    return chunk + offset, chunk + offset if growing else offset, (chunk - 1).clamp(min=0)


def chunk_rows(
    token: Tensor, row: Tensor, open_tokens: Tensor, growing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one launch."""
    from cat_bench import kernels

    return kernels.chunk_rows(token, row, open_tokens, growing)


@lru_cache
def fused_attention(chunk_size: int) -> Attend:
    """One function per chunk size: with a new one, torch.compile would start over."""
    return partial(chunk_attention, chunk_size=chunk_size, summary="first", implementation="fused")


def _uniform(lengths: np.ndarray) -> bool:
    return bool((lengths == lengths[0]).all())
