"""What reads long prompts beside the authors' kernels: convolution, windows, linear attention.

Whole models are in the files of their architectures; here each part stands against its definition.
"""

import contract
import pytest
import torch

from baselines import based
from cat_bench import recurrent_steps, window
from cat_bench.blocks import attention

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 5e-3}  # one rounding of the output
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "channels"), [(3, 1, 64), (1, 5, 130), (2, 33, 5), (2, 200, 2304)]
)
@pytest.mark.parametrize("activated", [False, True], ids=["plain", "bias and silu"])
@dtypes
def test_convolution_of_whole_sequences(
    dtype: torch.dtype, activated: bool, batch_size: int, num_tokens: int, channels: int, width: int
) -> None:
    """Inputs are columns of a wider matmul, filters those of a Conv1d; the window moves on."""
    recurrent_kernels = pytest.importorskip(
        "cat_bench.recurrent_kernels", reason="needs the package triton"
    )
    torch.manual_seed(0)
    wide = torch.randn(batch_size, num_tokens, channels + 24, device="cuda").to(dtype)
    new = wide[:, :, 8 : 8 + channels]
    window_before = torch.randn(batch_size, width, channels, device="cuda").to(dtype)
    weight = torch.randn(channels, 1, width, device="cuda").to(dtype)[:, 0]
    bias = torch.randn(channels, device="cuda").to(dtype) if activated else None
    inputs, expected_inputs = window_before.clone(), window_before.float()
    got = recurrent_kernels.conv_rows(new, inputs, weight, bias, activated)
    expected = recurrent_steps.conv_rows_reference(
        new.float(), expected_inputs, weight.float(), None if bias is None else bias.float(),
        activated,
    )  # fmt: skip
    assert got.dtype == dtype and got.shape == new.shape
    assert contract.relative_norm(got, expected) < BOUNDS[dtype]
    assert torch.equal(inputs.float(), expected_inputs)


def test_convolution_of_more_numbers_than_32_bits_address() -> None:
    """A prompt of 2 x 524,293 tokens of Mamba2; 10 GB."""
    recurrent_kernels = pytest.importorskip(
        "cat_bench.recurrent_kernels", reason="needs the package triton"
    )
    torch.manual_seed(0)
    new = torch.empty(2, 2**19 + 5, 2304, device="cuda", dtype=torch.bfloat16).normal_()
    assert new.numel() > 2**31
    weight = torch.randn(2304, 4, device="cuda", dtype=torch.bfloat16)
    got = recurrent_kernels.conv_rows(new, new.new_zeros(2, 4, 2304), weight)
    tail = recurrent_kernels.conv_rows(new[:, -8:], new[:, -12:-8].clone(), weight)
    assert torch.equal(got[:, -8:], tail)


@pytest.mark.parametrize(("num_tokens", "past"), [(5000, 0), (5000, 2499), (3000, 700)])
@pytest.mark.parametrize("size", [64, 512, 2500])  # the last: more than MAX_QUERIES
@dtypes
def test_windows_in_blocks(dtype: torch.dtype, size: int, num_tokens: int, past: int) -> None:
    """Against one call with one mask over all rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, past + num_tokens, 64, device="cuda").to(dtype)
    q = q[:, :, past:]
    got = window.window_attention(q, k, v, size)
    distance = torch.arange(k.shape[2], device="cuda")[past:, None]
    distance = distance - torch.arange(k.shape[2], device="cuda")
    expected = attention(q.float(), k.float(), v.float(), (distance >= 0) & (distance < size))
    assert contract.relative_norm(got, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("num_tokens", "past"), [(5000, 0), (2500, 0), (3000, 700), (40, 511)])
@pytest.mark.parametrize("size", [1, 64, 512, 6000])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_windows_by_flash(num_kv_heads: int, size: int, num_tokens: int, past: int) -> None:
    """q, k and v as a prompt's matmul leaves them: heads lie side by side in a row."""
    torch.manual_seed(0)
    heads = 4 + 2 * num_kv_heads
    qkv = torch.randn(3, past + num_tokens, heads, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.transpose(1, 2).split([4, num_kv_heads, num_kv_heads], dim=1)
    q = q[:, :, past:]
    got = window.fast_window_attention(q, k, v, size)
    expected = window.window_attention(q.float(), k.float(), v.float(), size)
    assert got.dtype == torch.bfloat16
    assert contract.relative_norm(got, expected) < 1e-2


@pytest.mark.parametrize(
    ("batch_size", "num_heads", "feature_dim", "width"),
    [(2, 16, 16, 64), (1, 3, 4, 32), (3, 2, 8, 48), (2, 2, 16, 128)],
)
@pytest.mark.parametrize("num_tokens", [1, 17, 32, 33, 2500])
def test_linear_attention_in_one_kernel(
    num_tokens: int, batch_size: int, num_heads: int, feature_dim: int, width: int
) -> None:
    """On an empty state, then on the one that it left; against float64."""
    recurrent_kernels = pytest.importorskip(
        "cat_bench.recurrent_kernels", reason="needs the package triton"
    )
    torch.manual_seed(0)
    parts = [num_heads * feature_dim, num_heads * feature_dim, num_heads * width]
    features = 1 + feature_dim + feature_dim**2
    state = [
        torch.zeros(batch_size, num_heads, features, *e, device="cuda") for e in ((width,), ())
    ]
    expected_state = [buffer.double() for buffer in state]
    for length in (num_tokens, 77):
        qkv = torch.randn(batch_size, length, sum(parts), device="cuda").bfloat16()
        q, k, v = qkv.split(parts, dim=-1)
        got = recurrent_kernels.taylor_rows(q, k, v, *state)
        heads = (x.double().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        expected, *expected_state = based.taylor_attention(*heads, *expected_state)
        assert got.dtype == torch.bfloat16
        assert contract.relative_norm(got, expected.transpose(1, 2).flatten(2)) < 5e-3
        for buffer, reference, bound in zip(state, expected_state, (5e-3, 1e-5), strict=True):
            assert contract.relative_norm(buffer, reference) < bound


@dtypes
def test_linear_attention_in_batches_of_chunks(dtype: torch.dtype) -> None:
    """64 heads, so that a batch holds 4096 of 9000 tokens; against float64, cut in two."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 16, 9000, 16, device="cuda").to(dtype)
    v = torch.randn(4, 16, 9000, 64, device="cuda").to(dtype)
    assert [count for _, count in based.chunks(9000, 64)] == [64, 64, 12, 1]
    y, *state = based.taylor_attention(q, k, v)
    wide = [x.double() for x in (q, k, v)]
    first, *middle = based.taylor_attention(*(x[:, :, :5000] for x in wide))
    second, *last = based.taylor_attention(*(x[:, :, 5000:] for x in wide), *middle)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert contract.relative_norm(y, torch.cat([first, second], dim=2)) < bound
    for got, expected in zip(state, last, strict=True):
        assert got.dtype == torch.float32
        assert contract.relative_norm(got, expected) < 1e-5
