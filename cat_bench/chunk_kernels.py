"""Triton kernels of chunk attention (chunk_attention.py has the definition and the references).

A tile is a whole number of chunks, at most BLOCK_M rows. For its queries the keys are of two kinds:

    before the tile   one summary row per chunk, at stride C in memory, all visible: no mask
    in the tile       a square with the definition as its mask

and one online softmax runs over both: flash attention over t / C keys and one square. Backward:
`_queries_kernel` repeats that loop for dq; as the rows of a tile are keys of the same tile and, the
summaries, of later ones, it also has their gradients from the tile itself. `_summaries_kernel` then
adds to the summary rows what the later tiles give, a tile of summaries at a time. No atomics: the
result is the same in every run.

Given rope tables, queries and keys are rotated where a tile loads them and their gradients rotated
back where it stores them. The rotation restarts in every chunk and the summary is its first row,
which no rotation moves: the loops over summaries read keys as they lie in memory. The loop over
later queries would rotate each of them once per tile of summaries, so `_queries_kernel` writes them
down instead.

Shapes: b batch, h query heads, g key-value heads, t rows, e head width. Scores are in units of
log 2, for exp2; sums are float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

VARYING = ("num_rows", "num_summaries", "heads", "shared", "offset")  # never worth a compilation
LOG2_E = tl.constexpr(1.4426950408889634)


class Launch(NamedTuple):
    block_m: int  # query rows
    block_n: int  # summary rows
    warps: int
    stages: int


def launch_of(
    kernel: str, chunk_size: int, head_width: int, float32: bool, num_chunks: int
) -> Launch:
    """Tiles of `kernel` ("forward", "queries" or "summaries") that keep to the registers.

    The smallest query tile that holds a chunk: what a tile computes of its own square without need
    grows with it, and small tiles fill the device at short lengths. Of summaries the forward pass
    takes few at a time, for the last, masked step of a loop wastes half a tile.
    """
    if float32:  # three TF32 products for one, and twice the bytes
        block_m = next(size for size in (32, 64, 128) if chunk_size <= size)
        block_m = 32 if kernel == "summaries" else block_m
        return Launch(block_m, 32, warps=4 if block_m == 32 else 8, stages=1)
    block_m = 64 if kernel == "summaries" or chunk_size <= 64 else 128
    block_n = 32 if kernel == "forward" else 64
    warps = 4 if block_m * head_width <= 64 * 64 else 8
    is_short = kernel == "queries" and num_chunks <= 256  # its loop ends before it is filled
    return Launch(block_m, block_n, warps, stages=2 if is_short or head_width > 64 else 3)


def tile_rows(chunk_size: int, block_m: int) -> int:
    """The rows that a tile has: as many chunks as fit."""
    return block_m // chunk_size * chunk_size


def forward(q, k, v, o, lse, chunk_size: int, offset: int, rope=None) -> None:
    """Fill o (b, h, t, e) and lse (b, h, t), the latter contiguous. Last dimensions contiguous.

    With `rope`, contiguous tables (t, e/2) float32, q and k come unrotated: row r is rotated as row
    r % C of the tables says, and row 0 must say not at all. `offset` is 0 then.
    """
    b, h, t, e = q.shape
    launch = launch_of("forward", chunk_size, e, q.element_size() == 4, t // chunk_size)
    rows = tile_rows(chunk_size, launch.block_m)
    _forward_kernel[(b * h, triton.cdiv(t, rows))](
        q, k, v, *_tables(rope), o, lse, t, *_scalars(q, k, offset), *_strides(q, k, v, o),
        **_tiling(chunk_size, rows, e, launch), num_warps=launch.warps,
    )  # fmt: skip


def backward(
    do, q, k, v, o, lse, delta, dq, dk, dv, chunk_size: int, offset: int, rope=None
) -> None:
    """Fill delta (b, h, t), dq, dk and dv (b, h, t, e): gradients of k and v per query head.

    With `rope` as in `forward`, dq and dk are those of the unrotated q and k.
    """
    b, h, t, e = q.shape
    launch = launch_of("queries", chunk_size, e, q.element_size() == 4, t // chunk_size)
    rows = tile_rows(chunk_size, launch.block_m)
    tiles = triton.cdiv(t, rows)
    rotated = q if rope is None else q.new_empty(b, t, h, e).transpose(1, 2)
    _queries_kernel[(b * h, tiles)](
        do, q, k, v, *_tables(rope), o, lse, delta, rotated, dq, dk, dv, t,
        *_scalars(q, k, offset), *_strides(do, q, k, v, o, rotated, dq, dk, dv),
        **_tiling(chunk_size, rows, e, launch), num_warps=launch.warps,
    )  # fmt: skip
    num_summaries = (tiles - 1) * (rows // chunk_size)  # those that a later tile sees
    if num_summaries == 0:
        return
    launch = launch_of("summaries", chunk_size, e, q.element_size() == 4, t // chunk_size)
    _summaries_kernel[(b * h, triton.cdiv(num_summaries, launch.block_n))](
        do, rotated, k, v, lse, delta, dk, dv, t, num_summaries, *_scalars(q, k, offset),
        *_strides(do, rotated, k, v, dk, dv),
        **_tiling(chunk_size, rows, e, launch), num_warps=launch.warps,
    )  # fmt: skip


def _strides(*tensors) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _tables(rope) -> tuple:
    """cos and sin; None leaves every rotation out of a kernel."""
    return (None, None) if rope is None else rope


def _scalars(q, k, offset: int) -> tuple[float, int, int, int]:
    """Scale, query heads, query heads per key-value head, place of the summary in its chunk."""
    return q.shape[3] ** -0.5, q.shape[1], q.shape[1] // k.shape[1], offset


def _tiling(chunk_size: int, rows: int, head_width: int, launch: Launch) -> dict:
    return {
        "C": chunk_size, "ROWS": rows, "E": head_width,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "STAGES": launch.stages,
        "PRECISION": "tf32x3",  # of float32 inputs only: as exact as float32, on tensor cores
    }  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, o_ptr, lse_ptr,
    num_rows, scale, heads, shared, offset,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    E: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head."""
    program = tl.program_id(0).to(tl.int64)
    head, b = program % heads, program // heads
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last has the most keys: it starts first
    lane, start = tl.arange(0, BLOCK_M), tile.to(tl.int64) * ROWS
    inside = (lane < ROWS) & (start + lane < num_rows)
    k_ptr += b * k_b + head // shared * k_h
    v_ptr += b * v_b + head // shared * v_h
    q_ptr += b * q_b + head * q_h
    q = _load_rotated(q_ptr + start * q_t, q_t, lane, inside, cos_ptr, sin_ptr, C, E)
    k = _load_rotated(k_ptr + start * k_t, k_t, lane, inside, cos_ptr, sin_ptr, C, E)
    v = _load_rows(v_ptr + start * v_t, v_t, lane, inside, E)
    scale *= LOG2_E
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    # Lanes past the end are keys of none but themselves: later than every row.
    score = tl.where(_sees(lane[:, None], lane[None, :], offset, C), score, float("-inf"))
    best = tl.max(score, 1)
    weight = tl.exp2(score - best[:, None])
    total = tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)

    k_ptr += offset * k_t
    v_ptr += offset * v_t
    num_before = tile * (ROWS // C)
    whole = num_before // BLOCK_N * BLOCK_N
    for low in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        best, total, acc = _attend_summaries(
            q, best, total, acc, low, None, k_ptr, C * k_t, v_ptr, C * v_t, scale,
            BLOCK_N, E, PRECISION,
        )  # fmt: skip
    if whole < num_before:
        best, total, acc = _attend_summaries(
            q, best, total, acc, whole, num_before, k_ptr, C * k_t, v_ptr, C * v_t, scale,
            BLOCK_N, E, PRECISION,
        )  # fmt: skip
    _store_rows(
        o_ptr + b * o_b + head * o_h + start * o_t, o_t, lane, inside, acc / total[:, None], E
    )
    lse_ptr += tl.program_id(0).to(tl.int64) * num_rows + start
    tl.store(lse_ptr + lane, best + tl.log2(total), mask=inside)


@triton.jit
def _attend_summaries(
    q, best, total, acc, low, end, k_ptr, k_stride, v_ptr, v_stride, scale,
    BLOCK_N: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: summaries low .. low + BLOCK_N - 1, below `end` if given."""
    k, v = _load_summaries(k_ptr, k_stride, v_ptr, v_stride, low, end, BLOCK_N, E)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if end is not None:
        score = tl.where((low + tl.arange(0, BLOCK_N) < end)[None, :], score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, 1))
    weight = tl.exp2(score - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_best, total, acc


@triton.jit
def _load_summaries(
    k_ptr, k_stride, v_ptr, v_stride, low, end, BLOCK_N: tl.constexpr, E: tl.constexpr
):
    """Keys and values (n, e); zero from `end` on, where there is one."""
    n, first = tl.arange(0, BLOCK_N), tl.cast(low, tl.int64)
    there = None if end is None else low + n < end
    k = _load_rows(k_ptr + first * k_stride, k_stride, n, there, E)
    v = _load_rows(v_ptr + first * v_stride, v_stride, n, there, E)
    return k, v


@triton.jit(do_not_specialize=VARYING)
def _queries_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, o_ptr, lse_ptr, delta_ptr,
    rotated_ptr, dq_ptr, dk_ptr, dv_ptr, num_rows, scale, heads, shared, offset,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    rotated_b, rotated_h, rotated_t, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    E: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one head: its dq, its keys' gradients from the tile itself, delta = do . o."""
    program = tl.program_id(0).to(tl.int64)
    head, b = program % heads, program // heads
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    lane, start = tl.arange(0, BLOCK_M), tile.to(tl.int64) * ROWS
    inside = (lane < ROWS) & (start + lane < num_rows)
    k_ptr += b * k_b + head // shared * k_h
    v_ptr += b * v_b + head // shared * v_h
    do = _load_rows(do_ptr + b * do_b + head * do_h + start * do_t, do_t, lane, inside, E)
    o = _load_rows(o_ptr + b * o_b + head * o_h + start * o_t, o_t, lane, inside, E)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = tl.program_id(0).to(tl.int64) * num_rows + start + lane
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)

    # Lanes past the end have q = do = 0, hence weight 1, delta 0 and no gradient for any key.
    q_ptr += b * q_b + head * q_h
    q = _load_rotated(q_ptr + start * q_t, q_t, lane, inside, cos_ptr, sin_ptr, C, E)
    k = _load_rotated(k_ptr + start * k_t, k_t, lane, inside, cos_ptr, sin_ptr, C, E)
    v = _load_rows(v_ptr + start * v_t, v_t, lane, inside, E)
    if cos_ptr is not None:
        rotated_ptr += b * rotated_b + head * rotated_h + start * rotated_t
        _store_rows(rotated_ptr, rotated_t, lane, inside, q, E)
    scale_2 = scale * LOG2_E
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_2
    weight = tl.exp2(score - lse[:, None])
    weight = tl.where(_sees(lane[:, None], lane[None, :], offset, C), weight, 0.0)
    dv = tl.dot(tl.trans(weight.to(do.dtype)), do, input_precision=PRECISION)
    _store_rows(dv_ptr + b * dv_b + head * dv_h + start * dv_t, dv_t, lane, inside, dv, E)
    d_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    d_score = (weight * (d_weight - delta[:, None])).to(k.dtype)
    dk = tl.dot(tl.trans(d_score), q, input_precision=PRECISION) * scale
    dk_ptr += b * dk_b + head * dk_h + start * dk_t
    _store_rotated_back(dk_ptr, dk_t, lane, inside, dk, cos_ptr, sin_ptr, C, E)
    dq = tl.dot(d_score, k, input_precision=PRECISION)

    k_ptr += offset * k_t
    v_ptr += offset * v_t
    num_before = tile * (ROWS // C)
    whole = num_before // BLOCK_N * BLOCK_N
    for low in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        dq = _summaries_to_queries(
            q, do, lse, delta, dq, low, None, k_ptr, C * k_t, v_ptr, C * v_t, scale_2,
            BLOCK_N, E, PRECISION,
        )  # fmt: skip
    if whole < num_before:
        dq = _summaries_to_queries(
            q, do, lse, delta, dq, whole, num_before, k_ptr, C * k_t, v_ptr, C * v_t, scale_2,
            BLOCK_N, E, PRECISION,
        )  # fmt: skip
    dq_ptr += b * dq_b + head * dq_h + start * dq_t
    _store_rotated_back(dq_ptr, dq_t, lane, inside, dq * scale, cos_ptr, sin_ptr, C, E)


@triton.jit
def _summaries_to_queries(
    q, do, lse, delta, dq, low, end, k_ptr, k_stride, v_ptr, v_stride, scale,
    BLOCK_N: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the summaries of _attend_summaries give to dq (without the scale)."""
    k, v = _load_summaries(k_ptr, k_stride, v_ptr, v_stride, low, end, BLOCK_N, E)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    weight = tl.exp2(score - lse[:, None])
    if end is not None:
        weight = tl.where((low + tl.arange(0, BLOCK_N) < end)[None, :], weight, 0.0)
    d_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    d_score = (weight * (d_weight - delta[:, None])).to(k.dtype)
    return tl.dot(d_score, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def _summaries_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    num_rows, num_summaries, scale, heads, shared, offset,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    E: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N summary rows of one head, as keys of all queries in later tiles; added to dk, dv."""
    program = tl.program_id(0).to(tl.int64)
    head, b = program % heads, program // heads
    low = tl.program_id(1) * BLOCK_N  # the first has the most queries, and starts first
    n, lane = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    there = low + n < num_summaries
    row = low.to(tl.int64) * C + offset
    k_ptr += b * k_b + head // shared * k_h + row * k_t
    v_ptr += b * v_b + head // shared * v_h + row * v_t
    q_ptr += b * q_b + head * q_h
    do_ptr += b * do_b + head * do_h
    lse_ptr += tl.program_id(0).to(tl.int64) * num_rows
    delta_ptr += tl.program_id(0).to(tl.int64) * num_rows
    k = _load_rows(k_ptr, C * k_t, n, there, E)
    v = _load_rows(v_ptr, C * v_t, n, there, E)
    dk = tl.zeros([BLOCK_N, E], tl.float32)
    dv = tl.zeros([BLOCK_N, E], tl.float32)
    # Tile by tile, first those that see a part of these summaries, then those that see them all.
    chunks: tl.constexpr = ROWS // C
    first = (low // chunks + 1) * ROWS
    all_from = ((low + BLOCK_N - 1) // chunks + 1) * ROWS
    all_from = tl.minimum(first + tl.cdiv(all_from - first, BLOCK_M) * BLOCK_M, num_rows)
    for start in tl.range(first, all_from, BLOCK_M, num_stages=STAGES):
        query = start + lane
        seen = (low + n)[:, None] < (query // ROWS * chunks)[None, :]
        dk, dv = _later_queries(
            k, v, dk, dv, seen, start, num_rows, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr,
            scale, BLOCK_M, E, PRECISION,
        )  # fmt: skip
    for start in tl.range(all_from, num_rows, BLOCK_M, num_stages=STAGES):
        dk, dv = _later_queries(
            k, v, dk, dv, None, start, num_rows, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr,
            scale, BLOCK_M, E, PRECISION,
        )  # fmt: skip
    dk_ptr += b * dk_b + head * dk_h + row * dk_t
    dv_ptr += b * dv_b + head * dv_h + row * dv_t
    dk = dk * scale + _load_rows(dk_ptr, C * dk_t, n, there, E).to(tl.float32)
    dv += _load_rows(dv_ptr, C * dv_t, n, there, E).to(tl.float32)
    _store_rows(dk_ptr, C * dk_t, n, there, dk, E)
    _store_rows(dv_ptr, C * dv_t, n, there, dv, E)


@triton.jit
def _later_queries(
    k, v, dk, dv, seen, start, num_rows, q_ptr, q_t, do_ptr, do_t, lse_ptr, delta_ptr, scale,
    BLOCK_M: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries start .. start + BLOCK_M - 1 give to dk (without the scale) and dv."""
    lane, far = tl.arange(0, BLOCK_M), tl.cast(start, tl.int64)
    inside = start + lane < num_rows
    q = _load_rows(q_ptr + far * q_t, q_t, lane, inside, E)
    do = _load_rows(do_ptr + far * do_t, do_t, lane, inside, E)
    lse = tl.load(lse_ptr + start + lane, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + start + lane, mask=inside, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)  # (n, m)
    weight = tl.exp2(score - lse[None, :])
    if seen is not None:
        weight = tl.where(seen, weight, 0.0)
    dv = tl.dot(weight.to(do.dtype), do, dv, input_precision=PRECISION)
    d_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    d_score = (weight * (d_weight - delta[None, :])).to(q.dtype)
    dk = tl.dot(d_score, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _sees(query, key, offset, C: tl.constexpr):
    """chunk_attention.sees, on row numbers counted from the start of any chunk."""
    return (key <= query) & ((query // C == key // C) | (key % C == offset))


@triton.jit
def _load_rotated(ptr, stride, lane, inside, cos_ptr, sin_ptr, C: tl.constexpr, E: tl.constexpr):
    """_load_rows of a tile that starts a chunk, rotated and rounded as blocks.rotate does.

    The halves of a row are loaded apart: to split a loaded tile would take a trip through shared
    memory.
    """
    if cos_ptr is None:
        return _load_rows(ptr, stride, lane, inside, E)
    else:
        cos = _load_rows(cos_ptr, E // 2, lane % C, inside, E // 2)
        sin = _load_rows(sin_ptr, E // 2, lane % C, inside, E // 2)
        x1 = _load_rows(ptr, stride, lane, inside, E // 2)
        x2 = _load_rows(ptr + E // 2, stride, lane, inside, E // 2)
        y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
        if x1.dtype != tl.float32:
            # Outside all is 0 already. But a condition that no load gave keeps the compiler from
            # bringing four loads, instead of one result, into the layout of a product's operand:
            # 164 registers in _queries_kernel instead of 214. Float32 has no shared memory for it.
            y1 = tl.where(inside[:, None], y1, 0.0).to(x1.dtype)
            y2 = tl.where(inside[:, None], y2, 0.0).to(x1.dtype)
        return tl.reshape(tl.permute(tl.join(y1, y2), (0, 2, 1)), (lane.shape[0], E))


@triton.jit
def _store_rotated_back(
    ptr, stride, lane, inside, x, cos_ptr, sin_ptr, C: tl.constexpr, E: tl.constexpr
):
    """_store_rows of the gradient of what _load_rotated gave, as that of what it had loaded."""
    if cos_ptr is None:
        _store_rows(ptr, stride, lane, inside, x, E)
    else:
        cos = _load_rows(cos_ptr, E // 2, lane % C, inside, E // 2)
        sin = _load_rows(sin_ptr, E // 2, lane % C, inside, E // 2)
        x1, x2 = tl.split(tl.permute(tl.reshape(x, (lane.shape[0], 2, E // 2)), (0, 2, 1)))
        _store_rows(ptr, stride, lane, inside, x1 * cos + x2 * sin, E // 2)
        _store_rows(ptr + E // 2, stride, lane, inside, x2 * cos - x1 * sin, E // 2)


@triton.jit
def _load_rows(ptr, stride, lane, inside, E: tl.constexpr):
    """(lanes, E); 0 where not `inside`, which None leaves out."""
    ptr += lane[:, None] * stride + tl.arange(0, E)[None, :]
    if inside is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=inside[:, None], other=0.0)


@triton.jit
def _store_rows(ptr, stride, lane, inside, x, E: tl.constexpr):
    ptr += lane[:, None] * stride + tl.arange(0, E)[None, :]
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=inside[:, None])
