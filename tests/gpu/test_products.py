"""Our products on Hopper, against plain ones: of few rows and of many."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_bench import graph, nvrtc, products

pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("cat_bench.kernels", reason="needs the package triton")

SHAPES = [  # rows, outputs, inputs
    (256, 6144, 2048),
    (512, 5632, 2048),
    (231, 5632, 2048),  # the last rows of the last tile are padding
    (1000, 2816, 1024),
    (4352, 2816, 1024),  # several tiles a program
    (4352, 1024, 2816),
    (300, 50432, 1024),
    (2304, 3008, 1000),  # the last tiles are not full, of outputs and of inputs; an odd number
    (1024, 5632, 192),  # fewer tiles of inputs than the ring has stages
]
EPS = 1e-5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def require_hopper() -> None:
    if not products.num_processors(torch.device("cuda", 0)):
        pytest.skip(f"for Hopper GPUs, this is {torch.cuda.get_device_name()}")


def near(got: Tensor, expected: Tensor, bound: float = 3e-3) -> bool:
    """As a whole, and every element: one store that is missing is nothing to a norm of millions."""
    got, expected = got.double(), expected.double()
    mean = expected.square().mean().sqrt()
    each = (got - expected).abs() <= expected.abs() / 64 + 0.1 * mean
    return bool((got - expected).norm() < bound * expected.norm()) and bool(each.all())


@pytest.mark.parametrize("height, norm", [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_many_rows(
    shape: tuple[int, int, int], height: int, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way of doing it, also where another one or cuBLAS is faster."""
    require_hopper()
    num_rows, num_outputs, width = shape
    most = products.MAX_NORMED_COLUMNS if norm else products.MAX_COLUMNS
    tile = products.Tiling(height, most if num_outputs > 4096 else 96, 96, stages=3, norm=norm)
    monkeypatch.setattr(products, "tiling_on", lambda *_: tile)
    gain = 1 + 0.2 * random(width)
    x, weight = 3 * random(num_rows, width), random(num_outputs, width) * width**-0.5
    plain = F.rms_norm(x.double(), (width,), gain.double(), EPS) @ weight.double().T

    buffer = torch.full((num_rows + 50, num_outputs), 7.0, device="cuda", dtype=torch.bfloat16)
    got = products.norm_many(x, gain, EPS, weight, buffer[:num_rows])
    assert near(got, plain)
    assert torch.equal(buffer[num_rows:], torch.full_like(buffer[num_rows:], 7.0))

    gate, up = plain.chunk(2, dim=1)
    got = products.norm_many(x, gain, EPS, weight, swiglu=True)
    assert near(got, F.silu(gate) * up, 5e-3)
    # cuBLAS sums in another order: no more than roundings to bfloat16 differ
    apart = kernels.swiglu(F.linear(kernels.rms_norm(x, gain, EPS), weight))
    assert near(got, apart, 5e-3)


@pytest.mark.parametrize(
    "shape, swiglu",
    [
        ((256, 5632, 2048), True),
        ((512, 5632, 2048), True),
        ((256, 50432, 2048), False),
        ((2304, 3072, 1024), False),
        ((4352, 3072, 1024), False),
        ((4352, 2816, 1024), True),
        ((2304, 6144, 2048), False),
    ],
)
@torch.no_grad()
def test_the_tilings_that_are_chosen(shape: tuple[int, int, int], swiglu: bool) -> None:
    require_hopper()
    num_rows, num_outputs, width = shape
    x, gain = 3 * random(num_rows, width), 1 + 0.2 * random(width)
    weight = random(num_outputs * (2 if swiglu else 1), width) * width**-0.5
    assert products.takes_many(x, gain, weight, swiglu=swiglu)
    z = F.rms_norm(x.double(), (width,), gain.double(), EPS) @ weight.double().T
    expected = F.silu(z[:, :num_outputs]) * z[:, num_outputs:] if swiglu else z
    got = products.norm_many(x, gain, EPS, weight, swiglu=swiglu)
    assert near(got, expected, 5e-3 if swiglu else 3e-3)


