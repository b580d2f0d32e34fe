"""Recall of CAT-8, CAT-16 and CAT-32.

Appendix C.3: what a larger chunk costs in recall.
Try it: cat-bench paper table6 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 6: recall of CAT-8, CAT-16 and CAT-32"
SUITES = ("pretrain", "swde", "drop", "squad", "triviaqa")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
