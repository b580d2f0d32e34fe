"""Gated DeltaNet (GDN): a recurrent memory per head that forgets by a gate and corrects itself.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2025), in Transformer++ blocks; `gdn-h1` makes
every other layer sliding-window attention (GDN first, then sliding, and so on). Per head, with
beta = sigmoid(b(x)) and g = -exp(A_log) softplus(a(x) + dt_bias) <= 0, the memory S decays first,
then the delta rule corrects what the decayed memory says of the key:

    S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - S'^T k_t);  S_t = S' + k_t u_t^T;  o_t = S_t^T q_t

q, k, v = silu(causal convolution of width 4 of the projections); q and k have L2 norm 1 per head,
x / sqrt(sum x^2 + 1e-6), q then times 1 / sqrt(128). Output: o_proj(RMSNorm(o) silu(g_proj(x))).
State: S, and the last 4 inputs of the convolutions, so it does not grow; a sliding layer adds a
ring of `window` rows. S and its sums are float32 at least, whatever autocast says, so S has 4 bytes
per element in bfloat16.

Paths. Decoding beyond `eager`: prompts are read on the kernels of flash-linear-attention (fla 0.6),
with our fused kernels around them. `cuda_graph` takes a token on our own kernels, S changed in
place, and reads a short prompt so, too. `upstream` takes fla's, which return S as a new tensor:
copying it back doubles the bytes of a step. `upstream_graph` is the same, captured. Forward:
`upstream` is what fla's own layer trains with; its backward raises on Hopper GPUs with Triton 3.4.0
to 3.7.0, which compile it wrongly (fla issue 640). fla's chunks multiply float32 in TF32.

Names in flash-linear-attention's GatedDeltaNet: `blocks.i.mixer.X` is its `model.layers.i.attn.X`,
one to one, shapes too: {q,k,v,a,b,g,o}_proj, {q,k,v}_conv1d (.weight), o_norm.weight, A_log,
dt_bias. Around them: embed = model.embeddings, norm = model.norm, head = lm_head, attn_norm and
mlp_norm keep their names, w1 / w3 / w2 = mlp.gate_proj / up_proj / down_proj. A sliding layer's
qkv is q_proj over k_proj over v_proj of its Attention (attn.*), attn_out is o_proj.

Shapes: b batch, t tokens, d width, h heads, p key width, e value width, n = h (2p + e) channels of
the convolutions, c chunk, s ring slots, l layers of one kind, v words.
Try it: cat-bench run efficiency -a gdn-h1 --quick
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Attend,
    Block,
    check_width,
    feed_forward,
    linear_params,
    rope_table,
    sum_dtype,
    swiglu_width,
)
from cat_bench.errors import UserError
from cat_bench.graph import (
    CapturedStep,
    block_step,
    fast_block,
    finish_block,
    norm_linear,
    packed,
    plain_block,
)
from cat_bench.language_model import SHORT_PROMPT, LanguageModel
from cat_bench.upstream import read_settings, require_fla, to_our_names, to_their_names
from cat_bench.window import (
    check_ring,
    flex_window_attention,
    pairs_before_last,
    prompt_attention,
    ring_attention,
    ring_rows,
    window_attention,
)

PRESETS = {"gdn": {}, "gdn-h1": {"hybrid": True, "window": 512}}
REQUIRES = {  # every fast step has kernels of ours, so Triton, around the authors'
    "cuda_graph": ("fla", "triton"),
    "upstream_graph": ("fla", "triton"),
    "upstream": ("fla", "triton"),
}
UPSTREAM_LACKS = {"hybrid": "fla's attention layer needs flash-attn"}  # for suite upstream
TINY = {"num_heads": 2, "key_width": 16, "value_width": 32}
CHUNK = 64  # tokens that forward and prefill read at once: speed only, the results are the same


@dataclass(frozen=True)
class Config:
    width: int = 1024
    num_layers: int = 12
    num_heads: int | None = None  # None: heads_by_rule, which is 6 here
    key_width: int = 128
    value_width: int = 256  # expand 2
    conv_width: int = 4
    hybrid: bool = False  # every other layer a sliding-window attention layer
    window: int = 512  # hybrid only: a token sees itself and window - 1 tokens before it
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    rope_base: float = 10_000.0  # hybrid only: GDN layers have no positions
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        counts = "width num_layers num_heads key_width value_width conv_width window".split()
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        by_rule = heads_by_rule(self.width, self.key_width)
        if self.num_heads is None and by_rule % 1:
            raise ValueError(
                f"width={self.width} has no whole number of heads with key_width={self.key_width}: "
                f"num_heads x key_width = 3/4 width gives {by_rule:g}. Give num_heads."
            )
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}.")
        if self.hybrid:
            check_width(self.width)

    @property
    def heads(self) -> int:
        """num_heads, resolved."""
        if self.num_heads is None:
            return int(heads_by_rule(self.width, self.key_width))
        return self.num_heads

    @property
    def label(self) -> str:
        name, told = "GDN", ("window", "rope_base")  # without effect in GDN
        if self.hybrid:
            name, told = "GDN-H1", ("hybrid",)
        if self.heads == heads_by_rule(self.width, self.key_width):
            told += ("num_heads",)
        return full_label(name, self, told)

    @property
    def num_sliding_layers(self) -> int:
        return self.num_layers // 2 if self.hybrid else 0

    @property
    def num_delta_layers(self) -> int:
        return self.num_layers - self.num_sliding_layers

    @property
    def conv_channels(self) -> int:
        return self.heads * (2 * self.key_width + self.value_width)


def heads_by_rule(width: int, key_width: int) -> float:
    """The paper's: heads x key width = 3/4 width."""
    return 0.75 * width / key_width