@torch.no_grad()
def test_large_activations_saturate_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """silu of -90 is no nan, and of 90 it is 90: the division is a fast one."""
    require_hopper()
    tile = products.Tiling(1, 192, 118, stages=5, norm=False)
    monkeypatch.setattr(products, "tiling_on", lambda *_: tile)
    gate = torch.linspace(-3e38, 3e38, 64).sign() * torch.logspace(-30, 38, 64)
    x = torch.zeros(256, 64, device="cuda", dtype=torch.bfloat16)
    x[:, 0] = 0.125  # the root mean square is 1 / 64
    gain = torch.full((64,), 0.125, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(2 * 5632, 64, device="cuda", dtype=torch.bfloat16)
    weight[:64, 0], weight[5632:, 0] = gate.to(weight), 1
    found = products.norm_many(x, gain, 0.0, weight, swiglu=True)[:, :64].double()
    exact = F.silu(weight[:64, 0].double()).expand_as(found)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, exact, rtol=1e-2, atol=1e-35)


@torch.no_grad()
def test_rows_of_zeros_and_of_large_numbers_are_normed() -> None:
    """A row of zeros gives zeros; squares are summed in float32."""
    require_hopper()
    x, weight = random(2304, 1024), random(3072, 1024) / 32
    x[3], x[5] = 0, x[5] * 1e15
    gain = torch.ones_like(x[0])
    assert products.takes_many(x, gain, weight)
    assert products.tiling_on(x.device, 2304, 3072, 1024).norm
    got = products.norm_many(x, gain, EPS, weight)
    assert not got[3].any()
    assert near(got, F.rms_norm(x.double(), (1024,), gain.double(), EPS) @ weight.double().T)


def check_replays(run: Callable, x: Tensor, y: Tensor) -> None:
    """`run`, which makes y of x, captured and replayed on changing x equals itself with a pause
    behind every kernel.
    """
    run()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    for _ in range(20):
        x.normal_()
        captured.replay()
        got = y.clone()
        run(torch.cuda.synchronize)
        assert torch.equal(got, y)


@pytest.mark.parametrize("num_rows", [256, 512])
@torch.no_grad()
def test_early_starts_read_nothing_too_early(num_rows: int) -> None:
    """In a captured chain each kernel may start before the one ahead has ended: our norm lets it,
    and writes what the pairs of CTAs read.
    """
    require_hopper()
    weights = [random(2 * 5632, 2048) * 0.02 for _ in range(6)]
    norm = torch.nn.RMSNorm(2048, eps=1e-5, device="cuda", dtype=torch.bfloat16)
    x, y = random(num_rows, 2048), random(num_rows, 2048)
    tile = products.tiling(num_rows, 5632, 2048, products.num_processors(x.device), True)
    assert tile is not None and not tile.norm

    def run(pause=lambda: None) -> None:
        y.copy_(x)
        for weight in weights:
            y.copy_(products.norm_many(y, norm.weight, 1e-5, weight, swiglu=True)[:, :2048])
            pause()

    check_replays(run, x, y)


@torch.no_grad()
def test_early_starts_with_the_norm_on_the_way() -> None:
    """Behind a kernel that lets it start early: the norm of another layer."""
    require_hopper()
    weights = [random(3072, 1024) * 0.02 for _ in range(12)]
    norm = torch.nn.RMSNorm(1024, eps=1e-5, device="cuda", dtype=torch.bfloat16)
    x, y = random(4352, 1024), random(4352, 1024)
    assert products.takes_many(x, norm.weight, weights[0])

    def run(pause=lambda: None) -> None:
        y.copy_(x)
        for weight in weights:
            h = kernels.rms_norm(y, norm.weight, 1e-5)
            pause()
            y.copy_(products.norm_many(h, norm.weight, 1e-5, weight)[:, :1024])
            pause()

    check_replays(run, x, y)


FEW = [  # outputs, inputs
    (3072, 1024),
    (1024, 1024),
    (2048, 5632),
    (6144, 2048),
    (1024, 2816),
    (2200, 1000),  # the last tiles are not full, of weights and of inputs
    (8, 64),
]


