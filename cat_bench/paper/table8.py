"""Zero-shot accuracy on six tasks.

Appendix C.5: HellaSwag, PIQA, ARC-E, ARC-C, WinoGrande, OpenBookQA.
Try it: cat-bench paper table8 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.paper import _tables
from cat_bench.paper._settings import Content

TITLE = "Table 8: zero-shot accuracy on six tasks"
SUITES = ("pretrain", "lm_eval")


def plan(scale: str) -> list[Case]:
    """Its suites plan the training that it needs; before they exist there is nothing to run."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return _tables.content(TITLE, published, SUITES)
