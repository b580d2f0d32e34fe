"""Triton kernels of the decode path `cuda_graph`; each one's reference is named beside it.

A decoding step is bound by memory: the cache is read once, at the live length and not at its
allocated one, and the small operations around the matmuls take one launch each.

Shapes: b batch, h query heads, g key-value heads, e head width (64), s cache rows, d width.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_bench.blocks import HEAD_WIDTH, Rope
from cat_bench.graph import Rows

try:
    from triton.language.extra.cuda import gdc_launch_dependents as gdc_release
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # Triton before 3.4: no early launch
    gdc_release = gdc_wait = None


class Tile(NamedTuple):
    rows: int  # of the cache
    warps: int
    stages: int


# The best of nine on an H100, or within 2 % of it, for 16 to 32,500 rows and batches 1 to 512.
LONG, SHORT = Tile(32, 1, stages=2), Tile(16, 1, stages=1)
FEW = Tile(128, 4, stages=2)  # where few programs have few rows: then time is latency
SHORT_ROWS, FEW_ROWS, FEW_PROGRAMS = 768, 256, 128
PROGRAMS_WANTED = 2048  # about 16 per multiprocessor of an H100 or H200; below it, split the rows


@lru_cache
def early_launch() -> dict[str, bool]:
    """Launch options of kernels that may start while the one before them still runs (Hopper).

    Such a kernel has the constant EARLY. Before `gdc_wait` it reads only what the kernel before it
    does not write, and writes nothing; after it, `gdc_release` lets the next one start. So when a
    kernel starts, everything up to the last but one has ended.
    """
    early = (
        gdc_wait is not None
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (9, 0)
    )
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Rows, rope: Rope
) -> Tensor:
    """Rotate q and k, write k and v into the cache, attend: one launch (two where rows are split).

    Reference: graph.decode_attention_reference. q (b, h e), k and v (b, g e), not yet rotated, last
    dimension contiguous; keys, values (b, g, s, e) changed in place; rope tables (ids, e/2) fp32.
    Returns (b, h e) in q's dtype. Softmax and sums are float32. `rows` must not come from the
    kernel right before this one, which may start before that has ended.
    """
    batch_size, num_heads, num_kv = len(q), q.shape[1] // HEAD_WIDTH, keys.shape[1]
    tile, splits = tiling(batch_size * num_heads, keys.shape[2])
    out = torch.empty(batch_size, num_heads * HEAD_WIDTH, dtype=q.dtype, device=q.device)
    partial = q.new_empty(batch_size * num_heads, splits, HEAD_WIDTH + 2, dtype=torch.float32)
    second = rows.second_start is not None
    _attend_kernel[(batch_size * num_heads, splits)](
        q, k, v, keys, values, *rope, out, partial, *(rows if second else (*rows[:3], *rows[:2])),
        q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1),
        HEADS=num_heads, GROUP=num_heads // num_kv, SPLITS=splits, BLOCK=tile.rows, E=HEAD_WIDTH,
        SECOND=second, STAGES=tile.stages, AHEAD=tile == FEW, num_warps=tile.warps,
        EVICT="evict_first" if num_heads == num_kv else "",  # heads that share rows read them again
        **early_launch(),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(batch_size * num_heads,)](
            partial, out, SPLITS=splits, E=HEAD_WIDTH, **early_launch()
        )
    return out


def tiling(num_programs: int, num_rows: int) -> tuple[Tile, int]:
    """The tile for caches of `num_rows` rows, one program a head, and over how many programs more
    the rows of a head are split: enough to fill the GPU, and a power of two, for the combining
    kernel holds them in one tile.
    """
    few = num_programs <= FEW_PROGRAMS and num_rows <= FEW_ROWS
    tile = FEW if few else SHORT if num_rows <= SHORT_ROWS else LONG
    splits = max(1, PROGRAMS_WANTED // (num_programs * tile.warps))
    splits = min(splits, triton.cdiv(num_rows, 2 * tile.rows), 64)
    return tile, 2 ** (splits.bit_length() - 1)


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, out_ptr, partial_ptr,
    write_ptr, rope_ptr, first_end_ptr, second_start_ptr, second_end_ptr,
    q_stride, k_stride, v_stride, cache_stride_b, cache_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    E: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    EVICT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence, one share of the rows; share 0 also takes the own row.

    Whatever does not depend on another load is loaded first: with few rows, the time is latency.
    AHEAD: also the first tile, whose rows are older than the kernel before this; with many
    programs the loop alone keeps more loads under way.
    """
    head = tl.program_id(0) % HEADS
    split = 0 if SPLITS == 1 else tl.program_id(1)
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    kv_head = head // GROUP
    e = tl.arange(0, E)
    other = (e + E // 2) % E  # the partner in the half-split rotation
    rope_id = tl.load(rope_ptr + b)
    write = tl.load(write_ptr + b)
    first_end = tl.load(first_end_ptr + b).to(tl.int32)
    cos = tl.load(cos_ptr + rope_id * (E // 2) + e % (E // 2))
    sin = tl.load(sin_ptr + rope_id * (E // 2) + e % (E // 2))
    sin = tl.where(e < E // 2, -sin, sin)
    keys_ptr += b * cache_stride_b + kv_head * cache_stride_h
    values_ptr += b * cache_stride_b + kv_head * cache_stride_h
    share = tl.cdiv(tl.cdiv(first_end, SPLITS), BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, first_end)
    if AHEAD:
        tile = _load_tile(keys_ptr, values_ptr, start, end, write, BLOCK, E, EVICT)
    if EARLY:
        gdc_wait()
        gdc_release()
    q_ptr += b * q_stride + head * E
    k_ptr += b * k_stride + kv_head * E
    q = tl.load(q_ptr + e).to(tl.float32)
    q_other = tl.load(q_ptr + other).to(tl.float32)
    k = tl.load(k_ptr + e).to(tl.float32)
    k_other = tl.load(k_ptr + other).to(tl.float32)
    v = tl.load(v_ptr + b * v_stride + kv_head * E + e)
    dtype = keys_ptr.dtype.element_ty
    q = (q * cos + q_other * sin).to(dtype).to(tl.float32)
    q *= 1.4426950408889634 / tl.sqrt(E * 1.0)  # scale, and log2(e) for exp2
    k = (k * cos + k_other * sin).to(dtype)
    if split == 0:
        tl.store(keys_ptr + write * E + e, k)
        tl.store(values_ptr + write * E + e, v)
        best = tl.sum(q * k.to(tl.float32))
        total = 1.0
        acc = v.to(tl.float32)
    else:
        best = -1e30  # not -inf: a tile may hold no row but the skipped one
        total = 0.0
        acc = tl.zeros([E], tl.float32)
    if AHEAD:
        best, total, acc = _attend_tile(q, *tile, best, total, acc)
        start += BLOCK
    best, total, acc = _attend_rows(
        q, keys_ptr, values_ptr, start, end, write, best, total, acc, BLOCK, E, STAGES, EVICT
    )
    if SECOND:
        if split == 0:
            low = tl.load(second_start_ptr + b).to(tl.int32)
            high = tl.load(second_end_ptr + b).to(tl.int32)
            best, total, acc = _attend_rows(
                q, keys_ptr, values_ptr, low, high, write, best, total, acc, BLOCK, E, 1, EVICT
            )
    if SPLITS == 1:
        tl.store(out_ptr + tl.program_id(0) * E + e, (acc / total).to(out_ptr.dtype.element_ty))
    else:
        partial_ptr += (tl.program_id(0) * SPLITS + split) * (E + 2)
        tl.store(partial_ptr + e, acc)
        tl.store(partial_ptr + E, best)
        tl.store(partial_ptr + E + 1, total)


@triton.jit
def _attend_rows(
    q, keys_ptr, values_ptr, start, end, skip, best, total, acc,
    BLOCK: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Online softmax over cache rows start .. end - 1 without row `skip`, which the query itself
    is writing; reads nothing past them.
    """
    for low in tl.range(start, end, BLOCK, num_stages=STAGES):
        tile = _load_tile(keys_ptr, values_ptr, low, end, skip, BLOCK, E, EVICT)
        best, total, acc = _attend_tile(q, *tile, best, total, acc)
    return best, total, acc


@triton.jit
def _load_tile(
    keys_ptr, values_ptr, low, end, skip,
    BLOCK: tl.constexpr, E: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Keys and values (rows, e), zeros where `inside` (rows,) is false.

    EVICT "evict_first": nobody reads them again in this step, so they leave the L2 cache first.
    """
    row, e = low + tl.arange(0, BLOCK), tl.arange(0, E)
    inside = (row < end) & (row != skip)
    seen, at = inside[:, None], row[:, None] * E + e
    k = tl.load(keys_ptr + at, mask=seen, other=0.0, eviction_policy=EVICT)
    v = tl.load(values_ptr + at, mask=seen, other=0.0, eviction_policy=EVICT)
    return k, v, inside


@triton.jit
def _attend_tile(q, k, v, inside, best, total, acc):
    score = tl.sum(k.to(tl.float32) * q, axis=1)
    score = tl.where(inside, score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score))
    weight = tl.exp2(score - new_best)
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weight)
    acc = acc * shrink + tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
    return new_best, total, acc


@triton.jit
def _combine_kernel(
    partial_ptr, out_ptr, SPLITS: tl.constexpr, E: tl.constexpr, EARLY: tl.constexpr
):
    """Merge the shares of one head by their maxima and sums."""
    if EARLY:
        gdc_wait()
        gdc_release()
    e, split = tl.arange(0, E), tl.arange(0, SPLITS)
    partial_ptr += tl.program_id(0) * SPLITS * (E + 2)
    acc = tl.load(partial_ptr + split[:, None] * (E + 2) + e)
    best = tl.load(partial_ptr + split * (E + 2) + E)
    total = tl.load(partial_ptr + split * (E + 2) + E + 1)
    weight = tl.exp2(best - tl.max(best))  # an empty share has best = -1e30: weight 0
    out = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight)
    tl.store(out_ptr + tl.program_id(0) * E + e, out.to(out_ptr.dtype.element_ty))


def chunk_rows(
    token: Tensor, row: Tensor, open_tokens: Tensor, growing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Put `token` into its open chunk and find the places of `row`, in one launch.

    Reference: cat.chunk_rows_reference. token, row (b,) int64; open_tokens (b, c), changed in
    place. Returns cache rows, ids of the rotation and numbers of the chunk that closes, (b,) each.
    """
    batch_size, chunk_size = open_tokens.shape
    out = row.new_empty(3, batch_size)
    _chunk_rows_kernel[(triton.cdiv(batch_size, 128),)](
        token, row, open_tokens, out, batch_size, C=chunk_size, GROWING=growing, BLOCK=128
    )
    return tuple(out)


@triton.jit
def _chunk_rows_kernel(
    token_ptr, row_ptr, open_ptr, out_ptr, batch_size,
    C: tl.constexpr, GROWING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < batch_size
    row = tl.load(row_ptr + b, mask=inside, other=1)
    token = tl.load(token_ptr + b, mask=inside, other=0)
    tl.store(open_ptr + b.to(tl.int64) * C + (row + C - 1) % C, token, mask=inside)
    chunk, offset = row // C, row % C
    tl.store(out_ptr + b, chunk + offset, mask=inside)
    tl.store(out_ptr + batch_size + b, chunk + offset if GROWING else offset, mask=inside)
    tl.store(out_ptr + 2 * batch_size + b, tl.maximum(chunk - 1, 0), mask=inside)


def short_attention(qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    """Every row of a short sequence sees all its rows: rotate and attend in one launch.

    Reference: short_attention.short_attention_reference. qkv (b, t, 3 h e), contiguous, not yet
    rotated, t up to MAX_SHORT; rope tables (t, e/2) fp32. Returns (b, t, h e). One program a head:
    all its rows lie in registers, padded to a power of two.
    """
    batch_size, num_rows, _ = qkv.shape
    out = qkv.new_empty(batch_size, num_rows, num_heads * HEAD_WIDTH)
    padded = max(16, triton.next_power_of_2(num_rows))
    more_at_once = {"maxnreg": 168} if padded == 32 else {}  # programs, for a few spilled registers
    _short_attention_kernel[(batch_size * num_heads,)](
        qkv, *rope, out, num_rows,
        HEADS=num_heads, E=HEAD_WIDTH, ROWS=padded, num_warps=max(1, padded // 32), **more_at_once,
    )  # fmt: skip
    return out


@triton.jit
def _short_attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, num_rows,
    HEADS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    row = tl.arange(0, ROWS)
    half = tl.arange(0, E // 2)
    e = tl.arange(0, E)
    inside = row < num_rows
    here = (b * num_rows + row)[:, None]
    table = row[:, None] * (E // 2) + half
    cos = tl.load(cos_ptr + table, mask=inside[:, None], other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside[:, None], other=0.0)
    qkv_ptr += here * (3 * HEADS * E) + head * E
    q1, q2 = _rotated_halves(qkv_ptr + half, cos, sin, inside, E)
    k1, k2 = _rotated_halves(qkv_ptr + HEADS * E + half, cos, sin, inside, E)
    v = tl.load(qkv_ptr + 2 * HEADS * E + e, mask=inside[:, None], other=0.0)
    score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
    score *= 1.4426950408889634 / tl.sqrt(E * 1.0)  # scale, and log2(e) for exp2
    score = tl.where(inside[None, :], score, float("-inf"))
    weight = tl.exp2(score - tl.max(score, axis=1)[:, None])
    total = tl.sum(weight, axis=1)
    o = tl.dot(weight.to(v.dtype), v, input_precision="ieee") / total[:, None]
    out_at = out_ptr + here * (HEADS * E) + head * E + e
    tl.store(out_at, o.to(v.dtype), mask=inside[:, None])


def short_attention_backward(do: Tensor, qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    """Gradient of `short_attention` with respect to qkv. do (b, t, h e), contiguous -> as qkv."""
    batch_size, num_rows, _ = qkv.shape
    grad = torch.empty_like(qkv)
    padded = max(16, triton.next_power_of_2(num_rows))
    _short_backward_kernel[(batch_size * num_heads,)](
        do, qkv, *rope, grad, num_rows,
        HEADS=num_heads, E=HEAD_WIDTH, ROWS=padded, num_warps=min(8, max(1, padded // 16)),
    )  # fmt: skip
    return grad


@triton.jit
def _short_backward_kernel(
    do_ptr, qkv_ptr, cos_ptr, sin_ptr, grad_ptr, num_rows,
    HEADS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weights are made again; nothing of the forward but its inputs is kept."""
    head = tl.program_id(0) % HEADS
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    row = tl.arange(0, ROWS)
    half = tl.arange(0, E // 2)
    e = tl.arange(0, E)
    inside = row < num_rows
    seen = inside[:, None]
    here = (b * num_rows + row)[:, None]
    table = row[:, None] * (E // 2) + half
    cos = tl.load(cos_ptr + table, mask=seen, other=0.0)
    sin = tl.load(sin_ptr + table, mask=seen, other=0.0)
    at = here * (3 * HEADS * E) + head * E
    q1, q2 = _rotated_halves(qkv_ptr + at + half, cos, sin, inside, E)
    k1, k2 = _rotated_halves(qkv_ptr + at + HEADS * E + half, cos, sin, inside, E)
    v = tl.load(qkv_ptr + at + 2 * HEADS * E + e, mask=seen, other=0.0)
    do = tl.load(do_ptr + here * (HEADS * E) + head * E + e, mask=seen, other=0.0)
    dtype = v.dtype
    scale = 1 / tl.sqrt(E * 1.0)
    score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee") * scale
    score = tl.where(inside[None, :], score, float("-inf"))
    p = tl.exp(score - tl.max(score, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    dv = tl.dot(tl.trans(p.to(dtype)), do, input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    ds = ds.to(dtype)
    dq1 = tl.dot(ds, k1, input_precision="ieee")
    dq2 = tl.dot(ds, k2, input_precision="ieee")
    ds = tl.trans(ds)
    dk1 = tl.dot(ds, q1, input_precision="ieee")
    dk2 = tl.dot(ds, q2, input_precision="ieee")
    first = grad_ptr + at + half
    tl.store(first, (dq1 * cos + dq2 * sin).to(dtype), mask=seen)
    tl.store(first + E // 2, (dq2 * cos - dq1 * sin).to(dtype), mask=seen)
    tl.store(first + HEADS * E, (dk1 * cos + dk2 * sin).to(dtype), mask=seen)
    tl.store(first + HEADS * E + E // 2, (dk2 * cos - dk1 * sin).to(dtype), mask=seen)
    tl.store(grad_ptr + at + 2 * HEADS * E + e, dv.to(dtype), mask=seen)


@triton.jit
def _rotated_halves(x_ptr, cos, sin, inside, E: tl.constexpr):
    """Half-split RoPE of (rows, e) as its two halves, rounded to the dtype of x."""
    x1 = tl.load(x_ptr, mask=inside[:, None], other=0.0)
    x2 = tl.load(x_ptr + E // 2, mask=inside[:, None], other=0.0)
    dtype = x1.dtype
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    return (x1 * cos - x2 * sin).to(dtype), (x1 * sin + x2 * cos).to(dtype)


def rotate_(qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    """Half-split RoPE of the first `num_heads` heads of every row, in place, in one launch.

    Reference: blocks.rotate. qkv (b, t, n e), contiguous; rope tables (t, e/2) fp32.
    """
    batch_size, num_rows, width = qkv.shape
    pairs = num_heads * HEAD_WIDTH // 2
    _rotate_kernel[(batch_size * num_rows,)](
        qkv, *rope, num_rows, width, pairs, E=HEAD_WIDTH, BLOCK=triton.next_power_of_2(pairs)
    )
    return qkv


@triton.jit
def _rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, num_rows, width, pairs, E: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    table = row % num_rows * (E // 2) + pair % (E // 2)
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    first = qkv_ptr + row * width + pair // (E // 2) * E + pair % (E // 2)
    x1 = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(first + E // 2, mask=inside, other=0.0).to(tl.float32)
    dtype = qkv_ptr.dtype.element_ty
    tl.store(first, (x1 * cos - x2 * sin).to(dtype), mask=inside)
    tl.store(first + E // 2, (x1 * sin + x2 * cos).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean x^2 + eps) * weight, computed in float32. (b, d). Reference: F.rms_norm."""
    out = torch.empty_like(x)
    width = x.shape[1]
    _rms_norm_kernel[(len(x),)](
        x, weight, out, width, eps, BLOCK=triton.next_power_of_2(width), num_warps=4,
        **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.program_id(0).to(tl.int64) * width  # a long prompt has over 2^31 numbers
    if EARLY:
        gdc_wait()
        gdc_release()
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + column, out, mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (b, 2 i), contiguous -> (b, i). Reference: F.silu(gate) * up."""
    width = gate_up.shape[1] // 2
    out = torch.empty(len(gate_up), width, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_kernel[(len(gate_up), triton.cdiv(width, 1024))](
        gate_up, out, width, BLOCK=1024, **early_launch()
    )
    return out


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if EARLY:
        gdc_wait()
        gdc_release()
    gate = tl.load(gate_up_ptr + 2 * row * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (2 * row + 1) * width + column, mask=inside, other=0.0)
    out = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def argmax(logits: Tensor, out: Tensor) -> None:
    """Column of the largest of each row, logits (b, v) -> out (b,) int64; the first of equals.

    Reference: torch.argmax. As there nan counts as the largest, but only as inf does: the first of
    either is taken. Last dimension contiguous.
    """
    _argmax_kernel[(len(logits),)](
        logits, out, logits.shape[1], logits.stride(0), out.stride(0), BLOCK=8192, num_warps=16
    )


@triton.jit
def _argmax_kernel(logits_ptr, out_ptr, width, stride, out_stride, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane
    for low in tl.range(0, width, BLOCK):
        inside = low + lane < width
        x = tl.load(logits_ptr + b * stride + low + lane, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # nan
        where = tl.where(x > best, low + lane, where)
        best = tl.maximum(best, x)
    first = tl.min(tl.where(best == tl.max(best, 0), where, width), 0)
    tl.store(out_ptr + b * out_stride, first.to(tl.int64))
