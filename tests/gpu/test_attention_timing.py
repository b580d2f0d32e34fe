"""The suite `attention` on a GPU: samples are graphs of up to ten calls."""

import pytest
import torch

from cat_bench.architecture import build
from cat_bench.case import Options
from cat_bench.spec import parse
from cat_bench.suites import attention

pytestmark = pytest.mark.gpu


def test_a_sample_is_that_many_calls() -> None:
    x = torch.zeros((), device="cuda")
    replay = attention.captured(lambda: x.add_(1), 10)
    x.zero_()
    for _ in range(3):
        replay()
    assert x == 30


@pytest.mark.parametrize("text", ["cat:chunk_size=16", "dense"])
def test_every_implementation_is_measured(text: str) -> None:
    """Also the gradients, which autograd launches from a thread of its own."""
    options = Options(device="cuda", seq_lens=(256,), batch_sizes=(2,), repeats=2)
    cases = attention.plan([parse(text)], options)
    assert len(cases) == (5 if text.startswith("cat") else 1)
    for case in cases:
        model = build(parse(case.arch), device="cuda", dtype=case.dtype)
        rows = {row.metric: row for row in attention.measure(case, model)}
        assert len(rows["forward_s"].samples) == 2
        assert rows["forward_backward_s"].value > rows["forward_s"].value > 0
        assert rows["peak_allocated_bytes"].value > 0