@pytest.mark.parametrize("num_rows", [2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize(("num_outputs", "width"), FEW)
@torch.no_grad()
def test_few_rows(num_rows: int, num_outputs: int, width: int) -> None:
    require_hopper()
    x, weight = random(num_rows, width), random(num_outputs, width) * width**-0.5
    assert products.takes_few(x, weight)
    plain = x.double() @ weight.double().T

    buffer = torch.full((20, num_outputs), 7.0, device="cuda", dtype=torch.bfloat16)
    got = products.linear(x, weight, buffer[:num_rows])
    assert (got.double() - plain).norm() / plain.norm() < 3e-3
    assert torch.equal(buffer[num_rows:], torch.full_like(buffer[num_rows:], 7.0))

    buffer = random(20, num_outputs)
    before = buffer.clone()
    got = products.add_linear_(buffer[:num_rows], x, weight)
    expected = before[:num_rows].double() + plain
    assert (got.double() - expected).norm() / expected.norm() < 3e-3
    assert torch.equal(buffer[num_rows:], before[num_rows:])

    gate_up = random(2 * num_outputs, width) * width**-0.5
    rounded = (x.double() @ gate_up.double().T).bfloat16()  # as the kernel does: 16 values may be
    gate, up = rounded.double().chunk(2, dim=1)  # unlucky in what they lose by it
    expected = F.silu(gate) * up
    got = products.swiglu_of_few(x, gate_up)
    assert (got.double() - expected).norm() / expected.norm() < 5e-3


def test_what_few_rows_are_not() -> None:
    require_hopper()
    x, weight = random(16, 1024), random(1024, 1024)
    assert products.takes_few(x, weight)
    assert not products.takes_few(x[:1], weight)
    assert not products.takes_few(random(17, 1024), weight)
    assert not products.takes_few(x.float(), weight.float())
    assert not products.takes_few(random(16, 2048)[:, :1024], weight)  # rows apart
    assert not products.takes_few(x, random(50432, 1024))  # more than one wave
    assert not products.takes_few(x, weight.float())  # a master copy, under autocast
    flat = random(1024 * 1024 + 1)[1:].view(1024, 1024)
    assert not products.takes_few(x, flat)  # begins at no multiple of 16 bytes
    large, gain, wide = random(256, 2048), random(2048), random(11264, 2048)
    assert products.takes_many(large, gain, wide, swiglu=True)
    assert not products.takes_many(large[:128], gain, wide, swiglu=True)
    assert not products.takes_many(large, gain, random(6144, 2048))  # too few rows without SwiGLU
    assert not products.takes_many(large, gain, random(2048, 2048), swiglu=True)  # and too little
    assert not products.takes_many(large, gain, wide.float(), swiglu=True)
    assert not products.takes_many(large, gain.float(), wide, swiglu=True)
    assert not products.takes_many(large.float(), gain.float(), wide.float(), swiglu=True)


@pytest.mark.parametrize("num_rows", [2, 16])
@torch.no_grad()
def test_few_rows_read_nothing_too_early(num_rows: int) -> None:
    """As test_early_starts_read_nothing_too_early."""
    require_hopper()
    norm = torch.nn.RMSNorm(1024, eps=1e-5, device="cuda", dtype=torch.bfloat16)
    layers = [
        [random(n, k) * 0.02 for n, k in ((3072, 1024), (1024, 1024), (5632, 1024), (1024, 2816))]
        for _ in range(12)
    ]
    x, y = random(num_rows, 1024), random(num_rows, 1024)

    def run(pause=lambda: None) -> None:
        y.copy_(x)
        for qkv, attn_out, gate_up, down in layers:
            h = graph.norm_linear(y, norm, qkv)
            pause()
            h = kernels.rms_norm(h[:, 1024:2048].contiguous(), norm.weight, 1e-5)
            pause()
            graph.add_linear_(y, h, attn_out)
            pause()
            h = graph.norm_swiglu(y, norm, gate_up)
            pause()
            graph.add_linear_(y, h, down)
            pause()

    check_replays(run, x, y)


def test_the_compiled_kernel_is_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_hopper()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"K": 64, "N": 128, "R": 8, "SPLITS": 1, "STAGES": 2, "SWIGLU": 0, "ADD": 0}
    source, options = products.source_of("few_rows", 8, tuple(sizes.items()))
    image = nvrtc.cubin("few_rows", source, options)
    assert list(tmp_path.rglob("few_rows.cubin"))
    monkeypatch.setattr(nvrtc, "compile_cuda", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin("few_rows", source, options) == image


def test_a_source_that_does_not_compile_says_why() -> None:
    require_hopper()
    with pytest.raises(RuntimeError, match="identifier"):
        nvrtc.compile_cuda("wrong", "int f() { return nothing; }", ["--gpu-architecture=sm_90a"])
