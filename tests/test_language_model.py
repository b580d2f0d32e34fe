"""What the architectures share around their blocks: how they ask the compiler."""

from functools import partial

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounter
from torch._functorch import config as budget

from cat_bench.errors import UserError
from cat_bench.language_model import ForwardPath


def test_the_compiler_sees_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only while it may trace: afterwards the setting is as before."""
    seen = []

    def compile(run: object, dynamic: bool) -> object:
        return lambda x: seen.append(budget.activation_memory_budget)

    monkeypatch.setattr(torch, "compile", compile)
    before = budget.activation_memory_budget
    for memory_budget in (1.0, 0.5):
        path = ForwardPath()
        path.forward_path, path.memory_budget = "compile", memory_budget
        path.on_forward_path(torch.nn.Identity())(1)
    assert seen == [before, 0.5]
    assert budget.activation_memory_budget == before


def test_too_many_lengths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo alone would run the ninth eagerly, under the name of the compiled path."""
    compiler = CompileCounter()
    compile = partial(torch.compile, backend=compiler)
    monkeypatch.setattr(torch, "compile", compile)
    path = ForwardPath()
    path.forward_path = "compile"
    block = path.on_forward_path(lambda x: 2 * x)
    for length in range(10, 10 + dynamo.recompile_limit):
        block(torch.ones(length))
    assert compiler.frame_count == dynamo.recompile_limit
    with pytest.raises(UserError, match="was compiled 8 times in this process and would be"):
        block(torch.ones(9))
    assert block(torch.ones(10)).sum() == 20  # the compiled ones stay
    assert not dynamo.fail_on_recompile_limit_hit
