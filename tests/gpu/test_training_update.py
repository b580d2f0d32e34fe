"""The training step's update on CUDA: clipping inside the fused AdamW against clip_grad_norm_."""

import pytest
import torch

from cat_bench.architecture import build
from cat_bench.case import Case
from cat_bench.spec import parse
from cat_bench.suites import training

pytestmark = pytest.mark.gpu

DENSE = "dense:num_layers=2,vocab_size=96,width=128"


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_clipping_inside_the_optimizer_is_clip_grad_norm(factor: float) -> None:
    """Two updates by gradients below, at and above the bound, then a bare step by those left."""
    case = Case(
        "training", DENSE, batch_size=2, prompt_len=0, seq_len=24, dtype="float32", device="cuda"
    )
    step = training.Step(case, build(parse(DENSE), device="cuda"))
    known = build(parse(DENSE), device="cuda")
    known.load_state_dict(step.model.state_dict())
    optimizer = torch.optim.AdamW(
        known.parameters(), training.LEARNING_RATE, training.BETAS,
        weight_decay=training.WEIGHT_DECAY, fused=False,
    )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    pairs = list(zip(step.model.parameters(), known.parameters(), strict=True))
    count = sum(p.numel() for p in known.parameters())
    for size in (1.0, 5.0):
        for ours, theirs in pairs:
            noise = torch.randn(ours.shape, generator=generator, device="cuda")
            ours.grad = noise * (factor * size / count**0.5)
            theirs.grad = ours.grad.clone()
        step._update()
        torch.nn.utils.clip_grad_norm_(known.parameters(), training.CLIP)
        optimizer.step()
    step.optimizer.step()
    optimizer.step()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