class Memory(NamedTuple):
    """What one GDN layer remembers."""

    matrix: Tensor  # (b, h, p, e), float32 at least: S
    inputs: Tensor  # (b, conv_width, n): the last projections (q, k, v), newest last


class State(NamedTuple):
    matrices: Tensor  # (l, b, h, p, e), float32 at least
    inputs: Tensor  # (l, b, conv_width, n)
    keys: Tensor  # (l, b, h, s, 64), rotated; token i in slot i mod s; no layers without hybrid
    values: Tensor  # (l, b, h, s, 64)
    num_tokens: int  # read so far
    fast_step: Callable[[Tensor, int], Tensor] | None  # (token, num_tokens), on these buffers


class Model(LanguageModel):
    decode_paths = ("eager", "cuda_graph", "upstream_graph", "upstream")
    forward_paths = ("eager", "upstream")
    float32_forward_paths = ("upstream",)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        c = config
        blocks = (
            Block(c.width, eps=c.norm_eps) if c.hybrid and layer % 2 else DeltaBlock(c)
            for layer in range(c.num_layers)
        )
        super().__init__(config, blocks, decode_path, forward_path)

    def hidden(self, tokens: Tokens) -> Tensor:
        rope = rope_table(
            torch.arange(tokens.shape[1], device=tokens.device), self.config.rope_base
        )
        attend = self._attend_all(tokens.shape[1], tokens.device)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            if isinstance(block, DeltaBlock):
                h = block.attn_norm(x)
                if self.forward_path == "upstream":
                    o, _ = self.checkpointed(block.mixer.upstream)(h)
                else:
                    o, _ = self.checkpointed(block.mixer)(h, block.mixer.empty(len(tokens)))
                x = self.on_forward_path(block.feed_forward)(x, o)
            else:
                x = self.on_forward_path(block)(x, rope, attend)
        return self.norm(x)

    def _attend_all(self, num_tokens: int, device: torch.device) -> Attend | None:
        """The attention of the sliding layers in `hidden`; None: there are none."""
        c = self.config
        if not c.hybrid:
            return None
        if self.forward_path == "upstream":
            return flex_window_attention(num_tokens, c.window, device)
        return lambda q, k, v: window_attention(q, k, v, c.window)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        matrix = (c.num_delta_layers, batch_size, c.heads, c.key_width, c.value_width)
        inputs = (c.num_delta_layers, batch_size, c.conv_width, c.conv_channels)
        slots = min(c.window, max_len)
        ring = (c.num_sliding_layers, batch_size, c.width // HEAD_WIDTH, slots, HEAD_WIDTH)
        buffers = State(
            matrices=like.new_zeros(matrix, dtype=sum_dtype(like.dtype)),
            inputs=like.new_zeros(inputs),
            keys=like.new_zeros(ring),
            values=like.new_zeros(ring),
            num_tokens=0,
            fast_step=None,
        )
        if self.decode_path == "eager":
            return buffers
        fast_step = self._fast_step(buffers, batch_size, max_len)
        return self.reset(buffers._replace(fast_step=fast_step))  # capturing ran the step

    def reset(self, state: State) -> State:
        state.matrices.zero_()
        state.inputs.zero_()
        return state._replace(num_tokens=0)  # ring slots past the counter are never read

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        c, start, end = self.config, state.num_tokens, state.num_tokens + tokens.shape[1]
        self._check_room(end, state)
        if self.decode_path == "cuda_graph" and tokens.shape[1] <= SHORT_PROMPT:
            return self.read_by_steps(tokens, state)
        rope = rope_table(torch.arange(start, end, device=tokens.device), c.rope_base)
        memories = zip(state.matrices, state.inputs, strict=True)
        rings = zip(state.keys, state.values, strict=True)
        eager, in_window = self.decode_path == "eager", prompt_attention(self.decode_path)
        read_delta, read_sliding = (
            (read_block, plain_block) if eager else (fast_delta_block, fast_block)
        )
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            if isinstance(block, DeltaBlock):
                x = read_delta(block, x, Memory(*next(memories)))
            else:
                keys, values = next(rings)

                def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                    return ring_attention(q, k, v, keys, values, start, c.window, in_window)

                x = read_sliding(block, x, rope, attend)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        if state.fast_step is None:
            return self.prefill(token[:, None], state)  # of one token: the recurrence itself
        self._check_room(state.num_tokens + 1, state)
        logits = state.fast_step(token, state.num_tokens)
        return logits, state._replace(num_tokens=state.num_tokens + 1)

    def _fast_step(
        self, buffers: State, batch_size: int, max_len: int
    ) -> Callable[[Tensor, int], Tensor]:
        """The step on kernels, (token (b,), tokens read so far) -> logits (b, v)."""
        c, device = self.config, self.head.weight.device
        rope = rope_table(torch.arange(max_len if c.hybrid else 0, device=device), c.rope_base)
        rule = upstream_rule if self.decode_path.startswith("upstream") else in_place_rule

        def run(token: Tensor, position: Tensor) -> Tensor:
            rows = ring_rows(position, buffers.keys.shape[3]) if c.hybrid else None
            memories = zip(buffers.matrices, buffers.inputs, strict=True)
            rings = zip(buffers.keys, buffers.values, strict=True)
            x = self.embed(token)  # (b, d)
            for block in self.blocks:
                if isinstance(block, DeltaBlock):
                    x = delta_block_step(block, x, Memory(*next(memories)), rule)
                else:
                    x = block_step(block, x, *next(rings), rows, rope)
            return norm_linear(x, self.norm, self.head.weight)

        if self.decode_path != "upstream":
            return CapturedStep(run, batch_size, device, end=max_len if c.hybrid else None)

        @torch.no_grad()
        def launch_by_launch(token: Tensor, position: int) -> Tensor:
            return run(token, torch.full_like(token, position))

        return launch_by_launch

    def _check_room(self, end: int, state: State) -> None:
        if self.config.hybrid:
            check_ring(end, state.keys.shape[3], self.config.window)

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Memories, which do not depend on the length, and min(window, length) rows per ring."""
        return batch_size * (self._memory_bytes() + self._ring_bytes(seq_len))

    def _memory_bytes(self) -> int:
        c, dtype = self.config, self.head.weight.dtype
        matrix = c.heads * c.key_width * c.value_width * sum_dtype(dtype).itemsize
        return c.num_delta_layers * (matrix + c.conv_width * c.conv_channels * dtype.itemsize)

    def _ring_bytes(self, num_tokens: int) -> int:
        c = self.config
        rows = 2 * min(c.window, num_tokens)  # keys and values
        return c.num_sliding_layers * rows * c.width * self.head.weight.itemsize

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix and convolution once, 2 FLOP per weight. State: memories are read
        and written, 6 FLOP per element of S; ring rows are read, 4 D FLOP each.
        """
        c = self.config
        heads = c.heads * (2 * c.key_width + 3 * c.value_width + 2)  # q k, v g o, a b
        delta = c.width * heads + c.conv_width * c.conv_channels
        delta += 3 * c.width * swiglu_width(c.width)
        sliding = linear_params(c.width)
        weights = c.num_delta_layers * delta + c.num_sliding_layers * sliding
        weights += c.width * c.vocab_size
        delta_flops = 6 * c.num_delta_layers * c.heads * c.key_width * c.value_width
        ring_flops = c.num_sliding_layers * self._ring_flops(num_tokens)
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                batch_size * (2 * self._memory_bytes() + self._ring_bytes(num_tokens)),
                batch_size * (delta_flops + ring_flops),
            ),
        )

    def looks_back(self, block: nn.Module, num_tokens: int) -> int:
        return num_tokens if isinstance(block, DeltaBlock) else self.config.window - 1

    def pair_flops(self, num_tokens: int, passing: list[int]) -> float:
        return sum(
            4 * self.config.width * pairs_before_last(num_tokens, count, self.config.window)
            for block, count in zip(self.blocks, passing, strict=True)
            if not isinstance(block, DeltaBlock)
        )

    def _ring_flops(self, num_tokens: int) -> int:
        """Of one sliding layer, for token number `num_tokens`."""
        return 4 * self.config.width * min(self.config.window, num_tokens)


