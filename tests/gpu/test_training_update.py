"""The training step's update on CUDA: clipping inside AdamW against clip_grad_norm_ before it."""

import pytest
import torch
from clipping import check_clipping

from cat_bench.case import Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("forward_path", ["eager", "compile"])  # PyTorch's kernel, and ours
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_clipping_inside_the_optimizer_is_clip_grad_norm(factor: float, forward_path: str) -> None:
    if forward_path == "compile":
        pytest.importorskip("triton")
    arch = "dense:num_layers=2,vocab_size=96,width=128"
    case = Case(
        "training", arch, batch_size=2, prompt_len=0, seq_len=24, dtype="float32", device="cuda",
        forward_path=forward_path,
    )  # fmt: skip
    check_clipping(case, factor)


def test_weights_that_are_not_float32_are_refused() -> None:
    update = pytest.importorskip("cat_bench.adamw_kernel", reason="needs the package triton")
    weight = torch.nn.Parameter(torch.zeros(8, device="cuda", dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(ValueError, match="need contiguous float32, got torch.bfloat16"):
        update.update_(optimizer, torch.ones((), device="cuda"))
