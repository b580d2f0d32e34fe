"""Sliding-window attention and its cache, a ring: for every architecture that has such layers.

A query sees itself and the `window` - 1 rows before it: 0 <= q - k < window. Token p lives in row
p mod s of a ring of s = min(window, max_len) rows, its key rotated by its absolute position before
it is written: softmax is a sum over rows, so their order in the ring does not matter.

Shapes: b batch, t new tokens, h heads, e head width, s ring rows.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cat_bench.blocks import Attend, attention, causal_attention
from cat_bench.errors import require_cuda
from cat_bench.graph import Rows

WindowAttention = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (q, k, v, window) -> as q

# Queries in one attention call: enough for small windows to fill the device, and not so many that
# the mask of a block gets large (38 MB at a window of 16,384).
MIN_QUERIES, MAX_QUERIES = 512, 2048


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of the last `t` rows over all rows (in order), each over `window` up to itself.

    Blocks of queries, each with only the keys that it may see: the work grows with t, not t^2. The
    first `window` rows of all see what causal attention lets them see, so they need no mask.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    done, outputs = 0, []
    if num_queries == num_keys:
        done = min(window, num_queries)
        outputs = [causal_attention(q[:, :, :done], k[:, :, :done], v[:, :, :done])]
    size = min(max(window, MIN_QUERIES), MAX_QUERIES)
    for at in range(done, num_queries, size):
        block = q[:, :, at : at + size]
        end = num_keys - num_queries + at + block.shape[2]
        first = max(0, end - block.shape[2] - window)  # window - 1 would do; kernels like it even
        mask = window_mask(block.shape[2], end - first, window, q.device)
        outputs.append(attention(block, k[:, :, first:end], v[:, :, first:end], mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def prompt_attention(decode_path: str) -> WindowAttention:
    """What reads the windows of a prompt: as eager has it, or on a fast path in one launch."""
    return window_attention if decode_path == "eager" else fast_window_attention


def fast_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same for prompts of the fast decode paths, without gradients.

    By the dtype: FlashAttention takes 16 bits and no others, float32 stays in blocks of queries.
    """
    if q.dtype.itemsize > 2:
        return window_attention(q, k, v, window)
    return flash_window_attention(q, k, v, window)


def flash_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same in one launch of PyTorch's FlashAttention, which knows windows and grouped heads but
    is called so by no public function: no mask, no tile out of sight, queries the last rows.
    """
    o, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),  # (b, t, h, e)
        None, None, q.shape[2], k.shape[2], 0.0, False, False,  # no packing, no dropout
        window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return o.transpose(1, 2)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """(t, s) booleans, 0 <= q - k < window: the queries are the last rows of the keys."""
    keys = torch.arange(num_keys, device=device)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= 0) & (distance < window)


@lru_cache
def compiled_flex() -> Callable:
    """Not at import: torch.compile takes seconds to load, which only this path should pay."""
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def flex_window_attention(num_tokens: int, window: int, device: torch.device) -> Attend:
    """The same for all rows at once, (q, k, v) -> (b, h, t, e), skipping tiles out of sight.

    FlexAttention, compiled apart from what calls it: with the rotation of queries and keys fused
    into it, torch 2.11 (CUDA) and 2.13 (CPU) give outputs that are wrong by O(1). One function per
    length: a new one would make torch.compile start over. Raises UserError on a CPU, where it has
    no gradient.
    """
    require_cuda("the forward path 'compile' of window attention", device.type)
    blocks = create_block_mask(
        lambda b, h, query, key: (query >= key) & (query - key < window),
        None, None, num_tokens, num_tokens, device=device,
    )  # fmt: skip

    flex = compiled_flex()

    @torch.compiler.disable(recursive=False)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    window: int,
    attend: WindowAttention = window_attention,
) -> Tensor:
    """Attend from tokens start, start + 1, ... and put their rows into the ring, in place.

    q (b, h, t, e), k v (b, g, t, e); keys, values (b, g, s, e), s >= min(window, tokens). One token
    overwrites the row that it no longer sees, then all rows are visible, in any order. Several
    still need rows that they overwrite: those are read first.
    """
    slots, num_new = keys.shape[2], q.shape[2]
    if num_new == 1 and slots <= window:
        keys[:, :, start % slots], values[:, :, start % slots] = k[:, :, 0], v[:, :, 0]
        filled = min(start + 1, slots)
        return attention(q, keys[:, :, :filled], values[:, :, :filled])
    past, all_k, all_v = min(start, window - 1), k, v
    if past:  # a first prompt, which may be long, is not copied
        all_k, all_v = (
            torch.cat([last_rows(ring, start, past), new], dim=2)
            for ring, new in ((keys, k), (values, v))
        )
    o = attend(q, all_k, all_v, window)
    write_rows(keys, k, start)
    write_rows(values, v, start)
    return o


def last_rows(ring: Tensor, num_tokens: int, count: int) -> Tensor:
    """Rows of the last `count` of `num_tokens` tokens, oldest first. ring (b, h, s, e)."""
    ids = torch.arange(num_tokens - count, num_tokens, device=ring.device)
    return ring[:, :, ids % ring.shape[2]]


def write_rows(ring: Tensor, rows: Tensor, start: int) -> None:
    """Put the tokens from number `start` on into the ring, where the last s of them remain.

    Rounded to the ring's dtype, from which rows may differ under autocast.
    """
    num_rows, num_new = ring.shape[2], rows.shape[2]
    rows = rows.to(ring.dtype)
    ids = torch.arange(start, start + num_new, device=ring.device)[-num_rows:]
    ring[:, :, ids % num_rows] = rows[:, :, -num_rows:]


def ring_rows(position: Tensor, num_slots: int) -> Rows:
    """For a graphed step: token `position` (b,) overwrites the oldest row and sees all others."""
    return Rows(
        write=position % num_slots, rope_id=position, first_end=position.clamp(max=num_slots)
    )


def pairs_before_last(num_tokens: int, count: int, window: int) -> int:
    """Query-key pairs of the last `count` of `num_tokens` tokens, all of them but the last."""
    return sum(min(window, n) for n in range(num_tokens - count + 1, num_tokens))


def check_ring(end: int, num_rows: int, window: int) -> None:
    """Raises ValueError where token number `end` would push a token in sight out of the ring."""
    if num_rows < window and end > num_rows:
        raise ValueError(
            f"the state was made for {num_rows} tokens, fewer than the window of {window}; "
            f"token {end} was given."
        )
