"""Latency of BASED over the length, with a window cache of `window` slots (the paper: patched) and
of `max_len` slots (the official code's) (Appendix C.7).

Try it: cat-bench paper fig7 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 7: latency of BASED over the length"
SUITES = ("efficiency",)
ARCHITECTURES = ("dense", "based:window_cache=window", "based:window_cache=max_len")


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, [chosen.batch_size], chosen.seq_lens)


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    return over_length(TITLE, (figures.LATENCY, figures.SPEEDUP), records, published, scale)


def over_length(
    title: str,
    panels: Sequence[figures.Panel],
    records: pd.DataFrame,
    published: Sequence,
    scale: str,
) -> Content:
    """Figures 7 and 8. The ratios need the paper's Dense, which stands in Figure 3."""
    published = [*published, *_curves.published_dense("fig3")]
    return _curves.content(
        title, records, published, ARCHITECTURES, plan(scale), figures.LENGTH, scale, panels
    )
