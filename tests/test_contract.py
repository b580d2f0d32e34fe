"""The contract of contract.py over every architecture file found, in every tiny variant.

Your own file: CAT_BENCH_ARCH=path/to/mine.py python -m pytest tests/test_contract.py
"""

import contract
import pytest

from cat_bench import spec
from cat_bench.architecture import build

SUBJECTS = contract.subjects()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)
@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(check: str, subject: contract.Subject) -> None:
    contract.CHECKS[check](subject)


def test_every_architecture_is_covered() -> None:
    covered = {subject.label.split("[")[0] for subject in SUBJECTS}
    found = {info.name for info in spec.architectures()}
    assert {"cat", "dense"} <= found
    assert found <= covered


PRESETS = [preset for info in spec.architectures() for preset in info.presets]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_at_full_size_without_memory(preset: str) -> None:
    model = build(spec.parse(preset), device="meta", dtype="bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.num_params > model.num_params_non_embedding > 0
    assert model.state_bytes(512, 1024) >= model.state_bytes_float(512, 1024) > 0
