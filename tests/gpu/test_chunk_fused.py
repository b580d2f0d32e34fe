"""The fused kernels of chunk attention against eager, forward and gradients, on a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cat_bench.blocks import Block, rope_table
from cat_bench.chunk_attention import chunk_attention
from cat_bench.chunk_block import chunk_block, packed, packed_reference

pytest.importorskip("triton", reason="implementation 'fused' needs the package triton")
pytestmark = pytest.mark.gpu

CHUNK_SIZES = (1, 2, 3, 4, 5, 8, 16, 32, 100, 128)
# b, h, g, t: one row, less than a tile, an open last chunk, many tiles; shared heads.
SHAPES = [(2, 2, 2, 1), (1, 2, 1, 50), (2, 4, 2, 333), (1, 2, 2, 1024), (1, 2, 1, 2051)]


def inputs(b: int, h: int, g: int, t: int, e: int = 64) -> list[Tensor]:
    """q, k, v and the gradient of o; the first three as views of one projection."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads = torch.randn(b, t, 2 * h + 2 * g, e, generator=generator, device="cuda")
    return list(heads.transpose(1, 2).split([h, g, g, h], dim=1))


def results(tensors: list[Tensor], implementation: str, chunk_size: int, summary: str) -> list:
    """o, dq, dk, dv."""
    *qkv, do = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    o = chunk_attention(*qkv, chunk_size, summary, implementation)
    return [o.detach(), *torch.autograd.grad(o, qkv, do)]


def relative(got: Tensor, expected: Tensor) -> float:
    """Of norms; where one row alone makes a gradient exactly 0, the norm itself."""
    return ((got.float() - expected).norm() / expected.norm().clamp(min=1)).item()


@pytest.mark.parametrize("summary", ["first", "last"])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_fused_equals_eager(chunk_size: int, summary: str) -> None:
    for shape in SHAPES:
        tensors = inputs(*shape)
        expected = results(tensors, "eager", chunk_size, summary)
        fused = results(tensors, "fused", chunk_size, summary)
        torch.testing.assert_close(fused[0], expected[0], rtol=1e-5, atol=1e-5)
        errors = [relative(*pair) for pair in zip(fused, expected, strict=True)]
        assert max(errors) < 1e-4, (shape, errors)
        if shape[-1] == 1:  # the true gradients of q and k are 0: what bfloat16 gives is rounding
            continue
        half = [x.bfloat16() for x in tensors]
        exact = results([x.float() for x in half], "eager", chunk_size, summary)
        errors = [
            relative(*pair)
            for pair in zip(results(half, "fused", chunk_size, summary), exact, strict=True)
        ]
        assert max(errors) < 1e-2, (shape, errors)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 8, 16, 32, 128])
