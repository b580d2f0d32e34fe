"""Decoder width D_d for three chunk sizes.

Appendix D.2: WikiText-103, 6 and 6 layers, D = 768.
Try it: cat-bench paper table11 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 11: decoder width D_d for three chunk sizes"
SUITES = ("pretrain", "perplexity")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
