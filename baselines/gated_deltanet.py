"""Gated DeltaNet (GDN): a recurrent memory per head that forgets by a gate and corrects itself.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2025), in Transformer++ blocks; `gdn-h1` makes
every other layer sliding-window attention (GDN first, then sliding, and so on). Per head, with
beta = sigmoid(b(x)) and g = -exp(A_log) softplus(a(x) + dt_bias) <= 0, the memory S decays first,
then the delta rule corrects what the decayed memory says of the key:

    S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - S'^T k_t);  S_t = S' + k_t u_t^T;  o_t = S_t^T q_t

q, k, v = silu(causal convolution of width 4 of the projections); q and k have L2 norm 1 per head,
x / sqrt(sum x^2 + 1e-6), q then times 1 / sqrt(128). Output: o_proj(RMSNorm(o) silu(g_proj(x))).
State: S, and the last 4 inputs of the convolutions, so it does not grow; a sliding layer adds a
ring of `window` rows. S and its sums are float32 at least, so 4 bytes per element in bfloat16.

Names in flash-linear-attention's GatedDeltaNet: `blocks.i.mixer.X` is its `model.layers.i.attn.X`,
one to one, shapes too: {q,k,v,a,b,g,o}_proj, {q,k,v}_conv1d (.weight), o_norm.weight, A_log,
dt_bias. Around them: embed = model.embeddings, norm = model.norm, head = lm_head, attn_norm and
mlp_norm keep their names, w1 / w3 / w2 = mlp.gate_proj / up_proj / down_proj. A sliding layer's
qkv is q_proj over k_proj over v_proj of its Attention (attn.*), attn_out is o_proj.

Shapes: b batch, t tokens, d width, h heads, p key width, e value width, n = h (2p + e) channels of
the convolutions, c chunk, s ring slots, l layers of one kind, v words.
Try it: cat-bench run efficiency -a gdn-h1 --quick
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Block,
    attention,
    check_width,
    linear_params,
    rope_table,
    swiglu_width,
)

PRESETS = {"gdn": {}, "gdn-h1": {"hybrid": True, "window": 512}}
TINY = {"num_heads": 2, "key_width": 8, "value_width": 16}
CHUNK = 64  # tokens that forward and prefill read at once: speed only, the results are the same


@dataclass(frozen=True)
class Config:
    width: int = 1024
    num_layers: int = 12
    num_heads: int = 6  # the paper's rule: heads x 128 = 3/4 width
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {self.vocab_size}.")
        if self.hybrid:
            check_width(self.width)

    @property
    def label(self) -> str:
        if self.hybrid:
            return full_label("GDN-H1", self, told=("hybrid",))
        return full_label("GDN", self, told=("window", "rope_base"))  # without effect here

    @property
    def num_sliding_layers(self) -> int:
        return self.num_layers // 2 if self.hybrid else 0

    @property
    def num_delta_layers(self) -> int:
        return self.num_layers - self.num_sliding_layers

    @property
    def conv_channels(self) -> int:
        return self.num_heads * (2 * self.key_width + self.value_width)


class Memory(NamedTuple):
    """What one GDN layer remembers."""

    matrix: Tensor  # (b, h, p, e), float32 at least: S
    inputs: Tensor  # (b, n, conv_width): the last projections (q, k, v), newest last


class State(NamedTuple):
    matrices: Tensor  # (l, b, h, p, e), float32 at least
    inputs: Tensor  # (l, b, n, conv_width)
    keys: Tensor  # (l, b, h, s, 64), rotated; token i in slot i mod s; no layers without hybrid
    values: Tensor  # (l, b, h, s, 64)
    num_tokens: int  # read so far


class Model(nn.Module):
    decode_paths = ("eager",)
    max_len = None  # the state does not grow, and RoPE knows no limit

    def __init__(self, config: Config, decode_path: str = "eager"):
        super().__init__()
        self.config, self.decode_path = config, decode_path
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(
            Block(c.width, eps=c.norm_eps) if c.hybrid and layer % 2 else DeltaBlock(c)
            for layer in range(c.num_layers)
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
        c = self.config
        rope = rope_table(torch.arange(tokens.shape[1], device=tokens.device), c.rope_base)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            if isinstance(block, DeltaBlock):
                x, _ = block(x, block.mixer.empty(len(tokens)))
            else:
                x = block(x, rope, lambda q, k, v: window_attention(q, k, v, c.window))
        return self.head(self.norm(x))  # (b, t, v)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        matrix = (c.num_delta_layers, batch_size, c.num_heads, c.key_width, c.value_width)
        inputs = (c.num_delta_layers, batch_size, c.conv_channels, c.conv_width)
        slots = min(c.window, max_len)
        ring = (c.num_sliding_layers, batch_size, c.width // HEAD_WIDTH, slots, HEAD_WIDTH)
        return State(
            matrices=like.new_zeros(matrix, dtype=at_least_float32(like.dtype)),
            inputs=like.new_zeros(inputs),
            keys=like.new_zeros(ring),
            values=like.new_zeros(ring),
            num_tokens=0,
        )

    def reset(self, state: State) -> State:
        state.matrices.zero_()
        state.inputs.zero_()
        return state._replace(num_tokens=0)  # ring slots past the counter are never read

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        c, start, end = self.config, state.num_tokens, state.num_tokens + tokens.shape[1]
        self._check_room(end, state)
        rope = rope_table(torch.arange(start, end, device=tokens.device), c.rope_base)
        memories = zip(state.matrices, state.inputs, strict=True)
        rings = zip(state.keys, state.values, strict=True)
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            if isinstance(block, DeltaBlock):
                memory = Memory(*next(memories))
                x, new = block(x, memory)
                memory.matrix.copy_(new.matrix)
                memory.inputs.copy_(new.inputs)
            else:
                keys, values = next(rings)

                def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values) -> Tensor:
                    return ring_attention(q, k, v, keys, values, start, c.window)

                x = block(x, rope, attend)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        return self.prefill(token[:, None], state)  # of one token: the recurrence itself

    def _check_room(self, end: int, state: State) -> None:
        """A ring shorter than the window (max_len < window) must not wrap."""
        slots = state.keys.shape[3]
        if self.config.hybrid and slots < self.config.window and end > slots:
            raise ValueError(f"the state holds {slots} tokens; token {end} was given.")

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Memories, which do not depend on the length, and min(window, length) rows per ring."""
        return batch_size * (self._memory_bytes() + self._ring_bytes(seq_len))

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        """All of it: the table of evaluation_spec.md 4.4, its matrix part at 4 bytes, not at 2."""
        return self.state_bytes(batch_size, seq_len)

    def _memory_bytes(self) -> int:
        c, dtype = self.config, self.head.weight.dtype
        matrix = c.num_heads * c.key_width * c.value_width * at_least_float32(dtype).itemsize
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
        heads = c.num_heads * (2 * c.key_width + 3 * c.value_width + 2)  # q k, v g o, a b
        delta = c.width * heads + c.conv_width * c.conv_channels
        delta += 3 * c.width * swiglu_width(c.width)
        sliding = linear_params(c.width)
        weights = c.num_delta_layers * delta + c.num_sliding_layers * sliding
        weights += c.width * c.vocab_size
        delta_flops = 6 * c.num_delta_layers * c.num_heads * c.key_width * c.value_width
        ring_flops = 4 * c.num_sliding_layers * c.width * min(c.window, num_tokens)
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost(
                "state",
                batch_size * (2 * self._memory_bytes() + self._ring_bytes(num_tokens)),
                batch_size * (delta_flops + ring_flops),
            ),
        )


