"""Chunk attention: eager against the definition row by row, two parts against eager, the errors.

The fused kernels need a GPU: tests/gpu/test_chunk_fused.py.
"""

import itertools
import math

import numpy as np
import pytest
import reference_kernels
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cat_bench.blocks import Block, rope_table, rotate
from cat_bench.chunk_attention import chunk_attention, fused
from cat_bench.chunk_block import chunk_block, packed, packed_reference
from cat_bench.short_attention import short_attention

SUMMARIES = ("first", "last")
# h, g, t, C: one row, one chunk, an open last chunk, a full one, C = 1, C > t, shared heads.
CASES = [
    (1, 1, 1, 4), (2, 2, 4, 4), (2, 1, 11, 4), (2, 2, 12, 4), (4, 2, 7, 1), (2, 1, 5, 9),
    (1, 1, 9, 2),
]  # fmt: skip


def inputs(h: int, g: int, t: int, e: int = 8, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in float64, as views of one projection: only the last dimension is contiguous."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(b, t, h + 2 * g, e, generator=generator, dtype=torch.float64)
    return heads.transpose(1, 2).split([h, g, g], dim=1)


def by_definition(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, summary: str) -> Tensor:
    """One query at a time, over the list of its rows."""
    o = torch.empty_like(q)
    b, h, t, e = q.shape
    offset = 0 if summary == "first" else chunk_size - 1
    for i, head, row in itertools.product(range(b), range(h), range(t)):
        start = row // chunk_size * chunk_size
        seen = [r + offset for r in range(0, start, chunk_size)] + list(range(start, row + 1))
        keys, values = (x[i, head // (h // k.shape[1]), seen] for x in (k, v))
        weights = (keys @ q[i, head, row] / math.sqrt(e)).softmax(0)
        o[i, head, row] = weights @ values
    return o


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("h, g, t, chunk_size", CASES)
def test_eager_is_the_definition(h: int, g: int, t: int, chunk_size: int, summary: str) -> None:
    qkv = inputs(h, g, t)
    o = chunk_attention(*qkv, chunk_size, summary, "eager")
    torch.testing.assert_close(o, by_definition(*qkv, chunk_size, summary), rtol=0, atol=1e-13)


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("h, g, t, chunk_size", CASES)
def test_two_parts_equal_eager(h: int, g: int, t: int, chunk_size: int, summary: str) -> None:
    results = []
    for implementation in ("eager", "two_part"):
        qkv = [x.clone().requires_grad_() for x in inputs(h, g, t)]
        o = chunk_attention(*qkv, chunk_size, summary, implementation)
        o.backward(inputs(h, g, t)[0] + 1)
        results.append([o, *(x.grad for x in qkv)])
    for eager, two_part in zip(*results, strict=True):
        torch.testing.assert_close(two_part, eager, rtol=0, atol=1e-12)


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("h, g, t, chunk_size", [(2, 1, 7, 3), (1, 1, 4, 1), (1, 1, 3, 3)])
def test_two_part_gradients(h: int, g: int, t: int, chunk_size: int, summary: str) -> None:
    qkv = [x.clone().requires_grad_() for x in inputs(h, g, t, e=2, b=1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: chunk_attention(q, k, v, chunk_size, summary, "two_part"), qkv
    )


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_the_work_of_two_parts_is_that_of_their_scores() -> None:
    """No tensor is larger: keys are not copied for every chunk, nor rows padded to a long one."""
    h, t, c = 4, 512, 8
    qkv = [x.requires_grad_() for x in inputs(h, 2, t, e=16, b=1)]
    with Largest() as largest:
        chunk_attention(*qkv, c, "first", "two_part").sum().backward()
    assert largest.numel <= h * t * (t // c)
    with Largest() as largest:
        chunk_attention(*inputs(1, 1, 8), 10**6, "last", "two_part")
    assert largest.numel <= 8 * 8 * 2 * 8


def test_two_parts_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs: as many scores at a time as are allowed, in the backward pass as well."""
    h, t, c = 2, 96, 4
    whole = [x.requires_grad_() for x in inputs(h, 1, t)]
    pieces = [x.detach().clone().requires_grad_() for x in whole]
    expected = chunk_attention(*whole, c)
    expected.square().sum().backward()
    limit = 2 * h * c * 10 * (t // c)  # ten chunks of both sequences
    monkeypatch.setattr("cat_bench.chunk_attention.MAX_SCORES", limit)
    with Largest() as largest:
        o = chunk_attention(*pieces, c)
        o.square().sum().backward()
    assert largest.numel <= limit
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    for got, right in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got.grad, right.grad, rtol=0, atol=1e-12)


def test_a_mask_of_a_fake_is_not_kept() -> None:
    q, k, v = inputs(1, 1, 19)
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(x) for x in (q, k, v))
        assert chunk_attention(*fakes, 3, "first", "eager").shape == q.shape
    o = chunk_attention(q, k, v, 3, "first", "eager")
    torch.testing.assert_close(o, by_definition(q, k, v, 3, "first"), rtol=0, atol=1e-13)
    metas = [x.to("meta") for x in (q, k, v)]
    assert chunk_attention(*metas, 3, "first", "eager").shape == q.shape


def test_numpy_integers_are_chunk_sizes() -> None:
    qkv = inputs(1, 1, 9)
    assert torch.equal(chunk_attention(*qkv, np.int64(4)), chunk_attention(*qkv, 4))


@pytest.mark.parametrize("t, chunk_size", [(1, 4), (4, 4), (11, 4), (7, 1), (5, 9)])
def test_packed_rotates_and_attends(
    t: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands round the kernels: views, the one buffer of gradients, fakes for the compiler."""
    reference_kernels.install_kernels(monkeypatch)
    q, k, v = inputs(2, 2, t, e=64)
    do = inputs(2, 2, t, e=64)[0].transpose(1, 2).flatten(2) + 1
    rope = rope_table(torch.arange(t) % chunk_size)
    qkv = torch.cat([q, k, v], dim=1).transpose(1, 2).flatten(2).requires_grad_()  # (b, t, 3 h e)
    expected = by_definition(rotate(q, rope), rotate(k, rope), v, chunk_size, "first")
    outputs = (
        packed_reference(qkv, rope, 2, chunk_size),
        packed(qkv, *rope, 2, chunk_size)[0],
    )
    for o in outputs:
        torch.testing.assert_close(o, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(o, qkv, do)[0] for o in outputs]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    torch.library.opcheck(packed, (qkv, *rope, 2, chunk_size))


def test_the_operators_keep_the_rules_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes, strides and autograd as torch.compile assumes them."""
    reference_kernels.install_kernels(monkeypatch)
    qkv = [x.requires_grad_() for x in inputs(2, 2, 21)]
    torch.library.opcheck(fused, (*qkv, 4, 3))
    rope = rope_table(torch.arange(5))
    flat = torch.cat(inputs(2, 2, 5, e=64), dim=1).transpose(1, 2).flatten(2).requires_grad_()
    torch.library.opcheck(short_attention, (flat, 2, *rope))


@pytest.mark.parametrize("kind", [{"num_kv_heads": 1}, {"qk_norm": True}])
def test_chunk_block_refuses_what_its_kernels_do_not_know(kind: dict) -> None:
    block = Block(128, **kind)
    with pytest.raises(ValueError, match="takes no q_norm and one key-value head for every head"):
        chunk_block(block, torch.zeros(1, 5, 128), rope_table(torch.arange(5)), 4)


@pytest.mark.parametrize("implementation", ["eager", "two_part"])
def test_chunks_of_one_row_are_causal_attention(implementation: str) -> None:
    q, k, v = inputs(2, 2, 9)
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for summary in SUMMARIES:
        o = chunk_attention(q, k, v, 1, summary, implementation)
        torch.testing.assert_close(o, causal, rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", ["eager", "two_part"])
def test_large_scores_stay_finite(implementation: str) -> None:
    q, k, v = inputs(1, 1, 9)
    qkv = [x.float().requires_grad_() for x in (1e3 * q, 1e3 * k, v)]
    o = chunk_attention(*qkv, 4, "first", implementation)
    o.sum().backward()
    assert all(x.isfinite().all() for x in (o, *(x.grad for x in qkv)))


@pytest.mark.parametrize("implementation", ["eager", "two_part"])
def test_bfloat16_and_autocast(implementation: str) -> None:
    qkv = inputs(2, 1, 37, 16)
    exact = chunk_attention(*qkv, 4, "first", "eager")
    half = chunk_attention(*(x.bfloat16() for x in qkv), 4, "first", implementation)
    with torch.autocast("cpu", torch.bfloat16):
        cast = chunk_attention(*(x.float() for x in qkv), 4, "first", implementation)
    for o in (half, cast):
        assert o.dtype == torch.bfloat16
        assert (o - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(
    "change, said",
    [
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"chunk_size": 2.5}, "chunk_size must be an integer of at least 1, got 2.5"),
        ({"chunk_size": True}, "chunk_size must be an integer of at least 1, got True"),
        (
            dict.fromkeys("qkv", torch.zeros(2, 2, 5, 8).int()),
            "floating-point dtype, got torch.int32",
        ),
        ({"summary": "middle"}, "summary must be 'first' or 'last', got 'middle'"),
        ({"implementation": "flash"}, "implementation must be one of"),
        ({"implementation": "fused"}, "needs CUDA tensors, got cpu; use implementation='two_part'"),
        ({"q": torch.zeros(2, 3, 5, 8)}, "heads of k must divide those of q"),
        ({"q": torch.zeros(2, 2, 6, 8)}, "must agree in batch, rows"),
        ({"v": torch.zeros(2, 2, 5, 4)}, "q must be (b, h, t, e), k and v (b, g, t, e)"),
        ({"q": torch.zeros(2, 2, 5, 8).double()}, "must have one dtype and device"),
    ],
)
def test_errors_say_what_to_do(change: dict, said: str) -> None:
    x = torch.zeros(2, 2, 5, 8)
    arguments = {"q": x, "k": x, "v": x, "chunk_size": 4} | change
    with pytest.raises(ValueError) as error:
        chunk_attention(**arguments)
    assert said in str(error.value)
