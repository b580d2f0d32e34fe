"""Suites: what can be measured. A suite is a file here or in recall_tasks/ with plan and measure.

The directory is the registry: `cat-bench list suites` shows every such file, `cat-bench run NAME`
runs it. Nothing here or at the top of a suite imports torch: planning works on any laptop, and
`measure` imports what it needs itself, in the fresh process of its case.
"""

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, cast

from cat_bench.case import Case, Options, Record
from cat_bench.spec import Spec, suite_module

if TYPE_CHECKING:
    from cat_bench.architecture import Architecture


class Suite(Protocol):
    """The two functions that a suite's file defines."""

    def plan(self, specs: list[Spec], options: Options) -> list[Case]:
        """Everything to measure. Pure: the same arguments give the same cases in the same order.

        Raises UserError for options that this suite cannot follow.
        """
        ...

    def measure(self, case: Case, model: "Architecture") -> Iterator[Record]:
        """The rows of one case, each as soon as it is known, so that an OOM keeps the earlier ones.

        `model` is built already, from the case. The suite neither prints nor writes files; the
        closing row (metric "case") is the runner's.
        """
        ...


def load(name: str) -> Suite:
    """Import a suite by name. Raises UserError for an unknown one."""
    return cast(Suite, importlib.import_module(suite_module(name)))
