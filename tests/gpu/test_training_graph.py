"""The training step as CUDA graphs against the same step launched from Python.

Small models under bfloat16 autocast, as the suite trains them. Both run the same kernels, so only
sums in no fixed order (atomics) differ; with weights 1e-6 apart, eight such steps come out 1e-3 of
the loss apart, and 0.01 where it is below 0.3. A step changes the loss by a tenth or more.
"""

import gc
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cat_bench.architecture import build
from cat_bench.case import Case, Record
from cat_bench.spec import describe, parse
from cat_bench.suites import training
from cat_bench.train_graph import WARMUPS

pytestmark = pytest.mark.gpu

CHECKPOINT = ("checkpoint", "true")
DENSE = "dense:num_layers=2,vocab_size=512,width=128"
CAT = "cat:chunk_size=8,max_len=128,num_layers=2,vocab_size=512,width=128"
MAMBA2 = "mamba2:num_layers=2,vocab_size=512,width=256"
GDN = "gated_deltanet:num_heads=2,num_layers=2,vocab_size=512,width=256"
H1 = f"{GDN},hybrid=true,window=96"
BASED = "based:num_heads=2,pattern=cls,vocab_size=512,width=128"
NUM_STEPS = 5


def case_of(arch: str, path: str, *settings: tuple[str, str]) -> Case:
    settings = tuple(sorted([("autocast", "bfloat16"), *settings]))
    return Case(
        "training", parse(arch).text, batch_size=2, prompt_len=0, seq_len=128, dtype="float32",
        device="cuda", forward_path=path, settings=settings,
    )  # fmt: skip


