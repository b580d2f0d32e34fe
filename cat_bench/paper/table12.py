"""Compressor depth for two chunk sizes.

Appendix D.3: WikiText-103, D = 768, D_d = 1536, 6 decoder layers.
Try it: cat-bench paper table12 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 12: compressor depth for two chunk sizes"
SUITES = ("pretrain", "perplexity")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
