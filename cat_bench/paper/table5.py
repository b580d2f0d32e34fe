"""MQAR, solved or not, and the state size.

Appendix C.2: two layers, width 64, sequences up to 256.
Try it: cat-bench paper table5 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 5: MQAR, solved or not, and the state size"
SUITES = ("mqar",)


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
