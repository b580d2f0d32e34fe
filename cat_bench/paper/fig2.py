"""Latency and memory of all architectures over the batch size, length 1024 (section 3.3).

Try it: cat-bench paper fig2 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 2: latency and memory over the batch size"
SUITES = ("efficiency",)
ARCHITECTURES = _settings.ARCHITECTURES


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, chosen.batch_sizes, [chosen.seq_len])


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    cases = plan(scale)
    return _curves.content(TITLE, records, published, ARCHITECTURES, cases, figures.BATCH, scale)
