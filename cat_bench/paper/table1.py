"""Perplexity and mean accuracy after pre-training on FineWeb-Edu.

Section 3.1: held-out FineWeb-Edu, WikiText and LAMBADA perplexity, mean of six accuracies.
Try it: cat-bench paper table1 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 1: perplexity and mean accuracy after pre-training on FineWeb-Edu"
SUITES = ("pretrain", "perplexity", "lm_eval")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
