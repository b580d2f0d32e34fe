"""Chunk attention: causal inside a chunk, plus one summary row of every chunk before it.

Rows come in chunks of C: chunk i is rows iC .. iC + C - 1, the last one may be open. The query in
row r of chunk i sees

    rows iC .. r                   of its own chunk, and
    one row of each earlier chunk  its first (summary="first") or its last (summary="last").

"first" is the decoder of CAT in the compact layout, where a chunk's first row is a slot (paper
sections 2 and B.2, cat_spec.md 1.3 and 3); "last" is the strided pattern of Sparse Transformers
(baselines/sparse.py). C = 4, rows 5 and 6, # seen:

    first  #...##..   #...###.         last  ...###..   ...####.

A query sees t / C + C rows at most instead of t, so a long sequence costs about C times less than
dense causal attention; a mask alone saves nothing, for seen and unseen columns alternate.

Shapes: b batch, h query heads, g key-value heads, t rows, e head width, k chunks = ceil(t / C).
"""

import operator
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cat_bench.blocks import attention
from cat_bench.mask import sees

IMPLEMENTATIONS = ("eager", "two_part", "fused")
MAX_FUSED_CHUNK = 128  # rows; a chunk must fit into one tile of the kernels
MAX_TILE_ROWS = 128  # rows of a tile; those of a tile of summaries lie a chunk apart
MAX_SCORES = 2**27  # of "two_part" at a time: 0.5 GiB in float32, about five times with gradients
FUSED_HEAD_WIDTHS = (16, 32, 64, 128)
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    summary: Literal["first", "last"] = "first",
    implementation: Literal["eager", "two_part", "fused"] = "two_part",
) -> Tensor:
    """Softmax attention, scale 1 / sqrt(e), of each row over its own chunk of `chunk_size` rows so
    far and over one row of every earlier chunk: its "first", or its "last" (`summary`).

    q (b, h, t, e); k and v (b, g, t, e), where query head i uses key-value head i // (h / g).
    Returns o (b, h, t, e) in q's dtype. Any t >= 1 and any chunk_size >= 1; differentiable in all
    three inputs. Under autocast the inputs are cast as those of PyTorch's own attention are. No
    positions are encoded: rotate q and k before.

        q, k, v = (torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        o = chunk_attention(q, k, v, 16, implementation="fused")

    "eager"     a (t, t) mask: the specification. Any device and dtype.
    "two_part"  own chunk and earlier summaries apart, merged: 1 / C as much work for long t, and
                memory for MAX_SCORES scores at a time (computed once more for the gradients).
                Plain PyTorch, any device and dtype; its scores are rounded to that dtype.
    "fused"     one Triton kernel forward, two backward, float32 sums: CUDA with the shared memory
                of an A100 or H100; float32, bfloat16 or float16; chunk_size up to 128 (64 in
                float32 with e = 128); e one of 16, 32, 64, 128. Opaque to torch.compile, which
                may wrap it (fullgraph). Once differentiable.

    Raises ValueError where shapes, dtypes, names or the limits of "fused" do not fit.
    """
    _check(q, k, v, chunk_size, summary, implementation)
    chunk_size = operator.index(chunk_size)
    if _is_cast(q):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    offset = 0 if summary == "first" else chunk_size - 1
    if implementation == "eager":
        make_mask = chunk_mask if type(q) is Tensor else chunk_mask.__wrapped__  # a fake: not kept
        return attention(q, k, v, mask=make_mask(q.shape[2], chunk_size, offset, q.device))
    if implementation == "two_part":
        return _two_part(q, k, v, chunk_size, offset)
    check_fused(q, chunk_size)
    return fused(q, k, v, chunk_size, offset)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, summary: str, name: str) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be (b, h, t, e), k and v (b, g, t, e), got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}."
        )
    (b, h, t, e), g = q.shape, k.shape[1]
    if t < 1 or k.shape != (b, g, t, e) or g < 1 or h % g:
        raise ValueError(
            f"q and k must agree in batch, rows (at least 1) and head width, and the heads of k "
            f"must divide those of q, got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    one_dtype = q.dtype == k.dtype == v.dtype or all(map(_is_cast, (q, k, v)))
    if not (one_dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k and v must have one dtype and device, got {q.dtype}, {k.dtype} and {v.dtype} "
            f"on {q.device}, {k.device} and {v.device}."
        )
    if not all(x.dtype.is_floating_point for x in (q, k, v)):
        raise ValueError(
            f"q, k and v must be of a floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}."
        )
    is_whole = hasattr(chunk_size, "__index__") and not isinstance(chunk_size, bool)
    if not is_whole or operator.index(chunk_size) < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size}.")
    if summary not in ("first", "last"):
        raise ValueError(f"summary must be 'first' or 'last', got '{summary}'.")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got '{name}'.")