class DeltaBlock(nn.Module):
    """cat_bench.blocks.Block with the gated delta rule in place of attention, in two halves:
    `mixer(attn_norm(x), memory)`, then `feed_forward`.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.width, swiglu_width(config.width)
        self.attn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.mixer = GatedDeltaNet(config)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.w1 = nn.Linear(width, hidden, bias=False)  # gate
        self.w3 = nn.Linear(width, hidden, bias=False)  # up
        self.w2 = nn.Linear(hidden, width, bias=False)  # down

    @property
    def attn_out(self) -> nn.Linear:
        """Under the name that it has in Block, for graph.finish_block."""
        return self.mixer.o_proj

    def feed_forward(self, x: Tensor, o: Tensor) -> Tensor:
        """x, o (b, t, d): residual, then as in Block."""
        return feed_forward(self, x + o)

    def init_weights(self, num_layers: int) -> None:
        """Matrices as in Block; the mixer's convolutions and vectors as it makes them."""
        width = self.w1.in_features
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=(2 / (5 * width)) ** 0.5)
        for linear in (self.mixer.o_proj, self.w2):
            nn.init.normal_(linear.weight, std=1 / (width**0.5 * num_layers))


class GatedDeltaNet(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        keys, values = c.heads * c.key_width, c.heads * c.value_width
        self.q_proj = nn.Linear(c.width, keys, bias=False)
        self.k_proj = nn.Linear(c.width, keys, bias=False)
        self.v_proj = nn.Linear(c.width, values, bias=False)
        self.a_proj = nn.Linear(c.width, c.heads, bias=False)  # decay
        self.b_proj = nn.Linear(c.width, c.heads, bias=False)  # strength of the correction
        self.g_proj = nn.Linear(c.width, values, bias=False)  # output gate
        self.o_proj = nn.Linear(values, c.width, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(size, size, c.conv_width, groups=size, bias=False)
            for size in (keys, keys, values)
        )
        self.o_norm = nn.RMSNorm(c.value_width, eps=c.norm_eps)  # one weight for all heads
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.dt_bias = nn.Parameter(torch.empty(c.heads))
        self.init_gates()

    @torch.no_grad()
    def init_gates(self) -> None:
        """exp(A_log) uniform in (0, 16); softplus(dt_bias) log-uniform in (0.001, 0.1).

        Drawn in float32: bfloat16 would draw an exact 0 now and then, whose logarithm is infinite.
        """
        draw = torch.empty_like(self.A_log, dtype=torch.float32)
        self.A_log.copy_(draw.uniform_(0, 16).clamp(min=1e-4).log())
        dt = 0.001 * 100 ** draw.uniform_(0, 1)
        self.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def empty(self, batch_size: int) -> Memory:
        c, like = self.config, self.o_proj.weight
        matrix = (batch_size, c.heads, c.key_width, c.value_width)
        return Memory(
            like.new_zeros(matrix, dtype=sum_dtype(like.dtype)),
            like.new_zeros(batch_size, c.conv_width, c.conv_channels),
        )

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Read x (b, t, d) on top of `memory`; the memory given is not changed."""
        o, memory = self.mix(*self.project(x), memory)
        return self.o_proj(o), memory

    def upstream(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory | None]:
        """`forward` on fla's kernels. Without a memory: from the empty one; returns none."""
        o, memory = self.mix_upstream(*self.project(x), memory)
        return self.o_proj(o), memory

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (b, t, d) -> q, k, v in one (b, t, n), output gate (b, t, h e), a and b (b, t, h)."""
        new = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        return new, self.g_proj(x), self.a_proj(x), self.b_proj(x)

    def mix(
        self, new: Tensor, gate: Tensor, a: Tensor, b: Tensor, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """What lies between `project` and `o_proj`: (b, t, h e), and the memory after it."""
        c, dtype = self.config, new.dtype
        q, k, v, inputs = self.convolved(new, memory.inputs)
        q, k = unit(q) / c.key_width**0.5, unit(k)
        a, b, A_log, dt_bias = (part.to(q.dtype) for part in (a, b, self.A_log, self.dt_bias))
        log_decay = (-A_log.exp() * F.softplus(a + dt_bias)).transpose(1, 2)  # (b, h, t), <= 0
        beta = b.sigmoid().transpose(1, 2)  # (b, h, t)
        rule = recurrent_delta_rule if new.shape[1] == 1 else chunked_delta_rule
        with torch.autocast(new.device.type, enabled=False):  # S and its sums: float32 at least
            o, matrix = rule(q, k, v, log_decay, beta, memory.matrix)  # (b, h, t, e)
        o = F.rms_norm(o, o.shape[-1:], self.o_norm.weight.to(o.dtype), self.o_norm.eps)
        gate = gate.unflatten(-1, (c.heads, -1)).to(o.dtype)  # (b, t, h, e)
        return (o.transpose(1, 2) * F.silu(gate)).flatten(2).to(dtype), Memory(matrix, inputs)

    def convolved(self, new: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (b, h, t, p) and v (b, h, t, e) after convolution and SiLU, float32 at least; and
        the last inputs of the convolutions. new (b, t, n).
        """
        c = self.config
        seen = torch.cat([inputs, new], dim=1)  # (b, conv_width + t, n)
        kernel = torch.cat(self.kernels())  # (n, 1, conv_width), newest last
        out = F.silu(F.conv1d(seen[:, 1:].transpose(1, 2), kernel, groups=len(kernel)))  # (b, n, t)
        keys = c.heads * c.key_width
        parts = out.to(sum_dtype(new.dtype)).split([keys, keys, c.heads * c.value_width], 1)
        q, k, v = (part.unflatten(1, (c.heads, -1)).transpose(2, 3) for part in parts)
        return q, k, v, seen[:, -c.conv_width :]

    def kernels(self) -> list[nn.Parameter]:
        """Of the convolutions of q, k and v: (h p, 1, conv_width) twice, (h e, 1, conv_width)."""
        return [conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]

    def mix_upstream(
        self, new: Tensor, gate: Tensor, a: Tensor, b: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory | None]:
        """`mix` on fla's kernels, those that its own layer trains with, gates inside them.

        On top of a memory, fewer than CHUNK tokens go through the recurrence, which multiplies in
        float32 and has no backward.
        """
        require_fla()
        from fla.modules.convolution import causal_conv1d
        from fla.modules.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import (
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )

        c = self.config
        past = None if memory is None else memory.inputs.mT.contiguous()  # (b, n, conv_width)
        kernel = torch.cat(self.kernels())[:, 0]
        qkv, _ = causal_conv1d(new, kernel, initial_state=past, activation="silu")
        keys = c.heads * c.key_width
        parts = qkv.split([keys, keys, c.heads * c.value_width], dim=-1)
        q, k, v = (part.unflatten(-1, (c.heads, -1)) for part in parts)  # (b, t, h, p or e)
        short = memory is not None and new.shape[1] < CHUNK
        rule = fused_recurrent_gated_delta_rule if short else chunk_gated_delta_rule
        o, matrix = rule(
            q, k, v, g=a, beta=b, A_log=self.A_log, dt_bias=self.dt_bias,
            initial_state=None if memory is None else memory.matrix,
            output_final_state=memory is not None,
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        gate = gate.unflatten(-1, (c.heads, -1))
        o = rms_norm_gated(o, gate, self.o_norm.weight, None, eps=self.o_norm.eps).flatten(2)
        if memory is None:
            return o, None
        inputs = torch.cat([memory.inputs, new[:, -c.conv_width :]], dim=1)[:, -c.conv_width :]
        return o, Memory(matrix, inputs)


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. q k (b, h, t, p), v (b, h, t, e), log_decay beta (b, h, t),
    matrix (b, h, p, e) -> outputs (b, h, t, e) and the last matrix.
    """
    outputs = []
    for i in range(q.shape[2]):
        matrix = log_decay[:, :, i, None, None].exp() * matrix
        recalled = (matrix * k[:, :, i, :, None]).sum(2)  # (b, h, e): S'^T k
        u = beta[:, :, i, None] * (v[:, :, i] - recalled)
        matrix = matrix + k[:, :, i, :, None] * u[:, :, None]
        outputs.append((matrix * q[:, :, i, :, None]).sum(2))
    return torch.stack(outputs, dim=2), matrix


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for CHUNK tokens at once: only chunks follow one another.

    With G the running sum of log_decay in the chunk, S_i = e^G_i S_0 + sum_(j<=i) e^(G_i-G_j) k_j
    u_j^T. Put into the definition of u_i, this is one unit lower triangular system for all u:

        u_i + beta_i sum_(j<i) e^(G_i-G_j) (k_i . k_j) u_j = beta_i (v_i - e^G_i S_0^T k_i)
    """
    outputs = []
    parts = (x.split(CHUNK, dim=2) for x in (q, k, v, log_decay, beta[..., None]))
    for qc, kc, vc, gc, bc in zip(*parts, strict=True):  # (b, h, c, ...)
        total = gc.cumsum(2)  # (b, h, c): G, the decay since S_0
        carried = total.exp()[..., None]  # (b, h, c, 1)
        later = torch.ones_like(total[0, 0, :, None] - total[0, 0], dtype=torch.bool).triu(1)
        between = total[..., :, None] - total[..., None, :]  # (b, h, c, c): G_i - G_j
        decay = between.masked_fill(later, -torch.inf).exp()  # at most 1: nothing overflows
        system = bc * decay * (kc @ kc.mT)  # its diagonal is taken as 1, not read
        right = bc * (vc - carried * (kc @ matrix))
        u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        outputs.append(carried * (qc @ matrix) + (decay * (qc @ kc.mT)) @ u)
        left_over = (total[..., -1:] - total).exp()[..., None]  # (b, h, c, 1): e^(G_c - G_j)
        matrix = carried[:, :, -1:] * matrix + (left_over * kc).mT @ u
    return torch.cat(outputs, dim=2), matrix


def unit(x: Tensor) -> Tensor:
    """x with L2 norm 1 along its last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


# --- a prompt and a cached step; all but read_block change x in place, without gradients ----------

Rule = Callable[["GatedDeltaNet", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def read_block(block: DeltaBlock, x: Tensor, memory: Memory) -> Tensor:
    """A DeltaBlock for a segment of a prompt, x (b, t, d); `memory` moves on in place."""
    o, after = block.mixer(block.attn_norm(x), memory)
    remember(memory, after)
    return block.feed_forward(x, o)


def fast_delta_block(block: DeltaBlock, x: Tensor, memory: Memory) -> Tensor:
    """The same on fla's kernels, and on ours around them."""
    rows = x.flatten(0, 1)
    parts = (part.unflatten(0, x.shape[:2]) for part in fast_projections(block, rows))
    o, after = block.mixer.mix_upstream(*parts, memory)
    remember(memory, after)
    return finish_block(block, rows, o.flatten(0, 1)).view_as(x)


def delta_block_step(block: DeltaBlock, x: Tensor, memory: Memory, rule: Rule) -> Tensor:
    """The same for one token per sequence, x (b, d)."""
    from cat_bench import recurrent_kernels

    mixer = block.mixer
    new, gate, a, b = fast_projections(block, x)
    kernel = packed(mixer.kernels())[: new.shape[1], 0]
    qkv = recurrent_kernels.conv_step(new, memory.inputs, kernel, silu=True)
    return finish_block(block, x, rule(mixer, qkv, gate, a, b, memory.matrix))


def fast_projections(block: DeltaBlock, x: Tensor) -> list[Tensor]:
    """`project(attn_norm(x))` in one matmul: x (rows, d) -> its parts, which are strided."""
    mixer, c = block.mixer, block.mixer.config
    names = "qkvgab"  # a and b last, for the alignment of the others
    weight = packed([getattr(mixer, f"{name}_proj").weight for name in names])
    n, values, heads = c.conv_channels, c.heads * c.value_width, c.heads
    sizes = [n, values, heads, heads, len(weight) - n - values - 2 * heads]
    *parts, _ = norm_linear(x, block.attn_norm, weight).split(sizes, dim=-1)
    return parts


def remember(memory: Memory, after: Memory) -> None:
    for old, new in zip(memory, after, strict=True):
        old.copy_(new)


def in_place_rule(
    mixer: GatedDeltaNet, qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, matrix: Tensor
) -> Tensor:
    """qkv (b, n), gate (b, h e), a b (b, h), not yet gates -> (b, h e); `matrix` moves on."""
    from cat_bench import recurrent_kernels

    o = recurrent_kernels.delta_step(qkv, a, b, mixer.A_log, mixer.dt_bias, matrix)
    return recurrent_kernels.gated_rms_norm(o, gate, mixer.o_norm.weight, mixer.o_norm.eps)


def upstream_rule(
    mixer: GatedDeltaNet, qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, matrix: Tensor
) -> Tensor:
    """The same on fla's kernels, which have no way to write the memory where it was read."""
    require_fla()
    from fla.modules.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    heads, keys = mixer.config.heads, mixer.config.heads * mixer.config.key_width
    parts = qkv[:, None].split([keys, keys, qkv.shape[1] - 2 * keys], dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts)  # (b, 1, h, p or e)
    o, new = fused_recurrent_gated_delta_rule(
        q, k, v, g=a[:, None], beta=b[:, None], A_log=mixer.A_log, dt_bias=mixer.dt_bias,
        initial_state=matrix, output_final_state=True,
        use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    matrix.copy_(new)
    gate = gate.unflatten(-1, (heads, -1))[:, None]
    return rms_norm_gated(o, gate, mixer.o_norm.weight, None, eps=mixer.o_norm.eps).flatten(1)


# --- flash-linear-attention's own model ----------------------------------------------------------

NAMES = {  # ours: GatedDeltaNetForCausalLM's
    "embed.": "model.embeddings.",
    "blocks.": "model.layers.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
}
INSIDE = {  # a layer
    ".mixer.": ".attn.",
    ".w1.": ".mlp.gate_proj.",
    ".w3.": ".mlp.up_proj.",
    ".w2.": ".mlp.down_proj.",
}
SETTINGS = {  # ours: of GatedDeltaNetConfig (fla 0.6.0), and the default there
    "width": ("hidden_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_heads", 6),
    "key_width": ("head_dim", 256),
    "conv_width": ("conv_size", 4),
    "vocab_size": ("vocab_size", 32_000),
    "norm_eps": ("norm_eps", 1e-6),
}
ATTENTION_SETTINGS = {"window": ("window_size", None), "rope_base": ("rope_theta", 10_000.0)}
BUILT_IN = {
    "model_type": ("gated_deltanet",),
    "allow_neg_eigval": (False,),
    "output_gate_activation": ("swish", "silu"),
    "hidden_act": ("swish",),
}
NOT_IN_SHAPES = ("norm_eps", "allow_neg_eigval", "output_gate_activation", "hidden_act", "attn")


def to_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Model under the names of fla's GatedDeltaNetForCausalLM; the same memory."""
    theirs = {}
    for name, weight in to_their_names(state_dict, NAMES).items():
        layer, is_qkv, _ = name.partition("qkv.weight")
        if is_qkv:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                theirs[f"{layer}attn.{part}_proj.weight"] = rows
        else:
            theirs[_renamed(name, INSIDE | {".attn_out.": ".attn.o_proj."})] = weight
    return theirs


def from_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of fla's GatedDeltaNetForCausalLM under the names of Model, for load_state_dict."""
    ours, back = {}, {new: old for old, new in INSIDE.items()}
    for name, weight in state_dict.items():
        layer, _, part = name.partition(".attn.")
        if not part or f"{layer}.attn.A_log" in state_dict:
            ours[_renamed(name, back)] = weight
        elif part == "o_proj.weight":
            ours[f"{layer}.attn_out.weight"] = weight
        elif part == "q_proj.weight":
            rows = [state_dict[f"{layer}.attn.{x}_proj.weight"] for x in "qkv"]
            ours[f"{layer}.qkv.weight"] = torch.cat(rows)
        elif part not in ("k_proj.weight", "v_proj.weight"):  # those two came with q_proj
            raise ValueError(f"our sliding-window layers have no weight like '{name}'")
    return to_our_names(ours, NAMES)


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def settings_from_upstream(theirs: dict[str, Any]) -> dict[str, Any]:
    """Our settings by a config.json of fla. Raises ValueError where ours has no such model.

    What leaves a trace in names and shapes is not looked at: value heads, biases, the MLP's width.
    """
    found = read_settings(theirs, SETTINGS, BUILT_IN)
    found["value_width"] = int(found["key_width"] * theirs.get("expand_v", 2.0))
    if found["num_heads"] == heads_by_rule(found["width"], found["key_width"]):
        found["num_heads"] = None  # so that a spec need not name them
    if not theirs.get("attn"):
        return found | {"hybrid": False}
    kinds = theirs["attn"] if isinstance(theirs["attn"], list) else [theirs["attn"]]
    if len(kinds) > 1:
        raise ValueError(f"it has {len(kinds)} kinds of layers in attn, but ours has one")
    layers = list(range(1, found["num_layers"], 2))
    built_in = {"layers": (layers,), "num_heads": (found["width"] // HEAD_WIDTH,)}
    return found | {"hybrid": True} | read_settings(kinds[0], ATTENTION_SETTINGS, built_in)


def upstream_config(config: Config) -> dict[str, Any]:
    """The config.json of fla's model of ours; no token is special in it, none ends a text."""
    c = config
    theirs = {name: values[0] for name, values in BUILT_IN.items()}
    theirs |= {name: getattr(c, ours) for ours, (name, _) in SETTINGS.items()}
    if c.hybrid:
        theirs["attn"] = {
            "layers": list(range(1, c.num_layers, 2)),
            "num_heads": c.width // HEAD_WIDTH,
            "window_size": c.window,
            "rope_theta": c.rope_base,
        }
    return theirs | {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "num_heads": c.heads,
        "expand_v": c.value_width / c.key_width,
        "intermediate_size": swiglu_width(c.width),
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def upstream_model(model: Model) -> nn.Module:
    """fla's own GatedDeltaNetForCausalLM with the weights of `model`. UserError for gdn-h1."""
    c, like = model.config, model.head.weight
    if c.hybrid:
        raise UserError(
            f"fla's own model cannot be {c.label}: its attention layer needs flash-attn.",
            "Take gdn instead.",
        )
    require_fla()
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(**upstream_config(c))
    upstream = GatedDeltaNetForCausalLM(config).to(like.device, like.dtype).eval()
    upstream.load_state_dict(to_upstream(model.state_dict()))
    return upstream


def upstream_generate(model: Model) -> Callable[[Tensor, int], Tensor]:
    """Hugging Face `generate` of fla's own model with the weights of `model`, greedy, with a cache.

    Returns run(prompt (b, p), seq_len) -> tokens (b, seq_len), prompt included; no scores are kept.
    """
    upstream = upstream_model(model)

    def run(prompt: Tensor, seq_len: int) -> Tensor:
        num_new = seq_len - prompt.shape[1]
        return upstream.generate(
            prompt,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            use_cache=True,
        )

    return run
