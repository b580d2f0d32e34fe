"""Triton kernels of recurrent layers: short convolutions, Taylor linear attention, the gated delta
rule, Mamba-2. The state is read once and written once, in place, in one launch; what each computes
stands in recurrent_steps.py, as <name>_reference. A state is older than the kernel before, so it
may be read early.

Shapes: b batch, t tokens, h heads, w window of a convolution, m channels; others stand at each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_bench.kernels import early_launch, gdc_release, gdc_wait


def conv_step(
    new: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """One token of a causal depthwise convolution, its window moved on: one launch.

    new (b, m), last dimension contiguous; inputs (b, w, m), oldest first, changed in place to hold
    `new` last; weight (m, w), newest last; bias (m,). Returns (b, m) in new's dtype; sums in
    float32.
    """
    batch_size, width, channels = inputs.shape
    out = torch.empty(batch_size, channels, dtype=new.dtype, device=new.device)
    _conv_step_kernel[(batch_size, triton.cdiv(channels, 1024))](
        new, inputs, weight, weight if bias is None else bias, out, channels,
        new.stride(0), weight.stride(0),
        WIDTH=width, BIAS=bias is not None, SILU=silu, BLOCK=1024, **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _conv_step_kernel(
    new_ptr, inputs_ptr, weight_ptr, bias_ptr, out_ptr, channels, new_stride, weight_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_release()
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = m < channels
    inputs_ptr += row * WIDTH * channels + m
    total = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + m, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(WIDTH):
        if i < WIDTH - 1:
            x = tl.load(inputs_ptr + (i + 1) * channels, mask=inside, other=0.0)
        else:
            x = tl.load(new_ptr + row * new_stride + m, mask=inside, other=0.0)
        tl.store(inputs_ptr + i * channels, x.to(inputs_ptr.dtype.element_ty), mask=inside)
        weight = tl.load(weight_ptr + m * weight_stride + i, mask=inside, other=0.0)
        total += x.to(tl.float32) * weight.to(tl.float32)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(out_ptr + row * channels + m, total.to(out_ptr.dtype.element_ty), mask=inside)


CONV_ROWS, CONV_CHANNELS = 32, 128  # a tile: each input is loaded once a tap, from the L1 cache


def conv_rows(
    new: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """`conv_step` for any number of tokens: one launch, then the window is moved on.

    new (b, t, m), last dimension contiguous; inputs (b, w, m), oldest first, changed in place to
    hold the last w inputs; weight (m, w), newest last; bias (m,). Returns (b, t, m) in new's dtype;
    sums in float32.
    """
    (batch_size, num_rows, channels), width = new.shape, inputs.shape[1]
    out = torch.empty(new.shape, dtype=new.dtype, device=new.device)
    tiles = triton.cdiv(num_rows, CONV_ROWS)
    _conv_rows_kernel[(batch_size * tiles, triton.cdiv(channels, CONV_CHANNELS))](
        new, inputs, weight, weight if bias is None else bias, out, num_rows, channels, tiles,
        new.stride(0), new.stride(1), inputs.stride(0), inputs.stride(1), weight.stride(0),
        WIDTH=width, BIAS=bias is not None, SILU=silu,
        ROWS=CONV_ROWS, BLOCK=CONV_CHANNELS,
    )  # fmt: skip
    inputs.copy_(torch.cat([inputs, new[:, -width:]], dim=1)[:, -width:])
    return out


@triton.jit
def _conv_rows_kernel(
    new_ptr, inputs_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, channels, tiles,
    new_stride_b, new_stride_t, inputs_stride_b, inputs_stride_t, weight_stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sequence, BLOCK channels; token -1 is the last row of the window."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (m < channels)[None, :]
    new_ptr += b * new_stride_b + m[None, :]
    inputs_ptr += b * inputs_stride_b + m[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + m, mask=m < channels, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(WIDTH):
        token = (row + (i - WIDTH + 1))[:, None]
        told = (token >= 0) & (token < num_rows)
        x = tl.load(new_ptr + token * new_stride_t, mask=inside & told, other=0.0).to(tl.float32)
        old = inputs_ptr + (token + WIDTH) * inputs_stride_t
        x += tl.load(old, mask=inside & (token < 0), other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + m * weight_stride + i, mask=m < channels, other=0.0)
        total += x * weight.to(tl.float32)[None, :]
    if SILU:
        total *= tl.sigmoid(total)
    out_ptr += (b * num_rows + row)[:, None] * channels + m[None, :]
    here = inside & (row < num_rows)[:, None]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=here)


# --- BASED: Taylor linear attention --------------------------------------------------------------

TAYLOR_STAGES = 3  # tiles under way at once


def taylor_step(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor) -> Tensor:
    """One token of BASED's linear attention: each sum is read once and written once, one launch.

    q, k (b, h f), v (b, h e), last dimension contiguous; sums (b, h, p, e), norms (b, h, p),
    float32, contiguous, changed in place. Returns (b, h e) in v's dtype.
    """
    batch_size, num_heads, _, width = sums.shape
    feature_dim = q.shape[1] // num_heads
    f_pad, e_pad = triton.next_power_of_2(feature_dim), triton.next_power_of_2(width)
    out = torch.empty(batch_size, num_heads * width, dtype=v.dtype, device=v.device)
    _taylor_step_kernel[(batch_size * num_heads,)](
        q, k, v, sums, norms, out, q.stride(0), k.stride(0), v.stride(0), feature_dim**-0.25,
        HEADS=num_heads, F=feature_dim, E=width, F_PAD=f_pad, E_PAD=e_pad, STAGES=TAYLOR_STAGES,
        num_warps=max(1, min(16, f_pad * e_pad // 1024)),  # 32 sums a thread: 8 loads of 16 bytes
        **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _taylor_step_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, norms_ptr, out_ptr, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, F: tl.constexpr, E: tl.constexpr, F_PAD: tl.constexpr,
    E_PAD: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one sequence.

    Feature 0 is 1, the others are f + 1 tiles of f: tile 0 is x, tile i is x_i x / sqrt 2 with i
    from 1. So phi is never formed: a tile takes k v^T times one number, and gives to `read` itself
    times one number; q joins at the end.
    """
    program = tl.program_id(0).to(tl.int64)
    b, head = program // HEADS, program % HEADS
    q_ptr += b * q_stride + head * F
    k_ptr += b * k_stride + head * F
    sums_ptr += program * ((1 + F + F * F) * E)
    norms_ptr += program * (1 + F + F * F)
    j, e = tl.arange(0, F_PAD), tl.arange(0, E_PAD)
    in_f, in_e = j < F, e < E
    inside = in_f[:, None] & in_e
    if EARLY:
        gdc_wait()
        gdc_release()
    q = tl.load(q_ptr + j, mask=in_f, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + j, mask=in_f, other=0.0).to(tl.float32) * scale
    v = tl.load(v_ptr + b * v_stride + head * E + e, mask=in_e, other=0.0).to(tl.float32)

    top = tl.load(sums_ptr + e, mask=in_e, other=0.0) + v
    bottom = tl.load(norms_ptr) + 1.0
    tl.store(sums_ptr + e, top, mask=in_e)
    tl.store(norms_ptr, bottom)
    outer = k[:, None] * v
    read = tl.zeros([F_PAD, E_PAD], tl.float32)
    read_norm = tl.zeros([F_PAD], tl.float32)
    for i in tl.range(0, F + 1, num_stages=STAGES):
        before = tl.maximum(i - 1, 0)
        q_i = tl.load(q_ptr + before).to(tl.float32) * (scale * 0.7071067811865476)
        k_i = tl.load(k_ptr + before).to(tl.float32) * (scale * 0.7071067811865476)
        q_i = tl.where(i == 0, 1.0, q_i)
        k_i = tl.where(i == 0, 1.0, k_i)
        row = 1 + i * F + j
        tile = tl.load(sums_ptr + row[:, None] * E + e, mask=inside, other=0.0) + k_i * outer
        norm = tl.load(norms_ptr + row, mask=in_f, other=0.0) + k_i * k
        tl.store(sums_ptr + row[:, None] * E + e, tile, mask=inside)
        tl.store(norms_ptr + row, norm, mask=in_f)
        read += q_i * tile
        read_norm += q_i * norm
    top += tl.sum(q[:, None] * read, axis=0)
    bottom += tl.sum(q * read_norm)
    out = (top / bottom).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + program * E + e, out, mask=in_e)


