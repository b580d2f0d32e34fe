"""One update of AdamW with clipping inside, a launch a tensor.

Reference: torch.nn.utils.clip_grad_norm_, then torch.optim.AdamW. PyTorch's fused kernel, told to
divide gradients by `grad_scale`, writes them back: 32 bytes a weight where 28 are enough.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # weights of a program
WARPS = 8


@torch.no_grad()
def update_(optimizer: torch.optim.AdamW, scale: Tensor) -> None:
    """`optimizer.step()` by gradients divided by `scale`, a float32 scalar on the device.

    States are those of torch.optim.AdamW: a later step() goes on from them. Nothing here waits for
    the GPU. Raises ValueError for weights that are not contiguous or not in float32, and for
    settings that it does not know: amsgrad, maximize, a learning rate on the device, a beta of 0.
    """
    for group in optimizer.param_groups:
        plain = isinstance(group["lr"], float) and min(group["betas"]) > 0
        if group["amsgrad"] or group["maximize"] or not plain:
            told = {name: group[name] for name in ("lr", "betas", "amsgrad", "maximize")}
            raise ValueError(f"need plain AdamW with a float lr and betas above 0, got {told}.")
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        for p in params:
            if p.dtype != torch.float32 or not p.is_contiguous():
                raise ValueError(f"need contiguous float32, got {p.dtype} of strides {p.stride()}.")
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
        states = [optimizer.state[p] for p in params]
        torch._foreach_add_([state["step"] for state in states], 1)
        (beta1, beta2), lr = group["betas"], group["lr"]
        kept = 1 - lr * group["weight_decay"]
        for p, state in zip(params, states, strict=True):
            moments = state["exp_avg"], state["exp_avg_sq"]
            _adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
                p, p.grad.contiguous(), *moments, state["step"], scale, p.numel(), lr, kept,
                BETA1=beta1, BETA2=beta2, LOG1=math.log(beta1), LOG2=math.log(beta2),
                EPS=group["eps"], BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


@triton.jit
def _adamw_kernel(
    weight_ptr, grad_ptr, mean_ptr, square_ptr, step_ptr, scale_ptr, count, lr, kept,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    step = tl.load(step_ptr).to(tl.float64)  # 1 - beta^step of float32 is exact to 1e-4 only
    size = (lr / (1 - tl.exp(step * LOG1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(step * LOG2)).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside) / tl.load(scale_ptr)
    mean = BETA1 * tl.load(mean_ptr + at, mask=inside) + (1 - BETA1) * grad
    square = BETA2 * tl.load(square_ptr + at, mask=inside) + (1 - BETA2) * grad * grad
    weight = tl.load(weight_ptr + at, mask=inside) * kept
    weight -= size * mean / (tl.sqrt_rn(square) / root + EPS)
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
