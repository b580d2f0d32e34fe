"""Transformer++ parts that architectures share: RMSNorm, fused QKV, RoPE, SwiGLU (cat_spec.md 1.1).

Pre-norm residual blocks without biases or dropout; head width 64. The attention itself is passed in
by the caller as a function of (q, k, v), so one block serves forward, prefill and cached steps.

Shapes: b batch, t rows, d width, h query heads, g key-value heads, e head width (64), s cache rows.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
Rope = tuple[Tensor, Tensor]  # cos and sin, each (..., t, e/2), float32
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> (b, h, t, e)


def swiglu_width(width: int) -> int:
    """int(2/3 * 4 d), rounded up to a multiple of 256: 1024 -> 2816, 2048 -> 5632."""
    return -(-int(2 / 3 * 4 * width) // 256) * 256


def check_width(width: int, num_kv_heads: int | None = None) -> None:
    """Raise ValueError unless heads of 64 fill `width` and key-value heads divide them evenly."""
    if width < HEAD_WIDTH or width % HEAD_WIDTH:
        raise ValueError(
            f"width must be a positive multiple of {HEAD_WIDTH} (head width), got {width}."
        )
    heads = width // HEAD_WIDTH
    if num_kv_heads is not None and (num_kv_heads < 1 or heads % num_kv_heads):
        raise ValueError(f"num_kv_heads must divide the {heads} heads, got {num_kv_heads}.")


class Block(nn.Module):
    def __init__(
        self, width: int, num_kv_heads: int | None = None, qk_norm: bool = False, eps: float = 1e-5
    ):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH
        self.num_kv_heads = num_kv_heads or self.num_heads
        self.attn_norm = nn.RMSNorm(width, eps=eps)
        self.qkv = nn.Linear(
            width, (self.num_heads + 2 * self.num_kv_heads) * HEAD_WIDTH, bias=False
        )
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.w1 = nn.Linear(width, swiglu_width(width), bias=False)  # gate
        self.w3 = nn.Linear(width, swiglu_width(width), bias=False)  # up
        self.w2 = nn.Linear(swiglu_width(width), width, bias=False)  # down
        self.q_norm = nn.RMSNorm(HEAD_WIDTH, eps=eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(HEAD_WIDTH, eps=eps) if qk_norm else None

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        q, k, v = self.split_heads(self.qkv(self.attn_norm(x)))
        o = attend(rotate(q, rope), rotate(k, rope), v)  # (b, h, t, e)
        return feed_forward(self, x + self.attn_out(o.transpose(1, 2).flatten(2)))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, t, (h + 2g) e) -> q (b, h, t, e), k and v (b, g, t, e); normalised, unrotated."""
        heads = qkv.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def init_weights(self, num_layers: int) -> None:
        """Normal, std sqrt(2 / 5d); the two projections back into the residual 1 / (sqrt(d) L)."""
        width = self.qkv.in_features
        for linear in (self.qkv, self.w1, self.w3):
            nn.init.normal_(linear.weight, std=(2 / (5 * width)) ** 0.5)
        for linear in (self.attn_out, self.w2):
            nn.init.normal_(linear.weight, std=1 / (width**0.5 * num_layers))


def feed_forward(block: nn.Module, x: Tensor) -> Tensor:
    """The second half of a block, under the names of Block: norm, SwiGLU, residual. (b, t, d)."""
    h = block.mlp_norm(x)
    return x + block.w2(F.silu(block.w1(h)) * block.w3(h))


def linear_params(width: int, num_kv_heads: int | None = None) -> int:
    """Weights of the matrices of one block: 4 d^2 + 3 d I(d) with as many kv heads as heads."""
    kv_width = num_kv_heads * HEAD_WIDTH if num_kv_heads else width
    return 2 * width * width + 2 * width * kv_width + 3 * width * swiglu_width(width)


def rope_table(ids: Tensor, base: float = 10_000.0) -> Rope:
    """Angles id * base^(-2k/64), k = 0..31, always float32: (..., t) -> cos, sin (..., t, 32)."""
    exponent = torch.arange(0, HEAD_WIDTH, 2, device=ids.device, dtype=torch.float32) / HEAD_WIDTH
    angle = ids[..., None].float() * base**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Half-split RoPE over all head dimensions. x (b, h, t, e); tables (t, e/2) or (b, t, e/2)."""
    cos, sin = (part if part.dim() == 2 else part[:, None] for part in rope)
    x1, x2 = x.chunk(2, dim=-1)
    out = torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)  # float32 at least
    return out.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False) -> Tensor:
    """Softmax attention, scale 1/sqrt(64); query head i uses kv head i // (h / g)."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(t, s) booleans: the queries are the last rows of the keys."""
    keys = torch.arange(num_keys, device=device)
    return keys[num_keys - num_queries :, None] >= keys


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last `t` rows over all `s` rows, each up to itself."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == 1 or num_queries == num_keys:  # no mask tensor: flash kernels apply
        return attention(q, k, v, causal=num_queries > 1)
    return attention(q, k, v, causal_mask(num_queries, num_keys, q.device))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of recurrent sums: float32 at least, since thousands of small terms are added up."""
    return torch.promote_types(dtype, torch.float32)
