"""BASED: Taylor linear attention, sliding-window attention and short gated convolutions.

Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff",
as the baseline of the CAT paper, Appendix E.3. Pre-norm residual layers without biases, each one
mixer and one SwiGLU; `pattern` names the mixers, one letter per layer:

    c  BaseConv (kernel 3, expand_proj 4): u, g = split(W_in x), y = W_out(conv(u) * g)
    l  linear attention: y_t = sum_{i<=t} w_ti v_i / sum_{i<=t} w_ti with s = q_t.k_i / sqrt(f),
       w = 1 + s + s^2/2 (> 0), which is phi(q).phi(k): exp(s) to second order. So the state is
       sum phi(k) v^T and the normaliser sum phi(k), phi(x) having 1 + f + f^2 = 273 features.
    s  softmax attention over the last `window` tokens, itself included: 0 <= q - k < window

Positions: RoPE in the window layers alone, as in every other softmax layer of this project (so
MQAR compares mixers); keys are cached rotated, so the ring needs no order. Linear layers and
convolutions take none. Heads of window layers are 64 wide; `num_heads` splits the linear layers.
State: the sums are kept in float32 at least, in a model of any dtype; the rest in its own dtype.

Shapes: b batch, t tokens, d width, h heads, e head width, f feature_dim, p features (1 + f + f^2),
s cache rows, u channels of the convolution (2 d), i its kernel, c chunk, v words.
Try it: cat-bench run efficiency -a based --quick
"""

from dataclasses import dataclass
from itertools import repeat
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Rope,
    attention,
    check_width,
    rope_table,
    rotate,
    swiglu_width,
)

