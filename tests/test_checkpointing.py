"""`checkpoint_blocks`: the same gradients from fewer saved bytes, and no model that ignores it."""

from pathlib import Path

import contract
import pytest
import torch
from contract import Subject
from torch import Tensor

from baselines import dense
from cat_bench import spec
from cat_bench.case import Case
from cat_bench.errors import UserError
from cat_bench.loss import next_token_loss
from cat_bench.suites import training

RETENTION = Path(__file__).parents[1] / "notebooks" / "retention.py"
NAMES = [*(info.name for info in spec.architectures()), str(RETENTION)]
SUBJECTS = [subject for name in NAMES for subject in contract.subjects_of(name)]
DENSE = dense.Config(width=64, num_layers=2, vocab_size=97)


def trained(subject: Subject, checkpoint_blocks: bool) -> tuple[dict[str, Tensor], int, int]:
    """Gradients by name, bytes saved for backward beside the weights, and calls wrapped."""
    model, tokens = subject.model(), subject.tokens(2)
    model.checkpoint_blocks = checkpoint_blocks
    kept: list[Tensor] = []  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
    weights = contract.storages(list(model.parameters()))
    saved = sum(n for at, n in contract.storages(kept).items() if at not in weights)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, saved, model.num_checkpointed


def test_every_architecture_is_here() -> None:
    folder = Path(dense.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files | {"cat", str(RETENTION)} <= set(NAMES)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: Path(subject.label).stem)
def test_checkpointing_keeps_the_gradients_and_fewer_bytes(subject: Subject) -> None:
    expected, saved, wrapped = trained(subject, checkpoint_blocks=False)
    gradients, saved_less, wrapped_more = trained(subject, checkpoint_blocks=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)
    assert saved_less < saved / 2
    assert wrapped == 0 and wrapped_more >= subject.config.num_layers


class Deaf(dense.Model):
    """Has `checkpoint_blocks`, as every LanguageModel, and a `hidden` that does not ask for it."""

    def on_forward_path(self, run):
        return run


CASE = Case(
    "training", "dense:num_layers=2,vocab_size=97,width=64", batch_size=2, prompt_len=0,
    seq_len=24, dtype="float32", device="cpu", scale="smoke", settings=(("checkpoint", "true"),),
)  # fmt: skip


def test_a_model_that_ignores_checkpointing_is_refused() -> None:
    """At its first step: no time is measured."""
    rows = []
    with pytest.raises(UserError, match="ignores activation checkpointing") as error:
        for row in training.measure(CASE, Deaf(DENSE)):
            rows.append(row.metric)
    assert "self.checkpointed(block)" in error.value.hint
    assert "weights_bytes" in rows and not {"compile_s", "train_step_s"} & set(rows)


def test_a_model_that_follows_it_trains() -> None:
    rows = {row.metric for row in training.measure(CASE, dense.Model(DENSE))}
    assert "train_step_s" in rows
