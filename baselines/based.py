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
State: the sums are kept in float32 at least, in a model of any dtype and under autocast; the rest
in the model's dtype.
Decode path cuda_graph: a token on Triton kernels, captured, and so is each of a short prompt; a
longer one with fused norms, SwiGLU, rotation and convolution around one kernel of linear attention
per layer. That multiplies in 16 bits: float32, and a feature_dim above 16, keep the eager chunks.

Shapes: b batch, t tokens, d width, h heads, e head width, f feature_dim, p features (1 + f + f^2),
s cache rows, u channels of the convolution (2 d), i its kernel, n chunks, c chunk, v words.
Try it: cat-bench run efficiency -a based --quick
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import (
    HEAD_WIDTH,
    Attend,
    Block,
    Rope,
    check_width,
    feed_forward,
    rope_table,
    sum_dtype,
)
from cat_bench.graph import (
    CapturedStep,
    Rows,
    block_step,
    fast_block,
    finish_block,
    norm_linear,
)
from cat_bench.language_model import SHORT_PROMPT, LanguageModel
from cat_bench.recurrent_steps import taylor_features
from cat_bench.upstream import require_fla
from cat_bench.window import (
    WindowAttention,
    fast_window_attention,
    flex_window_attention,
    pairs_before_last,
    ring_attention,
    ring_rows,
    window_attention,
)

# At WikiText-103 scale (paper C.1, E.4): 1 linear + 1 window + 4 convolution layers, and 2 + 2 + 2.
PRESETS = {
    "based-wikitext": {"pattern": "cclcsc", "width": 768, "window": 64, "vocab_size": 32_000},
    "based-2x": {"pattern": "clscls", "width": 768, "window": 64, "vocab_size": 32_000},
}
REQUIRES = {"cuda_graph": "triton", "upstream": "fla"}
TINY = {"pattern": "clsl", "feature_dim": 4, "num_heads": 2}  # for the contract test
Taylor = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k (b, h, t, f), v (b, h, t, e) -> as v
# Tokens whose mutual weights are formed at once, and heads x tokens whose features are: time and
# memory (2 GB in float32), not the result.
CHUNK, BATCHED = 64, 2**18


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    pattern: str = "cclcsccclcsc"  # 2 linear + 2 window + 8 convolution, front to back
    feature_dim: int = 16  # f: width of a query or key before the feature map
    num_heads: int = 16  # of the linear layers
    window: int = 128  # tokens that a window layer sees
    # "max_len" allocates a row for every token, as official code does (the fault in the paper's
    # C.7), though `window` of them are read: here the ring stays in the first ones.
    window_cache: Literal["window", "max_len"] = "window"
    conv_kernel: int = 3
    expand_proj: int = 4  # BaseConv projects to expand_proj * width: one half is convolved
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width)
        pattern = "be letters of c (convolution), l (linear) and s (sliding window), one per layer"
        heads, pair, rings = self.num_heads, self.expand_proj, ("window", "max_len")
        rules = {
            "pattern": (self.pattern and set(self.pattern) <= set(LAYERS), pattern),
            "num_heads": (
                heads > 0 and self.width % heads == 0,
                f"divide the width of {self.width}",
            ),
            "window_cache": (self.window_cache in rings, "be 'window' or 'max_len'"),
            "expand_proj": (pair > 0 and pair % 2 == 0, "be even and positive"),
            "vocab_size": (self.vocab_size > 1, "be at least 2"),
        }
        for name in ("feature_dim", "window", "conv_kernel"):
            rules[name] = (getattr(self, name) > 0, "be at least 1")
        for name, (fits, rule) in rules.items():
            if not fits:
                raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r}.")

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

    sums: Tensor  # (l, b, h, p, e), float32 at least
    norms: Tensor  # (l, b, h, p), as sums
    keys: Tensor  # (l, b, h, s, 64), rotated; token n lies in row n mod window
    values: Tensor  # (l, b, h, s, 64)
    conv: Tensor  # (l, b, i, u): what the convolution read last, the present token included
    num_tokens: int  # read so far
    max_len: int
    captured: CapturedStep | None  # decode path cuda_graph: the step, tied to these buffers