class DeltaBlock(nn.Module):
    """cat_bench.blocks.Block with the gated delta rule in place of attention."""

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.width, swiglu_width(config.width)
        self.attn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.mixer = GatedDeltaNet(config)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.w1 = nn.Linear(width, hidden, bias=False)  # gate
        self.w3 = nn.Linear(width, hidden, bias=False)  # up
        self.w2 = nn.Linear(hidden, width, bias=False)  # down

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        o, memory = self.mixer(self.attn_norm(x), memory)
        x = x + o
        h = self.mlp_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h)), memory

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
        keys, values = c.num_heads * c.key_width, c.num_heads * c.value_width
        self.q_proj = nn.Linear(c.width, keys, bias=False)
        self.k_proj = nn.Linear(c.width, keys, bias=False)
        self.v_proj = nn.Linear(c.width, values, bias=False)
        self.a_proj = nn.Linear(c.width, c.num_heads, bias=False)  # decay
        self.b_proj = nn.Linear(c.width, c.num_heads, bias=False)  # strength of the correction
        self.g_proj = nn.Linear(c.width, values, bias=False)  # output gate
        self.o_proj = nn.Linear(values, c.width, bias=False)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(size, size, c.conv_width, groups=size, bias=False)
            for size in (keys, keys, values)
        )
        self.o_norm = nn.RMSNorm(c.value_width, eps=c.norm_eps)  # one weight for all heads
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
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
        matrix = (batch_size, c.num_heads, c.key_width, c.value_width)
        return Memory(
            like.new_zeros(matrix, dtype=at_least_float32(like.dtype)),
            like.new_zeros(batch_size, c.conv_channels, c.conv_width),
        )

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Read x (b, t, d) on top of `memory`; the memory given is not changed."""
        c = self.config
        q, k, v, inputs = self.convolved(x, memory.inputs)
        q, k = unit(q) / c.key_width**0.5, unit(k)
        a, b = (self.a_proj(x), self.b_proj(x))  # (b, t, h)
        a, b, A_log, dt_bias = (part.to(q.dtype) for part in (a, b, self.A_log, self.dt_bias))
        log_decay = (-A_log.exp() * F.softplus(a + dt_bias)).transpose(1, 2)  # (b, h, t), <= 0
        beta = b.sigmoid().transpose(1, 2)  # (b, h, t)
        rule = recurrent_delta_rule if x.shape[1] == 1 else chunked_delta_rule
        o, matrix = rule(q, k, v, log_decay, beta, memory.matrix)  # (b, h, t, e)
        o = F.rms_norm(o, o.shape[-1:], self.o_norm.weight.to(o.dtype), self.o_norm.eps)
        gate = self.g_proj(x).unflatten(-1, (c.num_heads, -1)).to(o.dtype)  # (b, t, h, e)
        o = (o.transpose(1, 2) * F.silu(gate)).flatten(2).to(x.dtype)
        return self.o_proj(o), Memory(matrix, inputs)

    def convolved(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (b, h, t, p) and v (b, h, t, e) after convolution and SiLU, float32 at least; and
        the last inputs of the convolutions.
        """
        c = self.config
        new = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).transpose(1, 2)
        seen = torch.cat([inputs, new], dim=-1)  # (b, n, conv_width + t)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        kernel = torch.cat([conv.weight for conv in convs])  # (n, 1, conv_width), newest last
        out = F.silu(F.conv1d(seen[..., 1:], kernel, groups=len(kernel)))  # (b, n, t)
        keys = c.num_heads * c.key_width
        parts = out.to(at_least_float32(x.dtype)).split(
            [keys, keys, c.num_heads * c.value_width], 1
        )
        q, k, v = (part.unflatten(1, (c.num_heads, -1)).transpose(2, 3) for part in parts)
        return q, k, v, seen[..., -c.conv_width :]


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


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The queries are the last rows of the keys; each sees itself and window - 1 rows before."""
    return attention(q, k, v, mask=window_mask(q.shape[2], k.shape[2], window, q.device))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """(t, s) booleans: 0 <= query - key < window."""
    keys = torch.arange(num_keys, device=device)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= 0) & (distance < window)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, window: int
) -> Tensor:
    """Attend from tokens start, start + 1, ... and put their rows into the ring, in place.

    One token overwrites the row that it no longer sees; then all rows are visible, in any order.
    Several still need rows that they overwrite: those are read first.
    """
    slots, end = keys.shape[2], start + q.shape[2]
    stored = torch.arange(max(0, start - slots), start, device=q.device) % slots
    kept = torch.arange(max(start, end - slots), end, device=q.device)
    if q.shape[2] > 1:
        k_seen = torch.cat([keys[:, :, stored], k], dim=2)
        v_seen = torch.cat([values[:, :, stored], v], dim=2)
    keys[:, :, kept % slots] = k[:, :, kept - start]
    values[:, :, kept % slots] = v[:, :, kept - start]
    if q.shape[2] > 1:
        return window_attention(q, k_seen, v_seen, window)
    filled = min(end, slots)
    return attention(q, keys[:, :, :filled], values[:, :, :filled])


def unit(x: Tensor) -> Tensor:
    """x with L2 norm 1 along its last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of recurrent sums: bfloat16 -> float32, float64 stays."""
    return torch.promote_types(dtype, torch.float32)
