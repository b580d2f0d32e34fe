"""CAT's training mask, N = 128 and C = 16: the paper's layout and ours (Appendix B.4).

Try it: cat-bench paper fig4 --scale smoke
"""

from collections.abc import Sequence

import pandas as pd

from cat_bench import figures, mask
from cat_bench.case import Case
from cat_bench.paper._settings import Content

TITLE = "Figure 4: CAT's training mask"
SUITES: tuple[str, ...] = ()
NUM_TOKENS, CHUNK_SIZE = 128, 16
CAPTION = (
    f"{TITLE}: {NUM_TOKENS} tokens, chunks of {CHUNK_SIZE}; drawn from mask.py, as the model is.\n"
    "(a) As in the paper: each block is a compressed chunk, then its tokens. (b) The rows of this "
    "implementation: the row of a compressed chunk also predicts the next token."
)


def plan(scale: str) -> list[Case]:
    """Nothing to measure."""
    return []


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    paper = mask.published_allowed(NUM_TOKENS, CHUNK_SIZE)
    ours = mask.allowed(NUM_TOKENS + 1, CHUNK_SIZE)
    masks = [
        (f"(a) published, {len(paper)} rows", paper, CHUNK_SIZE + 1),
        (f"(b) compact, {len(ours)} rows", ours, CHUNK_SIZE),
    ]
    return Content(figure=figures.mask_figure(masks, CAPTION))
