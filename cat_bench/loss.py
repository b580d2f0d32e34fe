"""Next-token loss without the logits: a linear head and cross entropy, some rows at a time.

The logits of 16,384 tokens over 50,432 words are 3.1 GiB in float32, and so is their gradient. Here
they exist for `chunk_tokens` rows at a time: each chunk's logits become its losses and at once its
share of both gradients, so the backward pass only scales what the forward pass has left behind.

    loss = linear_cross_entropy(hidden, head.weight, targets)       # = F.cross_entropy(logits, ...)

Targets are not shifted here: row t of `targets` is the token that row t of `hidden` predicts. The
loader shifts, once (cat_spec.md 2). A target of -100 counts nowhere. Any other one outside of the
vocabulary makes the loss nan with the implementation "triton"; the eager one raises, RuntimeError
or IndexError on a CPU, and fails an assertion on the device on a GPU.

Shapes: b batch, t tokens, n = b t rows, r rows of a chunk, d width, v vocabulary.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cat_bench.architecture import Tokens

Implementation = Literal["eager", "triton"]

IGNORE = -100  # as in F.cross_entropy
CHUNK_TOKENS = 8192  # at most: 0.8 GB of bfloat16 logits. The head's gradient adds up once a chunk


def next_token_loss(
    model: Any, tokens: Tokens, targets: Tokens, implementation: Implementation = "eager"
) -> Tensor:
    """The mean loss of an architecture on (b, t) tokens and their (b, t) next tokens.

    Chunked where the model has `hidden` and a head (`output_head`), else from all its logits.
    """
    head = output_head(model)
    if head is None:
        logits = model.forward(tokens)  # (b, t, v)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
    return linear_cross_entropy(
        model.hidden(tokens), head.weight, targets, implementation=implementation
    )


def output_head(model: Any) -> nn.Linear | None:
    """What reads `model.hidden(tokens)` (b, t, d): `model.head`, or CAT's `model.decoder.head`.

    None where a model has no such method (in a user's file `hidden` may be a width, or a layer), or
    a head that is more than one matrix.
    """
    hidden = getattr(model, "hidden", None)
    if isinstance(hidden, nn.Module) or not callable(hidden):
        return None
    owner = model if hasattr(model, "head") else getattr(model, "decoder", None)
    head = getattr(owner, "head", None)
    return head if isinstance(head, nn.Linear) and head.bias is None else None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    implementation: Implementation = "eager",
) -> Tensor:
    """Mean cross entropy of hidden (b, t, d) @ weight.T (v, d) with targets (b, t).

    A scalar, float32 at least. Under autocast the products are in its dtype; softmax and loss are
    float32, and the gradient of the weight adds up in the weight's own dtype. `chunk_tokens`: whose
    logits exist at a time; by default half of all, at most CHUNK_TOKENS. `implementation`:
    "eager" is the specification; "triton" does all between the matmuls in one pass, on a GPU.
    Once differentiable. Raises ValueError where shapes or dtypes do not fit, and for float16.
    """
    if implementation not in ("eager", "triton"):
        raise ValueError(f"implementation must be 'eager' or 'triton', got '{implementation}'.")
    if chunk_tokens is None:
        chunk_tokens = max(1, min(CHUNK_TOKENS, (targets.numel() + 1) // 2))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (b, t, d), weight (v, d) and targets (b, t) do not fit: got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}."
        )
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    if dtype == torch.float16:  # a share of 1 / n is below what it can hold, at any loss scale
        raise ValueError(
            "the gradient of a mean over many tokens underflows in float16: "
            "use bfloat16 or float32."
        )
    if implementation == "triton" and dtype == torch.float64:
        raise ValueError("implementation 'triton' computes in float32; float64 needs 'eager'.")
    with torch.autocast(device_type, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, targets.flatten().contiguous(), dtype, chunk_tokens,
            implementation, torch.is_grad_enabled(),
        )  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (n, d), weight (v, d), targets (n,) -> mean loss; gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        implementation: Implementation,
        is_grad_enabled: bool,
    ) -> Tensor:
        wants_hidden, wants_weight = (is_grad_enabled and w for w in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        wide = torch.promote_types(dtype, torch.float32)
        num_counted = (targets != IGNORE).sum()  # stays on the device
        share = 1 / num_counted.to(wide)  # of a row in the mean
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        matrix = weight.to(dtype)
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part = hidden[rows].to(dtype)  # (r, d)
            logits = part @ matrix.T  # (r, v)
            losses[rows] = _losses(
                logits, targets[rows], share, wants_hidden or wants_weight, implementation
            )
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ matrix
            if grad_weight is not None:
                grad_weight.add_(logits.T @ part)  # adds up in the weight's dtype, float32
            elif wants_weight:  # the first chunk: no zeros to fill and to add to
                grad_weight = (logits.T @ part).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _losses(
    logits: Tensor, targets: Tensor, share: Tensor, wants_grad: bool, implementation: Implementation
) -> Tensor:
    """Losses (r,) of logits (r, v), which become their own gradient where it is wanted."""
    if implementation == "eager":
        return losses_reference(logits, targets, share, wants_grad)
    from cat_bench import loss_kernels

    with torch.cuda.device_of(logits):
        return loss_kernels.losses(logits, targets, share, wants_grad)


def losses_reference(logits: Tensor, targets: Tensor, share: Tensor, wants_grad: bool) -> Tensor:
    """logits (r, v), targets (r,) -> losses (r,), 0 where ignored.

    With `wants_grad` the logits are overwritten: (softmax - one-hot) times `share`, a scalar.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != IGNORE
    picked = targets.where(counts, 0)[:, None]  # (r, 1)
    total = wide.logsumexp(dim=-1, keepdim=True)
    losses = (total - wide.gather(1, picked))[:, 0].where(counts, 0)
    if wants_grad:
        grad = wide.sub_(total).exp_()  # `wide` is `logits` itself in float32
        grad.scatter_add_(1, picked, -torch.ones_like(total))
        logits.copy_(grad.mul_(share.to(grad.dtype)).masked_fill_(~counts[:, None], 0))
    return losses
