"""For GPU tests: warnings of compilers are no errors, and no kernel is autotuned.

Autotuning takes minutes per shape and moves no result; CAT_BENCH_AUTOTUNE=1 switches it on.
"""

import importlib.util
import os
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


def first_configuration_only() -> None:
    """Before any kernel is defined: what triton.autotune decorates keeps one configuration."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        original(self, fn, arg_names, configs[:1], *rest, **options)

    Autotuner.__init__ = init


if importlib.util.find_spec("triton") and os.environ.get("CAT_BENCH_AUTOTUNE") != "1":
    first_configuration_only()
