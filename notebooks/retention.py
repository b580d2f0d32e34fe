"""Retention: attention without softmax whose memory decays at a fixed rate per head.

Sun et al., "Retentive Network" (2023), in Transformer++ blocks; xPos is left out, RoPE stays. The
example of 3_add_your_architecture.ipynb: one file, outside of baselines/, named by its path. Per
head h with gamma = 1 - 2^(-5 - h), the memory S starts at 0:

    S_t = gamma S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t / sqrt(64)

Output: attn_out(GroupNorm(o) silu(gate(x))), one group per head. State: S, so it does not grow; its
sums are float32 at least. Forward and prefill read CHUNK tokens at once, a step reads one. On a GPU
the decode path `cuda_graph` captures that step: the same PyTorch, launched as one.

Shapes: b batch, t tokens, d width, h heads, e head width (64), c chunk, l layers, v words.
Try it: cat-bench run efficiency -a notebooks/retention.py -a dense --quick
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Block,
    Rope,
    check_width,
    feed_forward,
    linear_params,
    rope_table,
    rotate,
    sum_dtype,
)
from cat_bench.graph import CapturedStep
from cat_bench.language_model import LanguageModel

REQUIRES = {"cuda_graph": "triton"}  # comes with a torch for GPUs: what the path needs
CHUNK = 64  # tokens read at once: speed only, the results are the same


@dataclass(frozen=True)
class Config:
    width: int = 1024
    num_layers: int = 12
    vocab_size: int = 50_432
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width)

    @property
    def label(self) -> str:
        return full_label("Retention", self, told=())


class State(NamedTuple):
    memories: Tensor  # (l, b, h, e, e), float32 at least: S of every layer; written in place
    num_tokens: int
    captured: CapturedStep | None  # decode path cuda_graph: the step, tied to `memories`


class Model(LanguageModel):
    decode_paths = ("eager", "cuda_graph")

    def __init__(self, config: Config, decode_path: str = "eager"):
        blocks = [RetentionBlock(config) for _ in range(config.num_layers)]
        super().__init__(config, blocks, decode_path, "eager")

    def hidden(self, tokens: Tokens) -> Tensor:
        rope = rope_table(
            torch.arange(tokens.shape[1], device=tokens.device), self.config.rope_base
        )
        x = self.embed(tokens)  # (b, t, d)
        for block, memory in zip(self.blocks, self._empty(len(tokens)), strict=True):
            x, _ = self.checkpointed(block)(x, rope, memory)
        return self.norm(x)

    def init_state(self, batch_size: int, max_len: int) -> State:
        memories = self._empty(batch_size)
        if self.decode_path == "eager":
            return State(memories, 0, None)
        captured = CapturedStep(partial(self._read_token, memories), batch_size, memories.device)
        return self.reset(State(memories, 0, captured))  # capturing ran the step

    def _read_token(self, memories: Tensor, token: Token, position: Tensor) -> Tensor:
        """One token, of which all is on the device: (b,) and its position (b,) -> logits (b, v)."""
        rope = rope_table(position[:, None], self.config.rope_base)
        return self.head(self._read(token[:, None], rope, memories)[:, -1])

    def _empty(self, batch_size: int) -> Tensor:
        heads = self.config.width // HEAD_WIDTH
        shape = (self.config.num_layers, batch_size, heads, HEAD_WIDTH, HEAD_WIDTH)
        return self.head.weight.new_zeros(shape, dtype=self._sum_dtype)

    @property
    def _sum_dtype(self) -> torch.dtype:
        return sum_dtype(self.head.weight.dtype)

    def reset(self, state: State) -> State:
        state.memories.zero_()
        return state._replace(num_tokens=0)

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        start, end = state.num_tokens, state.num_tokens + tokens.shape[1]
        rope = rope_table(torch.arange(start, end, device=tokens.device), self.config.rope_base)
        x = self._read(tokens, rope, state.memories)
        return self.head(x[:, -1]), state._replace(num_tokens=end)

    def _read(self, tokens: Tokens, rope: Rope, memories: Tensor) -> Tensor:
        """Final hidden states (b, t, d); `memories` move on in place."""
        x = self.embed(tokens)  # (b, t, d)
        for block, memory in zip(self.blocks, memories, strict=True):
            x, new = block(x, rope, memory)
            memory.copy_(new)
        return self.norm(x)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        if state.captured is None:
            return self.prefill(token[:, None], state)
        logits = state.captured(token, state.num_tokens)
        return logits, state._replace(num_tokens=state.num_tokens + 1)

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """layers x batch x heads x 64 x 64 = layers x batch x width x 64, whatever the length."""
        c = self.config
        return c.num_layers * batch_size * c.width * HEAD_WIDTH * self._sum_dtype.itemsize

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: S is read and written; decay,
        k v^T, sum and S^T q are 5 FLOP per element of it.
        """
        c = self.config
        weights = c.num_layers * (linear_params(c.width) + c.width**2) + c.width * c.vocab_size
        memory = self.state_bytes(batch_size, num_tokens)
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost("state", 2 * memory, 5 * memory // self._sum_dtype.itemsize),
        )


class RetentionBlock(Block):
    """cat_bench.blocks.Block with retention, and a gate, in place of attention."""

    def __init__(self, config: Config):
        super().__init__(config.width, eps=config.norm_eps)
        self.gate = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Rope, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read x (b, t, d) on top of `memory` (b, h, e, e), which is not changed."""
        h = self.attn_norm(x)
        q, k, v = self.split_heads(self.qkv(h))  # (b, h, t, e)
        q, k = rotate(q, rope) / HEAD_WIDTH**0.5, rotate(k, rope)
        o, memory = retain(*(part.to(memory.dtype) for part in (q, k, v)), memory)
        o = F.layer_norm(o, (HEAD_WIDTH,), eps=self.attn_norm.eps).to(x.dtype)
        x = x + self.attn_out(o.transpose(1, 2).flatten(2) * F.silu(self.gate(h)))
        return feed_forward(self, x), memory

    def init_weights(self, num_layers: int) -> None:
        super().init_weights(num_layers)
        nn.init.normal_(self.gate.weight, std=(2 / (5 * self.gate.in_features)) ** 0.5)


def retain(q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, CHUNK tokens at once: q k v (b, h, t, e) -> outputs and the last memory.

    Row i of a chunk sees row j <= i at gamma^(i - j), and the memory before it at gamma^(i + 1).
    """
    heads = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    log_gamma = torch.log1p(-(2.0 ** (-5 - heads)))[:, None, None]  # (h, 1, 1)
    outputs = []
    for qc, kc, vc in zip(*(part.split(CHUNK, dim=2) for part in (q, k, v)), strict=True):
        size = qc.shape[2]
        rows = torch.arange(size, device=q.device, dtype=q.dtype)
        age = rows[:, None] - rows  # (c, c)
        decay = (age * log_gamma).exp().masked_fill(age < 0, 0.0)  # (h, c, c)
        carried = ((rows[:, None] + 1) * log_gamma).exp()  # (h, c, 1)
        left_over = ((size - 1 - rows[:, None]) * log_gamma).exp()  # (h, c, 1)
        outputs.append((qc @ kc.mT * decay) @ vc + carried * (qc @ memory))
        memory = (size * log_gamma).exp() * memory + (left_over * kc).mT @ vc
    return torch.cat(outputs, dim=2), memory
