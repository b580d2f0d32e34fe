"""Which shapes our products take and how they are tiled; their compiler and its instruction."""

import pytest
import torch

from cat_bench import nvrtc, products
from cat_bench.errors import UserError
from cat_bench.products import Tiling, tiling

H100 = 132  # multiprocessors


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "width", "swiglu", "expected"),
    [
        (256, 5632, 2048, True, Tiling(height=1, columns=176, num_programs=128, stages=11)),
        (512, 5632, 2048, True, Tiling(height=2, columns=176, num_programs=128, stages=8)),
        (256, 50432, 2048, False, Tiling(height=2, columns=192, num_programs=132, stages=8)),
        (4352, 2816, 1024, True, Tiling(height=2, columns=192, num_programs=132, stages=8)),
        (4352, 1024, 2816, False, Tiling(height=2, columns=160, num_programs=119, stages=8)),
        (256, 6144, 2048, False, None),  # tiles of 128 x 96: shared memory is the bound
        (256, 2048, 5632, False, None),
        (128, 5632, 2048, True, None),  # half of the multiprocessors would have nothing to do
    ],
)
def test_tilings(
    num_rows: int, num_outputs: int, width: int, swiglu: bool, expected: Tiling | None
) -> None:
    assert tiling(num_rows, num_outputs, width, H100, swiglu) == expected


@pytest.mark.parametrize("swiglu", [False, True])
def test_every_tiling_covers_its_product_and_fits_a_multiprocessor(swiglu: bool) -> None:
    found = 0
    for num_rows in range(1, 5000, 37):
        for num_outputs, width in ((5632, 2048), (2816, 1024), (4096, 1536), (50432, 1000)):
            tile = tiling(num_rows, num_outputs, width, H100, swiglu)
            if tile is None:
                continue
            found += 1
            outputs = tile.columns // 2 if swiglu else tile.columns
            num_tiles = -(-num_rows // (128 * tile.height)) * -(-num_outputs // outputs)
            assert tile.num_programs == min(num_tiles, H100)
            stage = (128 * tile.height + tile.columns) * 32 * 2
            assert tile.stages >= 2
            assert tile.stages * (stage + 16) + 1024 <= 227 * 1024
            assert tile.columns <= 256 and tile.columns % 16 == 0
            assert tile.height * tile.columns <= 2 * 192  # sums in a thread's registers: half of it
    assert found > 50


@pytest.mark.parametrize("num_rows", [2, 8, 9, 16])
def test_few_rows_fit_a_multiprocessor_and_split_what_there_is(num_rows: int) -> None:
    for num_weight_rows in (8, 1024, 3072, 11264, 16896):
        for width in (64, 72, 1024, 2816, 5632):
            rows, splits, stages = products.few_tiling(num_rows, num_weight_rows, width)
            assert num_rows <= rows and rows % splits == 0
            assert splits <= -(-width // 64) and stages >= 2
            assert stages * ((128 + rows) * 128 + 16) + 1024 <= 227 * 1024
            ctas = -(-num_weight_rows // 128) * splits
            assert ctas >= 84 or splits == 8 or 2 * splits > -(-width // 64)


def test_a_cpu_is_not_taken() -> None:
    x, gate_up = torch.randn(256, 2048).bfloat16(), torch.randn(11264, 2048).bfloat16()
    assert not products.takes_many(x, gate_up, swiglu=True)
    assert not products.takes_few(x[:4], gate_up)


def test_a_missing_compiler_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(UserError, match=r"no libnvrtc\.so\.99(.|\n)*nvidia-cuda-nvrtc==99"):
        nvrtc.nvrtc_library()


def test_the_instruction_names_every_sum_once() -> None:
    text = products.wgmma(176)
    assert "m64n176k16" in text and "float (&d)[88]" in text
    assert all(text.count(f'"+f"(d[{i}])') == 1 for i in range(88))
    assert "%88, %89, p" in text and "setp.ne.b32 p, %90" in text
