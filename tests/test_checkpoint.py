"""A checkpoint says what its weights mean, or it is refused (cat_spec.md 1.4, pitfall 4)."""

import json
from pathlib import Path

import pytest
import torch

from cat_bench import checkpoint
from cat_bench.architecture import build
from cat_bench.errors import UserError
from cat_bench.spec import parse

SPEC = parse("cat:chunk_size=3,width=64,num_layers=1,vocab_size=31,max_len=12,rope=growing")
TOKENS = torch.arange(10)[None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", SPEC, build(SPEC, seed=1))
    return tmp_path / "model"


def change(folder: Path, edit) -> None:
    path = folder / checkpoint.CONFIG
    meaning = json.loads(path.read_text())
    edit(meaning)
    path.write_text(json.dumps(meaning))


def test_what_is_saved_is_loaded_with_its_rope_rule(saved: Path) -> None:
    model = checkpoint.load(saved)
    assert model.config.rope == "growing"
    assert torch.equal(model(TOKENS), build(SPEC, seed=1)(TOKENS))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m["config"].pop("rope"), r"lacks \['rope'\]"),
        (lambda m: m["config"].update(colour=1), r"unknown \['colour'\]"),
        (lambda m: m["config"].update(rope="sideways"), "rope must be"),
        (lambda m: m["config"].update(width=128), "cannot be loaded"),
        (lambda m: m.update(layout_version=0), "layout version 0"),
        (lambda m: m.pop("config"), "lacks config"),
        (lambda m: m.update(config=3), "expected an object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved: Path, edit, reason: str) -> None:
    change(saved, edit)
    with pytest.raises(UserError, match=reason):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", [b"3", b"{", b"\xff\xfe"])
def test_a_config_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / checkpoint.CONFIG).write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        checkpoint.load(saved)


def test_bare_tensors_are_refused(saved: Path) -> None:
    (saved / checkpoint.CONFIG).unlink()
    with pytest.raises(UserError, match="Tensors alone do not tell every setting"):
        checkpoint.load(saved)


def test_an_interrupted_save_never_pairs_new_weights_with_an_old_config(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_stop(tensors, path) -> None:
        original(tensors, path)
        raise KeyboardInterrupt

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", write_and_stop)
    other = parse("cat:chunk_size=3,width=64,num_layers=1,vocab_size=31,max_len=12")
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, other, build(other))
    with pytest.raises(UserError):
        checkpoint.load(saved)
