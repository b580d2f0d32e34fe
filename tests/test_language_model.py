"""What the architectures share around their blocks: checkpointing, and the memory budget."""

import contract
import pytest
import torch
from contract import Subject
from torch._functorch import config as budget

from cat_bench.language_model import ForwardPath

SUBJECTS = [s for s in contract.subjects() if hasattr(s.model_class, "checkpoint_blocks")]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)
def test_checkpointing_keeps_gradients_and_fewer_activations(subject: Subject) -> None:
    tokens = subject.tokens(2)
    gradients, saved = [], []
    for checkpoint_blocks in (False, True):
        model = subject.model()
        model.checkpoint_blocks = checkpoint_blocks
        kept = []

        def keep(tensor: torch.Tensor, kept: list = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens).square().mean()
        saved.append(sum(kept))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert saved[1] < saved[0] / 2


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
