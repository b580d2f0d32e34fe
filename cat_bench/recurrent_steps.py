"""One token of a recurrent layer in plain PyTorch: what each of recurrent_kernels.py computes.

States are changed in place. The tests of those kernels compare with these; the eager paths of
baselines/ say the same in their own words.

Shapes: b batch, t tokens, h heads, e head width; others where they appear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- causal convolution ---------------------------------------------------------------------------


def conv_step_reference(
    new: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """One token of a causal depthwise convolution. new (b, m), inputs (b, w, m) changed in place,
    oldest first; weight (m, w), newest last; bias (m,) -> (b, m).
    """
    inputs.copy_(torch.cat([inputs[:, 1:], new[:, None]], dim=1))
    out = torch.einsum("bwm,mw->bm", inputs, weight)
    out = out if bias is None else out + bias
    return F.silu(out) if silu else out


def conv_rows_reference(
    new: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """The same for any number of tokens, new (b, t, m) -> (b, t, m)."""
    rows = [conv_step_reference(token, inputs, weight, bias, silu) for token in new.unbind(1)]
    return torch.stack(rows, dim=1)


# --- BASED: Taylor linear attention --------------------------------------------------------------


def taylor_step_reference(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor) -> Tensor:
    """One token: S += phi(k) v^T, z += phi(k), y = phi(q) S / phi(q) z. Computed as the sums are.

    q, k (b, h f), v (b, h e); sums (b, h, p, e) and norms (b, h, p) changed in place -> (b, h e) as
    v. p = 1 + f + f^2.
    """
    q, k, value = (x.unflatten(-1, (sums.shape[1], -1)).to(sums.dtype) for x in (q, k, v))
    phi_q, phi_k = taylor_features(q), taylor_features(k)  # (b, h, p)
    sums += phi_k[..., :, None] * value[..., None, :]
    norms += phi_k
    y = (phi_q[..., None, :] @ sums)[..., 0, :] / (phi_q * norms).sum(-1, keepdim=True)
    return y.flatten(-2).to(v.dtype)


def taylor_rows_reference(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor) -> Tensor:
    """The same for any number of tokens: q, k (b, t, h f), v (b, t, h e) -> as v."""
    tokens = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.stack([taylor_step_reference(*token, sums, norms) for token in tokens], dim=1)


def taylor_features(x: Tensor) -> Tensor:
    """phi(x) = (1, x, x (x) x / sqrt 2) of x / f^(1/4): phi(q).phi(k) = 1 + s + s^2 / 2 for
    s = q.k / sqrt(f). (..., f) -> (..., 1 + f + f^2).
    """
    x = x * x.shape[-1] ** -0.25
    half = x * 0.5**0.25  # before the product, which is f times larger
    squares = (half[..., :, None] * half[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)


# --- gated delta rule (baselines/gated_deltanet.py) ----------------------------------------------


def delta_step_reference(
    qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, matrix: Tensor
) -> Tensor:
    """One token of the gated delta rule, gates and norms included, in the dtype of `matrix`.

    qkv (b, h (2p + e)), after convolution and SiLU; a, b (b, h): what the gates are made of; A_log,
    dt_bias (h,); matrix (b, h, p, e), changed in place. Returns (b, h, e).
    """
    _, num_heads, key_width, value_width = matrix.shape
    qkv, a, b, A_log, dt_bias = (x.to(matrix.dtype) for x in (qkv, a, b, A_log, dt_bias))
    keys = num_heads * key_width
    parts = qkv.split([keys, keys, num_heads * value_width], dim=-1)
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in parts)  # (b, h, p or e)
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    matrix *= (-A_log.exp() * F.softplus(a + dt_bias)).exp()[..., None, None]
    recalled = torch.einsum("bhpe,bhp->bhe", matrix, k)
    matrix += k[..., None] * (b.sigmoid()[..., None] * (v - recalled))[..., None, :]
    return torch.einsum("bhpe,bhp->bhe", matrix, q) / key_width**0.5


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) silu(gate), head by head. x (b, h, e), gate (b, h e), weight (e,) -> as gate."""
    o = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).flatten(1)
    return (o * F.silu(gate.to(x.dtype))).to(gate.dtype)


# --- Mamba-2 ----------------------------------------------------------------------------------


def ssm_step_reference(
    xbc: Tensor, dt: Tensor, z: Tensor, A_log: Tensor, dt_bias: Tensor, D: Tensor, matrix: Tensor
) -> Tensor:
    """One token of a Mamba-2 layer from the convolution to the gate, float32 at least.

    xbc (b, h e + 2n): x, B, C after convolution and SiLU; dt (b, h), without its bias; z (b, h e);
    A_log, dt_bias, D (h,); matrix S (b, h, e, n), changed in place. Returns y silu(z), (b, h e).
    """
    _, num_heads, width, num_states = matrix.shape
    wide = torch.promote_types(matrix.dtype, torch.float32)
    parts = (part.to(wide) for part in (dt, z, A_log, dt_bias, D, matrix))
    dt, z, A_log, dt_bias, D, state = parts
    x, key, query = xbc.to(wide).split([num_heads * width, num_states, num_states], dim=-1)
    x = x.unflatten(-1, (num_heads, width))  # (b, h, e)
    dt = F.softplus(dt + dt_bias)[..., None]  # (b, h, 1)
    decay = (-dt * A_log.exp()[:, None]).exp()[..., None]
    state = decay * state + (dt * x)[..., None] * key[:, None, None]
    matrix.copy_(state)
    y = torch.einsum("bhen,bn->bhe", state, query) + D[:, None] * x
    return (y.flatten(1) * F.silu(z)).to(xbc.dtype)
