"""WikiText and LAMBADA perplexity.

Appendix C.5, the two perplexities of Table 1 with two digits; GDN's WikiText differs.
Try it: cat-bench paper table9 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 9: WikiText and LAMBADA perplexity"
SUITES = ("pretrain", "lm_eval")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