def _is_cast(x: Tensor) -> bool:
    """Whether autocast changes its dtype; it leaves float64 alone."""
    kind = x.device.type
    is_known = kind != "meta"  # a device without arithmetic, and without autocast
    return is_known and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def check_fused(q: Tensor, chunk_size: int) -> None:
    """What the kernels cannot do has another name: nothing falls back in silence."""
    other = "use implementation='two_part'."
    if not q.is_cuda:
        raise ValueError(f"implementation 'fused' needs CUDA tensors, got {q.device}; {other}")
    if chunk_size > MAX_FUSED_CHUNK:
        raise ValueError(
            f"implementation 'fused' takes chunk_size up to {MAX_FUSED_CHUNK}, got {chunk_size}; "
            f"{other}"
        )
    if q.shape[3] not in FUSED_HEAD_WIDTHS:
        raise ValueError(
            f"implementation 'fused' takes head widths {FUSED_HEAD_WIDTHS}, got {q.shape[3]}; "
            f"{other}"
        )
    if q.dtype not in FUSED_DTYPES:
        raise ValueError(f"implementation 'fused' computes in float32, got {q.dtype}; {other}")
    if q.dtype == torch.float32 and q.shape[3] == 128 and chunk_size > 64:
        raise ValueError(
            f"implementation 'fused' takes chunk_size up to 64 in float32 with head width 128, "
            f"whose tiles fill the shared memory, got {chunk_size}; {other}"
        )


# --- eager ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # all layers ask for the same one; at 32K rows it is 1 GiB
@torch.inference_mode(False)  # a mask made while scoring must also serve training
def chunk_mask(num_rows: int, chunk_size: int, offset: int, device: torch.device) -> Tensor:
    """(t, t) booleans, built once per length and chunk size; offset of the summary: 0 or C - 1."""
    rows = torch.arange(num_rows, device=device)
    return sees(rows[:, None], rows, chunk_size, offset)


# --- two parts ------------------------------------------------------------------------------------


def _two_part(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, offset: int) -> Tensor:
    """softmax over A and B together = the two softmaxes, weighted by their sums of exponentials.

    Shifted by one chunk, "all summaries before my chunk" is plain causal attention over chunks:
    chunk i, of 1 .. k - 1, sees summaries 0 .. i - 1. So no part is ever empty.
    """
    (num_rows, e), r = q.shape[2:], q.shape[1] // k.shape[1]
    if chunk_size >= num_rows:  # one chunk: no more rows than there are
        chunk_size, offset = num_rows, 0
    pad = -num_rows % chunk_size  # at the end, where causality hides it

    def chunked(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk_size))

    k, v = chunked(k), chunked(v)  # (b, g, k, c, e)
    q = chunked(q * e**-0.5).unflatten(1, (-1, r)).transpose(2, 3)  # (b, g, k, r, c, e)
    q = q.flatten(3, 4)  # (b, g, k, r c, e)
    rows = torch.arange(chunk_size, device=q.device)
    weight, lse = _softmax(q @ k.mT, (rows[:, None] >= rows).repeat(r, 1))
    o = weight.to(v.dtype) @ v
    if k.shape[2] > 1:
        late_o, late_lse = _earlier(q[:, :, 1:], k[:, :, :-1, offset], v[:, :, :-1, offset])
        both = torch.logaddexp(lse[:, :, 1:], late_lse)
        own_part = o[:, :, 1:] * (lse[:, :, 1:] - both).exp()[..., None]
        late_part = late_o * (late_lse - both).exp()[..., None]
        o = torch.cat([o[:, :, :1].to(both.dtype), own_part + late_part], dim=2)
    o = o.unflatten(3, (r, -1)).transpose(2, 3)  # (b, g, r, k, c, e)
    return o.flatten(3, 4).flatten(1, 2)[:, :, :num_rows].to(v.dtype)


