"""Files given by their path: their faults in one sentence, what lies beside them, their version."""

import sys
from pathlib import Path

import contract
import pytest
import torch

from cat_bench import predict, user_code
from cat_bench.architecture import Architecture, build, load_module, make_config, step_kind
from cat_bench.case import Options
from cat_bench.errors import UserError
from cat_bench.spec import OPTIONAL, describe, members, parse, resolve
from cat_bench.suites.efficiency import plan

SOUND = '''"""Dense, tiny."""
from dataclasses import dataclass
from baselines import dense

@dataclass(frozen=True)
class Config(dense.Config):
    width: int = 64
    num_layers: int = 1
    vocab_size: int = 64

class Model(dense.Model):
    pass
'''
SOUND_LINES = SOUND.count("\n")
INIT = "    def __init__(self, config, decode_path):\n"
OWN_CONFIG = "class Config:\n    def __init__(self, size):\n        self.size = size\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A sound file in a folder of its own."""
    return written(tmp_path / "mine" / "mine.py", SOUND)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path) -> UserError:
    """What a plan with the file is refused with."""
    with pytest.raises(UserError) as caught:
        predict.resolve(plan([parse(str(path))], Options()))
    return caught.value


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("foo()\n", "", "importing it raised NameError: name 'foo' is not defined (line 1)."),
        ("\nraise SystemExit(3)\n", "", "importing it raised SystemExit: 3 (line 2)."),
        ("", OWN_CONFIG, "making its Config raised TypeError: Config.__init__() missing 1 requ"),
        (
            "",
            "class Config(Config):\n    def __post_init__(self):\n        1 + ''\n",
            "making its Config raised TypeError: unsupported operand type(s) for +: 'int' and "
            f"'str' (line {SOUND_LINES + 3}).",
        ),
        (
            "",
            f"{INIT}        raise KeyError('no')\n",
            f"building its Model raised KeyError: 'no' (line {SOUND_LINES + 2}).",
        ),
        ("", f"{INIT}        assert 0\n", f"Model raised AssertionError (line {SOUND_LINES + 2})."),
        (
            "",
            "    def state_bytes(self, batch_size, seq_len):\n        return self.nothing\n",
            "asking for its sizes and costs raised AttributeError: 'Model' object has no "
            f"attribute 'nothing' (line {SOUND_LINES + 2}).",
        ),
    ],
)
def test_whatever_a_file_raises_is_one_sentence(
    mine: Path, before: str, after: str, said: str
) -> None:
    mine.write_text(before + SOUND + after)
    error = refusal(mine)
    assert error.message.startswith(f"{mine} fails: ") and said in error.message
    assert "\n" not in error.message and "--debug" in error.hint
    assert error.__cause__ is error.error  # --debug shows the traceback


BARE = '''"""A model that can only read a prompt."""
from dataclasses import dataclass
from cat_bench.language_model import LanguageModel
from torch import nn

@dataclass(frozen=True)
class Config:
    width: int = 64

class Model(nn.Module):
    def __init__(self, config, decode_path):
        super().__init__()
        self.config, self.decode_path = config, decode_path

    def prefill(self, tokens, state):
        return self.step(tokens, state)
'''
LACKS = (
    "decode_paths, max_len, num_params, num_params_non_embedding, forward, init_state, reset, "
    "step, state_bytes, state_bytes_float, step_costs"
)
FROM_OURS = BARE.replace("nn.Module", "LanguageModel").replace(
    "__init__()", "__init__(Config(), [], decode_path, 'eager')"
)


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (BARE, LACKS),
        (
            FROM_OURS.replace("width: int = 64", "width = vocab_size = num_layers = norm_eps = 64"),
            "init_state, reset, step, state_bytes, step_costs",
        ),
    ],
)
def test_all_that_a_model_lacks_is_told_at_once(mine: Path, text: str, lacks: str) -> None:
    mine.write_text(text)
    error = refusal(mine)
    assert error.message == f"{mine}: the class Model must define {lacks}."
    assert "cat_bench/architecture.py" in error.hint
    assert describe(str(mine)).lacks == tuple(lacks.split(", "))  # told without an import
    (subject, *_) = contract.subjects_of(str(mine))
    with pytest.raises(AssertionError, match=f"must define {lacks}"):
        subject.model()


