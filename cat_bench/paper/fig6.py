"""Latency of Mamba2 over d_state at batch 512 and length 1024, Dense as a line (Appendix C.6).

Try it: cat-bench paper fig6 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures
from cat_bench.case import Case
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 6: Mamba2's state size against its latency"
SUITES = ("efficiency",)
ARCHITECTURES = (
    "dense", "mamba2:d_state=16", "mamba2:d_state=32", "mamba2:d_state=64", "mamba2:d_state=128",
)  # fmt: skip
PANELS = (figures.LATENCY, figures.SPEEDUP)
PAPER_BATCH = 512


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    return _settings.timed_cases(ARCHITECTURES, scale, [chosen.batch_sizes[-1]], [chosen.seq_len])


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    # The ratios need the paper's Dense, which stands in another figure; it has no d_state.
    published = [*published, *_curves.published_dense("fig2", PAPER_BATCH)]
    return _curves.content(
        TITLE, records, published, ARCHITECTURES, plan(scale), figures.D_STATE, scale, PANELS
    )