# At WikiText-103 scale (cat_spec.md 1.7): 2 + 2 + 2 layers, the plain one there is pattern=cclcsc.
PRESETS = {
    "based-2x": {"pattern": "clscls", "width": 768, "window": 64, "vocab_size": 32_000},
}
TINY = {"pattern": "clsl", "feature_dim": 4, "num_heads": 2}  # for the contract test
CHUNK = 64  # tokens whose mutual weights are formed at once; changes no result


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    pattern: str = "cclcsccclcsc"  # 2 linear + 2 window + 8 convolution, front to back
    feature_dim: int = 16  # f: width of a query or key before the feature map
    num_heads: int = 16  # of the linear layers
    window: int = 128  # tokens that a window layer sees
    # "max_len": a row for every token, as official code has it (the fault in the paper's C.7).
    window_cache: Literal["window", "max_len"] = "window"
    conv_kernel: int = 3
    expand_proj: int = 4  # BaseConv projects to expand_proj * width: one half is convolved
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width)
        if not self.pattern or set(self.pattern) - set(MIXERS):
            raise ValueError(
                f"pattern must be letters of c (convolution), l (linear) and s (sliding window), "
                f"one per layer, got '{self.pattern}'."
            )
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"num_heads must divide the width of {self.width}, got {self.num_heads}."
            )
        if self.window_cache not in ("window", "max_len"):
            raise ValueError(
                f"window_cache must be 'window' or 'max_len', got '{self.window_cache}'."
            )
        if self.expand_proj < 2 or self.expand_proj % 2:
            raise ValueError(f"expand_proj must be even and positive, got {self.expand_proj}.")
        for name, least in {
            "feature_dim": 1,
            "window": 1,
            "conv_kernel": 1,
            "vocab_size": 2,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def label(self) -> str:
        twice = self.pattern == PRESETS["based-2x"]["pattern"]
        return full_label("BASED-2x" if twice else "BASED", self, ("pattern",) if twice else ())

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def num_features(self) -> int:
        return 1 + self.feature_dim + self.feature_dim**2

    @property
    def conv_width(self) -> int:
        return self.expand_proj * self.width // 2


class State(NamedTuple):
    """First axis: the layers of that kind. Buffers are filled in place."""

    sums: Tensor  # (l, b, h, e + 1, p), float32 at least; the last of e + 1 rows: the normaliser
    keys: Tensor  # (l, b, h, s, 64), rotated; token n lies in row n mod s
    values: Tensor  # (l, b, h, s, 64)
    conv: Tensor  # (l, b, i, u): what the convolution read last, the present token included
    num_tokens: int  # read so far
    max_len: int


class Span(NamedTuple):
    """Where the tokens of one call lie: what all its window layers share."""

    rope: Rope
    mask: Tensor | None  # (t, rows seen): old rows, then the new ones; None: all are visible
    old: Tensor  # rows of the cache to look at, in the order of their tokens
    new: Tensor  # rows of the cache to write: the last tokens of the call, as many as fit


class Model(nn.Module):
    decode_paths = ("eager",)
    max_len = None  # neither RoPE nor a recurrence knows a limit

    def __init__(self, config: Config, decode_path: str = "eager"):
        super().__init__()
        self.config, self.decode_path = config, decode_path
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.pattern)
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied to the embedding
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, std sqrt(2 / 5d); the projections back into the residual 1 / (sqrt(d) L).

        Convolutions keep torch's default, uniform in +-1 / sqrt(kernel).
        """
        width, num_layers = self.config.width, self.config.num_layers
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith((".out", ".w2"))
                std = 1 / (width**0.5 * num_layers) if into_residual else (2 / (5 * width)) ** 0.5
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tokens) -> Logits:
        return self.head(self.norm(self._layers(tokens, None)))  # (b, t, v)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        count, rows = c.pattern.count, self._window_rows(max_len)
        sums = (count("l"), batch_size, c.num_heads, c.width // c.num_heads + 1, c.num_features)
        window = (count("s"), batch_size, c.width // HEAD_WIDTH, rows, HEAD_WIDTH)
        return State(
            like.new_zeros(sums, dtype=sum_dtype(like.dtype)),
            like.new_zeros(window),
            like.new_zeros(window),
            like.new_zeros(count("c"), batch_size, c.conv_kernel, c.conv_width),
            num_tokens=0,
            max_len=max_len,
        )

    def reset(self, state: State) -> State:
        state.sums.zero_()
        state.conv.zero_()  # the zeros before the first token; window rows are hidden by the count
        return state._replace(num_tokens=0)

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        end = state.num_tokens + tokens.shape[1]
        if end > state.max_len:
            raise ValueError(f"the state holds {state.max_len} tokens; token {end} was given.")
        x = self._layers(tokens, state)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        return self.prefill(token[:, None], state)

    def _layers(self, tokens: Tokens, state: State | None) -> Tensor:
        """The residual stream (b, t, d) after the last layer; reads and updates a state."""
        c, caches = self.config, {kind: repeat(None) for kind in MIXERS}
        start, rows = 0, tokens.shape[1]
        if state is not None:
            start, rows = state.num_tokens, self._window_rows(state.max_len)
            window = zip(state.keys, state.values, strict=True)
            caches = {"l": iter(state.sums), "s": window, "c": iter(state.conv)}
        here = span(start, tokens.shape[1], c.window, rows, c.rope_base, tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, here, next(caches[layer.kind]))
        return x

    def _window_rows(self, max_len: int) -> int:
        c = self.config
        return max_len if c.window_cache == "max_len" else min(c.window, max_len)

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Sums (4 bytes per element, 8 in float64) + key and value rows + convolution inputs."""
        rows = self._window_rows(seq_len)
        return batch_size * (self._recurrent_bytes() + self._window_bytes(rows))

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        """All of it. The table of evaluation_spec.md 4.4 counts the sums with 2 bytes and leaves
        the convolutions out: half of `sums` and all of `conv` less than this, in bfloat16.
        """
        return self.state_bytes(batch_size, seq_len)

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix and convolution once, 2 FLOP per weight.

        State: sums and convolution inputs read and written, the visible window rows read; 2 FLOP
        per sum to update it and 2 to read it, 4 D per window row.
        """
        c, itemsize = self.config, self.head.weight.itemsize
        norms = (2 * c.num_layers + 1) * c.width
        weights = self.num_params - self.embed.weight.numel() - norms
        rows = min(num_tokens, c.window)
        flops = 4 * self._num_sums() + 4 * c.width * rows * c.pattern.count("s")
        num_bytes = 2 * self._recurrent_bytes() + self._window_bytes(rows)
        return (
            Cost("weights", weights * itemsize, 2 * batch_size * weights),
            Cost("state", batch_size * num_bytes, batch_size * flops),
        )

    def _num_sums(self) -> int:
        """Linear layers x features x (width + one normaliser per head): 2 x 273 x 1040."""
        c = self.config
        return c.pattern.count("l") * c.num_features * (c.width + c.num_heads)

    def _recurrent_bytes(self) -> int:
        c, dtype = self.config, self.head.weight.dtype
        conv = c.pattern.count("c") * c.conv_kernel * c.conv_width
        return self._num_sums() * sum_dtype(dtype).itemsize + conv * dtype.itemsize

    def _window_bytes(self, rows: int) -> int:
        c = self.config
        return 2 * c.pattern.count("s") * rows * c.width * self.head.weight.itemsize


# --- layers --------------------------------------------------------------------------------------


class Layer(nn.Module):
    """x += mixer(norm(x)), then x += swiglu(norm(x))."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        width, hidden, self.kind = config.width, swiglu_width(config.width), kind
        self.mixer_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.mixer = MIXERS[kind](config)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.w1 = nn.Linear(width, hidden, bias=False)  # gate
        self.w3 = nn.Linear(width, hidden, bias=False)  # up
        self.w2 = nn.Linear(hidden, width, bias=False)  # down

    def forward(self, x: Tensor, here: Span, cache) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), here, cache)
        h = self.mlp_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class LinearAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.num_heads, self.feature_dim = c.num_heads, c.feature_dim
        self.q = nn.Linear(c.width, c.num_heads * c.feature_dim, bias=False)
        self.k = nn.Linear(c.width, c.num_heads * c.feature_dim, bias=False)
        self.v = nn.Linear(c.width, c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def forward(self, x: Tensor, here: Span, sums: Tensor | None) -> Tensor:
        dtype = sum_dtype(x.dtype)
        q, k, v = (  # (b, h, t, f) twice, (b, h, t, e)
            linear(x).to(dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y, after = taylor_attention(q, k, v, sums)
        if sums is not None:
            sums.copy_(after)
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))


class SlidingAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, here: Span, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # (b, 3h, t, 64)
        q, k, v = heads.chunk(3, dim=1)
        q, k = rotate(q, here.rope), rotate(k, here.rope)
        if cache is not None:
            k, v = (look_back(rows, new, here) for rows, new in zip(cache, (k, v), strict=True))
        return self.out(attention(q, k, v, here.mask).transpose(1, 2).flatten(2))


class BaseConv(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.kernel = c.conv_kernel
        self.inner = nn.Linear(c.width, 2 * c.conv_width, bias=False)
        self.conv = nn.Conv1d(
            c.conv_width, c.conv_width, c.conv_kernel, groups=c.conv_width, bias=False
        )
        self.out = nn.Linear(c.conv_width, c.width, bias=False)

    def forward(self, x: Tensor, here: Span, last: Tensor | None) -> Tensor:
        u, gate = self.inner(x).chunk(2, dim=-1)  # (b, t, u)
        if last is None:
            u = F.pad(u, (0, 0, self.kernel - 1, 0))  # zeros before the first token
        else:
            u = torch.cat([last[:, 1:], u], dim=1)  # (b, i - 1 + t, u)
            last.copy_(u[:, -self.kernel :])
        return self.out(self.conv(u.mT).mT * gate)


MIXERS = {"c": BaseConv, "l": LinearAttention, "s": SlidingAttention}


# --- the mixers' arithmetic ----------------------------------------------------------------------


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k (b, h, t, f), v (b, h, t, e), sums over all tokens before -> y (b, h, t, e), new sums.

    Inside a chunk the weights themselves, 1 + s + s^2/2; across chunks their factors phi.
    """
    q, k = (x * x.shape[-1] ** -0.25 for x in (q, k))  # so that q.k is s
    v = F.pad(v, (0, 1), value=1.0)  # a column of ones: its weighted sum is the normaliser
    parts = []
    for qc, kc, vc in zip(*(x.split(CHUNK, dim=2) for x in (q, k, v)), strict=True):
        s = qc @ kc.mT  # (b, h, c, c)
        y = (1 + s + s * s / 2).tril() @ vc  # (b, h, c, e + 1)
        if sums is not None:
            y = y + features(qc) @ sums.mT
        parts.append(y)
        added = vc.mT @ features(kc)  # (b, h, e + 1, p)
        sums = added if sums is None else sums + added
    y = torch.cat(parts, dim=2)
    return y[..., :-1] / y[..., -1:], sums


def features(x: Tensor) -> Tensor:
    """phi(x) = (1, x, x (x) x / sqrt 2), so phi(q).phi(k) = 1 + q.k + (q.k)^2 / 2. f -> p wide."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)


def span(
    start: int, num_new: int, window: int, rows: int, rope_base: float, device: torch.device
) -> Span:
    """Tokens start .. start + num_new - 1, in a cache of `rows` rows where token n has n mod rows.

    The new tokens are attended to from the call itself, so a row is read before it is overwritten.
    """
    end, first = start + num_new, max(0, start - window + 1)
    seen = torch.arange(first, end, device=device)
    new = seen[start - first :]
    distance = new[:, None] - seen  # (t, rows seen)
    mask = (distance >= 0) & (distance < window) if num_new > 1 else None
    rope = rope_table(new, rope_base)
    return Span(rope, mask, seen[: start - first] % rows, new[-rows:] % rows)


def look_back(rows: Tensor, new: Tensor, here: Span) -> Tensor:
    """The old rows of the window, then the new ones, which are written: (b, h, old + t, 64)."""
    seen = torch.cat([rows[:, :, here.old], new], dim=2)
    rows[:, :, here.new] = new[:, :, -len(here.new) :]
    return seen


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of recurrent sums: float32 at least, since thousands of small terms are added up."""
    return torch.promote_types(dtype, torch.float32)
