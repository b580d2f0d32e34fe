"""Sliding-window transformer: a token sees itself and the `window` - 1 tokens before it.

The blocks are Dense's (Transformer++, CAT paper, Appendix E.3); only the attention is local, as in
Longformer (Beltagy et al., 2020, arXiv:2004.05150):

    o_q = sum_k softmax_k(q_q . k_k / sqrt(e)) v_k    over k with 0 <= q - k < window

The window counts the token itself; implementations that allow a distance of `window` see one token
more. The l layers together reach l (window - 1) tokens back: nothing before that is recalled.
State: a ring of min(window, max_len) rows per layer and nothing else, in the model's dtype (no
recurrent sums). Token p lives in row p mod window, its key rotated by its absolute position before
it is written: softmax is a sum over rows, so their order in the ring does not matter.

Shapes: b batch, t tokens, d width, h heads, e head width (64), s ring rows, l layers, v words.
Try it: cat-bench run efficiency -a swa-64 --quick
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cat_bench.architecture import Cost, full_label
from cat_bench.blocks import HEAD_WIDTH, Attend, check_width
from cat_bench.graph import CapturedStep
from cat_bench.language_model import Transformer, check_counts
from cat_bench.window import (
    check_ring,
    flex_window_attention,
    prompt_attention,
    ring_attention,
    ring_rows,
    window_attention,
)

PRESETS = {
    "swa": {},
    "swa-512": {"window": 512},
    "swa-64": {"window": 64},
    "swa-wikitext": {  # paper C.1, E.4
        "window": 64, "width": 768, "num_layers": 6, "vocab_size": 32_000
    },
    "swa-mqar": {"window": 64, "width": 64, "num_layers": 2, "vocab_size": 8192},  # C.2, E.5
}  # fmt: skip
REQUIRES = {"cuda_graph": "triton", "compile": "triton"}


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    num_layers: int = 12
    window: int = 512  # tokens seen, the token itself included
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    num_kv_heads: int | None = None  # None: as many as query heads
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width, self.num_kv_heads)
        check_counts(self.num_layers, self.vocab_size)
        if self.window < 1:
            raise ValueError(
                f"window must be at least 1 (the token itself counts), got {self.window}."
            )

    @property
    def label(self) -> str:
        return full_label("Sliding", self, told=())


class State(NamedTuple):
    keys: Tensor  # (l, b, h, s, e), rotated; a ring, filled in place
    values: Tensor  # (l, b, h, s, e)
    num_tokens: int  # read so far; token p is in row p mod s
    captured: CapturedStep | None  # decode path cuda_graph: the step, tied to these buffers


class Model(Transformer):
    decode_paths = ("eager", "cuda_graph")
    forward_paths = ("eager", "compile")
    float32_forward_paths = ("compile",)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        super().__init__(config, decode_path, forward_path)

    def attend_all(self, num_tokens: int, device: torch.device) -> Attend:
        window = self.config.window
        if self.forward_path == "compile":
            return flex_window_attention(num_tokens, window, device)
        return lambda q, k, v: window_attention(q, k, v, window)

    def init_state(self, batch_size: int, max_len: int) -> State:
        c, like = self.config, self.head.weight
        num_rows = min(c.window, max_len)
        shape = (c.num_layers, batch_size, self.num_kv_heads, num_rows, HEAD_WIDTH)
        buffers = State(like.new_zeros(shape), like.new_zeros(shape), 0, None)
        captured = self.capture(buffers, max_len, lambda position: ring_rows(position, num_rows))
        return buffers._replace(captured=captured)

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        attend = prompt_attention(self.decode_path)
        return ring_attention(q, k, v, keys, values, start, self.config.window, attend)

    def check_room(self, end: int, state: State) -> None:
        check_ring(end, state.keys.shape[3], self.config.window)

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x min(window, tokens) x kv width x bytes per element."""
        return batch_size * min(self.config.window, seq_len) * self.row_bytes

    def looks_back(self, block: nn.Module, num_tokens: int) -> int:
        return self.config.window - 1

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: the rows in sight, 4 L D each."""
        return self.costs(batch_size, min(self.config.window, num_tokens))
