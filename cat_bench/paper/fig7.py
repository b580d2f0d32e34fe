"""Latency of BASED over the length, with a window cache of `window` slots (the paper: patched) and
of `max_len` slots (the official code's) (Appendix C.7).

Try it: cat-bench paper fig7 --scale smoke
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from cat_bench import figures, spec
from cat_bench.case import Case
from cat_bench.columns import GIB, digits
from cat_bench.paper import _curves, _settings
from cat_bench.paper._settings import Content

TITLE = "Figure 7: latency of BASED over the length"
SUITES = ("efficiency",)
ARCHITECTURES = ("dense", "based:window_cache=window", "based:window_cache=max_len")


CACHE = (
    "The switch window_cache reproduces the cache's allocation, not the official code's time: only "
    "`window` rows are read either way, so our two latencies coincide by construction."
)


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
    drawn = _curves.content(
        title,
        records,
        published,
        ARCHITECTURES,
        plan(scale),
        figures.LENGTH,
        scale,
        panels,
        [CACHE],
    )
    if not drawn.tables:
        return drawn
    ratios, *others = drawn.tables
    noted = replace(ratios, notes=(*ratios.notes, CACHE, kept_scores(plan(scale))))
    return drawn._replace(tables=(noted, *others))


def kept_scores(cases: Sequence[Case]) -> str:
    """The part of the paper's figures that is not reproduced (evaluation_spec.md 4.3 and 4.5)."""
    of_based = [case for case in cases if case.arch.startswith("based")]
    by_length = {case.seq_len: score_bytes(case) for case in of_based}
    lengths = ", ".join(str(length) for length in by_length)
    sizes = ", ".join(digits(size / GIB) for size in by_length.values())
    return (
        "Not reproduced and not timed: scores kept. BASED's official code keeps the logits of all "
        "steps, so the two caches alone do not explain the paper's Figure 8; this loop keeps none. "
        "By formula, batch x new tokens x vocabulary x bytes per element, they would take "
        f"{sizes} GiB more at lengths {lengths}."
    )


def score_bytes(case: Case) -> int:
    """Bytes of the logits of all new tokens, in the case's dtype."""
    parsed = spec.parse(case.arch)
    fields = spec.describe(parsed.name).fields
    values: dict[str, Any] = {"vocab_size": fields["vocab_size"].default, **parsed.overrides}
    itemsize = int(case.dtype[-2:]) // 8  # "bfloat16", "float32": bits
    return case.batch_size * case.new_tokens * values["vocab_size"] * itemsize
