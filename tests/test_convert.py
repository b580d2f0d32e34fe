"""`cat-bench convert` and `run --weights`: whole checkpoints or one sentence, never a part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_bench import checkpoint, cli, convert, planning
from cat_bench.architecture import build
from cat_bench.case import Case
from cat_bench.errors import UserError
from cat_bench.spec import Spec, parse
from cat_bench.worker import build_model

# Upstream calls everything "model." and ties the head to the embedding.
MINE = '''"""Dense, whose authors name tensors in their own way."""
from dataclasses import dataclass
from baselines import dense

@dataclass(frozen=True)
class Config(dense.Config):
    width: int = 64
    num_layers: int = 1
    vocab_size: int = 48

class Model(dense.Model):
    pass

def from_upstream(tensors):
    ours = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return ours | {"head.weight": tensors["model.embed.weight"]}

def to_upstream(tensors):
    return {f"model.{name}": tensor for name, tensor in tensors.items() if name != "head.weight"}
'''


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return parse(str(path))


@pytest.fixture
def upstream(tmp_path: Path, spec: Spec) -> Path:
    """A file of the authors, in bfloat16."""
    tensors = build(spec, dtype="bfloat16", seed=3).state_dict()
    del tensors["head.weight"]
    save_file(
        {f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    return tmp_path / "x.safetensors"


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_come_over_whole_and_go_back(tmp_path: Path, spec: Spec, upstream: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert.from_upstream(spec, upstream, ours) == len(load_file(upstream)) + 1
    model = checkpoint.load(ours, dtype="bfloat16")
    assert torch.equal(model.head.weight, load_file(upstream)["model.embed.weight"])
    convert.to_upstream(spec, ours, back)
    assert left_behind(back) == {checkpoint.WEIGHTS}  # no upstream_config, no config.json
    assert same(load_file(back / checkpoint.WEIGHTS), load_file(upstream))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_in_several_files_is_read_whole(
    tmp_path: Path, spec: Spec, upstream: Path
) -> None:
    folder, tensors = tmp_path / "sharded", load_file(upstream)
    folder.mkdir()
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    (folder / convert.INDEX).write_text(json.dumps({"weight_map": shards}))
    assert same(convert.read_tensors(folder), tensors)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="part-1.safetensors cannot be read"):
        convert.from_upstream(spec, folder, tmp_path / "ours")


def drop(name: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "said", "hint"),
    [
        (drop("model.embed.weight"), "lacks the tensor 'model.embed.weight'", "It holds"),
        (drop("model.norm.weight"), "gives no 'norm.weight'", "the sizes of these weights"),
        (
            lambda tensors: tensors.update({"model.embed.weight": torch.zeros(40, 64)}),
            r"'embed.weight' from .* has shape \(40, 64\), expected \(48, 64\)",
            "Set vocab_size=40 in the spec",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32)}),
            r"'norm.weight' from .* has shape \(32,\), expected \(64,\)",
            "the sizes of these weights",
        ),
        (
            lambda tensors: tensors.update({"model.more": torch.zeros(2)}),
            r"gives 'more' with shape \(2,\), which .* does not have",
            "the sizes of these weights",
        ),
    ],
)
def test_the_first_misfit_is_named_and_nothing_is_written(
    tmp_path: Path, spec: Spec, upstream: Path, edit: Callable[[dict], object], said: str, hint: str
) -> None:
    tensors = load_file(upstream)
    edit(tensors)
    save_file(tensors, upstream)
    before = left_behind(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        convert.from_upstream(spec, upstream, tmp_path / "ours")
    assert hint in error.value.hint
    assert left_behind(tmp_path) == before


def test_what_cannot_be_read_or_written_is_one_sentence(
    tmp_path: Path, spec: Spec, upstream: Path
) -> None:
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02}q")
    for source, said in (
        ("pickle.bin", "cannot be read as safetensors"),
        ("nowhere", "does not exist"),
        (".", "lacks model.safetensors and"),
    ):
        with pytest.raises(UserError, match=said) as error:
            convert.from_upstream(spec, tmp_path / source, tmp_path / "ours")
    assert f"holds {checkpoint.WEIGHTS} or {convert.INDEX}" in error.value.hint
    with pytest.raises(UserError, match="exists already"):
        convert.from_upstream(spec, upstream, tmp_path)
    with pytest.raises(UserError, match="dense has no map of upstream weights"):
        convert.from_upstream(parse("dense"), upstream, tmp_path / "ours")


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, spec: Spec, upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    before = left_behind(tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", stop)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        convert.from_upstream(spec, upstream, tmp_path / "ours")
    assert left_behind(tmp_path) == before


def test_the_way_back_wants_the_checkpoint_of_this_spec(
    tmp_path: Path, spec: Spec, upstream: Path
) -> None:
    convert.from_upstream(spec, upstream, tmp_path / "ours")
    other = parse(f"{spec.name}:num_layers=2")
    with pytest.raises(UserError, match="has num_layers=1, but .* means num_layers=2"):
        convert.to_upstream(other, tmp_path / "ours", tmp_path / "back")


def test_the_command_writes_and_refuses_with_exit_code_2(
    tmp_path: Path, spec: Spec, upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = ["cat-bench", "convert", spec.text, str(upstream), "-o", str(tmp_path / "ours")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("sys.excepthook", None)
    for code, said in ((0, "written: "), (2, "exists already")):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
        assert said in "".join(capsys.readouterr())


def test_a_bare_file_is_no_checkpoint_of_any_architecture(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors/config.json cannot be read") as error:
        convert.to_upstream(parse("mamba2"), tmp_path / "x.safetensors", tmp_path / "back")
    assert "a folder that cat-bench wrote" in error.value.hint


# --- the authors' config.json ---------------------------------------------------------------------

SIZES = "width=64,num_layers=2,vocab_size=48"
GDN = f"gated_deltanet:key_width=16,value_width=32,{SIZES}"
H1 = f"{GDN},hybrid=true,window=8"
MAMBA = f"mamba2:d_state=16,headdim=16,{SIZES}"


def theirs_of(text: str, folder: Path) -> Path:
    """A folder of the authors with weights of this spec."""
    spec = parse(text)
    checkpoint.save(folder / "first", spec, build(spec, seed=4))
    convert.to_upstream(spec, folder / "first", folder / "theirs")
    return folder / "theirs"


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("text", [GDN, H1, MAMBA])
def test_the_way_back_writes_a_config_that_is_read_again(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs, spec = theirs_of(text, tmp_path), parse(text)
    convert.from_upstream(spec, theirs, tmp_path / "ours")
    assert capsys.readouterr().err == ""
    tokens = torch.arange(9)[None]
    assert torch.equal(checkpoint.load(tmp_path / "ours")(tokens), build(spec, seed=4)(tokens))


@pytest.mark.parametrize(
    ("text", "changed", "said", "correct"),
    [
        (GDN, {"norm_eps": 1e-6}, "norm_eps=1e-06, but .* means norm_eps=1e-05", "norm_eps=1e-06"),
        (H1, {"norm_eps": 1e-6, "attn": {"layers": [1], "num_heads": 1, "window_size": 9}},
         "norm_eps=1e-06, window=9, but .* means norm_eps=1e-05, window=8", "window=9"),
        (H1, {"attn": None}, "hybrid=False, but .* means hybrid=True", "gated_deltanet:"),
        (GDN, {"num_heads": 4}, "num_heads=4, but .* means num_heads=None", "num_heads=4"),
        (MAMBA, {"d_model": 128, "vocab_size": 50}, "width=128, vocab_size=50", "width=128"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_with_the_spec_to_use(
    tmp_path: Path, text: str, changed: dict, said: str, correct: str
) -> None:
    theirs = theirs_of(text, tmp_path)
    change(theirs / "config.json", **changed)
    for source in (theirs, theirs / "model.safetensors"):
        with pytest.raises(UserError, match=f"means .*{said}") as error:
            convert.from_upstream(parse(text), source, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
    corrected = error.value.hint.removeprefix("Use the spec ")
    assert correct in corrected
    if changed.keys() <= {"norm_eps", "attn"} and changed.get("attn", {}) is not None:
        convert.from_upstream(parse(corrected), theirs, tmp_path / "ours")  # same shapes


@pytest.mark.parametrize(
    ("text", "changed", "said"),
    [
        (GDN, {"allow_neg_eigval": True}, "allow_neg_eigval=True, but ours has False built in"),
        (MAMBA, {"ssm_cfg": {"layer": "Mamba2", "ngroups": 2}}, "ngroups=2, but ours has 1"),
        (MAMBA, {"ssm_cfg": 3}, ""),
        (GDN, {"model_type": "gla"}, "model_type='gla'"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused(
    tmp_path: Path, text: str, changed: dict, said: str
) -> None:
    theirs = theirs_of(text, tmp_path)
    change(theirs / "config.json", **changed)
    with pytest.raises(UserError, match=f"config.json does not fit .*{said}"):
        convert.from_upstream(parse(text), theirs, tmp_path / "ours")
    (theirs / "config.json").write_text("[3]")
    with pytest.raises(UserError, match="config.json holds list, expected an object"):
        convert.from_upstream(parse(text), theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    ("text", "unseen"),
    [(GDN, "norm_eps, allow_neg_eigval, "), (MAMBA, "d_state, ngroups, norm_before_gate")],
)
def test_without_their_config_a_warning_says_what_was_not_checked(
    tmp_path: Path, text: str, unseen: str, capsys: pytest.CaptureFixture
) -> None:
    theirs = theirs_of(text, tmp_path)
    (theirs / "config.json").unlink()
    convert.from_upstream(parse(text), theirs, tmp_path / "ours")
    warned = capsys.readouterr().err
    assert warned.startswith(f"warning: no {theirs / 'config.json'}, so these settings")
    assert f"not checked: {unseen}" in warned


def test_without_a_reader_of_it_a_warning_says_so(
    tmp_path: Path, spec: Spec, upstream: Path, capsys: pytest.CaptureFixture
) -> None:
    convert.from_upstream(spec, upstream, tmp_path / "ours")
    assert "exports no settings_from_upstream: only names and" in capsys.readouterr().err


def test_settings_that_they_do_not_have_stay_here(tmp_path: Path) -> None:
    spec = parse(f"{MAMBA},norm_eps=1e-6")
    checkpoint.save(tmp_path / "first", spec, build(spec))
    with pytest.raises(UserError, match="no counterpart upstream: .* norm_eps 1e-05 built in"):
        convert.to_upstream(spec, tmp_path / "first", tmp_path / "theirs")


def test_weights_of_another_family_are_refused_by_name(tmp_path: Path) -> None:
    theirs = theirs_of(MAMBA, tmp_path)
    with pytest.raises(UserError, match="called 'backbone.embedding.weight'; expected"):
        convert.from_upstream(parse(GDN), theirs, tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers_are_refused(
    tmp_path: Path, spec: Spec, upstream: Path, dtype: torch.dtype
) -> None:
    save_file({name: t.to(dtype) for name, t in load_file(upstream).items()}, upstream)
    with pytest.raises(UserError, match=f"has dtype {str(dtype)[6:]}, expected one of float16"):
        convert.from_upstream(spec, upstream, tmp_path / "ours")
    assert left_behind(tmp_path) == {"mine.py", "x.safetensors"}


def test_weights_that_are_not_finite_get_a_warning(
    tmp_path: Path, spec: Spec, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(upstream)
    convert.from_upstream(spec, upstream, tmp_path / "whole")
    assert "nan or inf" not in capsys.readouterr().err
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, upstream)
    convert.from_upstream(spec, upstream, tmp_path / "ours")
    said = f"has nan or inf in 1 of {len(tensors) + 1} tensors, first 'norm.weight'"
    assert said in capsys.readouterr().err
    convert.to_upstream(spec, tmp_path / "ours", tmp_path / "theirs")
    assert "first 'model.norm.weight'" in capsys.readouterr().err


# --- run --weights --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, spec: Spec) -> Path:
    checkpoint.save(tmp_path / "model", spec, build(spec, seed=5))
    return tmp_path / "model"


def planned(spec: Spec, folder: Path, **settings: str) -> Case:
    plain = Case("efficiency", spec.text, 1, 8, 16, "float32", "cpu")
    reference = Case(
        "efficiency", "dense", 16, 8, 1024, "float32", "cpu", settings=(("reference", "0"),)
    )
    case, untouched = planning.with_weights([plain, reference], folder)
    assert untouched == reference and case.key != plain.key
    return case


def test_a_case_with_weights_is_built_from_its_folder(spec: Spec, folder: Path) -> None:
    case = planned(spec, folder)
    assert case.weights == checkpoint.digest(folder)
    assert dict(case.settings) == {"weights": str(folder)}
    tokens = torch.arange(9)[None]
    assert torch.equal(build_model(case)(tokens), checkpoint.load(folder)(tokens))


def test_other_weights_than_planned_are_refused(spec: Spec, folder: Path) -> None:
    case = planned(spec, folder)
    checkpoint.save(folder, spec, build(spec, seed=6))
    with pytest.raises(UserError, match="but the case was planned with sha256:"):
        build_model(case)


def test_weights_of_another_config_are_refused_in_the_plan(spec: Spec, folder: Path) -> None:
    wider = parse(f"{spec.name}:width=128")
    with pytest.raises(UserError, match="has width=64, but .* means width=128") as error:
        planned(wider, folder)
    assert error.value.hint == f"Use the spec {spec.name}"  # 64 is its default
    with pytest.raises(UserError, match="holds weights of .*mine.py, got the spec dense"):
        planned(parse("dense"), folder)
    with pytest.raises(UserError, match="config.json cannot be read"):
        planned(spec, folder.parent / "nowhere")


def test_all_settings_that_do_not_fit_are_told_at_once_with_the_spec_to_use(
    spec: Spec, folder: Path
) -> None:
    other = parse(f"{spec.name}:width=128,vocab_size=96")
    with pytest.raises(UserError, match="has width=64, vocab_size=48, but .* width=128, vocab"):
        planned(other, folder)
    dense = parse("dense:width=128,num_layers=1,vocab_size=96")
    checkpoint.save(folder.parent / "dense", dense, build(dense))
    for asked in ("dense", "cat-8"):
        with pytest.raises(UserError) as error:
            planned(parse(asked), folder.parent / "dense")
        assert error.value.hint.endswith(f"Use the spec {dense.text}")


def test_weights_that_are_not_whole_are_refused_in_the_plan(spec: Spec, folder: Path) -> None:
    path = folder / checkpoint.WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors cannot be read as safetensors"):
        planned(spec, folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    norm = tensors.pop("norm.weight")
    for others, said in (
        ({}, r"has no 'norm.weight', but .* has 'norm.weight' with shape \(64,\)"),
        ({"norm.weight": norm[:32].clone()}, r"has 'norm.weight' with shape \(32,\), but"),
        ({"norm.weight": norm, "more": norm.clone()}, r"has 'more' with shape .* has no 'more'"),
    ):
        save_file(tensors | others, path)
        with pytest.raises(UserError, match=said):
            planned(spec, folder)


def test_a_folder_of_the_authors_goes_through_convert_first(spec: Spec, upstream: Path) -> None:
    folder = upstream.parent / "theirs"
    folder.mkdir()
    upstream.rename(folder / checkpoint.WEIGHTS)
    for config in (None, '{"model_type": "mine"}'):
        if config:
            (folder / checkpoint.CONFIG).write_text(config)
        with pytest.raises(UserError) as error:
            planned(spec, folder)
        assert "cat-bench convert SPEC FOLDER -o NEW" in error.value.hint