def _earlier(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """q (b, g, k, r c, e) of k chunks over the summaries (b, g, k, e), chunk i over 0 .. i: output
    as q, and log-sum-exp (b, g, k, r c). Piece by piece, where the scores are too many for one.
    """
    num_chunks = keys.shape[2]
    size = max(1, MAX_SCORES // (q[:, :, 0].numel() // q.shape[-1] * num_chunks))
    found = []
    for first in range(0, num_chunks, size):
        piece = q[:, :, first : first + size]
        end = first + piece.shape[2]
        of_piece = piece, keys[:, :, :end], values[:, :, :end], first
        if size >= num_chunks:
            return _piece(*of_piece)
        found.append(checkpoint(_piece, *of_piece, use_reentrant=False, preserve_rng_state=False))
    outputs, lses = zip(*found, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _piece(q: Tensor, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """`_earlier` of the chunks from `first` on."""
    chunks = q.shape[2], q.shape[3]
    ends = torch.arange(first, first + q.shape[2], device=q.device)
    seen = ends[:, None, None] >= torch.arange(keys.shape[2], device=q.device)  # (k, 1, s)
    score = (q.flatten(2, 3) @ keys.mT).unflatten(2, chunks)  # rows of one matrix: no copies of k
    weight, lse = _softmax(score, seen)
    return (weight.to(values.dtype).flatten(2, 3) @ values).unflatten(2, chunks), lse


def _softmax(score: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension, where `seen`; and the logarithm of the sum of exponentials. Float32
    at least.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32)).masked_fill(~seen, -torch.inf)
    lse = score.logsumexp(-1)
    return (score - lse[..., None]).exp(), lse


# --- fused ----------------------------------------------------------------------------------------


@torch.library.custom_op("cat_bench::chunk_attention", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """o (b, h, t, e), and log2 of the sums of exponentials, (b, h, t) float32.

    `offset` of the summary row in its chunk: 0 or chunk_size - 1. Arguments are not checked.
    """
    from cat_bench.chunk_kernels import forward

    o, lse = _outputs(q)
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever q lies
        forward(whole(q), whole(k), whole(v), o, lse, chunk_size, offset)
    return o, lse


@fused.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, offset: int) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("cat_bench::chunk_attention_backward", mutates_args=())
def fused_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    chunk_size: int, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (b, h, t, e), dk and dv (b, g, t, e) of `do` (b, h, t, e) and the outputs of `fused`."""
    from cat_bench.chunk_kernels import backward

    dq, dk, dv = (_like_tokens(q) for _ in range(3))
    delta = torch.empty_like(lse)  # rows of do times o, handed from one kernel to the next
    qkv = whole(q), whole(k), whole(v)
    with torch.cuda.device_of(q):
        backward(whole(do), *qkv, o, lse, delta, dq, dk, dv, chunk_size, offset)
    return dq, _shared(dk, k), _shared(dv, k)


@fused_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    chunk_size: int, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_tokens(q), _shared(_like_tokens(q), k), _shared(_like_tokens(q), k)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.chunk_size, ctx.offset = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse


def _gradients(ctx, do: Tensor, _):
    return *fused_backward(do, *ctx.saved_tensors, ctx.chunk_size, ctx.offset), None, None


fused.register_autograd(_gradients, setup_context=_save)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like_tokens(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _like_tokens(q: Tensor) -> Tensor:
    """An empty (b, h, t, e) whose heads lie side by side per token, as projections want them."""
    b, h, t, e = q.shape
    return q.new_empty(b, t, h, e).transpose(1, 2)


def _shared(gradient: Tensor, k: Tensor) -> Tensor:
    """(b, h, t, e) -> (b, g, t, e): the sum over query heads that share a key."""
    if gradient.shape[1] == k.shape[1]:
        return gradient
    return gradient.unflatten(1, (k.shape[1], -1)).sum(2)


def whole(x: Tensor) -> Tensor:
    """Every head of a row in one piece, and rows so near that a tile's offsets fit into 32 bits."""
    is_near = x.stride(2) * MAX_FUSED_CHUNK * MAX_TILE_ROWS < 2**31
    return x if x.stride(3) == 1 and is_near else x.contiguous()
