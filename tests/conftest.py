"""For all tests: GPU tests skip with a reason, hypothesis repeats itself, results/ stays clean."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded, and for every worker: the tensors are tiny, and two threads on cores that
# something else uses too wait for each other, for up to 30 times the time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU; there is none here")


@pytest.fixture(autouse=True)
def idle_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs here: a warning of it would stand beside those that tests expect."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the CLI writes in tests: never the project's own results/."""
    folder = tmp_path / "results"
    monkeypatch.setenv("CAT_BENCH_RESULTS", str(folder))
    return folder
