"""Attention of many short sequences, in which every row sees all rows: CAT's compressor.

A chunk of C tokens is a sequence of C + 1 rows, and a text has thousands of them. General kernels
tile such a sequence with 64 or 128 rows, nearly all padding, and rotate, split and join heads in
launches of their own; here all that is one kernel forward and one backward (kernels.py).

Shapes: b sequences, t rows, h heads, e head width (64).
"""

import torch
from torch import Tensor

from cat_bench.blocks import HEAD_WIDTH, Block, Rope, attention, feed_forward, rotate

MAX_SHORT = 128  # rows: all of them lie in the registers of one program


def short_attention_reference(qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    """Every row sees all rows. qkv (b, t, 3 h e), not yet rotated; rope tables (t, e/2) fp32.

    Returns (b, t, h e).
    """
    q, k, v = qkv.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2).split(num_heads, dim=1)
    return attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)


@torch.library.custom_op("cat_bench::short_attention", mutates_args=())
def short_attention(qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The same on Triton, differentiable in qkv; t up to MAX_SHORT."""
    from cat_bench import kernels

    with torch.cuda.device_of(qkv):
        return kernels.short_attention(qkv.contiguous(), num_heads, (cos, sin))


@short_attention.register_fake
def _(qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], num_heads * HEAD_WIDTH)


@torch.library.custom_op("cat_bench::short_attention_backward", mutates_args=())
def short_attention_backward(
    do: Tensor, qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor
) -> Tensor:
    from cat_bench import kernels

    with torch.cuda.device_of(qkv):
        return kernels.short_attention_backward(
            do.contiguous(), qkv.contiguous(), num_heads, (cos, sin)
        )


@short_attention_backward.register_fake
def _(do: Tensor, qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, cos, sin = inputs
    ctx.save_for_backward(qkv, cos, sin)


def _gradients(ctx, do: Tensor):
    qkv, cos, sin = ctx.saved_tensors
    return short_attention_backward(do, qkv, ctx.num_heads, cos, sin), None, None, None


short_attention.register_autograd(_gradients, setup_context=_save)


def short_block(block: Block, x: Tensor, rope: Rope) -> Tensor:
    """`block(x, rope, attention)` with that attention, for training: x (b, t, d) -> (b, t, d)."""
    qkv = block.qkv(block.attn_norm(x))
    return feed_forward(block, x + block.attn_out(short_attention(qkv, block.num_heads, *rope)))
