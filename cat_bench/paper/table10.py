"""Compressor width D at a fixed decoder width.

Appendix D.1: WikiText-103, 6 and 6 layers, D_d = 1536.
Try it: cat-bench paper table10 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 10: compressor width D at a fixed decoder width"
SUITES = ("pretrain", "perplexity")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
