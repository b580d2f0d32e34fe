"""Our loop against upstream's: pairs in the plan, honest endings, the ratio in the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cat_bench import measurements, report, tables
from cat_bench.architecture import build
from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.spec import describe, parse
from cat_bench.store import Run, find
from cat_bench.suites import upstream

MINE = '''"""Dense with a program of its own authors."""
from dataclasses import dataclass

import torch

from baselines import dense
{head}

@dataclass(frozen=True)
class Config(dense.Config):
    width: int = 64
    num_layers: int = 1
    vocab_size: int = 64

class Model(dense.Model):
    decode_paths = ("eager", "upstream_graph", "upstream")

def upstream_generate(model):
    def run(prompt, seq_len):
        tokens = prompt
        while tokens.shape[1] < seq_len{fault}:
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
        assert not tokens.requires_grad and torch.is_inference_mode_enabled()
        return tokens
    return run
'''


def write(folder: Path, head: str = "", fault: str = "") -> str:
    path = folder / "mine.py"
    path.write_text(MINE.format(head=head, fault=fault))
    return str(path)


def pair(arch: str, **options) -> dict[str, Case]:
    planned = upstream.plan([parse(arch)], Options(**{"batch_sizes": (2,), **options}))
    return {dict(case.settings)["loop"]: case for case in planned}


def rows(case: Case) -> dict[str, Record]:
    model = build(parse(case.arch), case.decode_path, case.device, case.dtype, case.seed)
    return {record.metric: record for record in upstream.measure(case, model)}


# --- plan and measure -----------------------------------------------------------------------------


def test_a_pair_differs_in_nothing_but_its_loop(tmp_path: Path) -> None:
    cases = upstream.plan([parse(write(tmp_path))], Options(batch_sizes=(1, 2), seq_lens=(32,)))
    assert loops_of(cases) == ["ours", "upstream", "upstream", "ours"]
    ours, theirs = (vars(case) | {"settings": (), "key": ""} for case in cases[:2])
    assert ours == theirs and ours["suite"] == "upstream" and ours["decode_path"] == "eager"


def loops_of(cases: list[Case]) -> list[str]:
    return [dict(case.settings)["loop"] for case in cases if case.suite == "upstream"]


def test_a_drift_favours_neither_loop(tmp_path: Path) -> None:
    """Pairs stay together; each loop runs first in half of them, drift references in between."""
    arch, sizes = parse(write(tmp_path)), {"batch_sizes": (1, 2, 3, 4), "seq_lens": (32,)}
    for every in (None, 1, 3):
        cases = upstream.plan([arch], Options(**sizes, reference_every=every))
        assert loops_of(cases) == ["ours", "upstream", "upstream", "ours"] * 2
        pairs = [case.batch_size for case in cases if case.suite == "upstream"]
        assert pairs[::2] == pairs[1::2]


def test_our_side_takes_the_fastest_path_or_the_one_asked_for(tmp_path: Path) -> None:
    arch = write(tmp_path)
    assert pair(arch, device="cuda")["ours"].decode_path == "upstream_graph"
    assert pair(arch, device="cuda", decode_path="upstream")["ours"].decode_path == "upstream"


def test_references_stay_cases_of_efficiency(tmp_path: Path) -> None:
    options = Options(batch_sizes=(1,), seq_lens=(32,), reference_every=20)
    cases = upstream.plan([parse(write(tmp_path))], options)
    assert [case.suite for case in cases] == ["efficiency", "upstream", "upstream", "efficiency"]


def test_a_forward_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--forward-path says how training's forward pass"):
        pair(write(tmp_path), forward_path="eager")


def test_an_architecture_without_upstream_program_is_refused() -> None:
    with pytest.raises(UserError) as error:
        upstream.plan([parse("dense")], Options())
    assert "dense has no upstream program" in error.value.message
    able = [name for name in ("mamba2", "gated_deltanet") if "upstream_generate" in exports(name)]
    assert all(name in error.value.hint for name in able)


@pytest.mark.parametrize(
    ("arch", "said", "hint"),
    [
        ("gdn-h1", "needs flash-attn", "gated_deltanet without hybrid has one."),
        ("mamba2:norm_eps=1e-6", "has 1e-5 built in", "mamba2 without norm_eps has one."),
    ],
)
def test_a_model_that_their_program_cannot_be_is_refused_by_the_plan(
    arch: str, said: str, hint: str
) -> None:
    """Not after our side of the whole grid is measured."""
    with pytest.raises(UserError) as error:
        upstream.plan([parse("gdn"), parse(arch)], Options(device="cuda"))
    assert error.value.message.startswith(f"{parse(arch).text} has no upstream program")
    assert said in error.value.message and error.value.hint == hint


def test_a_dtype_that_their_kernels_lack_is_refused_by_the_plan(tmp_path: Path) -> None:
    """On our eager path, too, which has float64."""
    options = Options(device="cuda", dtype="float64", decode_path="eager")
    for arch in ("mamba2", "gdn", write(tmp_path, head='REQUIRES = {"upstream": "torch"}')):
        said = f"the upstream program of {parse(arch).text} computes in float32, so dtype float64"
        with pytest.raises(UserError, match=said):
            upstream.plan([parse(arch)], options)
    assert pair(write(tmp_path), dtype="float64")  # without such kernels


def exports(name: str) -> frozenset[str]:
    return describe(name).exports


def test_both_loops_are_timed_alike(tmp_path: Path) -> None:
    for case in pair(write(tmp_path), scale="smoke", seq_lens=(16,)).values():
        found = rows(case)
        assert set(found) == {"compile_s", "first_call_s", "latency_s", "host_latency_s"}
        assert len(found["latency_s"].samples) == 3 and found["latency_s"].unit == "s"


def test_a_loop_that_stops_early_is_a_fault(tmp_path: Path) -> None:
    case = pair(write(tmp_path, fault=" - 1"), scale="smoke", seq_lens=(16,))["upstream"]
    with pytest.raises(ValueError, match=r"shape \(2, 15\), expected \(2, 16\)"):
        rows(case)


@pytest.mark.parametrize(
    ("package", "said", "hint"),
    [
        ("no_such_package_anywhere", "needs the package no_such_package_anywhere", "pip install"),
        ("torch", "kernels for GPUs only, got device 'cpu'", "--device cuda"),
    ],
)
def test_what_upstream_lacks_is_one_sentence(
    tmp_path: Path, package: str, said: str, hint: str
) -> None:
    arch = write(tmp_path, head=f'REQUIRES = {{"upstream_graph": "{package}"}}')
    cases = pair(arch, scale="smoke", seq_lens=(16,))
    assert "latency_s" in rows(cases["ours"])
    with pytest.raises(UserError) as error:
        rows(cases["upstream"])
    assert said in error.value.message and hint in error.value.hint


def test_quick_gives_an_honest_row_where_the_package_is_missing(tmp_path: Path) -> None:
    """Through the real command and its workers: our side is timed, theirs says what it needs."""
    arch = write(tmp_path, head='REQUIRES = {"upstream_graph": "no_such_package_anywhere"}')
    command = [sys.executable, "-m", "cat_bench", "run", "upstream", "-a", arch, "--quick"]
    sizes = ["--batch-size", "1", "--seq-len", "16", "--results", str(tmp_path / "results")]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "1 case unsupported;" in done.stderr
    run = find(tmp_path / "results", "1")
    assert sorted(run.closed().values()) == ["ok", "unsupported"]
    assert "Install it: pip install no_such_package_anywhere" in done.stdout


# --- tables ---------------------------------------------------------------------------------------

GPU = {"gpu_name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0"}


def timed(seconds: float):
    return lambda key: [
        Record(key, "latency_s", seconds, "s", [seconds] * 5),
        Record(key, "case", 9.0, "s"),
    ]


def missing(key: str) -> list[Record]:
    text = "needs the package mamba_ssm\nInstall it: pip install mamba-ssm"
    return [Record(key, "case", 1.0, "s", status="unsupported", error=text)]


def a_run(folder: Path, suite: str, found: dict[tuple, object]) -> Run:
    """`found`: (batch size, loop or None) -> what makes the rows of that case."""
    cases = {
        Case(
            suite, "mamba2", batch, 8, 1024, "bfloat16", "cuda", decode_path="cuda_graph",
            settings=(("loop", loop),) if loop else (),
        ): make
        for (batch, loop), make in found.items()
    }  # fmt: skip
    resolved = {case.key: {"label": "Mamba2", "config": {}} for case in cases}
    run = Run.create(folder, suite, GPU, list(cases), resolved)
    for case, make in cases.items():
        run.append(make(case.key))
    return run


@pytest.fixture
def loops(tmp_path: Path) -> Run:
    made = {
        (1, "ours"): timed(1.0), (1, "upstream"): timed(2.0),
        (64, "ours"): timed(2.2), (64, "upstream"): timed(2.0),
        (256, "ours"): timed(3.0), (256, "upstream"): missing,
    }  # fmt: skip
    return a_run(tmp_path, "upstream", made)


def test_show_prints_the_ratio_and_the_mark_once_per_pair(loops: Run) -> None:
    made = tables.run_table(loops)
    assert list(made.text["loop"]) == ["ours", "upstream"] * 3
    assert list(made.text["loop ratio [95 % CI]"]) == [
        "0.500 [0.500, 0.500]", "-", "1.10 [1.10, 1.10] underserved", "-", "-", "-",
    ]  # fmt: skip
    assert made.text["latency s [95 % CI]"].iloc[-1] == "unsupported"
    assert any("pip install mamba-ssm" in note for note in made.notes)
    assert any(note.startswith("loop ratio = our latency") for note in made.notes)
    assert "underserved" in report.terminal(made)


def test_a_report_marks_the_architecture_by_its_worst_shape(tmp_path: Path, loops: Run) -> None:
    efficiency = a_run(tmp_path, "efficiency", {(1, None): timed(1.0), (16, None): timed(1.5)})
    made = tables.records_table(measurements.frame([efficiency, loops]))
    assert list(made.text["loop ratio [95 % CI]"]) == ["1.10 [1.10, 1.10] underserved"] * 2
    text = report.report_text([efficiency, loops], "table")
    assert text.count("loop ratio [95 % CI]") == 2  # the efficiency table, then upstream's own
    document = json.loads(report.report_text([efficiency, loops], "json"))
    ratios = {
        (row["suite"], row["batch_size"], row["loop"]): row["loop_ratio"]
        for row in document["rows"]
    }
    assert ratios["efficiency", 16, ""] == pytest.approx(1.1)
    assert ratios["upstream", 1, "ours"] == 0.5 and ratios["upstream", 256, "ours"] is None


def test_each_run_is_held_to_its_own_upstream_rows(tmp_path: Path) -> None:
    """Ours at 2 s and 3 s, theirs at 1 s and 3 s: ratios of 2 and 1."""
    runs = [
        a_run(tmp_path, "upstream", {(1, "ours"): timed(ours), (1, "upstream"): timed(theirs)})
        for ours, theirs in ((2.0, 1.0), (3.0, 3.0))
    ]
    rows = measurements.measured(measurements.frame(runs))
    ours = rows[rows["loop"] == "ours"].set_index("run")["loop_ratio"]
    assert ours.to_dict() == {"0001-upstream": 2.0, "0002-upstream": 1.0}


def test_without_upstream_rows_nothing_changes(tmp_path: Path) -> None:
    made = tables.run_table(a_run(tmp_path, "efficiency", {(1, None): timed(1.0)}))
    assert not any("loop" in title for title in made.text)
    assert not any("loop" in note for note in made.notes)
