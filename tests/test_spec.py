"""Specs: text in, canonical text out, clear sentences for bad text, files found unimported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_bench import spec, syntax
from cat_bench.errors import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "spec_architecture.py"
MINE = FIXTURE.read_text()


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        spec.parse(text)
    return str(caught.value)


def test_defaults_are_dropped_and_keys_sorted():
    assert spec.parse("dense:width=2048,num_layers=6").text == "dense:num_layers=6,width=2048"
    assert spec.parse("dense:width=1024").text == "dense"
    assert spec.parse("dense:").text == "dense"


def test_a_preset_is_its_file_with_settings():
    assert spec.parse("dense-2d").text == "dense:width=2048"
    assert spec.parse("cat-16").text == "cat:chunk_size=16"
    assert spec.parse("cat-16:max_len=4096").text == "cat:chunk_size=16,max_len=4096"
    assert spec.parse("dense-2d:width=1024").text == "dense"  # a setting beats the preset


def test_every_preset_parses_and_every_text_is_canonical():
    for info in spec.architectures():
        for name in [info.name, *info.presets]:
            parsed = spec.parse(name)
            assert spec.parse(parsed.text) == parsed


# Names to type for the models of cat_spec.md 1.7, by scale: FineWeb-Edu, WikiText-103, MQAR.
SCALES = {
    "fineweb": (
        "dense dense-2d cat-4 cat-8 cat-16 cat-32 cat-4-q cat-8-q cat-16-q cat-32-q cat-1x "
        "cat-1x-q sparse-2d swa swa-512 swa-64 based mamba2 gdn gdn-h1"
    ),
    "wikitext": (
        "dense-wikitext sparse-wikitext swa-wikitext based-wikitext based-2x mamba2-wikitext "
        "cat-8-wikitext cat-16-wikitext cat-32-wikitext cat-64-wikitext"
    ),
    "mqar": "dense-mqar sparse-mqar swa-mqar cat-mqar",
}
SHARED = {  # what all models of a scale have in common there
    "fineweb": {"width": (1024, 2048), "vocab_size": (50_432,)},
    "wikitext": {"width": (768,), "vocab_size": (32_000,)},
    "mqar": {"width": (64,), "vocab_size": (8192,), "num_layers": (2,)},
}


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_of_the_specification_has_a_name(scale: str):
    for name in SCALES[scale].split():
        parsed = spec.parse(name)
        defaults = {key: field.default for key, field in spec.describe(parsed.name).fields.items()}
        settings = defaults | parsed.overrides
        for key, allowed in SHARED[scale].items():
            assert settings[key] in allowed, name


def test_all_types_are_read(mine: str):
    parsed = spec.parse(f"{mine}:ratio=1e-3,rule=absolute,window=256,gated=TRUE,note=hello,width=8")
    assert parsed.overrides == {
        "gated": True,
        "note": "hello",
        "ratio": 0.001,
        "rule": "absolute",
        "width": 8,
        "window": 256,
    }
    assert spec.parse(f"{mine}:window=none,gated=false,width=64,ratio=.5") == spec.Spec(mine)


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_values_survive_the_trip_through_text(width: int, ratio: float, gated: bool):
    parsed = spec.parse(f"{FIXTURE}:width={width},ratio={ratio!r},gated={gated}")
    assert spec.parse(parsed.text) == parsed
    assert parsed.overrides.get("width", 64) == width
    assert parsed.overrides.get("ratio", 0.5) == ratio
    assert parsed.overrides.get("gated", False) is gated


def test_unknown_architecture_names_near_and_available_ones():
    message = refusal("dens")
    assert message.startswith("unknown architecture 'dens'. Did you mean: dense")
    assert re.search(r"Available: (\w+, )*cat, dense, ", message)
    assert "Your own: --arch path/to/file.py" in message
    assert "Did you mean: cat-8" in refusal("cat8")


def test_unknown_key_names_near_ones_and_all():
    message = refusal("cat:chunksize=8")
    assert "cat has no setting 'chunksize'. Did you mean: chunk_size?" in message
    assert "Its settings: " in message and "max_len" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("width=eight", "width='eight' is not an integer"),
        ("width=8.0", "width='8.0' is not an integer"),
        ("ratio=nan", "ratio='nan' is not a finite number"),
        ("gated=1", "gated='1' is not true or false"),
        ("rule=other", "rule='other' is not one of 'restart', 'absolute'"),
        ("window=wide", "window='wide' is not an integer or None"),
        ("width", "'width' is not of the form key=value"),
        ("width=", "'width=' is not of the form key=value"),
        ("width=1,width=2", "'width' is given twice"),
    ],
)
def test_bad_settings_get_one_clear_sentence(mine: str, settings: str, expected: str):
    assert expected in refusal(f"{mine}:{settings}")


def test_a_missing_file_and_a_broken_file_are_explained(tmp_path: Path):
    assert "no architecture file at" in refusal(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("class Config(:\n")
    assert "is not valid Python" in refusal(str(broken))


def test_an_edited_file_is_read_again(mine: str):
    assert spec.parse(f"{mine}:width=64").text == mine
    Path(mine).write_text(MINE.replace("WIDTH = 64", "WIDTH = 6_400"))
    assert spec.parse(f"{mine}:width=64").text == f"{mine}:width=64"


def test_the_directory_is_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "notes.py").write_text('"""No architecture."""\n')
    (tmp_path / "_private.py").write_text(MINE)
    monkeypatch.setattr(spec, "BASELINES", tmp_path)
    found = {info.name: info for info in spec.architectures()}
    assert list(found) == ["cat", "mine"]
    info = found["mine"]
    assert (
        info.summary
        == "A file that looks like an architecture; read by test_spec.py, never imported"
    )
    assert info.decode_paths == ("eager", "upstream")
    assert "kind" not in info.fields and info.fields["width"] == ("int", 64)
    assert info.lacking("decode", "upstream") == ("a_package_that_is_not_installed",)
    assert info.lacking("decode", "eager") == ()
    assert spec.parse("mine-wide").text == "mine:width=128"


@pytest.mark.parametrize(
    ("presets", "said"),
    [
        ('dict(mine_wide={"width": 2})', "PRESETS is not a literal dict."),
        ('{"wide": {"witdh": 2}}', "'wide' sets 'witdh', which its Config does not have. Did you"),
        ('{"wide": 2}', "the preset 'wide' is 2."),
        ('{8: {"width": 2}}', "the preset 8 has a name that no -a can give."),
        ('{"": {"width": 2}}', "the preset '' has a name"),
        ('{"wide:2": {"width": 2}}', "the preset 'wide:2' has a name"),
        ('{"a,b": {"width": 2}}', "the preset 'a,b' has a name"),
        ('{" wide": {"width": 2}}', "the preset ' wide' has a name"),
        ('{"wide.py": {"width": 2}}', "the preset 'wide.py' has a name"),
    ],
)
def test_presets_are_checked_where_they_are_read(tmp_path: Path, presets: str, said: str):
    path = tmp_path / "mine.py"
    path.write_text(re.sub(r"(?m)^PRESETS = .*", f"PRESETS = {presets}", MINE))
    with pytest.raises(UserError) as error:
        spec.parse(str(path))
    assert said in error.value.message and str(path) in error.value.message


@pytest.mark.parametrize("name", ["cat", "cat-8", "mine"])
def test_a_preset_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    (tmp_path / "mine.py").write_text(MINE.replace('"mine-wide"', f'"{name}"'))
    monkeypatch.setattr(spec, "BASELINES", tmp_path)
    with pytest.raises(UserError, match=f"mine.py: the preset '{name}' has a name that .* uses"):
        spec.architectures()


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from baselines import sparse", "sparse.Model"),
        ("import baselines.sparse", "baselines.sparse.Model"),
        ("import baselines.sparse as theirs", "theirs.Model"),
        ("from baselines.sparse import Model", "Model"),
        ("from beside import Base", "Base"),
        ("import beside", "beside.Base"),
        ("import beside\nclass Middle(object, beside.Base): ...", "Middle"),
    ],
)
def test_paths_of_a_base_class_are_found_with_what_they_need(
    tmp_path: Path, imports: str, base: str
):
    (tmp_path / "beside.py").write_text("from baselines.sparse import Model as Base\n")
    path = tmp_path / "mine.py"
    path.write_text(f"{imports}\nclass Model({base}):\n    decode_paths = ('eager', 'mine')\n")
    info, sparse = spec.describe(str(path)), spec.describe("sparse")
    assert info.forward_paths == sparse.forward_paths == ("eager", "compile")
    assert info.decode_paths == ("eager", "mine")
    assert info.packages("forward", "compile") == ("triton",)
    path.write_text(f"{imports}\nREQUIRES = {{'compile': ()}}\nclass Model({base}): ...\n")
    assert spec.describe(str(path)).fastest("cuda") == "cuda_graph"
    assert spec.describe(str(path)).packages("forward", "compile") == ()


def test_fields_of_a_base_config_are_found_in_its_order(tmp_path: Path):
    path = tmp_path / "mine.py"
    config = "class Config(dense.Config):\n    depth: int = 3\n    width: int = 64\n"
    path.write_text(f"from baselines import dense\n{config}class Model(dense.Model): ...\n")
    fields, theirs = spec.describe(str(path)).fields, spec.describe("dense").fields
    assert list(fields) == [*theirs, "depth"]
    assert (fields["width"].default, fields["vocab_size"]) == (64, theirs["vocab_size"])
    assert spec.parse(f"{path}:num_layers=2").overrides == {"num_layers": 2}
    path.write_text("from baselines.dense import Config, Model\n")
    assert spec.describe(str(path)).fields == theirs


@pytest.mark.parametrize(
    "source", ["import torch\nclass Model(torch.nn.Module): ...", "from mine import Model", ""]
)
def test_without_a_class_that_can_be_read_there_is_the_eager_path(tmp_path: Path, source: str):
    path = tmp_path / "mine.py"
    path.write_text(f"REQUIRES = {{'eager': 'torch'}}\n{source}\n")
    info = spec.describe(str(path))
    assert (info.decode_paths, info.forward_paths) == (("eager",), ("eager",))
    assert info.packages("decode", "eager") == ("torch",)


def test_a_path_may_need_several_packages_and_more_of_them_in_the_forward_pass(tmp_path: Path):
    path = tmp_path / "mine.py"
    requires = '{"upstream": "torch", "forward upstream": ("torch", "no_such_package")}'
    path.write_text(MINE.replace('{"upstream": "a_package_that_is_not_installed"}', requires))
    info = spec.describe(str(path))
    assert info.packages("decode", "upstream") == ("torch",)
    assert info.packages("forward", "upstream") == ("torch", "no_such_package")
    assert info.lacking("decode", "upstream") == ()
    assert info.lacking("forward", "upstream") == ("no_such_package",)


def test_submodules_are_looked_for_and_other_types_refused(tmp_path: Path):
    path = tmp_path / "mine.py"
    known = '{"upstream": "a_package_that_is_not_installed"}'
    path.write_text(MINE.replace(known, '{"upstream": "no_such_package.part"}'))
    assert spec.describe(str(path)).lacking("decode", "upstream") == ("no_such_package.part",)
    path.write_text(MINE.replace(known, '{"upstream": 3}'))
    with pytest.raises(UserError, match=r"REQUIRES\['upstream'\] is 3"):
        spec.describe(str(path))


def test_the_fused_forward_of_mamba2_needs_the_compiled_convolution():
    info = spec.describe("mamba2")
    assert info.packages("decode", "upstream") == ("mamba_ssm", "triton")
    assert info.packages("forward", "upstream") == ("mamba_ssm", "causal_conv1d")


@pytest.mark.parametrize("name", ["cat", "sparse", "sliding_window"])
def test_compile_needs_a_gpu_where_it_has_kernels(name: str):
    assert spec.describe(name).needs_gpu("forward", "compile")
    assert not spec.describe(name).needs_gpu("forward", "eager")
    assert not spec.describe("dense").needs_gpu("forward", "compile")  # compiled for a CPU, too


@pytest.mark.parametrize(
    ("typed", "tiny"),
    [
        ("dense", "dense:num_layers=2,vocab_size=256,width=64"),
        ("dense-2d", "dense:num_layers=2,vocab_size=256,width=128"),  # a preset becomes small
        ("dense:width=128", "dense:num_layers=2,vocab_size=256,width=128"),
        ("dense:width=1024", "dense:num_layers=2,vocab_size=256"),  # a default, but asked for
        ("dense:num_layers=5,vocab_size=99", "dense:num_layers=5,vocab_size=99,width=64"),
        (
            "cat:decoder_width=256",
            "cat:decoder_width=256,num_layers=2,vocab_size=256,width=64",
        ),
    ],
)
def test_quick_keeps_what_the_user_gave(typed: str, tiny: str):
    made = spec.tiny(spec.parse(typed))
    assert (made.text, made.typed) == (tiny, typed)


def test_own_names_resolve_to_modules():
    assert spec.resolve("cat").module == "cat_bench.cat"
    assert spec.resolve("dense").module == "baselines.dense"


def test_suites_and_exhibits_are_found_by_file():
    assert "efficiency" in dict(spec.suites())
    assert spec.suite_module("efficiency") == "cat_bench.suites.efficiency"
    with pytest.raises(UserError, match="Did you mean: efficiency"):
        spec.suite_module("eficiency")


def test_exhibits_stand_in_the_order_of_the_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ["fig2", "table10", "table2", "_build"]:
        (tmp_path / f"{name}.py").write_text(f'TITLE = "About {name}"\n')
    monkeypatch.setattr(spec, "EXHIBITS", tmp_path)
    titles = [("table2", "About table2"), ("table10", "About table10"), ("fig2", "About fig2")]
    assert spec.exhibits() == titles


def test_reading_all_files_imports_neither_torch_nor_them():
    code = (
        "import sys; from cat_bench import spec;"
        "spec.architectures(); spec.suites(); spec.exhibits();"
        "spec.parse('cat-8'); print({'torch', 'pandas', 'cat_bench.cat'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_functions_are_left_out_before_parsing_without_loss():
    """`list` must be quick: nothing inside of a function is read, all else must be as before."""
    for path in [spec.PACKAGE / "cat.py", *spec.BASELINES.glob("*.py")]:
        source = path.read_text()
        whole, outline = ast.parse(source), ast.parse(syntax.outline(source))
        assert len(syntax.outline(source)) < 0.6 * len(source) or len(source) < 500
        assert syntax.summary(whole) == syntax.summary(outline)
        assert syntax.defined(whole) == syntax.defined(outline)
        for kept in ("Config", "PRESETS", "REQUIRES"):
            found = [
                ast.dump(node)
                for tree in (whole, outline)
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == kept
            ]
            assert found[: len(found) // 2] == found[len(found) // 2 :]
