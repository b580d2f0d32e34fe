"""Memory of BASED over the length, for the two window caches of Figure 7, whose cases these are.

Try it: cat-bench paper fig8 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import fig7
from cat_bench.paper._settings import Content

TITLE = "Figure 8: memory of BASED over the length"
SUITES = fig7.SUITES
ARCHITECTURES = fig7.ARCHITECTURES


def plan(scale: str) -> list[Case]:
    return fig7.plan(scale)


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    panels = (figures.MEMORY, figures.REDUCTION)
    return fig7.over_length(TITLE, panels, records, published, scale)
