"""Our products on Hopper, against plain ones: few rows, and SwiGLU of some hundreds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_bench import graph, nvrtc, products

pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("cat_bench.kernels", reason="needs the package triton")

SHAPES = [  # rows, outputs, inputs
    (256, 5632, 2048),
    (512, 5632, 2048),
    (231, 5632, 2048),  # the last rows of the last tile are padding
    (449, 5632, 2048),
    (512, 2816, 1024),
    (1000, 2816, 1024),
    (256, 5632, 192),  # fewer tiles than the ring has stages
]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def require_hopper() -> None:
    if not products.num_processors(torch.device("cuda", 0)):
        pytest.skip(f"for Hopper GPUs, this is {torch.cuda.get_device_name()}")


def require_tiling(*shape: int) -> None:
    require_hopper()
    if products.tiling_on(torch.device("cuda", 0), *shape) is None:
        pytest.skip(f"no tiling for {shape} on {torch.cuda.get_device_name()}")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_product_and_activation(shape: tuple[int, int, int]) -> None:
    require_tiling(*shape)
    num_rows, num_outputs, width = shape
    x, gate_up = random(num_rows, width), random(2 * num_outputs, width) * width**-0.5
    assert products.takes_swiglu(x, gate_up)
    got = products.swiglu(x, gate_up)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    expected = F.silu(gate) * up
    assert (got.double() - expected).norm() / expected.norm() < 5e-3
    apart = kernels.swiglu(F.linear(x, gate_up)).double()
    # cuBLAS sums in another order: no more than roundings to bfloat16 differ
    assert (got.double() - apart).norm() / apart.norm() < 3e-3


@torch.no_grad()
def test_writes_its_rows_and_no_others() -> None:
    require_tiling(231, 5632, 2048)
    x, gate_up = random(231, 2048), random(11264, 2048)
    buffer = torch.full((300, 5632), 7.0, device="cuda", dtype=torch.bfloat16)
    tile = products.tiling_on(x.device, 231, 5632, 2048)
    products.launch_swiglu(tile, x, gate_up, buffer[:231])
    assert torch.equal(buffer[231:], torch.full_like(buffer[231:], 7.0))
    assert torch.equal(buffer[:231], products.swiglu(x, gate_up))


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


@torch.no_grad()
def test_early_starts_read_nothing_too_early() -> None:
    """In a captured chain each kernel may start before the one ahead has ended."""
    require_tiling(256, 5632, 2048)
    layers = [(random(11264, 2048) * 0.02, random(2048, 5632) * 0.02) for _ in range(6)]
    norm = torch.nn.RMSNorm(2048, eps=1e-5, device="cuda", dtype=torch.bfloat16)
    x, y = random(256, 2048), random(256, 2048)

    def run(pause=lambda: None) -> None:
        y.copy_(x)
        for gate_up, down in layers:
            h = kernels.rms_norm(y, norm.weight, 1e-5)
            pause()
            h = products.swiglu(h, gate_up)
            pause()
            y.addmm_(h, down.T)
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
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
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
    large = random(256, 2048)
    assert not products.takes_swiglu(large, random(11264, 2048).float())
    assert not products.takes_swiglu(large.float(), random(11264, 2048).float())


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
