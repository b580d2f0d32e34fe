"""Triton kernels of linear layers for one row: a step of one sequence reads each weight once.

What stands before and after a matrix (norm, SwiGLU, residual) is done in the same launch, and on
Hopper GPUs a program loads its first weights while the kernel before it still runs: so that kernel
must not be the one that wrote them. References: graph.norm_linear, graph.norm_swiglu and
graph.add_linear_ of more rows, which are products.py's or cuBLAS's.

Shapes: d inputs, n outputs.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from cat_bench.graph import eps_of
from cat_bench.kernels import early_launch, gdc_release, gdc_wait


def linear(
    x: Tensor, weight: Tensor, norm: nn.RMSNorm | None = None, add_to: Tensor | None = None
) -> Tensor:
    """weight (n, d) times x (1, d) or RMSNorm(x), added to `add_to` (1, n) in place if given.

    All last dimensions and `weight` contiguous. Products and sums are float32. Returns (1, n) in
    x's dtype.
    """
    num_outputs, width = weight.shape
    out = x.new_empty(1, num_outputs) if add_to is None else add_to
    # The best of 13 tilings on an H100, or within 6 % of it: few outputs need small tiles, or some
    # multiprocessors get none.
    block_n, block_k = (4, 1024) if num_outputs <= 2048 else (16, 512)
    _linear_kernel[(triton.cdiv(num_outputs, block_n),)](
        x, x if norm is None else norm.weight, weight, out, num_outputs, width,
        0.0 if norm is None else eps_of(norm),
        NORM=norm is not None, ADD=add_to is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, **early_launch(),
    )  # fmt: skip
    return out


def swiglu(x: Tensor, norm: nn.RMSNorm, gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (2 n, d) times RMSNorm(x), x (1, d) -> (1, n). All contiguous."""
    num_outputs, width = len(gate_up) // 2, gate_up.shape[1]
    out = x.new_empty(1, num_outputs)
    _swiglu_kernel[(triton.cdiv(num_outputs, 8),)](
        x, norm.weight, gate_up, out, num_outputs, width, eps_of(norm),
        BLOCK_N=8, BLOCK_K=512, num_warps=4, **early_launch(),
    )  # fmt: skip
    return out


@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, weight_ptr, out_ptr, num_outputs, width, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs. Weights are asked for one tile ahead, the first before x is there."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = n < num_outputs
    weight_ptr += n.to(tl.int64) * width
    weight = _weights(weight_ptr, there, k, width)
    if EARLY:
        gdc_wait()
        gdc_release()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for low in tl.range(0, width, BLOCK_K):
        x = tl.load(x_ptr + low + k, mask=low + k < width, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + low + k, mask=low + k < width, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :]
        weight = _weights(weight_ptr, there, low + BLOCK_K + k, width)
    y = tl.sum(total, axis=1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares) / width + eps)
    if ADD:
        y += tl.load(out_ptr + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_kernel(
    x_ptr, norm_ptr, weight_ptr, out_ptr, num_outputs, width, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs, each of a row of the gate and the row `num_outputs` further down."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = n < num_outputs
    gate_ptr = weight_ptr + n.to(tl.int64) * width
    up_ptr = gate_ptr + num_outputs * width
    gate = _weights(gate_ptr, there, k, width)
    up = _weights(up_ptr, there, k, width)
    if EARLY:
        gdc_wait()
        gdc_release()
    gates = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for low in tl.range(0, width, BLOCK_K):
        x = tl.load(x_ptr + low + k, mask=low + k < width, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + low + k, mask=low + k < width, other=0.0).to(tl.float32)
        gates += gate.to(tl.float32) * x[None, :]
        ups += up.to(tl.float32) * x[None, :]
        gate = _weights(gate_ptr, there, low + BLOCK_K + k, width)
        up = _weights(up_ptr, there, low + BLOCK_K + k, width)
    scale = tl.rsqrt(tl.sum(squares) / width + eps)
    y = tl.sum(gates, axis=1) * scale
    y *= tl.sigmoid(y) * tl.sum(ups, axis=1) * scale
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _weights(row_ptr, there, k, width):
    """(n, k) of the rows at `row_ptr` (n,); zeros outside. Read once: the cache is for others."""
    inside = there[:, None] & (k < width)[None, :]
    return tl.load(
        row_ptr[:, None] + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
    )
