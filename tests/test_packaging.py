"""The package as users meet it: import rules, lint, README commands, what travels in the wheel."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cat_bench import __version__, packages, spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH_FREE = (
    "spec",
    "case",
    "mask",
    "store",
    "stats",
    "report",
    "figures",
    "listing",
    "paper._build",
)


SCRIPTS = Path(sys.executable).parent  # of this environment, activated or not


def tool(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


# --- import rules and lint -----------------------------------------------------------------------


def test_import_rules_hold():
    done = tool(SCRIPTS / "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("cat_bench/spec.py", "from cat_bench import blocks", "never reach torch"),
        ("baselines/dense.py", "from cat_bench import runner", "baselines know no suite"),
        ("cat_bench/suites/efficiency.py", "from cat_bench import report", "suites know no report"),
    ],
)
def test_a_planted_import_breaks_its_rule(tmp_path: Path, module: str, line: str, contract: str):
    for package in ("cat_bench", "baselines", "recall_tasks"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n\ndef planted():\n    {line}\n")
    done = subprocess.run(
        [SCRIPTS / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


def test_ruff_finds_nothing():
    done = tool(SCRIPTS / "ruff", "check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "rule"),
    [("cat_bench/store.py", "TID253"), ("cat_bench/suites/mine.py", "TID253")],
)
def test_ruff_refuses_torch_at_the_top_of_a_torch_free_module(module: str, rule: str):
    code = '"""Planted."""\n\nimport torch\n\nprint(torch.__version__)\n'
    command = [SCRIPTS / "ruff", "check", "--no-cache", "--stdin-filename", module, "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True)
    assert done.returncode == 1
    assert rule in done.stdout and "T201" in done.stdout  # and no print outside cli.py


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free_modules_load_without_torch(module: str):
    code = f"import sys, cat_bench.{module}; sys.exit('torch' in sys.modules)"
    assert tool(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize("module", sorted(p.stem for p in (ROOT / "baselines").glob("[a-z]*.py")))
def test_baselines_load_without_the_compiler(module: str):
    """Inductor takes 4 seconds to load, in the process of every case."""
    code = f"import sys, baselines.{module}; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert tool(sys.executable, "-c", code).returncode == 0


# --- README --------------------------------------------------------------------------------------


def test_the_first_two_blocks_are_the_main_job_and_the_tests():
    job, tests = BLOCKS[:2]
    assert job.rstrip().endswith("cat-bench paper all --scale smoke")
    assert tests.rstrip().endswith('pytest -q -m "not gpu and not soak"')
    for block in (job, tests):  # each is enough by itself on a fresh machine
        assert "python3 -m venv .venv" in block
        assert "-c constraints/cpu.txt -e" in block


def test_ci_runs_the_second_block():
    done = tool(str(ROOT / ".ci" / "run"), "--print", cwd=ROOT / "tests")
    assert done.returncode == 0 and done.stdout == BLOCKS[1]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_are_valid_bash(number: int):
    done = subprocess.run(["bash", "-n"], input=BLOCKS[number], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def readme_commands(verb: str) -> list[str]:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"cat-bench {verb}")]


@pytest.mark.parametrize("line", readme_commands("run"))
def test_runs_of_the_readme_can_be_planned(line: str, results_folder: Path):
    device = [] if "--quick" in line else ["--device", "cuda"]
    arguments = [*shlex.split(line)[1:], *device, "--dry-run"]
    done = tool(sys.executable, "-m", "cat_bench", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Nothing was run." in done.stdout and not results_folder.exists()


@pytest.mark.parametrize("line", readme_commands(""))
def test_verbs_and_flags_of_the_readme_exist(line: str):
    _, verb, *arguments = shlex.split(line)
    help_text = tool(sys.executable, "-m", "cat_bench", verb, "--help").stdout
    assert help_text, f"no verb {verb}"
    for flag in (argument for argument in arguments if argument.startswith("-")):
        assert re.search(rf"(^|[ ,]){flag}\b", help_text, flags=re.MULTILINE), f"no flag {flag}"


@pytest.mark.parametrize("line", [*readme_commands("list"), *readme_commands("doctor")])
def test_what_shows_and_measures_nothing_runs(line: str):
    done = tool(sys.executable, "-m", "cat_bench", *shlex.split(line)[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_the_five_commands_work_on_a_fresh_clone(results_folder: Path):
    """One after another, among the runs that are committed."""
    ignored = shutil.ignore_patterns("*quick*", "*smoke*", "h200", "paper")
    shutil.copytree(ROOT / "results", results_folder, ignore=ignored)
    (block,) = [block for block in BLOCKS if "cat-bench show" in block]
    said = {}
    for line in block.splitlines():
        verb, *arguments = shlex.split(line)[1:]
        done = tool(sys.executable, "-m", "cat_bench", verb, *arguments)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[verb] = done.stdout
    assert list(said) == ["list", "run", "show", "compare", "paper"]
    assert "CAT-8 (" in said["show"] and said["show"] in said["run"]
    assert "comparable cases got worse." in said["compare"]
    assert (results_folder / "paper" / "h100" / "fig2.svg").stat().st_size


def test_the_readme_tree_names_every_module_and_nothing_else():
    tree = README.split("## Tree")[1].split("```")[1]
    named = set(re.findall(r"([a-z_]+\.(?:py|toml))", tree))
    modules = {path.name for path in (ROOT / "cat_bench").glob("[a-z]*.py")}
    assert named == modules | {"published.toml", "test_contract.py"}


# --- metadata and wheel --------------------------------------------------------------------------


def test_metadata_says_what_the_code_needs():
    project = PYPROJECT["project"]
    assert project["requires-python"] == ">=3.11"
    assert project["scripts"] == {"cat-bench": "cat_bench.cli:main"}
    assert set(project["optional-dependencies"]) == {"cuda", "eval", "dev"}
    assert (ROOT / "constraints" / "cpu.txt").read_text().strip() == "torch==2.13.0"


def test_constraints_and_extras_give_versions_that_will_do():
    extras = PYPROJECT["project"]["optional-dependencies"]
    extras = {
        one.name: one.specifier for one in map(Requirement, [*extras["cuda"], *extras["eval"]])
    }
    needs = {one.distribution: one.needs for one in packages.PACKAGES}
    needs |= {one.core: one.needs for one in packages.PACKAGES if one.core}
    for name in extras.keys() & needs.keys():
        assert extras[name] == SpecifierSet(needs[name]), name
    for line in (ROOT / "constraints" / "cuda.txt").read_text().splitlines():
        name, version = line.split("==")
        assert extras.get(name, SpecifierSet(needs.get(name, ""))).contains(version), line
    assert packages.CUDA in README


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_their_data(tmp_path: Path):
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"cat_bench-{__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"cat_bench", "baselines", "recall_tasks"}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cat_bench").glob("*.*")}
    assert {"cat_bench/published.toml", "cat_bench/report.html.j2"} <= data <= names
    own = {info.path.relative_to(ROOT).as_posix() for info in spec.architectures()}
    assert own <= names
