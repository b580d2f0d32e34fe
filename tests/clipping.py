"""The clipping of a training step against PyTorch's own, for tests on a CPU and on a GPU."""

import torch

from cat_bench.architecture import build
from cat_bench.case import Case
from cat_bench.spec import parse
from cat_bench.suites import training


def check_clipping(case: Case, factor: float) -> None:
    """Two updates by gradients below, at and above the bound, and a parameter without one.

    Then a bare step by new gradients: nothing of the clipping may stay behind.
    """
    ours, theirs = (build(parse(case.arch), device=case.device, dtype=case.dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    step = training.Step(case, ours)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), training.LEARNING_RATE, training.BETAS,
        weight_decay=training.WEIGHT_DECAY, fused=False,
    )  # fmt: skip
    generator = torch.Generator(case.device).manual_seed(0)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    count = sum(p.numel() for p in theirs.parameters())

    def set_gradients(scale: float) -> None:
        for p, q in pairs[1:]:
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
            p.grad = noise * scale
            q.grad = p.grad.clone()

    for size in (1.0, 5.0):
        set_gradients(factor * size / count**0.5)
        step._update()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), training.CLIP)
        optimizer.step()
    set_gradients(factor / count**0.5)
    step.optimizer.step()
    optimizer.step()
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
