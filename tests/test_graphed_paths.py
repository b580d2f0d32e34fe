"""Fast paths of attention on the references of their kernels: the decode path `cuda_graph`, and the
forward path `compile` of CAT. What stands between the kernels (rows, places, order, reset) needs no
GPU to be wrong.
"""

from functools import partial
from pathlib import Path
from unittest.mock import Mock

import contract
import pytest
import reference_kernels
import torch
from contract import Subject

from baselines import sparse
from cat_bench import cat, chunk_block, language_model
from cat_bench import chunk_attention as chunk_attention_module
from cat_bench.chunk_attention import chunk_attention

RETENTION = Path(__file__).parents[1] / "notebooks" / "retention.py"
SUBJECTS = [
    subject
    for name in ("cat", "dense", "sparse", "sliding_window")
    for subject in contract.subjects_of(name)
]


@pytest.fixture(autouse=True)
def on_references(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cat, language_model):
        reference_kernels.install(monkeypatch, module)
    strided = partial(chunk_attention, summary="last", implementation="two_part")
    monkeypatch.setattr(
        sparse, "fused_attention", lambda stride: partial(strided, chunk_size=stride)
    )


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)
@pytest.mark.parametrize("batch_size", [1, 3])  # one sequence has kernels of its own
@pytest.mark.parametrize("segments", [(1,), (4,), (3, 8), (17,)])
def test_graphed_step_equals_eager(
    subject: Subject, batch_size: int, segments: tuple[int, ...]
) -> None:
    reference_kernels.check_graphed_steps(subject, batch_size, segments)


def test_the_captured_step_of_the_example_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent state in plain PyTorch, as README's 'Add your architecture' has it."""
    (subject,) = contract.subjects_of(str(RETENTION))
    names = subject.model_class.init_state.__globals__  # of this very import of the file
    monkeypatch.setitem(names, "CapturedStep", reference_kernels.Uncaptured)
    reference_kernels.check_graphed_steps(subject, 3, (3, 8))


CATS = [s for s in SUBJECTS if s.label.startswith("cat")]


@pytest.mark.parametrize("subject", CATS, ids=lambda s: s.label)
def test_compiled_forward_equals_eager(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients, and which blocks rotate inside the kernels."""
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    monkeypatch.setattr(cat, "require_cuda", lambda *_: None)
    for module in (chunk_attention_module, chunk_block):
        monkeypatch.setattr(module, "check_fused", lambda *_: None)
    rotated_inside = Mock(wraps=chunk_block.chunk_block)
    monkeypatch.setattr(cat, "chunk_block", rotated_inside)
    eager, fast = subject.model(), subject.model(forward_path="compile")
    tokens = subject.tokens(2)
    logits = [model.forward(tokens) for model in (fast, eager)]
    contract.assert_same(*logits, "forward")
    for one in logits:
        one.square().mean().backward()
    for (name, got), expected in zip(fast.named_parameters(), eager.parameters(), strict=True):
        contract.assert_same(got.grad, expected.grad, f"gradient of {name}")
    c = subject.config
    plain = c.num_kv_heads is None and not c.qk_norm and c.rope == "restart"
    assert rotated_inside.call_count == (c.num_layers if plain else 0)


@pytest.mark.parametrize("subject", CATS, ids=lambda s: s.label)
@torch.no_grad()
def test_graphed_ragged_batches_equal_rows_alone(subject: Subject) -> None:
    eager, fast = subject.model(), subject.model(decode_path="cuda_graph")
    lengths = torch.tensor([1, 2, 3, 4, 7, 12])
    tokens = subject.tokens(6)
    padded = tokens[:, :12].masked_fill(torch.arange(12) >= lengths[:, None], 0)
    got = contract.ragged_decode(fast, tokens, padded, lengths, num_steps=9)
    positions = lengths[:, None] - 1 + torch.arange(10)
    alone = eager.forward(tokens)[torch.arange(6)[:, None], positions]
    contract.assert_same(got, alone, "ragged rows")