def test_a_kind_of_step_is_optional(mine: Path) -> None:
    mine.write_text(BARE)
    module = load_module(parse(str(mine)))
    assert step_kind(module.Model(module.Config(), "eager"), 3) == "step"


@pytest.mark.parametrize("base", ["dense.Model", "unknown.Model"])
def test_what_a_base_may_define_is_not_missing(mine: Path, base: str) -> None:
    mine.write_text(SOUND.replace("dense.Model", base))
    assert describe(str(mine)).lacks == ()


def test_the_members_are_those_of_the_protocol() -> None:
    declared = {*Architecture.__annotations__, *vars(Architecture)}
    assert {*members(), *OPTIONAL} <= declared
    assert {name for name in declared if name[0] != "_"} == {*members(), *OPTIONAL}


@pytest.mark.parametrize(("paths", "got"), [("None", "None"), ('("eager")', "'eager'")])
def test_decode_paths_that_are_no_tuple_are_refused(mine: Path, paths: str, got: str) -> None:
    mine.write_text(f"{SOUND}    decode_paths = {paths}\n")
    error = refusal(mine)
    assert error.message == f"{mine}: Model.decode_paths must be a tuple of names, got {got}."
    assert 'decode_paths = ("eager",)' in error.hint


def test_a_value_that_a_config_refuses_is_no_fault_of_the_file(mine: Path) -> None:
    with pytest.raises(UserError, match="width=100: width must be a positive multiple of 64"):
        make_config(parse(f"{mine}:width=100"))


def test_files_of_the_project_keep_their_tracebacks() -> None:
    with pytest.raises(ZeroDivisionError), user_code.running(resolve("dense"), "testing it"):
        _ = 1 / 0


def test_config_and_model_come_from_one_import(mine: Path) -> None:
    """A Model may ask whether its config is a Config of the same file."""
    check = "        assert isinstance(config, Config)\n        super().__init__(config)\n"
    mine.write_text(SOUND + INIT + check)
    build(parse(str(mine)), device="meta")


# --- what lies beside a file ---------------------------------------------------------------------


def test_a_file_imports_what_lies_beside_it(mine: Path) -> None:
    written(mine.parent / "cat_bench_helper.py", "from cat_bench_deeper import WIDTH\n")
    written(mine.parent / "cat_bench_deeper.py", "WIDTH = 128\n")
    mine.write_text(f"import cat_bench_helper\n{SOUND}".replace("= 64", "= cat_bench_helper.WIDTH"))
    before = list(sys.path)
    assert build(parse(str(mine)), device="meta").config.width == 128
    assert sys.path == before


def test_imports_inside_of_functions_find_it_too(mine: Path) -> None:
    written(mine.parent / "cat_bench_late.py", "BYTES = 12_345\n")
    late = "        import cat_bench_late\n"
    bytes_of = "    def state_bytes(self, batch_size, seq_len):\n"
    mine.write_text(
        f"{SOUND}{INIT}{late}        super().__init__(config)\n\n"
        f"{bytes_of}{late}        return cat_bench_late.BYTES\n"
    )
    resolved = predict.resolve(plan([parse(str(mine))], Options()))
    assert {row["state_bytes"] for row in resolved.values()} == {12_345}