CASES = {
    "dense": case_of(DENSE, "compile"),
    "dense-eager": case_of(DENSE, "eager"),
    "dense-checkpointed": case_of(DENSE, "compile", CHECKPOINT),
    "cat": case_of(CAT, "compile"),
    "sparse": case_of("sparse:num_layers=2,vocab_size=512,width=128", "compile"),
    "sliding": case_of("sliding_window:num_layers=2,vocab_size=512,width=128,window=32", "compile"),
    "based": case_of(BASED, "upstream"),
    "mamba2": case_of(MAMBA2, "upstream"),
    "mamba2-checkpointed": case_of(MAMBA2, "upstream", CHECKPOINT),
    "gdn": case_of(GDN, "upstream"),
    "gdn-h1": case_of(H1, "upstream"),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def few_compilations() -> None:
    torch.compiler.reset()


def skip_where_it_cannot_run(case: Case) -> None:
    info = describe(parse(case.arch).name)
    lacking = info.lacking("forward", case.forward_path)
    if lacking:
        pytest.skip(f"{info.name} needs {' and '.join(lacking)}")
    if info.name == "mamba2" and importlib.util.find_spec("causal_conv1d_cuda") is None:
        pytest.skip("needs a compiled causal-conv1d")
    if info.name == "gated_deltanet":
        from test_gdn_upstream import skip_where_triton_miscompiles

        skip_where_triton_miscompiles()


def step_of(case: Case) -> training.Step:
    """With the same weights at every call."""
    model = build(parse(case.arch), device="cuda", forward_path=case.forward_path)
    training._follow_settings(case, model)
    return training.Step(case, model)


def losses_of(step: training.Step, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        step()
        losses.append(float(step.loss))
    return losses


@EACH
def test_losses_are_those_of_steps_launched_from_python(case: Case) -> None:
    """Step by step, so weights, moments and step counters go on from replay to replay."""
    skip_where_it_cannot_run(case)
    launched = losses_of(step_of(case), WARMUPS + NUM_STEPS)[WARMUPS:]
    step = step_of(case)
    step.capture()  # trains WARMUPS steps; capturing itself must train none
    replayed = losses_of(step, NUM_STEPS)
    torch.testing.assert_close(replayed, launched, rtol=1e-2, atol=1e-2)
    assert all(after < 0.95 * before for before, after in zip(launched, launched[1:], strict=False))


@pytest.mark.parametrize("name", ["dense", "mamba2"])
def test_gradients_are_those_of_one_step(name: str) -> None:
    """After the backward part, and not added up: twice the gradients would be twice the norm."""
    skip_where_it_cannot_run(CASES[name])
    launched = norms_of(step_of(CASES[name]), WARMUPS + NUM_STEPS)[WARMUPS:]
    step = step_of(CASES[name])
    step.capture()
    torch.testing.assert_close(norms_of(step, NUM_STEPS), launched, rtol=0.1, atol=0)


def norms_of(step: training.Step, num_steps: int) -> list[float]:
    """Of the gradients after each backward part, before they are clipped."""
    norms = []

    def on_part() -> None:
        gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    for _ in range(num_steps):
        step(on_part)
    return norms[1::3]


def measured(case: Case) -> dict[str, Record]:
    gc.collect()
    torch.cuda.empty_cache()
    model = build(parse(case.arch), device="cuda", forward_path=case.forward_path)
    return {record.metric: record for record in training.measure(case, model)}


@pytest.mark.parametrize("name", ["dense", "cat", "mamba2"])
def test_rows_are_those_of_a_step_launched_from_python(name: str) -> None:
    """Memory too, although a replay allocates nothing. Launched first: what cuBLAS keeps for the
    stream of a capture stays in the process.
    """
    skip_where_it_cannot_run(CASES[name])
    launched = measured(CASES[name])
    settings = tuple(sorted([*CASES[name].settings, ("step", "cuda_graph")]))
    rows = measured(replace(CASES[name], settings=settings))
    assert set(rows) - {"energy_j", "energy_per_token_j"} == {*launched, "capture_s"} - {
        "energy_j", "energy_per_token_j",
    }  # fmt: skip
    for metric in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "train_flops"):
        assert rows[metric].value == launched[metric].value
    peak, known = (r["peak_allocated_bytes"].value for r in (rows, launched))
    assert peak == pytest.approx(known, rel=0.03)
    reserved, known = (r["peak_reserved_bytes"].value for r in (rows, launched))
    assert reserved == pytest.approx(known, rel=0.1)  # segments of 2 and 20 MiB
    pool = rows["graph_pool_bytes"].value - launched["graph_pool_bytes"].value
    assert pool >= rows["gradients_bytes"].value
    parts = sum(rows[f"{part}_s"].value for part in training.PARTS)
    assert 0.7 * rows["train_step_s"].value < parts < 1.5 * rows["train_step_s"].value
    assert len(rows["train_step_s"].samples) == training.REPEATS
    assert rows["launch_s"].value < launched["launch_s"].value


WAITS = '''"""Dense, and a forward pass that asks the GPU for a number."""
from baselines import dense
from baselines.dense import Config

class Model(dense.Model):
    def hidden(self, tokens):
        x = super().hidden(tokens)
        return x / x.detach().abs().max().item()
'''


def test_a_step_that_waits_for_the_gpu_is_unsupported_in_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: a broken capture leaves the allocator of its process broken."""
    mine = tmp_path / "mine.py"
    mine.write_text(WAITS)
    spec = f"{mine}:num_layers=1,vocab_size=64,width=64"
    command = [
        *(sys.executable, "-m", "cat_bench", "run", "training", "-a", spec),
        *("--device", "cuda", "--seq-len", "32", "--batch-size", "2", "--repeats", "1"),
        *("--forward-path", "eager", "--results", str(tmp_path / "results"), "--step-path"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = {
        path: subprocess.run([*command, path], env=environment, capture_output=True, text=True)
        for path in training.STEP_PATHS
    }
    assert done["eager"].returncode == 0, done["eager"].stderr
    assert done["cuda_graph"].returncode == 3, done["cuda_graph"].stderr
    said = " ".join(done["cuda_graph"].stdout.split())
    assert "unsupported" in said and "the forward part of this training step cannot be" in said
    assert "Use --step-path eager" in said and "Traceback" not in said
