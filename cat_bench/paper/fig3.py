"""Latency and memory over the length at batch 256 (section 3.3), with a table: % of floor, ratios,
and where the lines of CAT cross those of Dense and Mamba2.

Try it: cat-bench paper fig3 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 3: latency and memory over the length"
SUITES = ("efficiency",)
ARCHITECTURES = tuple(name for name in _settings.ARCHITECTURES if name != "dense-2d")


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, [chosen.batch_size], chosen.seq_lens)


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    cases = plan(scale)
    return _curves.content(TITLE, records, published, ARCHITECTURES, cases, figures.LENGTH, scale)
