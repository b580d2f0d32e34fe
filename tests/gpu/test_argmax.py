"""The kernel of `generate.choose` takes what torch.argmax takes."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size, width", [(1, 2), (3, 1000), (2, 8192), (5, 50_432)])
def test_argmax(batch_size: int, width: int, dtype: torch.dtype) -> None:
    from cat_bench import kernels

    torch.manual_seed(width)
    logits = torch.randn(batch_size, width, device="cuda").to(dtype)
    logits[-1] = -torch.inf  # all equal
    logits[0, width // 2 :] = 9.0  # of equals the first counts
    expected = logits.argmax(-1)
    assert expected[0] == width // 2
    tokens = torch.full((batch_size, 4), -1, device="cuda")  # a column of it is not contiguous
    kernels.argmax(logits, tokens[:, 2])
    assert torch.equal(tokens[:, 2], expected)
    assert (tokens[:, [0, 1, 3]] == -1).all()
    logits[0, width - 1] = torch.nan
    kernels.argmax(logits, tokens[:, 2])
    assert tokens[0, 2] == width - 1 == logits[0].argmax()