TAYLOR_ROWS = 32  # tokens read together: their mutual weights are formed, across them the sums
TAYLOR_ROW_FEATURES = 16  # widest q and k of `taylor_rows`, whose squares are held in registers


def taylor_rows(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, norms: Tensor) -> Tensor:
    """`taylor_step` for any number of tokens in one kernel, with matrix products in v's dtype.

    q, k (b, t, h f), v (b, t, h e): columns of one tensor, last dimension contiguous, f at most
    TAYLOR_ROW_FEATURES; sums (b, h, p, e), norms (b, h, p), float32, contiguous, changed in place.
    Returns (b, t, h e) in v's dtype.
    """
    (batch_size, num_heads, _, width), (_, num_tokens, features) = sums.shape, q.shape
    feature_dim = features // num_heads
    assert feature_dim <= TAYLOR_ROW_FEATURES, f"got {feature_dim} features"
    assert q.stride() == k.stride() == v.stride(), "q, k and v must be parts of one tensor"
    block_e = max(16, min(64, triton.next_power_of_2(width)))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    norms_after = torch.empty_like(norms)  # the old ones are read by every block of columns
    _taylor_rows_kernel[(batch_size * num_heads, triton.cdiv(width, block_e))](
        q, k, v, sums, norms, norms_after, out, num_tokens, v.stride(0), v.stride(1),
        feature_dim**-0.25,
        HEADS=num_heads, F=feature_dim, E=width, F_PAD=TAYLOR_ROW_FEATURES, BLOCK_E=block_e,
        ROWS=TAYLOR_ROWS, num_warps=8,
    )  # fmt: skip
    norms.copy_(norms_after)
    return out


