"""Recall of CAT-8 beside GDN-H1 and Sparse-2D.

Appendix C.4: a hybrid, and sparse attention of CAT's decoder width.
Try it: cat-bench paper table7 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 7: recall of CAT-8 beside GDN-H1 and Sparse-2D"
SUITES = ("pretrain", "swde", "drop", "squad", "triviaqa")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