def test_two_files_may_each_have_a_helper_of_one_name(mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine.py"
    for path, width in ((mine, 128), (other, 256)):
        written(path, f"from cat_bench_twin import WIDTH\n{SOUND}".replace("= 64", "= WIDTH", 1))
        written(path.parent / "cat_bench_twin.py", f"WIDTH = {width}\n")
    widths = [make_config(parse(str(path))).width for path in (mine, other, mine)]
    assert widths == [128, 256, 128]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "import a_module_of_nobody.part",
            "imports a_module_of_nobody, which is neither installed nor beside the file (line 1).",
            "Put a_module_of_nobody.py into ",
        ),
        (
            "import cat_bench_helper",
            "imports nowhere, which is neither installed nor beside the file "
            "(cat_bench_helper.py, line 1).",
            "Put nowhere.py into ",
        ),
        (
            "import mamba_ssm.ops",
            "imports the package mamba_ssm, which is not installed (line 1).",
            "mamba-ssm==2",
        ),
        (
            "from json import no_such",
            "cannot be imported: cannot import name 'no_such' from 'json'",
            "json is there, but has no such name",
        ),
        (
            "from . import helper",
            "cannot be imported: attempted relative import with no known parent package (line 1).",
            "Repair the file.",
        ),
    ],
)
def test_an_import_in_vain_says_what_is_missing_and_advises_no_unknown_package(
    mine: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str, hint: str
) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # absent, also where it is installed
    written(mine.parent / "cat_bench_helper.py", "import nowhere\n")
    mine.write_text(f"{line}\n{SOUND}")
    error = refusal(mine)
    assert error.message.startswith(f"{mine} {message}") and hint in error.hint
    assert "pip install" not in error.hint or "mamba" in line


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["norm_eps=-1", "norm_eps=0", "rope_base=0", "rope_base=-2.5"])
@pytest.mark.parametrize("own", [True, False])
def test_settings_that_must_be_positive(mine: Path, setting: str, own: bool) -> None:
    name, _, value = setting.partition("=")
    fields = "    rope_base: float = 1e4\n    norm_eps: float = 1e-5\n"
    mine.write_text(SOUND.replace("\nclass Model", f"{fields}\nclass Model"))
    said = f"{name} must be a positive number, got {float(value)}"
    with pytest.raises(UserError, match=said):
        build(parse(f"{'dense' if own else mine}:{setting}"), device="meta")


@pytest.mark.parametrize("settings", ["mamba2:width=1000000000", f"dense:vocab_size={10**20}"])
def test_sizes_that_no_tensor_has_are_refused(settings: str) -> None:
    with pytest.raises(UserError, match="more bytes than 64 bits can count"):
        build(parse(settings), device="meta")


def test_other_errors_of_a_model_of_ours_are_not_taken_for_a_size(monkeypatch) -> None:
    module = load_module(parse("dense"))
    monkeypatch.setattr(module.Model, "__init__", lambda *_: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        build(parse("dense"))


# --- versions ------------------------------------------------------------------------------------


def test_the_hash_follows_the_file_and_what_it_imports_from_its_folder(mine: Path) -> None:
    late = "        import late_helper, json\n        super().__init__(config)\n"
    mine.write_text(f"import helper, package.part\n{SOUND}{INIT}{late}")
    folder, hashes = mine.parent, [hash_of(mine)]
    written(folder / "package" / "__init__.py", "")
    for name in ("helper", "late_helper", "package/part", "deeper"):
        written(folder / f"{name}.py", "from deeper import x\n")
        hashes.append(hash_of(mine))
    (folder / "deeper.py").write_text("x = 1\n")
    hashes.append(hash_of(mine))
    mine.write_text(mine.read_text() + "\n")
    hashes.append(hash_of(mine))
    assert len(set(hashes)) == len(hashes)
    (folder / "stranger.py").write_text("not imported")
    (folder / "helper.txt").write_text("no source")
    assert hash_of(mine) == hashes[-1]


def test_the_hash_of_a_broken_file_is_a_hash(mine: Path) -> None:
    mine.write_text("def broken(:")
    assert len(hash_of(mine)) == 64


def test_the_plan_tells_the_version_of_a_users_file_alone(mine: Path) -> None:
    cases = plan([parse(str(mine)), parse("dense")], Options(batch_sizes=(1,)))
    resolved = predict.resolve(cases)
    hashes = {case.arch: resolved[case.key]["source_hash"] for case in cases}
    assert hashes == {str(mine): hash_of(mine), "dense": None}


def hash_of(path: Path) -> str:
    found = user_code.source_hash(resolve(str(path)))
    assert found is not None
    return found
