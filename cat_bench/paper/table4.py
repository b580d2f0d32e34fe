"""WikiText-103 perplexity of ten models.

Appendix C.1: 6 layers (Mamba2 12), width 768, length 512.
Try it: cat-bench paper table4 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 4: WikiText-103 perplexity of ten models"
SUITES = ("pretrain", "perplexity")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
