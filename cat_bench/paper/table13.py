"""Decoder depth 12 against 8.

Appendix D.4: CAT-8 on FineWeb-Edu, perplexity and mean recall.
Try it: cat-bench paper table13 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 13: decoder depth 12 against 8"
SUITES = ("pretrain", "perplexity", "swde", "drop", "squad", "triviaqa")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