class Call(NamedTuple):
    """What all layers of one call share; the last two serve calls without a state."""

    rope: Rope
    start: int  # number of the first token
    attend: Attend
    taylor: Taylor


class Model(LanguageModel):
    decode_paths = ("eager", "cuda_graph")
    forward_paths = ("eager", "upstream")
    float32_forward_paths = ("upstream",)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        layers = [LAYERS[kind](config) for kind in config.pattern]
        super().__init__(config, layers, decode_path, forward_path)

    def hidden(self, tokens: Tokens) -> Tensor:
        call, x = self._call(0, tokens), self.embed(tokens)  # (b, t, d)
        if self.forward_path == "upstream":
            attend = flex_window_attention(tokens.shape[1], self.config.window, tokens.device)
            call = call._replace(attend=attend, taylor=upstream_taylor_attention())
        for layer in self.blocks:
            x = self.on_forward_path(layer)(x, call)
        return self.norm(x)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        count, rows = c.pattern.count, self._window_rows(max_len)
        sums = (count("l"), batch_size, c.num_heads, c.num_features, c.width // c.num_heads)
        window = (count("s"), batch_size, c.width // HEAD_WIDTH, rows, HEAD_WIDTH)
        buffers = State(
            like.new_zeros(sums, dtype=sum_dtype(like.dtype)),
            like.new_zeros(sums[:-1], dtype=sum_dtype(like.dtype)),
            like.new_zeros(window),
            like.new_zeros(window),
            like.new_zeros(count("c"), batch_size, c.conv_kernel, c.conv_width),
            num_tokens=0,
            max_len=max_len,
            captured=None,
        )
        if self.decode_path == "eager":
            return buffers
        return self.reset(buffers._replace(captured=self._capture(buffers)))

    def reset(self, state: State) -> State:
        """Sums and the inputs before the first token are zeros; the count hides window rows."""
        for buffer in (state.sums, state.norms, state.conv):
            buffer.zero_()
        return state._replace(num_tokens=0)

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        end = self._check_room(state, tokens.shape[1])
        if state.captured is not None and tokens.shape[1] <= SHORT_PROMPT:
            return self.read_by_steps(tokens, state)
        call, x = self._call(state.num_tokens, tokens), self.embed(tokens)
        for layer, cache in zip(self.blocks, self._caches(state), strict=True):
            x = (layer if self.decode_path == "eager" else layer.fast)(x, call, cache)
        return self.head(self.norm(x[:, -1])), state._replace(num_tokens=end)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        if state.captured is None:
            return self.prefill(token[:, None], state)
        end = self._check_room(state, 1)
        return state.captured(token, state.num_tokens), state._replace(num_tokens=end)

    def _capture(self, buffers: State) -> CapturedStep:
        """The step as a graph; its warm-up leaves traces in the recurrent buffers."""
        c, device, caches = self.config, self.head.weight.device, self._caches(buffers)
        rope = rope_table(torch.arange(buffers.max_len, device=device), c.rope_base)
        num_slots = min(c.window, buffers.max_len)

        def run(token: Tensor, position: Tensor) -> Tensor:
            rows, x = ring_rows(position, num_slots), self.embed(token)
            for layer, cache in zip(self.blocks, caches, strict=True):
                x = layer.step(x, rows, rope, cache)
            return norm_linear(x, self.norm, self.head.weight)

        return CapturedStep(run, buffers.conv.shape[1], device, end=buffers.max_len)

    def _call(self, start: int, tokens: Tokens) -> Call:
        c, num_new, device = self.config, tokens.shape[1], tokens.device
        rope = rope_table(torch.arange(start, start + num_new, device=device), c.rope_base)
        return Call(
            rope,
            start,
            attend=lambda q, k, v: window_attention(q, k, v, c.window),
            taylor=lambda q, k, v: taylor_attention(q, k, v)[0],
        )

    def _caches(self, state: State) -> list[Any]:
        """Each layer's views of the state; of the rows only the ring that window layers use."""
        ring = slice(min(self.config.window, state.max_len))
        of_kind = {
            "c": iter(state.conv),
            "l": zip(state.sums, state.norms, strict=True),
            "s": zip(state.keys[:, :, :, ring], state.values[:, :, :, ring], strict=True),
        }
        return [next(of_kind[kind]) for kind in self.config.pattern]

    def _check_room(self, state: State, num_new: int) -> int:
        end = state.num_tokens + num_new
        if end > state.max_len:
            raise ValueError(f"the state holds {state.max_len} tokens; token {end} was given.")
        return end

    def _window_rows(self, max_len: int) -> int:
        c = self.config
        return max_len if c.window_cache == "max_len" else min(c.window, max_len)

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """Sums (4 bytes per element, 8 in float64) + key and value rows + convolution inputs.

        The table of evaluation_spec.md 4.4 counts the sums with 2 bytes and no convolutions: half
        of the sums and all of `conv` less than this, in bfloat16.
        """
        return batch_size * sum(self._bytes(self._window_rows(seq_len)))

    def looks_back(self, block: nn.Module, num_tokens: int) -> int:
        c = self.config
        reach = {LinearLayer: num_tokens, WindowLayer: c.window - 1, ConvLayer: c.conv_kernel - 1}
        return reach[type(block)]

    def pair_flops(self, num_tokens: int, passing: list[int]) -> float:
        return sum(
            4 * self.config.width * pairs_before_last(num_tokens, count, self.config.window)
            for kind, count in zip(self.config.pattern, passing, strict=True)
            if kind == "s"
        )

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
        recurrent, window = self._bytes(rows)
        return (
            Cost("weights", weights * itemsize, 2 * batch_size * weights),
            Cost("state", batch_size * (2 * recurrent + window), batch_size * flops),
        )

    def _num_sums(self) -> int:
        """Linear layers x features x (width + one normaliser per head): 2 x 273 x 1040."""
        c = self.config
        return c.pattern.count("l") * c.num_features * (c.width + c.num_heads)

    def _bytes(self, rows: int) -> tuple[int, int]:
        """Of one sequence: sums and convolution inputs; `rows` rows of every window layer."""
        c, dtype = self.config, self.head.weight.dtype
        conv = c.pattern.count("c") * c.conv_kernel * c.conv_width
        recurrent = self._num_sums() * sum_dtype(dtype).itemsize + conv * dtype.itemsize
        return recurrent, 2 * c.pattern.count("s") * rows * c.width * dtype.itemsize


# --- layers --------------------------------------------------------------------------------------


class Layer(Block):
    """A Block with another mixer in the place of attention: `qkv` leads into it, `attn_out` out.

    Every layer has `forward`, which reads any number of tokens, `fast`, which reads a prompt on the
    fused kernels, and `step`, which reads one token on them; the last two change x in place and
    have no gradient. Each kind has its own `forward`, so that torch.compile counts their
    compilations apart.
    """

    def __init__(self, config: Config, inner: int, outer: int):
        super().__init__(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, inner, bias=False)
        self.attn_out = nn.Linear(outer, config.width, bias=False)

    def enter(self, x: Tensor) -> Tensor:
        return self.qkv(self.attn_norm(x))

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return feed_forward(self, x + self.attn_out(y))

    def fast(self, x: Tensor, call: Call, cache: Any) -> Tensor:
        rows = x.flatten(0, 1)
        entered = self.enter_step(rows).unflatten(0, x.shape[:2])
        y = self.fast_mix(entered, call, cache).flatten(0, 1)
        return finish_block(self, rows, y).view_as(x)

    def enter_step(self, x: Tensor) -> Tensor:
        return norm_linear(x, self.attn_norm, self.qkv.weight)


class LinearLayer(Layer):
    def __init__(self, config: Config):
        c = config
        features = c.num_heads * c.feature_dim
        super().__init__(c, 2 * features + c.width, c.width)
        self.heads, self.parts = c.num_heads, [features, features, c.width]

    def forward(self, x: Tensor, call: Call, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.leave(x, self.mix(self.enter(x), call, cache))

    def mix(self, qkv: Tensor, call: Call, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (  # (b, h, t, f) twice, (b, h, t, e)
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in qkv.split(self.parts, dim=-1)
        )
        if cache is None:
            y = call.taylor(q, k, v)
        else:
            y, *after = taylor_attention(q, k, v, *cache)
            for old, new in zip(cache, after, strict=True):
                old.copy_(new)
        return y.transpose(1, 2).flatten(2)

    def fast_mix(self, qkv: Tensor, call: Call, cache: tuple[Tensor, Tensor]) -> Tensor:
        """By dtype and features: in 16 bits one kernel, whose products are of that dtype; float32
        and more than 16 features as eager has them, chunk by chunk.
        """
        from cat_bench import recurrent_kernels

        q, k, v = qkv.split(self.parts, dim=-1)
        wide = q.shape[-1] // self.heads > recurrent_kernels.TAYLOR_ROW_FEATURES
        if wide or v.dtype.itemsize > 2:
            return self.mix(qkv, call, cache)
        return recurrent_kernels.taylor_rows(q, k, v, *cache)

    def step(self, x: Tensor, rows: Rows, rope: Rope, cache: tuple[Tensor, Tensor]) -> Tensor:
        from cat_bench import recurrent_kernels

        q, k, v = self.enter_step(x).split(self.parts, dim=-1)
        return finish_block(self, x, recurrent_kernels.taylor_step(q, k, v, *cache))


class WindowLayer(Block):
    def __init__(self, config: Config):
        super().__init__(config.width, eps=config.norm_eps)
        self.window = config.window

    def forward(self, x: Tensor, call: Call, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        attend = call.attend if cache is None else self.ring(call, cache, window_attention)
        return super().forward(x, call.rope, attend)

    def fast(self, x: Tensor, call: Call, cache: tuple[Tensor, Tensor]) -> Tensor:
        return fast_block(self, x, call.rope, self.ring(call, cache, fast_window_attention))

    def ring(self, call: Call, cache: tuple[Tensor, Tensor], attend: WindowAttention) -> Attend:
        return lambda q, k, v: ring_attention(q, k, v, *cache, call.start, self.window, attend)

    def step(self, x: Tensor, rows: Rows, rope: Rope, cache: tuple[Tensor, Tensor]) -> Tensor:
        return block_step(self, x, *cache, rows, rope)


class ConvLayer(Layer):
    def __init__(self, config: Config):
        super().__init__(config, 2 * config.conv_width, config.conv_width)
        self.taps = nn.Parameter(torch.empty(config.conv_width, config.conv_kernel))  # newest last

    def init_weights(self, num_layers: int) -> None:
        super().init_weights(num_layers)
        bound = self.taps.shape[1] ** -0.5  # torch's default for a convolution
        nn.init.uniform_(self.taps, -bound, bound)

    def forward(self, x: Tensor, call: Call, cache: Tensor | None = None) -> Tensor:
        return self.leave(x, self.mix(self.enter(x), cache))

    def mix(self, both: Tensor, cache: Tensor | None) -> Tensor:
        u, gate = both.chunk(2, dim=-1)  # (b, t, u)
        num_new, kernel = u.shape[1], self.taps.shape[1]
        if cache is None:
            u = F.pad(u, (0, 0, kernel - 1, 0))  # zeros before the first token
        else:
            u = torch.cat([cache[:, 1:], u], dim=1)  # (b, i - 1 + t, u)
            cache.copy_(u[:, -kernel:])
        y = u[:, :num_new] * self.taps[:, 0]
        for i in range(1, kernel):
            y = torch.addcmul(y, u[:, i : i + num_new], self.taps[:, i])
        return y * gate

    def fast_mix(self, both: Tensor, call: Call, cache: Tensor) -> Tensor:
        from cat_bench import recurrent_kernels

        u, gate = both.chunk(2, dim=-1)
        return recurrent_kernels.conv_rows(u, cache, self.taps).mul_(gate)

    def step(self, x: Tensor, rows: Rows, rope: Rope, cache: Tensor) -> Tensor:
        from cat_bench import recurrent_kernels

        u, gate = self.enter_step(x).chunk(2, dim=-1)
        return finish_block(self, x, recurrent_kernels.conv_step(u, cache, self.taps).mul_(gate))


LAYERS = {"c": ConvLayer, "l": LinearLayer, "s": WindowLayer}


# --- linear attention ----------------------------------------------------------------------------


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None = None, norms: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (b, h, t, f), v (b, h, t, e), sums before -> y (b, h, t, e), sums after.

    Computed in the dtype of the sums, whatever autocast says.
    """
    dtype, f, at, parts = sum_dtype(v.dtype), q.shape[-1], 0, []
    if sums is None or norms is None:
        norms = v.new_zeros(*q.shape[:2], 1 + f + f * f, dtype=dtype)  # (b, h, p)
        sums = v.new_zeros(*norms.shape, v.shape[-1], dtype=dtype)  # (b, h, p, e)
    with torch.autocast(q.device.type, enabled=False):
        for chunk, count in chunks(q.shape[2], q.shape[0] * q.shape[1]):
            piece = slice(at, at + chunk * count)
            chunked = (x[:, :, piece].to(dtype).unflatten(2, (-1, chunk)) for x in (q, k, v))
            y, sums, norms = taylor_chunks(*chunked, sums, norms)
            parts.append(y.flatten(2, 3).to(v.dtype))
            at = piece.stop
    return torch.cat(parts, dim=2), sums, norms


def chunks(num_tokens: int, num_heads: int) -> list[tuple[int, int]]:
    """(tokens in a chunk, chunks read together), front to back: full chunks, then what is left."""
    full, rest = divmod(num_tokens, CHUNK)
    most = max(1, BATCHED // (num_heads * CHUNK))
    counts = [most] * (full // most) + [full % most]
    return [(CHUNK, count) for count in counts if count] + [(rest, 1)] * (rest > 0)


def taylor_chunks(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (b, h, n, c, f), v (b, h, n, c, e), sums before -> y (b, h, n, c, e), sums after.

    Inside a chunk the weights themselves, 1 + s + s^2/2; across chunks their factors phi. One chunk
    follows another in the running sums alone.
    """
    s = q @ k.mT * q.shape[-1] ** -0.5
    weights = (1 + s + s * s / 2).tril()  # (b, h, n, c, c)
    phi_q, phi_k = taylor_features(q), taylor_features(k)  # (b, h, n, c, p)
    sums_before, sums = running(sums, phi_k.mT @ v)  # (b, h, n, p, e), (b, h, p, e)
    norms_before, norms = running(norms, phi_k.sum(-2))  # (b, h, n, p), (b, h, p)
    y = weights @ v + phi_q @ sums_before
    norm = weights.sum(-1, keepdim=True) + phi_q @ norms_before[..., None]
    return y / norm, sums, norms


def running(start: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """start (b, h, ...), added (b, h, n, ...) -> sums before each chunk, as `added`, and after all.

    Of one chunk without a copy: the sums of a large batch are most of what a prompt needs.
    """
    if added.shape[2] == 1:
        return start[:, :, None], start + added[:, :, 0]
    sums = torch.cat([start[:, :, None], added], dim=2).cumsum(2)
    return sums[:, :, :-1], sums[:, :, -1]


@lru_cache(maxsize=1)
def upstream_taylor_attention() -> Taylor:
    """The same without a state by flash-linear-attention, (q, k, v) -> y.

    Of its two kernels the quadratic one, which fills a device at any length; the chunked one walks
    through the sequence. Upstream adds 1e-6 to the normaliser, which is 1/2 or more: at most 2e-6
    of a value.
    """
    require_fla()
    from fla.ops.based import parallel_based

    @torch.compiler.disable  # kernels of its own; torch.compile takes what is around them
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return parallel_based(q, k, v, scale=q.shape[-1] ** -0.5).transpose(1, 2)

    return attend
