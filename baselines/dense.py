"""Dense causal transformer: the quality ceiling and the cost ceiling of every table.

Transformer++ as in the CAT paper, Appendix E.3: RoPE, RMSNorm, SwiGLU, no biases. `dense-2d` is the
same at twice the width: the honest reference for CAT, whose decoder has that width.
State: one key and one value per token, layer and head, so it grows with the sequence.

Shapes: b batch, t tokens, d width, h heads, e head width (64), s cache rows, l layers, v words.
Try it: cat-bench run efficiency -a dense --quick
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cat_bench.architecture import Cost, full_label
from cat_bench.blocks import HEAD_WIDTH, Attend, causal_attention, check_width
from cat_bench.graph import CapturedStep, Rows
from cat_bench.language_model import Transformer, check_counts

PRESETS = {
    "dense-2d": {"width": 2048},
    "dense-wikitext": {"width": 768, "num_layers": 6, "vocab_size": 32_000},  # paper C.1, E.4
    "dense-mqar": {"width": 64, "num_layers": 2, "vocab_size": 8192},  # paper C.2, E.5
}
REQUIRES = {"cuda_graph": "triton"}  # compile runs on a CPU, too


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    num_layers: int = 12
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    num_kv_heads: int | None = None  # None: as many as query heads
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_width(self.width, self.num_kv_heads)
        check_counts(self.num_layers, self.vocab_size)

    @property
    def label(self) -> str:
        name = "Dense-2D" if self.width == 2048 else "Dense"
        return full_label(name, self, told=("width",) if self.width in (1024, 2048) else ())


class State(NamedTuple):
    keys: Tensor  # (l, b, h, s, e), rotated; filled in place
    values: Tensor  # (l, b, h, s, e)
    num_tokens: int  # rows filled so far
    captured: CapturedStep | None  # decode path cuda_graph: the step, tied to these buffers


class Model(Transformer):
    decode_paths = ("eager", "cuda_graph")
    forward_paths = ("eager", "compile")

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        super().__init__(config, decode_path, forward_path)

    def attend_all(self, num_tokens: int, device: torch.device) -> Attend:
        return causal_attention

    def init_state(self, batch_size: int, max_len: int) -> State:
        like = self.head.weight
        shape = (self.config.num_layers, batch_size, self.num_kv_heads, max_len, HEAD_WIDTH)
        buffers = State(like.new_zeros(shape), like.new_zeros(shape), 0, None)
        return buffers._replace(captured=self.capture(buffers, max_len, growing_rows))

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        end = start + k.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return causal_attention(q, keys[:, :, :end], values[:, :, :end])

    def check_room(self, end: int, state: State) -> None:
        if end > state.keys.shape[3]:
            raise ValueError(
                f"the state holds {state.keys.shape[3]} tokens; token {end} was given."
            )

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """2 (key, value) x layers x batch x tokens x kv width x bytes per element."""
        return batch_size * seq_len * self.row_bytes

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix once, 2 FLOP per weight. State: all rows so far, 4 L D each."""
        return self.costs(batch_size, num_tokens)


def growing_rows(position: Tensor) -> Rows:
    """Token `position` (b,) writes the row of its number and sees all before it."""
    return Rows(write=position, rope_id=position, first_end=position)
