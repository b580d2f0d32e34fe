"""Latency and memory of CAT-8, CAT-16 and CAT-32 over the batch size, length 1024 (Appendix C.3).

The paper's caption fixes the batch size that its axis varies; all cases are Figure 2's.

Try it: cat-bench paper fig5 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 5: latency and memory of CAT at several chunk sizes"
SUITES = ("efficiency",)
ARCHITECTURES = ("dense", "cat-8", "cat-16", "cat-32")


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, chosen.batch_sizes, [chosen.seq_len])


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    cases = plan(scale)
    return _curves.content(TITLE, records, published, ARCHITECTURES, cases, figures.BATCH, scale)
