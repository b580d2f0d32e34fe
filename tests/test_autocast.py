"""Sampling while training: float32 weights under bfloat16 autocast, in every architecture."""

import contract
import pytest
import torch
from contract import Subject

from cat_bench import spec

SUBJECTS = [contract.subjects_of(info.name)[0] for info in spec.architectures()]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)
def test_prefill_and_steps_run_under_autocast(subject: Subject) -> None:
    """The logits are those of float32, rounded."""
    model, tokens = subject.model("float32", std=0.05), subject.tokens(2)
    with torch.inference_mode():
        expected = model.forward(tokens)[:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model.prefill(tokens[:, :13], model.init_state(2, tokens.shape[1]))
            for token in tokens[:, 13:].unbind(1):
                logits, state = model.step(token, state)
    assert contract.relative_norm(logits.float(), expected) < 0.1
