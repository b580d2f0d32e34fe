"""Zero-shot recall of all models.

Section 3.2, the EVAPORATE tasks; queries up to 1,024 tokens.
Try it: cat-bench paper table2 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 2: zero-shot recall of all models"
SUITES = ("pretrain", "swde", "drop", "squad", "triviaqa")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
