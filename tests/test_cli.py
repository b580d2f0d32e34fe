"""The command line: streams, exit codes, one clear sentence for every kind of bad input."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from cat_bench import cli, environment, measuring, runner, spec, store
from cat_bench.case import Case, Record
from cat_bench.paper import _settings

TINY_RUN = ("efficiency", "-a", "dense", "--quick", "--batch-size", "1", "--seq-len", "16")
FAULTY = '''"""Dense with a planted fault."""
from dataclasses import dataclass
from baselines import dense

REQUIRES = {"upstream": "a_package_that_is_not_installed"}

@dataclass(frozen=True)
class Config(dense.Config):
    width: int = 64
    num_layers: int = 1
    vocab_size: int = 64

class Model(dense.Model):
    decode_paths = ("eager", "upstream")

    def step(self, token, state):
        raise RuntimeError("planted fault")
'''


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture
def cat_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Cli:
    """Runs `cat-bench ARGUMENTS` in this process; an unexpected exception fails the test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main() replaces it; put it back

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["cat-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one run of one tiny case, made through the real console entry."""
    results = tmp_path_factory.mktemp("measured")
    command = [sys.executable, "-m", "cat_bench", "run", *TINY_RUN, "--name", "first"]
    done = subprocess.run(
        [*command, "--results", str(results)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Dense" in done.stdout and "latency" in done.stdout
    assert "measuring 1 case" in done.stderr and "measuring" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no colours off a terminal
    return results


@pytest.fixture
def one_run(measured: Path, results_folder: Path) -> Path:
    """A copy of that run in this test's own results folder."""
    shutil.copytree(measured, results_folder)
    return results_folder / "0001-first"


def refused(answer: Answer, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one sentence on stderr that holds `parts`, no traceback."""
    assert answer.code == 2, answer
    assert answer.out == ""
    sentences = [line for line in answer.err.splitlines() if not line.startswith("warning: ")]
    assert sentences[0].startswith("error: ")
    assert "Traceback" not in answer.err
    for part in parts:
        assert part in answer.err


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "-a dens",
            ["unknown architecture 'dens'. Did you mean: dense", "Available: based, cat, dense, "],
        ),
        ("-a cat:chunksize=8", ["no setting 'chunksize'. Did you mean: chunk_size?"]),
        ("-a cat:chunk_size=eight", ["chunk_size='eight' is not an integer", "Example"]),
        ("-a cat:chunk_size=2048", ["chunk_size must lie between 1 and max_len=1024, got 2048"]),
        (
            "-a cat-16 --seq-len 8192",
            ["needs 512 chunk positions; max_len=1024 gives 64", "-a cat:chunk_size=16,max_len=81"],
        ),
        ("-a dense --batch-size -4", ["--batch-size -4 is impossible"]),
        ("-a dense --batch-size 1,x", ["--batch-size '1,x' is not a list of whole numbers"]),
        ("-a dense --seq-len 8", ["leaves nothing to generate"]),
        ("-a dense --dtype int8", ["--dtype 'int8' is unknown"]),
        ("-a dense --device tpu", ["--device 'tpu' is unknown"]),
        ("-a dense --match size", ["--match 'size' is unknown"]),
        ("-a dense --decode-path warp", ["no decode path 'warp'", "Its decode paths: eager, cuda"]),
        (  # the forward path of this name needs a package; that is not what is wrong
            "-a based --decode-path upstream --quick",
            ["based has no decode path 'upstream'", "Its decode paths: eager, cuda_graph"],
        ),
        (
            "-a dense --forward-path compil",
            ["no forward path 'compil'. Did you mean: compile", "Its forward paths: eager, comp"],
        ),
        ("-a dense --prompt-len 8,x", ["--prompt-len '8,x' is not a list of whole numbers"]),
        ("-a dense --prompt-len 8,64", ["--prompt-len 64 leaves nothing", "or --new-tokens N"]),
        ("-a dense --seq-len 64 --new-tokens 1", ["--seq-len and --new-tokens both say"]),
        (
            "-a cat-8 --prompt-len 1024,4096 --new-tokens 1",  # one hint serves both lengths
            ["seq_len=4097 needs 513 chunk positions", "-a cat:max_len=4097"],
        ),
        ("-a dense --quick --device cuda", ["--quick runs on the CPU"]),
        ("-a dense:width=100 --quick", ["width=100: width must be a positive multiple of 64"]),
        (  # a setting that fits at full size, and one that does not
            "-a dense:num_kv_heads=4 --quick",
            [
                "num_kv_heads must divide the 1 heads",
                "--quick shrinks what is not given, here num_",
            ],
        ),
        ("-a mamba2:headdim=48 --quick", ["error: mamba2:headdim=48: headdim must divide"]),
        ("-a cat-8 --quick --seq-len 4000", ["-a cat:max_len=4000,", "(--quick shrinks what is"]),
        (  # a length that nobody gave
            "-a cat-8:max_len=32 --quick",
            ["-a cat:max_len=64,", "at most 32 tokens: --seq-len, or --", "given, lengths too.)"],
        ),
        ("-a dense -a cat-8 --quick --match params", ["--match chooses widths, but --quick"]),
        ("-a dense -a dense-2d --match params", ["dense-2d: --match", "set by the preset"]),
        ("-a dense --timeout 0", ["--timeout 0 is no time", "Example: --timeout 3600"]),
        ("-a dense --timeout -5", ["--timeout -5 is no time"]),
        ("-a dense --timeout nan", ["--timeout nan is no time"]),
        ("-a dense --gpu H100", ["--gpu only predicts", "--dry-run"]),
        ("-a dense --gpu H100 --device cpu --dry-run", ["--gpu H100 predicts for cuda, got --dev"]),
        ("-a dense --gpu H100 --quick --dry-run", ["--gpu H100 predicts for cuda, got --quick"]),
        (
            "-a dense --gpu T4 --device cuda --dry-run",
            ["--gpu 'T4' is unknown", "H100, H200, A100"],
        ),
        ("-a dense --quick --name 0001", ["--name 0001 would mean the run of that number"]),
        ("-a dense --quick --name ../x", ["'../x' cannot be a folder's name", "--name x"]),
        ("-a dense --quick --name=", ["--name '' cannot be a folder's name"]),
        ("-a no/such/file.py", ["no architecture file at 'no/such/file.py'"]),
        ("", ["no architecture was given"]),
    ],
)
def test_a_bad_run_is_refused_before_anything_is_written(
    cat_bench: Cli, results_folder: Path, arguments: str, parts: list[str]
):
    device = [] if "--device" in arguments or "--quick" in arguments else ["--device", "cpu"]
    refused(cat_bench("run", "efficiency", *arguments.split(), *device), *parts)
    assert not results_folder.exists()


def test_a_path_that_computes_in_float32_is_refused_in_float64(cat_bench: Cli):
    command = ("run", "training", "-a", "dense", "-a", "cat-8", "--dtype", "float64")
    for flags in (["--gpu", "H100", "--dry-run"], ["--forward-path", "compile", "--dry-run"]):
        answer = cat_bench(*command, "--seq-len", "1024", *flags)
        refused(answer, "'compile' of cat computes in float32", "--forward-path eager")


def test_a_missing_gpu_is_refused(cat_bench: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = cat_bench("run", "efficiency", "-a", "dense", "--device", "cuda")
    refused(answer, "sees no CUDA GPU", "--device cpu")


def test_a_run_of_which_every_case_lacks_a_package_is_refused(
    cat_bench: Cli, tmp_path: Path, results_folder: Path
):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY)
    answer = cat_bench(
        *("run", "efficiency", "-a", mine, "--device", "cpu", "--decode-path", "upstream")
    )
    refused(answer, "'upstream' needs the package a_package_that_is_not_installed", "pip install")
    assert not results_folder.exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "import a_package_of_nobody.part",
            ["mine.py imports a_package_of_nobody, which is neither installed nor beside the fi"],
        ),
        ("import mamba_ssm.ops", ["imports the package mamba_ssm", "mamba-ssm==2"]),
        ("from json import no_such_name", ["mine.py cannot be imported: cannot import name"]),
        ("def broken(:", ["mine.py is not valid Python"]),
        ("foo()", ["mine.py fails: importing it raised NameError: name 'foo' is", "(line 2)"]),
        ("return 1", ["mine.py is not valid Python: 'return' outside function", "line 2"]),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_sentence(
    cat_bench: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, parts: list[str]
):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # absent, also where it is installed
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY.replace("from dataclasses", f"{line}\nfrom dataclasses", 1))
    refused(cat_bench("run", "efficiency", "-a", mine, "--quick", "--dry-run"), *parts)


def test_debug_shows_the_traceback_of_a_users_file(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(f"{FAULTY}\n1 / 0\n")
    command = [sys.executable, "-m", "cat_bench", "run", "efficiency", "-a", str(mine)]
    done = subprocess.run(
        [*command, "--quick", "--dry-run", "--debug"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert f'File "{mine}", line {FAULTY.count(chr(10)) + 2}' in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr


def test_a_file_under_two_names_is_one_or_refused(
    cat_bench: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FAULTY)
    command = ("run", "efficiency", "--quick", "--dry-run", "-a", "./mine.py", "-a")
    assert "plan: 2 cases, 1 architecture," in cat_bench(*command, "mine.py").out
    answer = cat_bench(*command, tmp_path / "mine.py")
    refused(answer, f"-a mine.py and -a {tmp_path / 'mine.py'} are the same file", "Write mine.py")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run"], ["run needs a suite"]),
        (["list", "runs", "--results", __file__], ["test_cli.py is a file", "Give the folder"]),
        (
            ["run", *TINY_RUN, "--results", __file__],
            ["test_cli.py is a file", "Give the folder"],
        ),
        (["paper", "fig4", "--results", __file__], ["test_cli.py is a file"]),
        (["show", "1", "--results", __file__], ["test_cli.py is a file", "Give the folder"]),
        (["run", "efficiency", "-a", "dense", "--seed", "x"], ["Example: --seed 0,1,2"]),
        (["run", "eficiency"], ["unknown suite 'eficiency'. Did you mean: efficiency?"]),
        (["run", "--resume", "none"], ["no run 'none'"]),
        (["show", "7"], ["no run '7'", "cat-bench run"]),
        (["run", "efficiency", "-a", "dense", "--retry", "oom"], ["--retry needs --resume"]),
        (["list", "everything"], ["cannot list 'everything'", "architectures, suites"]),
        (["list", "runs", "-a", "dense"], ["-a chooses architectures, but got 'runs'"]),
        (["list", "-a", "dens"], ["unknown architecture 'dens'. Did you mean: dense"]),
        (["list", "-a", __file__], ["test_cli.py is no architecture: it lacks Config or Model"]),
        (["paper", "fig22"], ["unknown exhibit 'fig22'. Did you mean: fig2"]),
        (["paper", "fig2,fig22"], ["unknown exhibit 'fig22'. Did you mean: fig2"]),
        (["paper", "fig2", "--run", "--only", "dens"], ["unknown architecture 'dens'"]),
        (["paper", "fig2", "--only", "dense"], ["say what is measured; nothing is.", "Add --run"]),
        (["paper", "--run"], ["--run needs an exhibit", "cat-bench paper fig2 --run"]),
        (["paper", "--run", "--only", "dense"], ["--run needs an exhibit"]),
        (["paper", "--dry-run"], ["--dry-run needs an exhibit", "cat-bench paper fig2 --dry-run"]),
        (["paper", "--scale", "huge"], ["unknown scale 'huge'", "smoke, h100, paper"]),
    ],
)
def test_bad_words_get_one_sentence(cat_bench: Cli, arguments: list[str], parts: list[str]):
    refused(cat_bench(*arguments), *parts)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["show"], ["run", "--no-such-flag"]])
def test_usage_errors_exit_with_2(cat_bench: Cli, arguments: list[str]):
    answer = cat_bench(*arguments)
    assert answer.code == 2 and "Error" in answer.err and answer.out == ""


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("plan.json", None, "plan.json is missing"),
        ("environment.json", "{not json", "environment.json is broken"),
        ("records.jsonl", '{"case": "abc"}\n', "records.jsonl, line 1 is not a row"),
    ],
)
def test_an_unreadable_run_is_refused_and_left_alone(
    cat_bench: Cli, one_run: Path, file: str, content: str | None, expected: str
):
    path = one_run / file
    path.unlink() if content is None else path.write_text(content)
    before = {p.name: p.read_bytes() for p in one_run.iterdir()}
    refused(cat_bench("show", "1"), expected)
    listed = cat_bench("list", "runs")
    assert listed.code == 0 and "0001-first  unreadable" in listed.out
    assert before == {p.name: p.read_bytes() for p in one_run.iterdir()}


def test_the_list_of_exhibits_warns_of_a_run_that_cannot_be_read(cat_bench: Cli, one_run: Path):
    (one_run / "plan.json").unlink()
    listed = cat_bench("paper")
    assert listed.code == 0 and "warning: " in listed.err and "0001-first" in listed.err


def test_a_torn_last_row_is_left_out_with_a_warning(cat_bench: Cli, one_run: Path):
    whole = cat_bench("show", "1")
    rows = one_run / "records.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"case": "ab')
    torn = cat_bench("show", "1")
    assert torn.code == 0 and torn.out == whole.out
    assert "cut short and is left out" in torn.err


def test_a_resume_on_another_gpu_is_refused_and_changes_nothing(cat_bench: Cli, one_run: Path):
    path = one_run / "environment.json"
    environment = json.loads(path.read_text()) | {"gpu_name": "Another GPU"}
    path.write_text(json.dumps(environment))
    before = {p.name: p.read_bytes() for p in one_run.iterdir()}
    refused(cat_bench("run", "--resume", "first"), "cannot be continued here: GPU was Another GPU")
    assert before == {p.name: p.read_bytes() for p in one_run.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("efficiency -a dense", "the suite, --arch"),
        ("--batch-size 7", "--batch-size"),
        ("--seed 0", "--seed"),  # also at its default: it was asked for
        ("--dry-run --quick --name x", "--name, --dry-run, --quick"),
        ("--match params --repeats 3", "--repeats, --match"),
    ],
)
def test_a_resume_takes_no_new_plan(cat_bench: Cli, one_run: Path, arguments: str, named: str):
    answer = cat_bench("run", *arguments.split(), "--resume", "first")
    refused(answer, f"--resume continues a run as it was planned, but got {named}.")
    taken = cat_bench("run", "--resume", "first", "--retry", "oom", "--timeout", "60", "--json")
    assert taken.code == 0


def test_retry_of_an_unknown_status_is_refused(cat_bench: Cli, one_run: Path):
    refused(
        cat_bench("run", "--resume", "first", "--retry", "ok"),
        "--retry 'ok' is unknown",
        "failed,oom",
    )


def test_a_report_cannot_be_written_into_a_missing_folder(cat_bench: Cli, one_run: Path):
    answer = cat_bench("report", "1", "-o", one_run / "none" / "report.md")
    refused(answer, "cannot write", "No such file or directory")


# --- good input ----------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_runs_nothing(cat_bench: Cli, results_folder: Path):
    arguments = ("run", "efficiency", "-a", "dense", "-a", "cat-8", "--device", "cpu", "--dry-run")
    answer = cat_bench(
        *arguments, "--batch-size", "64,512", "--seq-len", "1024", "--dtype=bfloat16"
    )
    assert answer.code == 0 and not results_folder.exists()
    assert "plan: 4 cases, 2 architectures, bfloat16, cpu, eager, seed 0" in answer.out
    dense = next(line for line in answer.out.splitlines() if "Dense" in line and "512" in line)
    assert " 24.00 " in dense  # GiB: 2 x 12 layers x 512 x 1024 tokens x 1024 x 2 bytes
    plan = json.loads(cat_bench(*arguments, "--json").out)
    assert {row["label"] for row in plan} == {"Dense", "CAT-8"}


def test_a_plan_for_a_gpu_that_is_not_here(cat_bench: Cli):
    arguments = ("run", "efficiency", "-a", "dense", "--batch-size", "512,2048", "--dry-run")
    lines = cat_bench(*arguments, "--gpu", "H200").out.splitlines()
    assert "cuda, cuda_graph" in lines[0]
    assert "fits in 140.4 GiB (H200, assumed)" in lines[1] and "floor s" in lines[1]
    assert " not ruled out " in lines[2] and float(lines[2].split()[-1]) > 1
    small = cat_bench(*arguments, "--gpu", "h100").out.splitlines()
    assert "fits in 79.6 GiB (H100, assumed)" in small[1]
    assert small[3].split()[-2:] == ["NO", "-"]  # 96 GiB
    assert "needs at least GiB" in small[1] and "activations (of training, and" in small[-2]


def test_a_plan_of_prompts_and_of_training(cat_bench: Cli):
    arguments = ("-a", "dense", "--gpu", "H200", "--dry-run")
    prompts = ("--prompt-len", "1024,4096", "--new-tokens", "1", "--batch-size", "1")
    lines = cat_bench("run", "efficiency", *prompts, *arguments).out.splitlines()
    assert "prompt tokens" in lines[1] and [line.split()[2] for line in lines[2:4]] == [
        "1025",
        "4097",
    ]
    lines = cat_bench("run", "training", *arguments).out.splitlines()
    assert "forward compile, autocast bfloat16, step cuda_graph, seed 0" in lines[0]
    lines = cat_bench("run", "training", *arguments, "--step-path", "eager").out.splitlines()
    assert "forward compile, autocast bfloat16, seed 0" in lines[0]
    assert "gradients + Adam GiB" in lines[1]


def test_a_missing_package_of_a_forward_path_is_refused(cat_bench: Cli, tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY + '    forward_paths = ("eager", "upstream")\n')
    flags = ("--device", "cpu", "--forward-path", "upstream")
    answer = cat_bench("run", "training", "-a", mine, *flags)
    refused(answer, "forward path 'upstream' needs the package a_package", "--forward-path eager")
    assert answer.err.endswith("pip install a_package_that_is_not_installed\n")  # to be pasted


def test_cases_that_lack_a_package_are_rows_beside_the_others(
    cat_bench: Cli, tmp_path: Path, results_folder: Path
):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY)
    also = tmp_path / "also.py"  # has the path and needs nothing for it
    sound = FAULTY.replace("raise RuntimeError", "return super().step(token, state)  #")
    eager = "    def __init__(self, config, decode_path):\n        super().__init__(config)\n"
    also.write_text(sound.replace("REQUIRES", "NEEDS") + eager)
    flags = ("--decode-path", "upstream", *TINY_RUN[3:], "--repeats", "1", "--name", "mixed")
    answer = cat_bench("run", "efficiency", "-a", mine, "-a", also, *flags)
    assert answer.code == 3, answer
    warnings = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: cases of {mine} on decode path 'upstream' will be unsupported: they need the "
        "package a_package_that_is_not_installed, which is not installed. Install it: "
        "pip install a_package_that_is_not_installed"
    ]
    assert "1 case unsupported; the rows say why." in answer.err and "failed" not in answer.err
    assert "--resume 0001-mixed --retry unsupported" in answer.err and "--timeout" not in answer.err
    assert "Install it: pip install a_package_that_is_not_installed" in answer.out
    run = store.find(results_folder, "mixed")
    assert sorted(run.closed().values()) == ["ok", "unsupported"]

    resumed = cat_bench("run", "--resume", "mixed")  # nothing is left to be measured
    assert resumed.code == 0 and "warning: " not in resumed.err
    again = cat_bench(*"run --resume mixed --retry unsupported --timeout 7200".split())
    assert again.code == 3 and "will be unsupported" in again.err
    assert "--resume 0001-mixed --retry unsupported --timeout 7200" in again.err
    mine.write_text(FAULTY.replace("a_package_that_is_not_installed", "torch"))
    after = cat_bench("run", "--resume", "mixed", "--retry", "unsupported")  # now it is there
    assert after.code == 3 and "1 case failed; the rows say why." in after.err


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"unsupported": 3}, "3 cases unsupported; "),
        ({"failed": 1, "unsupported": 2}, "1 case failed, 2 cases unsupported; "),
    ],
)
def test_the_last_line_tells_failed_from_unsupported(
    one_run: Path, capsys: pytest.CaptureFixture, counts: dict[str, int], said: str
):
    with pytest.raises(measuring.typer.Exit) as ended:
        measuring.exit_after(store.Run.open(one_run), runner.Summary(**counts))
    err = capsys.readouterr().err
    assert ended.value.exit_code == 3
    assert err.startswith(said) and f"--retry {','.join(counts)}" in err


@pytest.mark.parametrize(
    ("folder", "variable", "named"),
    [
        ("results", None, False),
        ("my results", None, True),
        ("results", "elsewhere", True),  # where the variable leads the run is not
    ],
)
@pytest.mark.parametrize(
    ("hint", "ended"), [("Again: ", {"failed": 1}), ("Continue: ", {"interrupted": True})]
)
def test_the_command_that_resumes_a_run_works_as_it_is_printed(
    cat_bench: Cli, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, folder: str, variable: str | None, named: bool,
    hint: str, ended: dict,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAT_BENCH_RESULTS")
    if variable:
        monkeypatch.setenv("CAT_BENCH_RESULTS", variable)
    shutil.copytree(measured, folder)
    with pytest.raises(measuring.typer.Exit):
        target = store.find(Path(folder), "first")
        measuring.exit_after(target, runner.Summary(**ended), 7200.0)
    command = capsys.readouterr().err.split(hint)[1].strip()
    assert ("--results" in command) == named and "--timeout 7200" in command
    program, *arguments = shlex.split(command)
    assert program == "cat-bench"
    resumed = cat_bench(*arguments)
    assert resumed.code == 0 and str(Path(folder, "0001-first")) in resumed.err  # "kept: ..."


@pytest.mark.parametrize(
    ("timeout_s", "timed_out", "suggested"),
    [(0.01, 1, ""), (3600.0, 1, "--timeout 7200"), (5000.0, 1, "--timeout 10000"),
     (60.0, 0, "--timeout 60")],
)  # fmt: skip
def test_after_a_timeout_a_longer_one_is_suggested(
    one_run: Path, capsys: pytest.CaptureFixture, timeout_s: float, timed_out: int, suggested: str
):
    summary = runner.Summary(failed=1, timed_out=timed_out)
    with pytest.raises(measuring.typer.Exit):
        measuring.exit_after(store.Run.open(one_run), summary, timeout_s)
    again = capsys.readouterr().err.split("Again: ")[1]
    assert suggested in again and ("--timeout" in again) == bool(suggested)


def a_case(arch: str, **settings: str) -> Case:
    path = "eager" if settings else "upstream"  # a drift reference needs no package
    return Case(
        *("efficiency", arch, 1, 8, 16, "float32", "cpu"),
        decode_path=path,
        settings=tuple(settings.items()),
    )


def test_a_drift_reference_is_no_reason_to_run(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY)
    with pytest.raises(measuring.UserError, match="no case can run here: .*a_package"):
        measuring.check_machine([a_case(str(mine)), a_case("dense", reference="0")])


@pytest.mark.parametrize(
    ("load", "device", "is_told"), [(1.2, "cpu", True), (0.9, "cpu", False), (1.2, "cuda", False)]
)
def test_a_busy_cpu_that_is_measured_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, load, device, is_told
):
    monkeypatch.setattr(measuring, "_check_gpu", lambda cases: None)
    monkeypatch.setattr(environment, "_cpu_cores", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    measuring.check_machine([Case("efficiency", "dense", 1, 8, 16, "float32", device)])
    err = capsys.readouterr().err
    assert ("warning: another process is using the CPU (load 1.2 on 2 cores" in err) == is_told
    assert is_told or not err


def test_a_package_is_told_once_and_with_all_that_need_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    files = [tmp_path / f"{name}.py" for name in ("one", "two")]
    for file in files:
        file.write_text(FAULTY)
    cases = [a_case(f"{file}:width={width}") for file in files for width in (64, 128)]
    measuring.check_machine([*cases, Case("efficiency", "dense", 1, 8, 16, "float32", "cpu")])
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"cases of {files[0]}, {files[1]} on decode path 'upstream' will be" in warning


def test_the_list_shows_both_kinds_of_paths(cat_bench: Cli):
    listed = cat_bench("list", "architectures")
    assert "decode path eager: ready" in listed.out and "forward path eager: ready" in listed.out
    found = json.loads(cat_bench("list", "architectures", "--json").out)["architectures"]
    dense = next(entry for entry in found if entry["name"] == "dense")
    assert dense["forward_paths"]["compile"] == "ready"


def test_the_list_says_what_is_ready_on_a_gpu_only(cat_bench: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spec, "is_installed", lambda name: name != "causal_conv1d")
    (mamba2,) = json.loads(cat_bench("list", "-a", "mamba2", "--json").out)["architectures"]
    assert mamba2["decode_paths"]["upstream"] == "ready on a GPU"
    assert mamba2["forward_paths"]["upstream"].startswith("needs causal_conv1d: pip install")


def test_the_list_shows_a_file_outside_the_tree(cat_bench: Cli, tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY.replace("import", "import a_package_of_nobody, ", 1))  # never imported
    listed = cat_bench("list", "architectures", "-a", mine, "-a", "cat-16")
    assert listed.code == 0 and listed.out.startswith("architectures\n")
    assert f"{mine}  " in listed.out and "Dense with a planted fault" in listed.out
    assert "decode path upstream: needs a_package_that_is_not_installed: pip" in listed.out
    assert "cat:chunk_size=16" in listed.out and "baselines" not in listed.out
    assert cat_bench("list", "-a", mine, "-a", "cat-16").out == listed.out
    mine.write_text('PRESETS = {"mine-wide": {"width": 128}}\n' + mine.read_text())
    (shown,) = json.loads(cat_bench("list", "-a", mine, "--json").out)["architectures"]
    assert shown["presets"] == {}  # no spec could name them


def test_the_list_calls_no_path_ready_that_lacks_a_member(cat_bench: Cli, tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY.replace("dense.Model", ""))
    (shown,) = json.loads(cat_bench("list", "-a", mine, "--json").out)["architectures"]
    lacks = shown["decode_paths"]["eager"]
    assert lacks.startswith("not ready: its Model lacks decode_path, config, max_len, num_params")
    assert lacks.endswith("prefill, state_bytes, state_bytes_float, step_costs")


def test_a_plan_says_where_eager_stands_beside_a_fast_path(cat_bench: Cli, tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY.replace('("eager", "upstream")', '("eager",)'))
    plan = ("-a", mine, "-a", "dense", "-a", "cat-8", "--gpu", "H100", "--dry-run")
    answer = cat_bench("run", "efficiency", *plan)
    assert answer.code == 0
    assert f"warning: {mine}: decode path eager" in answer.err
    assert "beside a fast one of dense, cat: their ratios" in answer.err
    assert "forward path eager, bound" not in answer.err  # none of them has another here
    for same in (("--decode-path", "eager"), ("--reference-every", "1", "--decode-path", "eager")):
        assert "bound by launches" not in cat_bench("run", "efficiency", *plan, *same).err


def test_a_plan_says_where_a_hybrid_has_no_window_of_half_the_length(cat_bench: Cli):
    flags = ("--seq-len", "1024,1032,4096", "--gpu", "H100", "--dry-run")
    answer = cat_bench("run", "efficiency", "-a", "gdn-h1", "-a", "swa", *flags)
    warnings = [line for line in answer.err.splitlines() if "window" in line]
    assert warnings == [
        "warning: gdn-h1 at length 4096 has a window of 512 tokens; the paper's is half of the "
        "length: -a gated_deltanet:hybrid=true,window=2048"
    ]
    given = cat_bench("run", "efficiency", "-a", "gdn-h1:window=512", "-a", "gdn", *flags)
    assert given.code == 0 and "window" not in given.err
    assert (
        "window" not in cat_bench("run", "efficiency", "-a", "gdn-h1", "--quick", "--dry-run").err
    )


def test_a_plan_for_the_cpu_is_held_against_host_memory(cat_bench: Cli):
    arguments = ("run", "efficiency", "-a", "dense", "--seq-len", "1024", "--device", "cpu")
    answer = cat_bench(*arguments, "--batch-size", "1,1000000", "--dry-run")
    header, small, large = answer.out.splitlines()[1:4]
    assert "GiB (host)" in header and "params M" in header and "non-embedding M" in header
    assert " not ruled out " in small and large.split()[-2] == "NO"


@pytest.fixture
def planned_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a GPU is planned and written, on any machine, and nothing is measured."""
    monkeypatch.setattr(measuring, "check_machine", lambda cases: None)
    monkeypatch.setattr(measuring, "measure", lambda target, cases, *_: runner.Summary())


@pytest.mark.usefixtures("planned_only")
@pytest.mark.parametrize("gpu_name", ["NVIDIA H100", None])
def test_paper_run_measures_what_this_machine_lacks(
    cat_bench: Cli, results_folder: Path, monkeypatch: pytest.MonkeyPatch, gpu_name: str | None
) -> None:
    """Another GPU has every case; also where nobody tells the name of this one."""
    from cat_bench.paper import _build

    cases = _build.exhibit("fig5").plan("h100")
    other = store.Run.create(results_folder, "other", {"gpu_name": "NVIDIA H200"}, cases, {})
    other.append([Record(case.key, "case", 1.0, "s") for case in cases])
    cat_bench("paper", "fig5", "--scale", "h100")
    assert len(store.folders(results_folder)) == 1
    gpu = environment._gpu() | {"gpu_name": gpu_name}
    monkeypatch.setattr(environment, "_gpu", lambda: gpu)
    cat_bench("paper", "fig5", "--scale", "h100", "--run")
    planned = store.find(results_folder, "fig5-h100").cases().values()
    assert {case.key for case in planned if not is_reference(case)} == {c.key for c in cases}


def test_a_misspelt_architecture_is_refused_where_nothing_is_missing(cat_bench: Cli) -> None:
    answer = cat_bench("paper", "fig4", "--scale", "smoke", "--only", "dennnse")
    assert answer.code == 2 and "unknown architecture 'dennnse'" in answer.err


def is_reference(case: Case) -> bool:
    return "reference" in dict(case.settings)


@pytest.mark.usefixtures("planned_only")
def test_paper_on_a_gpu_measures_the_drift_reference(cat_bench: Cli, results_folder: Path):
    cat_bench("paper", "fig2", "--scale", "h100", "--run")
    planned = list(store.find(results_folder, "fig2-h100").cases().values())
    references = [i for i, case in enumerate(planned) if is_reference(case)]
    num_cases = len(planned) - len(references)
    assert references == [*(21 * k for k in range(math.ceil(num_cases / 20))), len(planned) - 1]
    for number, index in enumerate(references):
        case = planned[index]
        assert case.settings == (("reference", str(number)),)
        assert (case.arch, case.batch_size, case.seq_len) == ("dense", 16, 1024)
        assert (case.scale, case.device, case.dtype) == ("h100", "cuda", "bfloat16")
    shapes = [(case.arch, case.batch_size) for case in planned if not is_reference(case)]
    assert len(shapes) == num_cases and shapes != sorted(shapes)  # still in random order


def test_paper_measures_on_where_some_cases_lack_a_package(
    cat_bench: Cli, results_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measuring, "measure", lambda target, cases, *_: runner.Summary())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(spec, "is_installed", lambda name: name != "fla")
    flags = ("paper", "fig2", "--scale", "h100", "--run", "--only")
    answer = cat_bench(*flags, "dense,gdn-h1")
    assert answer.code == 0, answer
    (warning,) = [line for line in answer.err.splitlines() if "package" in line]
    assert "cases of gated_deltanet on decode path 'cuda_graph' will be unsupported" in warning
    archs = {
        spec.parse(case.arch).name for case in store.find(results_folder, "1").cases().values()
    }
    assert archs == {"dense", "gated_deltanet"}
    refused(cat_bench(*flags, "gdn-h1", "--results", results_folder / "other"), "no case can run")


@pytest.mark.usefixtures("planned_only")
def test_only_finds_the_small_models_of_the_attention_exhibit(cat_bench: Cli, results_folder: Path):
    cat_bench("paper", "attention", "--scale", "h100", "--run", "--only", "cat-16,dense")
    planned = store.find(results_folder, "attention-h100").cases().values()
    archs = {spec.parse(case.arch).name for case in planned if not is_reference(case)}
    widths = {spec.parse(case.arch).overrides.get("width") for case in planned}
    assert archs == {"cat", "dense"} and widths == {None}  # no dense-2d


@pytest.mark.usefixtures("planned_only")
def test_implementations_of_the_attention_exhibit_can_be_chosen(
    cat_bench: Cli, results_folder: Path
):
    flags = ("paper", "attention", "--scale", "h100", "--run", "--implementation")
    cat_bench(*flags, "fused,causal")
    planned = store.find(results_folder, "attention-h100").cases().values()
    ways = [dict(case.settings).get("implementation") for case in planned]
    assert set(ways) == {"fused", "causal", None} and ways.count("fused") == 4  # None: references
    refused(cat_bench(*flags, "fusd"), "unknown implementation 'fusd'. Did you mean: fused?")


@pytest.mark.usefixtures("planned_only")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--only dense,cat-16 --batch-size 1 --seq-len 1024,1032",
            {(arch, 1, length) for arch in ("dense", "cat-16") for length in (1024, 1032)},
        ),
        ("--only cat-16 --batch-size 1,64 --seq-len 1024", {("cat-16", n, 1024) for n in (1, 64)}),
        ("--only dense --batch-size 64", {("dense", 64, 1024)}),
        ("--only dense --seq-len 1032", {("dense", 1, 1032)}),
    ],
)
def test_paper_measures_only_what_is_asked_for(
    cat_bench: Cli, results_folder: Path, flags: str, expected: set[tuple[str, int, int]]
):
    """Figure 2 has length 1024 and several batch sizes, ttft batch 1 and prompts of 1024 + 8."""
    answer = cat_bench("paper", "fig2,ttft", "--scale", "h100", "--run", *flags.split())
    assert answer.code == 0, answer.err
    cases = store.find(results_folder, "fig2-ttft-h100").cases().values()
    found = [(c.arch, c.batch_size, c.seq_len) for c in cases if not is_reference(c)]
    canonical = [(_settings.arch_text(arch, "h100", n), b, n) for arch, b, n in expected]
    assert sorted(found) == sorted(canonical)


@pytest.mark.usefixtures("planned_only")
def test_paper_makes_no_run_where_no_missing_case_is_asked_for(
    cat_bench: Cli, results_folder: Path
):
    answer = cat_bench("paper", "fig5", "--run", "--only", "mamba2")
    assert answer.code == 0 and "missing: 28 cases of dense, cat, cat:" in answer.err
    assert not list(results_folder.glob("0*"))
    answer = cat_bench("paper", "fig7", "--run", "--only", "cat-8")
    assert "based:window_cache=max_len" in answer.err  # what --only has to name
    answer = cat_bench("paper", "fig2", "--run", "--only", "cat:chunk_size=64")
    assert re.search(r"of (\S+, ){4}\S+ and \d+ more\.$", answer.err, re.MULTILINE)


def test_paper_dry_run_prints_what_run_would_measure(
    cat_bench: Cli, results_folder: Path, planned_only: None
):
    """The same cases in the same order, and no run folder."""
    asked = ("paper", "fig2", "--scale", "h100", "--only", "dense,cat-8", "--batch-size", "1,256")
    answer = cat_bench(*asked, "--dry-run", "--gpu", "H100", "--repeats", "3", "--json")
    assert answer.code == 0 and not list(results_folder.glob("0*"))
    predicted = json.loads(answer.out)
    assert all(row["floor_s"] > 0 for row in predicted)
    cat_bench(*asked, "--run", "--repeats", "3")
    measured = store.find(results_folder, "fig2-h100").cases()
    assert [row["key"] for row in predicted] == list(measured) and len(predicted) >= 4
    table = cat_bench(*asked, "--dry-run", "--gpu", "H100").out
    assert "CAT-8" in table and table.endswith("Nothing was run.\n")
    assert "plan: no case." in cat_bench("paper", "fig4", "--dry-run").out
    refused(cat_bench(*asked, "--dry-run", "--repeats", "0"), "--repeats")
    refused(cat_bench("paper", "--dry-run"), "--dry-run needs an exhibit")
    refused(cat_bench("paper", "fig2", "--gpu", "H100"), "--gpu only predicts")


def test_paper_names_the_runs_that_it_skipped(cat_bench: Cli, monkeypatch: pytest.MonkeyPatch):
    from cat_bench.paper import _build

    built = SimpleNamespace(statuses=[], files=[], report_html=None, skipped=("0007-x: broken.",))
    monkeypatch.setattr(_build, "build", lambda *_: built)
    answer = cat_bench("paper", "fig4", "--json")
    assert answer.code == 0 and "warning: 0007-x: broken." in answer.err
    assert json.loads(answer.out)["files"] == []


def test_listing_runs_counts_closed_cases_without_parsing_samples(
    cat_bench: Cli, one_run: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = one_run / "records.jsonl"
    rows.write_bytes(rows.read_bytes() * 2 + b'{"case": "torn", "metric": "case"')
    with monkeypatch.context() as patch:
        patch.setattr(store.Run, "_rows", lambda self: 1 / 0)
        assert "1 of 1 cases" in cat_bench("list", "runs").out
    rows.write_bytes(b"")
    assert "0 of 1 cases" in cat_bench("list", "runs").out


def test_match_changes_the_width_of_the_others(cat_bench: Cli):
    answer = cat_bench(
        *("run", "efficiency", "-a", "dense", "-a", "cat-8", "--batch-size", "1", "--dry-run"),
        *("--device", "cpu", "--match", "params", "--json"),
    )
    params = {row["arch"].split(":")[0]: row["num_params"] for row in json.loads(answer.out)}
    assert params["dense"] == 257_451_008
    assert params["cat"] == pytest.approx(params["dense"], rel=0.15)


def test_show_prints_the_table_or_one_case(cat_bench: Cli, one_run: Path):
    table = cat_bench("show", "first")
    assert table.code == 0 and "latency s" in table.out and "CPU: " in table.out
    document = json.loads(cat_bench("show", "first", "--json").out)
    assert document["rows"][0]["latency_s"] > 0
    key = next(iter(store.Run.open(one_run).closed()))
    text = cat_bench("show", "1", "--case", key[:6])
    assert f"case {key}" in text.out and "samples: " in text.out
    case = json.loads(cat_bench("show", "1", "--case", key, "--json").out)
    assert case["case"]["suite"] == "efficiency"
    assert {"case", "latency_s"} <= {row["metric"] for row in case["records"]}
    refused(cat_bench("show", "1", "--case", "xyz"), "'xyz' is no case")


@pytest.mark.parametrize(
    ("form", "mark"),
    [("csv", "latency_s"), ("markdown", "|"), ("latex", "\\toprule"), ("html", "<html")],
)
def test_report_writes_every_format(cat_bench: Cli, one_run: Path, form: str, mark: str):
    printed = cat_bench("report", "1", "--format", form)
    assert printed.code == 0 and mark in printed.out
    path = one_run.parent / "report.txt"
    written = cat_bench("report", "1", "--format", form, "--published", "-o", path)
    assert written.out == "" and str(path) in written.err and mark in path.read_text()


@pytest.mark.parametrize(
    ("ending", "mark"),
    [(".csv", ","), (".md", "| "), (".tex", "\\toprule"), (".HTML", "<html"), (".json", "[")],
)
def test_a_report_has_the_format_of_its_ending(
    cat_bench: Cli, one_run: Path, ending: str, mark: str
):
    path, usual = one_run.parent / f"report{ending}", one_run.parent / "report.txt"
    assert cat_bench("report", "1", "-o", path).code == cat_bench("report", "1", "-o", usual).code
    assert mark in path.read_text() and path.read_text() != usual.read_text()
    other = ("--format", "latex") if ending != ".tex" else ("--json",)
    path.unlink()
    refused(cat_bench("report", "1", *other, "-o", path), f"report{ending} must hold ", "asked for")
    assert not path.exists()


@pytest.mark.parametrize("flags", [(), ("--format", "latex"), ("--json",)])
def test_a_report_of_an_unknown_ending_is_refused(cat_bench: Cli, one_run: Path, flags: tuple):
    path = one_run.parent / "report.pdf"
    answer = cat_bench("report", "1", *flags, "-o", path)
    refused(answer, "has the ending .pdf, which no format", "Known endings: .json, .csv, .md,")
    assert not path.exists()


def test_compare_exits_with_4_where_a_case_got_slower(cat_bench: Cli, one_run: Path):
    slower = one_run.parent / "0002-second"
    shutil.copytree(one_run, slower)
    for path, factor in ((one_run, 1.0), (slower, 2.0)):
        rows = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
        for row in rows:
            if row["metric"] == "latency_s":  # ten repeats can tell a factor of 2 apart
                row["samples"] = [factor * (1 + 0.001 * i) for i in range(10)]
                row["value"] = row["samples"][5]
        (path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cat_bench("compare", "1", "1").code == 0
    worse = cat_bench("compare", "first", "second")
    assert worse.code == 4 and "slower" in worse.out and "+" in worse.out
    assert cat_bench("compare", "second", "first").code == 0


def sound(note: str) -> str:
    """The same architecture without its fault, in as many versions as there are notes."""
    return FAULTY.replace("raise RuntimeError", f"return super().step(token, state)  # {note}")


@pytest.mark.slow
def test_a_resume_mixes_no_two_versions_of_a_file(
    cat_bench: Cli, tmp_path: Path, results_folder: Path
):
    """One of two cases is measured; then the file, or one that it imports, is edited."""
    mine, beside = tmp_path / "mine.py", tmp_path / "cat_bench_beside.py"
    mine.write_text(f"import cat_bench_beside\n{sound('one')}")
    beside.write_text("")
    flags = ("--quick", "--batch-size", "1,2", "--seq-len", "16", "--repeats", "1")
    assert cat_bench("run", "efficiency", "-a", mine, *flags, "--name", "mixed").code == 0
    folder = store.find(results_folder, "mixed").path
    rows = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(rows[0])["case"]
    kept = "".join(row for row in rows if json.loads(row)["case"] == first)
    (folder / "records.jsonl").write_text(kept)  # as after an interruption

    for path, text in ((mine, sound("two")), (beside, "edited = True\n")):
        original = path.read_text()
        path.write_text(text)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        answer = cat_bench("run", "--resume", "mixed")
        refused(answer, f"{mine}, or a file beside it that it imports, has changed since the plan")
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
        path.write_text(original)
    mine.rename(tmp_path / "gone.py")
    refused(cat_bench("run", "--resume", "mixed"), "cannot be continued here: no architecture file")
    (tmp_path / "gone.py").rename(mine)

    assert cat_bench("run", "--resume", "mixed").code == 0
    mine.write_text(sound("three"))
    assert cat_bench("run", "--resume", "mixed").code == 0  # nothing is left to be measured


def test_a_run_whose_plan_tells_no_version_can_be_continued(
    cat_bench: Cli, tmp_path: Path, results_folder: Path
):
    """Runs of before plan.json had that field."""
    mine = tmp_path / "mine.py"
    mine.write_text(sound("one"))
    assert cat_bench("run", *TINY_RUN[:1], "-a", mine, *TINY_RUN[3:], "--name", "old").code == 0
    folder = store.find(results_folder, "old").path
    plan = json.loads((folder / "plan.json").read_text())
    for row in plan["resolved"].values():
        del row["source_hash"]
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "records.jsonl").unlink()
    mine.write_text(sound("two"))
    assert cat_bench("run", "--resume", "old").code == 0
    assert list(store.find(results_folder, "old").closed().values()) == ["ok"]


def test_a_faulty_case_is_a_row_and_exit_code_3(cat_bench: Cli, tmp_path: Path, one_run: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(FAULTY)
    answer = cat_bench("run", *TINY_RUN[:1], "-a", mine, *TINY_RUN[3:], "--name", "faulty")
    assert answer.code == 3
    assert "planted fault" in answer.out and "1 case failed" in answer.err
    run = store.find(one_run.parent, "faulty")
    assert list(run.closed().values()) == ["failed"]
    (planned,) = run.resolved().values()
    mine.write_text(sound("repaired"))
    again = cat_bench("run", "--resume", "faulty")
    assert again.code == 0 and list(run.closed().values()) == ["failed"]  # closed: not run again
    retried = cat_bench("run", "--resume", "faulty", "--retry", "failed")
    assert retried.code == 0 and list(run.closed().values()) == ["ok"]
    (planned_anew,) = run.resolved().values()
    assert planned_anew.pop("source_hash") != planned.pop("source_hash")
    assert planned_anew == planned


@pytest.mark.slow
def test_an_interruption_keeps_what_is_closed_and_resume_does_the_rest(
    cat_bench: Cli, results_folder: Path
):
    command = [sys.executable, "-m", "cat_bench", "run", "efficiency", "-a", "dense", "--quick"]
    grid = ["--batch-size", "1,2,3", "--seq-len", "16", "--name", "stopped"]
    process = subprocess.Popen(
        [*command, *grid],
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell inherits "ignore SIGINT"; a person's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    rows = results_folder / "0001-stopped" / "records.jsonl"
    deadline_s = time.monotonic() + 240
    while not rows.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Continue: cat-bench run --resume 0001-stopped" in err
    kept = rows.read_bytes()
    run = store.find(results_folder, "stopped")
    assert 1 <= len(run.closed()) < 3
    assert cat_bench("run", "--resume", "stopped").code == 0
    assert set(run.closed().values()) == {"ok"} and len(run.closed()) == 3
    assert rows.read_bytes().startswith(kept)


def test_doctor_names_every_check_and_its_repair(cat_bench: Cli):
    answer = cat_bench("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(answer.out)}
    assert {"python", "torch", "cuda", "disk", "architecture cat"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["status"] == "fail")
    expected = 3 if any(check["status"] == "fail" for check in checks.values()) else 0
    assert answer.code == expected


def test_paper_lists_every_exhibit_with_an_honest_status(cat_bench: Cli):
    statuses = json.loads(cat_bench("paper", "--json").out)
    found = {status["name"]: status["status"] for status in statuses}
    assert len(found) == 25  # Tables 1 to 13, Figures 2 to 8, five of our own
    assert found["fig2"] == "not run" and found["table1"].startswith("not built")
    listed = cat_bench("paper")
    assert listed.code == 0 and re.search("^fig2 +Figure 2: ", listed.out, re.MULTILINE)


def test_paper_renders_what_needs_no_run_and_says_where(cat_bench: Cli, results_folder: Path):
    answer = cat_bench("paper", "fig4", "--scale", "smoke")
    folder = results_folder / "paper" / "smoke"
    assert answer.code == 0
    assert str(folder) in answer.out and str(folder / "report.html") in answer.out
    assert {"fig4.svg", "fig4.pdf", "report.html"} <= {path.name for path in folder.iterdir()}
    assert not list(results_folder.glob("0*"))  # Figure 4 measures nothing


def test_paper_measures_nothing_beyond_smoke_unless_asked(cat_bench: Cli, results_folder: Path):
    answer = cat_bench("paper", "fig2", "--scale", "h100")
    assert answer.code == 0 and "not run" in answer.out
    assert not list(results_folder.glob("0*"))


def test_paper_refuses_flags_of_measuring_where_nothing_is_measured(cat_bench: Cli):
    given = ("--only dense", "--batch-size 1", "--repeats 5", "--implementation fused")
    for flags in given:
        answer = cat_bench("paper", "fig2", "--scale", "h100", *flags.split())
        assert answer.code == 2 and "Add --run" in answer.err
    answer = cat_bench("paper", "fig2", "--scale", "smoke", "--repeats", "0")
    assert answer.code == 2 and "--repeats 0 is impossible" in answer.err


@pytest.mark.slow
def test_paper_smoke_measures_what_is_missing_and_only_once(cat_bench: Cli, results_folder: Path):
    first = cat_bench("paper", "table3", "--scale", "smoke", "--repeats", "2")
    assert first.code == 0, first.err
    (run,) = [store.Run.open(path) for path in store.folders(results_folder)]
    records = store.frame([run])
    assert {len(s) for s in records.loc[records["metric"] == "latency_s", "samples"]} == {2}
    assert run.name == "0001-table3-smoke" and set(run.closed().values()) == {"ok"}
    table = (results_folder / "paper" / "smoke" / "table3.md").read_text()
    assert "Dense" in table and "CAT-8" in table
    again = cat_bench("paper", "table3", "--scale", "smoke")
    assert again.code == 0 and "measuring" not in again.err


# --- start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["list"], ["list", "--json"], ["list", "-a", "dense"]],
)
def test_help_and_list_load_nothing_heavy(arguments: list[str], one_run: Path):
    code = (
        "import atexit, sys; from cat_bench.cli import main;"
        "atexit.register(lambda: print({'torch', 'pandas', 'scipy', 'matplotlib', 'rich'}"
        " & set(sys.modules), file=sys.stderr)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "set()"
    assert done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_help_and_list_take_less_than_0_3_s(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Processor time, compiled once as for every user; the best of many starts, so that other
    work on the machine does not count. Where even that is slow, Typer alone is the measure.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    ours = [sys.executable, "-m", "cat_bench", *arguments]
    typer_alone = [sys.executable, "-c", "import typer, typer._adapters"]  # with pydantic
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 40 and not any(ours_s < 0.3 for ours_s, _ in pairs):
        pairs.append((_processor_s(ours), _processor_s(typer_alone)))
    ours_s, typer_s = (min(seconds) for seconds in zip(*pairs, strict=True))
    assert ours_s < 0.3 or ours_s < 1.6 * typer_s, pairs


def _processor_s(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


def test_an_internal_error_is_one_line_and_code_1():
    code = "import sys; from cat_bench import cli, spec;spec.suites = lambda: 1 / 0; cli.main()"
    command = [sys.executable, "-c", code, "list", "suites"]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    assert (
        plain.stderr.startswith("internal error: ZeroDivisionError") and "--debug" in plain.stderr
    )
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1 and "Traceback" in debug.stderr
