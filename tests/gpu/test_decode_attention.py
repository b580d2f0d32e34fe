"""The kernel of cached attention against its reference, on every tile and split that it chooses."""

import pytest
import torch

from cat_bench.blocks import rope_table, rotate
from cat_bench.graph import Rows, decode_attention_reference

pytest.importorskip("triton", reason="the kernel needs the package triton")
pytestmark = pytest.mark.gpu

# b, h, g, rows, and what they lead to: the tile, and whether the rows of a head are split.
CASES = [
    (1, 16, 16, 100, "FEW", False),
    (4, 32, 8, 200, "FEW", False),
    (2, 32, 32, 700, "SHORT", True),
    (64, 32, 32, 272, "SHORT", False),
    (65, 32, 4, 40, "SHORT", False),
    (2, 16, 16, 4096, "LONG", True),
    (1, 16, 2, 33_000, "LONG", True),
    (65, 32, 32, 1000, "LONG", False),
]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("second", [False, True], ids=["one range", "two ranges"])
@pytest.mark.parametrize("b, h, g, num_rows, tile, is_split", CASES)
def test_decode_attention(
    b: int, h: int, g: int, num_rows: int, tile: str, is_split: bool, second: bool,
    dtype: torch.dtype, bound: float,
) -> None:  # fmt: skip
    """Ranges of any length, the own row in a range or outside, nan wherever nobody may look."""
    from cat_bench import kernels

    chosen, splits = kernels.tiling(b * h, num_rows)
    assert chosen == getattr(kernels, tile) and (splits > 1) == is_split
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, heads * 64, device="cuda", dtype=dtype) for heads in (h, g, g))
    keys, values = torch.randn(2, b, g, num_rows, 64, device="cuda", dtype=dtype)
    sequence = torch.arange(b, device="cuda")
    low = num_rows // 2
    first_end = 1 + sequence * 7 % low  # every sequence its own length
    first_end[-1] = low if second else num_rows
    write = (first_end - sequence % 2).clamp(max=num_rows - 1)  # behind the range, or its last row
    rows = Rows(write, sequence % 50, first_end)
    seen = torch.arange(num_rows, device="cuda") < first_end[:, None]  # (b, s)
    if second:
        end = (low + 1 + sequence * 5).clamp(max=num_rows)
        rows = rows._replace(second_start=torch.full_like(end, low + 1), second_end=end)
        at = torch.arange(num_rows, device="cuda")
        seen |= (at > low) & (at < end[:, None])
    hidden = ~seen[:, None, :, None]
    keys.masked_fill_(hidden, torch.nan)
    values.masked_fill_(hidden, torch.nan)
    rope = rope_table(torch.arange(50, device="cuda"))
    expected_keys, expected_values = (x.double().masked_fill(hidden, 0.0) for x in (keys, values))
    heads = (x.unflatten(-1, (-1, 64))[:, :, None] for x in (q, k, v))
    q4, k4, v4 = heads
    tables = tuple(table[rows.rope_id][:, None] for table in rope)
    expected = decode_attention_reference(
        rotate(q4, tables).double(), rotate(k4, tables).double(), v4.double(),
        expected_keys, expected_values, rows,
    ).flatten(1)  # fmt: skip
    got = kernels.decode_attention(q, k, v, keys, values, rows, rope)
    error = (got.double() - expected).norm() / expected.norm()
    assert error < bound
    new = keys[sequence, :, write].double()
    assert torch.allclose(new, expected_keys[sequence, :, write], rtol=bound, atol=bound)
    assert torch.equal(values[sequence, :, write].double(), expected_values[sequence, :, write])
