"""For GPU tests: warnings of compilers are no errors, float32 is float32, no kernel is autotuned.

Autotuning takes minutes per shape and moves no result; CAT_BENCH_AUTOTUNE=1 switches it on.
"""

import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Matrix products of float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def smallest_configuration_only() -> None:
    """Before any kernel is defined: what triton.autotune decorates keeps one configuration.

    The one with the smallest tiles: a larger one may not fit the shared memory.
    """
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        original(
            self, fn, arg_names, [min(configs, key=tile)] if configs else configs, *rest, **options
        )

    def tile(config: Any) -> int:
        sizes = [size for size in config.kwargs.values() if isinstance(size, int)]
        return math.prod(max(1, size) for size in sizes)

    Autotuner.__init__ = init


if importlib.util.find_spec("triton") and os.environ.get("CAT_BENCH_AUTOTUNE") != "1":
    smallest_configuration_only()
