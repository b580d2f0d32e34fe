"""The Triton kernel of loss.py: logits -> losses, and the logits' gradient in their place.

Reference: loss.losses_reference. A row is read twice and written once, the second time from the
cache; in plain PyTorch it is read and written about six times, in float32.

Shapes: r rows, v vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_bench.loss import IGNORE

MAX_BLOCK = 16_384  # words a tile
WARPS = 16


def losses(logits: Tensor, targets: Tensor, share: Tensor, wants_grad: bool) -> Tensor:
    """logits (r, v) float32 or bfloat16, rows contiguous; targets (r,) -> losses (r,) float32.

    With `wants_grad` the logits are overwritten: (softmax - one-hot) times `share`, a scalar.
    """
    num_rows, num_words = logits.shape
    found = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(num_words))
    _losses_kernel[(num_rows,)](
        logits, targets, share, found, logits.stride(0), num_words,
        GRAD=wants_grad, IGNORED=IGNORE, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return found


@triton.jit
def _losses_kernel(
    logits_ptr, targets_ptr, share_ptr, losses_ptr, row_stride, num_words,
    GRAD: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: an online log-sum-exp in float32, then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    word = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    best = -float("inf")
    total = 0.0
    for start in range(0, num_words, BLOCK):
        inside = start + word < num_words
        x = tl.load(logits_ptr + start + word, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(best, tl.max(x, axis=0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), axis=0)
        best = higher
    total = best + tl.log(total)
    known = (target >= 0) & (target < num_words)  # another target must not read elsewhere: nan
    picked = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    counts = target != IGNORED
    tl.store(losses_ptr + row, tl.where(counts, total - picked, 0.0))
    if GRAD:
        share = tl.where(counts, tl.load(share_ptr), 0.0)
        tl.debug_barrier()  # `picked` is read by all before any of them overwrites it
        for start in range(0, num_words, BLOCK):
            inside = start + word < num_words
            x = tl.load(logits_ptr + start + word, mask=inside, other=-float("inf"))
            hit = (start + word == target).to(tl.float32)
            grad = (tl.exp(x.to(tl.float32) - total) - hit) * share
            tl.store(logits_ptr + start + word, grad.to(logits_ptr.dtype.element_ty), mask=inside)
