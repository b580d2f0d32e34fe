"""The training step's update on CUDA: clipping inside the fused AdamW against clip_grad_norm_."""

import pytest
from clipping import check_clipping

from cat_bench.case import Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_clipping_inside_the_optimizer_is_clip_grad_norm(factor: float) -> None:
    arch = "dense:num_layers=2,vocab_size=96,width=128"
    case = Case(
        "training", arch, batch_size=2, prompt_len=0, seq_len=24, dtype="float32", device="cuda"
    )
    check_clipping(case, factor)
