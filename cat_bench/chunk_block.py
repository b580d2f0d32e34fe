"""A decoder block on chunk attention, for training: rotation and head layout inside the kernels.

`chunk_attention` takes rotated q, k and v; made from a projection by PyTorch, these and their
gradients are written to memory and read again. Here the kernels (chunk_kernels.py) read the
projection itself, rotate what they load, and write its gradient into one buffer.

Shapes: b batch, t rows, d width, h heads, e head width.
"""

import torch
from torch import Tensor

from cat_bench.blocks import Block, Rope, feed_forward, rotate
from cat_bench.chunk_attention import check_fused, chunk_attention, whole


def chunk_block(block: Block, x: Tensor, rope: Rope, chunk_size: int) -> Tensor:
    """`block(x, rope, attend)` on chunk attention with summary="first", for training on CUDA.

    x (b, t, d) -> (b, t, d). `rope` as in packed_reference. Raises ValueError as "fused" does, and
    for a block with q_norm or fewer key-value heads than heads.
    """
    if block.q_norm is not None or block.num_kv_heads != block.num_heads:
        raise ValueError("chunk_block takes no q_norm and one key-value head for every head.")
    qkv = block.qkv(block.attn_norm(x))
    check_fused(_split(qkv, block.num_heads)[0], chunk_size)
    o, _ = packed(qkv, *rope, block.num_heads, chunk_size)
    return feed_forward(block, x + block.attn_out(o))


def packed_reference(qkv: Tensor, rope: Rope, num_heads: int, chunk_size: int) -> Tensor:
    """Chunk attention, summary="first", of a projection as it is: (b, t, 3 h e) -> (b, t, h e).

    Rope tables (t, e/2) of ids that start again from 0 in every chunk.
    """
    q, k, v = _split(qkv, num_heads)
    q, k = rotate(q, rope), rotate(k, rope)
    o = chunk_attention(q, k, v, chunk_size, implementation="eager")
    return o.transpose(1, 2).flatten(2)


@torch.library.custom_op("cat_bench::packed_chunk_attention", mutates_args=())
def packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The same on the kernels, and log2 of the sums of exponentials, (b, h, t) float32.

    So neither the rotated rows nor their gradients exist in memory. Arguments are not checked.
    """
    from cat_bench.chunk_kernels import forward

    o, lse = _packed_outputs(qkv, num_heads)
    q, k, v = (whole(x) for x in _split(qkv, num_heads))
    with torch.cuda.device_of(qkv):
        forward(q, k, v, _by_head(o, num_heads), lse, chunk_size, 0, (cos, sin))
    return o, lse


@packed.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return _packed_outputs(qkv, num_heads)


@torch.library.custom_op("cat_bench::packed_chunk_attention_backward", mutates_args=())
def packed_backward(
    do: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, o: Tensor, lse: Tensor,
    num_heads: int, chunk_size: int,
) -> Tensor:  # fmt: skip
    """The gradient of qkv, written by the kernels where it lies."""
    from cat_bench.chunk_kernels import backward

    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    do, o = whole(_by_head(do, num_heads)), _by_head(o, num_heads)
    q, k, v = (whole(x) for x in _split(qkv, num_heads))
    dq, dk, dv = _split(d_qkv, num_heads)
    with torch.cuda.device_of(qkv):
        backward(do, q, k, v, o, lse, delta, dq, dk, dv, chunk_size, 0, (cos, sin))
    return d_qkv


@packed_backward.register_fake
def _(
    do: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, o: Tensor, lse: Tensor,
    num_heads: int, chunk_size: int,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_packed(ctx, inputs, output) -> None:
    qkv, cos, sin, ctx.num_heads, ctx.chunk_size = inputs
    ctx.save_for_backward(qkv, cos, sin, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse


def _packed_gradients(ctx, do: Tensor, _):
    d_qkv = packed_backward(do, *ctx.saved_tensors, ctx.num_heads, ctx.chunk_size)
    return d_qkv, None, None, None, None


packed.register_autograd(_packed_gradients, setup_context=_save_packed)


def _packed_outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    b, t, width = qkv.shape
    lse = torch.empty(b, num_heads, t, dtype=torch.float32, device=qkv.device)
    return qkv.new_empty(b, t, width // 3), lse


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(b, t, 3 h e) -> views of q, k and v, (b, h, t, e) each."""
    return _by_head(qkv, 3 * num_heads).split(num_heads, dim=1)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(b, t, h e) -> (b, h, t, e), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