@triton.jit
def _taylor_rows_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, norms_ptr, norms_after_ptr, out_ptr, num_tokens, stride_b,
    stride_t, scale,
    HEADS: tl.constexpr, F: tl.constexpr, E: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BLOCK_E columns of its values, front to back.

    phi(x) = (1, x, x (x) x / sqrt 2): the sums are held in these three parts, 0, 1 and 2, the last
    with F_PAD^2 rows, of the norms as a matrix. Features that are padding are zeros.
    """
    program = tl.program_id(0).to(tl.int64)
    b, head = program // HEADS, program % HEADS
    i, pair = tl.arange(0, F_PAD), tl.arange(0, F_PAD * F_PAD)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_f, in_e = i < F, e < E
    in_pair = (pair // F_PAD < F) & (pair % F_PAD < F)
    row_1, row_2, squares = 1 + i, 1 + F + pair // F_PAD * F + pair % F_PAD, 1 + F + i * F
    q_ptr += b * stride_b + head * F + i
    k_ptr += b * stride_b + head * F + i
    v_ptr += b * stride_b + head * E + e
    out_ptr += (b * num_tokens * HEADS + head) * E + e
    sums_ptr += program * ((1 + F + F * F) * E) + e
    norms_ptr += program * (1 + F + F * F)
    norms_after_ptr += program * (1 + F + F * F)
    inside_1, inside_2 = in_f[:, None] & in_e, in_pair[:, None] & in_e

    sums_0 = tl.load(sums_ptr, mask=in_e, other=0.0)
    sums_1 = tl.load(sums_ptr + row_1[:, None] * E, mask=inside_1, other=0.0)
    sums_2 = tl.load(sums_ptr + row_2[:, None] * E, mask=inside_2, other=0.0)
    norm_0 = tl.load(norms_ptr)
    norm_1 = tl.load(norms_ptr + row_1, mask=in_f, other=0.0)
    norm_2 = tl.load(norms_ptr + squares[:, None] + i, mask=in_f[:, None] & in_f, other=0.0)

    row = tl.arange(0, ROWS)
    causal = row[:, None] >= row
    for start in range(0, num_tokens, ROWS):
        token = (start + row).to(tl.int64)
        told = token < num_tokens
        in_x, at = told[:, None] & in_f, token[:, None] * stride_t
        q = tl.load(q_ptr + at, mask=in_x, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + at, mask=in_x, other=0.0).to(tl.float32) * scale
        v = tl.load(v_ptr + at, mask=told[:, None] & in_e, other=0.0)
        q_1, k_1 = q.to(v.dtype), k.to(v.dtype)
        q_2 = _squares(q, ROWS, F_PAD)
        k_2 = _squares(k, ROWS, F_PAD)

        s = tl.dot(q_1, tl.trans(k_1), input_precision="ieee")
        weights = tl.where(causal, 1.0 + s + 0.5 * s * s, 0.0)  # rows past the end come after all
        top = tl.dot(weights.to(v.dtype), v, input_precision="ieee") + sums_0
        top = tl.dot(q_1, sums_1.to(v.dtype), top, input_precision="ieee")
        top = tl.dot(q_2.to(v.dtype), sums_2.to(v.dtype), top, input_precision="ieee")
        bottom = tl.sum(weights, 1) + norm_0
        read_2 = tl.dot(q, norm_2, input_precision="ieee") * 0.7071067811865476  # (rows, f)
        bottom += tl.sum(q * (norm_1 + read_2), 1)
        out = (top / bottom[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[:, None] * (HEADS * E), out, mask=told[:, None] & in_e)

        sums_0 += tl.sum(v.to(tl.float32), 0)
        sums_1 = tl.dot(tl.trans(k_1), v, sums_1, input_precision="ieee")
        sums_2 = tl.dot(tl.trans(k_2.to(v.dtype)), v, sums_2, input_precision="ieee")
        norm_0 += tl.sum(told.to(tl.float32), 0)
        norm_1 += tl.sum(k, 0)
        norm_2 += tl.dot(tl.trans(k), k * 0.7071067811865476, input_precision="ieee")

    tl.store(sums_ptr, sums_0, mask=in_e)
    tl.store(sums_ptr + row_1[:, None] * E, sums_1, mask=inside_1)
    tl.store(sums_ptr + row_2[:, None] * E, sums_2, mask=inside_2)
    if tl.program_id(1) == 0:
        tl.store(norms_after_ptr, norm_0)
        tl.store(norms_after_ptr + row_1, norm_1, mask=in_f)
        tl.store(norms_after_ptr + squares[:, None] + i, norm_2, mask=in_f[:, None] & in_f)


@triton.jit
def _squares(x, ROWS: tl.constexpr, F_PAD: tl.constexpr):
    """x (x) x / sqrt 2 of every row: (rows, f) -> (rows, f^2)."""
    squares = x[:, :, None] * (x * 0.7071067811865476)[:, None, :]
    return tl.reshape(squares, [ROWS, F_PAD * F_PAD])


# --- gated delta rule (baselines/gated_deltanet.py) ----------------------------------------------

DELTA_COLUMNS = 32  # value columns of the memory a program holds: rows of 128 bytes in float32
DELTA_WARPS = 4


def delta_step(
    qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, matrix: Tensor
) -> Tensor:
    """One token of the gated delta rule: the memory is read once and written once, in place.

    qkv (b, h (2p + e)) and a, b (b, h), last dimension contiguous; matrix (b, h, p, e) float32,
    contiguous. Returns (b, h, e) float32.
    """
    batch_size, num_heads, key_width, value_width = matrix.shape
    block = min(DELTA_COLUMNS, triton.next_power_of_2(value_width))
    blocks = triton.cdiv(value_width, block)
    out = torch.empty(batch_size, num_heads, value_width, dtype=matrix.dtype, device=matrix.device)
    _delta_step_kernel[(batch_size * num_heads * blocks,)](
        qkv, a, b, A_log, dt_bias, matrix, out, qkv.stride(0), a.stride(0), b.stride(0),
        HEADS=num_heads, P=key_width, E=value_width, KEYS=triton.next_power_of_2(key_width),
        BLOCK=block, BLOCKS=blocks, num_warps=DELTA_WARPS, **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _delta_step_kernel(
    qkv_ptr, a_ptr, b_ptr, rate_ptr, bias_ptr, matrix_ptr, out_ptr, qkv_stride, a_stride, b_stride,
    HEADS: tl.constexpr, P: tl.constexpr, E: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BLOCK columns of its memory, which lie in registers."""
    memory = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row, head = memory // HEADS, memory % HEADS
    p = tl.arange(0, KEYS)
    e = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = (p < P)[:, None] & (e < E)[None, :]
    matrix_ptr += memory * (P * E) + p[:, None] * E + e[None, :]
    matrix = tl.load(matrix_ptr, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_release()
    qkv_ptr += row * qkv_stride
    q = _unit_vector(qkv_ptr + head * P + p, p < P) / tl.sqrt(P * 1.0)
    k = _unit_vector(qkv_ptr + (HEADS + head) * P + p, p < P)
    v = tl.load(qkv_ptr + 2 * HEADS * P + head * E + e, mask=e < E, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(rate_ptr + head).to(tl.float32))
    a = tl.load(a_ptr + row * a_stride + head) + tl.load(bias_ptr + head).to(tl.float32)
    beta = tl.sigmoid(tl.load(b_ptr + row * b_stride + head).to(tl.float32))
    matrix *= tl.exp(-rate * _softplus(a))
    u = beta * (v - tl.sum(matrix * k[:, None], axis=0))
    matrix += k[:, None] * u[None, :]
    tl.store(matrix_ptr, matrix, mask=inside)
    out = tl.sum(matrix * q[:, None], axis=0)
    tl.store(out_ptr + memory * E + e, out, mask=e < E)


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + y), y = exp(-|x|). Where y is small, 1 + y has lost digits of y, and
    y / (1 + y - 1) puts back what the logarithm lost with them.
    """
    y = tl.exp(-tl.abs(x))
    one_more = 1.0 + y
    lost = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    return tl.maximum(x, 0.0) + tl.where(one_more == 1.0, y, tl.log(one_more) * (y / lost))


@triton.jit
def _unit_vector(x_ptr, inside):
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x) + 1e-6)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) silu(gate), head by head, in float32.

    x (b, h, e) contiguous, gate (b, h e), last dimension contiguous, weight (e,). Returns (b, h e)
    in gate's dtype.
    """
    batch_size, num_heads, width = x.shape
    out = torch.empty(batch_size, num_heads * width, dtype=gate.dtype, device=gate.device)
    _gated_rms_norm_kernel[(batch_size * num_heads,)](
        x, gate, weight, out, gate.stride(0), eps,
        HEADS=num_heads, E=width, BLOCK=triton.next_power_of_2(width), num_warps=1,
        **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _gated_rms_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, gate_stride, eps,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_release()
    here = tl.program_id(0).to(tl.int64)
    row, head = here // HEADS, here % HEADS
    e = tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(x_ptr + here * E + e, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + row * gate_stride + head * E + e, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    weight = tl.load(weight_ptr + e, mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x) / E + eps) * weight * gate * tl.sigmoid(gate)
    tl.store(out_ptr + here * E + e, out.to(out_ptr.dtype.element_ty), mask=inside)


# --- Mamba-2 ----------------------------------------------------------------------------------

SSM_ROWS, SSM_WARPS = 32, 4  # rows of S that a program holds


def ssm_step(
    xbc: Tensor, dt: Tensor, z: Tensor, A_log: Tensor, dt_bias: Tensor, D: Tensor, matrix: Tensor
) -> Tensor:
    """One token of a Mamba-2 layer: S is read once and written once, in place; gated output.

    xbc (b, h e + 2n), dt (b, h), z (b, h e), last dimension contiguous; A_log, dt_bias, D (h,);
    matrix (b, h, e, n), contiguous. Returns (b, h e), as xbc.
    """
    batch_size, num_heads, width, num_states = matrix.shape
    block = min(SSM_ROWS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    out = xbc.new_empty(batch_size, num_heads * width)
    _ssm_step_kernel[(batch_size * num_heads * blocks,)](
        xbc, dt, z, A_log, dt_bias, D, matrix, out, xbc.stride(0), dt.stride(0), z.stride(0),
        HEADS=num_heads, E=width, N=num_states, STATES=triton.next_power_of_2(num_states),
        BLOCK=block, BLOCKS=blocks, num_warps=SSM_WARPS, **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _ssm_step_kernel(
    xbc_ptr, dt_ptr, z_ptr, rate_ptr, bias_ptr, skip_ptr, matrix_ptr, out_ptr,
    xbc_stride, dt_stride, z_stride,
    HEADS: tl.constexpr, E: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, BLOCK rows of its S, which lie in registers."""
    memory = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row, head = memory // HEADS, memory % HEADS
    e = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    inside = (e < E)[:, None] & (n < N)[None, :]
    matrix_ptr += memory * (E * N) + e[:, None] * N + n[None, :]
    # S, which nobody reads again in this step, is the first to leave the L2 cache: 7 % of a step.
    # GatedDeltaNet's memory, marked so, made its step 3 % slower (docs/performance.md).
    matrix = tl.load(matrix_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )
    if EARLY:
        gdc_wait()
        gdc_release()
    xbc_ptr += row * xbc_stride
    x = tl.load(xbc_ptr + head * E + e, mask=e < E, other=0.0).to(tl.float32)
    key = tl.load(xbc_ptr + HEADS * E + n, mask=n < N, other=0.0).to(tl.float32)
    query = tl.load(xbc_ptr + HEADS * E + N + n, mask=n < N, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + head * E + e, mask=e < E, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row * dt_stride + head).to(tl.float32)
    dt = _softplus(dt + tl.load(bias_ptr + head).to(tl.float32))
    decay = tl.exp(-dt * tl.exp(tl.load(rate_ptr + head).to(tl.float32)))
    matrix = decay * matrix + (dt * x)[:, None] * key[None, :]
    state = matrix.to(matrix_ptr.dtype.element_ty)
    tl.store(matrix_ptr, state, mask=inside, eviction_policy="evict_first")
    y = tl.sum(matrix * query[None, :], axis=1)
    y += tl.load(skip_ptr + head).to(tl.float32) * x
    out = (y * z * tl.sigmoid(z)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + memory * E + e, out, mask=e < E)
