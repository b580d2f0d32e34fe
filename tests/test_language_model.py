"""What the architectures share around their blocks: the memory budget of the compiler."""

import pytest
import torch
from torch._functorch import config as budget

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