@pytest.mark.parametrize("t", [1, 3, 50, 333, 1025])
def test_packed_equals_its_reference(chunk_size: int, t: int) -> None:
    """The rotation inside the kernels, o and the gradient of qkv: in float32, and in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv, do = (
        torch.randn(2, t, width * 64, generator=generator, device="cuda") for width in (9, 3)
    )
    rope = rope_table(torch.arange(t, device="cuda") % chunk_size)

    def results(qkv: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        o = run(qkv)
        (gradient,) = torch.autograd.grad(o, qkv, do.to(o.dtype))
        return [o.detach(), *gradient.chunk(3, dim=-1)]

    def fused(x: Tensor) -> Tensor:
        return packed(x, *rope, 3, chunk_size)[0]

    def eager(x: Tensor) -> Tensor:
        return packed_reference(x, rope, 3, chunk_size)

    errors = map(relative, results(qkv, fused), results(qkv, eager))
    assert max(errors) < 1e-4
    half = qkv.bfloat16()
    errors = list(map(relative, results(half, fused), results(half.float(), eager)))
    if t == 1:  # as above: of q and k only rounding is left
        errors = errors[::3]
    assert max(errors) < 1e-2, errors


@pytest.mark.filterwarnings("ignore")  # torch.compile advises to use TF32
@pytest.mark.parametrize("chunk_size", [8, 5])
def test_chunk_block_equals_the_block(chunk_size: int) -> None:
    """Compiled in one graph, with and without autocast."""
    torch.manual_seed(0)
    block = Block(128).cuda()
    compiled = torch.compile(chunk_block, fullgraph=True)
    rope = rope_table(torch.arange(333, device="cuda") % chunk_size)
    attend = partial(chunk_attention, chunk_size=chunk_size)
    x = torch.randn(2, 333, 128, device="cuda", requires_grad=True)
    wanted = [x, *block.parameters()]
    expected = block(x, rope, attend)
    expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
    for autocast, bound in ((False, 1e-4), (True, 3e-2)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            got = compiled(block, x, rope, chunk_size)
        grads = torch.autograd.grad(got.float().square().sum(), wanted)
        assert relative(got, expected) < bound
        assert max(map(relative, grads, expected_grads)) < bound


@pytest.mark.parametrize("chunk_size", [8, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("e", [16, 32, 128])
def test_other_head_widths(e: int, dtype: torch.dtype, chunk_size: int) -> None:
    tensors = inputs(1, 2, 1, 777, e)
    expected = results(tensors, "eager", chunk_size, "first")
    half = [x.to(dtype) for x in tensors]
    if dtype == torch.float32 and e == 128 and chunk_size > 64:
        with pytest.raises(ValueError, match="chunk_size up to 64 in float32 with head width 128"):
            results(half, "fused", chunk_size, "first")
        return
    fused = results(half, "fused", chunk_size, "first")
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert max(relative(*pair) for pair in zip(fused, expected, strict=True)) < bound


@pytest.mark.parametrize("t", [4097, 16_385])
def test_long_sequences(t: int) -> None:
    """Beyond 256 chunks the kernels take other launches."""
    tensors = inputs(1, 2, 2, t)
    expected = results(tensors, "eager", 8, "first")
    fused = results([x.bfloat16() for x in tensors], "fused", 8, "first")
    assert max(relative(*pair) for pair in zip(fused, expected, strict=True)) < 2e-2


def test_heads_and_rows_that_lie_far_apart() -> None:
    """Offsets beyond 2^31 elements: between heads, and between the rows of one tile."""
    generator = torch.Generator("cuda").manual_seed(0)
    for far in (1, 2):  # (b, h, t, e): heads, then rows
        shape = (1, 3, 40, 64)
        strides = [0, 64 * 40, 64, 1]
        strides[far] = 1_100_000_000 if far == 1 else 60_000_000
        one = torch.empty(2_500_000_000, dtype=torch.bfloat16, device="cuda")
        q, k, v, do = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
        spread = one.as_strided(shape, strides)
        spread.copy_(k)
        expected = results([q.bfloat16(), spread.clone(), v.bfloat16(), do], "fused", 8, "first")
        got = results([q.bfloat16(), spread, v.bfloat16(), do], "fused", 8, "first")
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_two_parts_equal_eager_on_the_gpu() -> None:
    tensors = inputs(2, 4, 2, 333)
    pairs = zip(
        results(tensors, "two_part", 16, "first"), results(tensors, "eager", 16, "first"),
        strict=True,
    )  # fmt: skip
    assert max(relative(*pair) for pair in pairs) < 1e-5


def test_a_gradient_of_any_strides() -> None:
    q, k, v, do = inputs(1, 2, 2, 100)
    for gradient in (torch.ones((), device="cuda").expand_as(do), do.mT.contiguous().mT):
        expected = results([q, k, v, gradient], "eager", 8, "first")
        fused = results([q, k, v, gradient], "fused", 8, "first")
        assert max(relative(*pair) for pair in zip(fused, expected, strict=True)) < 1e-4


@pytest.mark.filterwarnings("ignore")  # torch.compile advises to use TF32
def test_inside_torch_compile_and_autocast() -> None:
    """A projection, the attention and a projection, as in a block, in one graph."""
    torch.manual_seed(0)
    into, out = (nn.Linear(128, width, device="cuda") for width in (3 * 128, 128))

    def block(x: Tensor, implementation: str) -> Tensor:
        q, k, v = into(x).unflatten(-1, (-1, 64)).transpose(1, 2).split(2, dim=1)
        return out(chunk_attention(q, k, v, 8, "first", implementation).transpose(1, 2).flatten(2))

    compiled = torch.compile(block, fullgraph=True)
    for t in (200, 333):  # the second length makes the graph dynamic
        x = torch.randn(2, t, 128, device="cuda")
        expected = block(x, "eager")
        torch.testing.assert_close(compiled(x, "fused"), expected, rtol=1e-4, atol=1e-5)
        grads = [
            torch.autograd.grad(f(x, name).square().sum(), into.weight)[0]
            for f, name in ((block, "eager"), (compiled, "fused"))
        ]
        assert relative(grads[1], grads[0]) < 1e-4
        with torch.autocast("cuda", torch.bfloat16):
            assert relative(compiled(x, "fused"), expected.detach()) < 2e-2


@pytest.mark.parametrize(
    "shape, chunk_size, dtype, said",
    [
        ((1, 1, 1, 300), 129, torch.float32, "takes chunk_size up to 128, got 129"),
        ((1, 1, 1, 30, 48), 4, torch.float32, "takes head widths (16, 32, 64, 128), got 48"),
        ((1, 1, 1, 30), 4, torch.float64, "computes in float32, got torch.float64"),
    ],
)
def test_errors_name_the_way_out(shape: tuple, chunk_size: int, dtype, said: str) -> None:
    q, k, v, _ = (x.to(dtype) for x in inputs(*shape))
    with pytest.raises(ValueError) as error:
        chunk_attention(q, k, v, chunk_size, "first", "fused")
    assert said in str(error.value) and "two_part" in str(error.value)


def test_chunk_block_has_the_same_limits() -> None:
    block, x = Block(64).cuda(), torch.zeros(1, 300, 64, device="cuda")
    rope = rope_table(torch.arange(300, device="cuda") % 129)
    with pytest.raises(ValueError, match="takes chunk_size up to 128, got 129"):
        chunk_block(block, x, rope, 129)
    with pytest.raises(ValueError, match="computes in float32, got torch.float64"):
        chunk_block(block.double(), x.double(), rope, 8)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_where_its_tensors_lie() -> None:
    """Triton launches on the current device, which need not be theirs."""
    here = inputs(1, 2, 2, 50)
    expected = results(here, "fused", 8, "first")
    got = results([x.to("cuda:1") for x in here], "fused", 8, "first")
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))
