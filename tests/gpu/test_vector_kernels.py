"""Linear layers of one row and CAT's places of a row, on Triton, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench import cat, graph, spec
from cat_bench.architecture import build
from cat_bench.generate import greedy

pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("cat_bench.kernels", reason="needs the package triton")
recurrent_kernels = pytest.importorskip("cat_bench.recurrent_kernels")
vector_kernels = pytest.importorskip("cat_bench.vector_kernels")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(97, 64), (2048, 2048), (2048, 5632), (6144, 2048), (3000, 700)]  # outputs, inputs


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def norm_of(width: int, dtype: torch.dtype) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, eps=1e-3, device="cuda", dtype=dtype)
    norm.weight.data = random(width, dtype=dtype)
    return norm


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
@torch.no_grad()
def test_linear_layers_of_one_row(num_outputs: int, width: int, dtype: torch.dtype) -> None:
    """One row after the other equals all rows at once in float32."""
    x, weight = random(3, width, dtype=dtype), random(num_outputs, width, dtype=dtype)
    gate_up, norm = random(2 * num_outputs, width, dtype=dtype), norm_of(width, dtype)
    normed = F.rms_norm(x.float(), (width,), norm.weight.float(), 1e-3)
    linear, normed_linear = x.float() @ weight.float().T, normed @ weight.float().T
    gate, up = (normed @ gate_up.float().T).chunk(2, dim=1)
    for row in range(3):
        one, into = x[row : row + 1], random(1, num_outputs, dtype=dtype)
        before = into.float()
        expected = (normed_linear[row], F.silu(gate[row]) * up[row], before[0] + linear[row])
        got = (
            graph.norm_linear(one, norm, weight),
            graph.norm_swiglu(one, norm, gate_up),
            graph.add_linear_(into, one, weight),
        )
        for mine, right in zip(got, expected, strict=True):
            assert error(mine[0], right) < BOUNDS[dtype]
        assert got[2] is into
        normed_into = graph.add_linear_(before.to(dtype, copy=True), one, weight, norm)
        assert error(normed_into[0], before[0] + normed_linear[row]) < BOUNDS[dtype]


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_places_of_a_row(chunk_size: int, growing: bool) -> None:
    row = torch.arange(1, 301, device="cuda")
    token = row + 1000
    mine, expected = (row.new_zeros(300, chunk_size) for _ in range(2))
    places = cat.chunk_rows(token, row, mine, growing)
    for got, right in zip(
        places, cat.chunk_rows_reference(token, row, expected, growing), strict=True
    ):
        assert torch.equal(got, right)
    assert torch.equal(mine, expected)


def test_a_chain_of_early_launches_keeps_its_order() -> None:
    """Hundreds of dependent launches in a graph: a kernel that read too early would show."""
    weights = random(200, 256, 256, dtype=torch.float32) / 16
    x, norm = random(1, 256, dtype=torch.float32), norm_of(256, torch.float32)
    start = x.clone()

    @torch.no_grad()
    def run() -> None:
        x.copy_(start)
        for weight in weights:
            graph.add_linear_(x, graph.norm_linear(x, norm, weight), weight)

    run()
    expected = x.clone()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    for _ in range(20):
        captured.replay()
        assert torch.equal(x, expected)
    slow = start.double()
    for weight in weights.double():
        normed = F.rms_norm(slow, (256,), norm.weight.double(), 1e-3)
        slow = slow + normed @ weight.T @ weight.T
    assert error(expected, slow.float()) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("text", ["dense", "cat-8", "cat-16", "gdn-h1", "mamba2", "based"])
def test_early_launch_changes_no_bit(
    text: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 captured steps: whoever read too early would read the step before."""
    info = spec.describe(spec.parse(text).name)
    if info.lacking("decode", "cuda_graph"):
        pytest.skip(f"needs the package {info.requires['cuda_graph']}")
    token = torch.arange(batch_size, device="cuda")[:, None]
    tokens = []
    for options in (kernels.early_launch(), {"EARLY": False}):
        for module in (kernels, recurrent_kernels, vector_kernels):
            monkeypatch.setattr(module, "early_launch", lambda options=options: options)
        model = build(spec.parse(text), "cuda_graph", "cuda", "bfloat16")
        tokens.append(greedy(model, token, 300))
    assert torch.equal(*tokens)


def test_a_norm_without_eps_takes_that_of_its_dtype() -> None:
    x, norm = random(2, 64, dtype=torch.float32) * 1e-3, nn.RMSNorm(64, device="cuda")
    weight = random(32, 64, dtype=torch.float32)
    expected = norm(x) @ weight.T
    for rows in (x, x[:1]):
        assert error(graph.norm_linear(rows, norm, weight), expected[: len(rows)]) < 1e-5
