"""Which shapes our products take and how they are tiled; their compiler and its instruction."""

import pytest
import torch

from cat_bench import nvrtc, products
from cat_bench.errors import UserError
from cat_bench.products import Tiling, tiling

H100 = 132  # multiprocessors


@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "width", "expected"),
    [
        (256, 5632, 2048, Tiling(height=1, columns=176, row_tiles=2, stages=5)),
        (512, 5632, 2048, Tiling(height=2, columns=176, row_tiles=2, stages=4)),
        (512, 2816, 1024, Tiling(height=1, columns=176, row_tiles=4, stages=5)),
        (128, 5632, 2048, None),  # half of the multiprocessors would have nothing to do
        (256, 2816, 1024, None),
        (300, 5632, 2048, None),  # 212 of 512 rows would be padding
        (4096, 5632, 2048, None),  # more than one wave: cuBLAS is as good
        (256, 5632, 2056, None),  # no whole tiles of 64 inputs
        (256, 5636, 2048, None),
    ],
)
def test_tilings(num_rows: int, num_outputs: int, width: int, expected: Tiling | None) -> None:
    assert tiling(num_rows, num_outputs, width, H100) == expected


def test_every_tiling_covers_its_product_and_fits_a_multiprocessor() -> None:
    found = 0
    for num_rows in range(1, 1200, 7):
        for num_outputs, width in ((5632, 2048), (2816, 1024), (4096, 1536), (1408, 512)):
            tile = tiling(num_rows, num_outputs, width, H100)
            if tile is None:
                continue
            found += 1
            assert num_rows <= tile.row_tiles * 128 * tile.height
            assert tile.row_tiles % 2 == 0 and num_outputs % (tile.columns // 2) == 0
            programs = tile.row_tiles * num_outputs // (tile.columns // 2)
            assert 7 / 8 * H100 <= programs <= H100
            stage = (128 * tile.height + tile.columns) * 64 * 2
            assert tile.stages >= 2
            assert tile.stages * (stage + 16) + 1024 <= 227 * 1024
            assert tile.columns <= 256 and tile.columns % 16 == 0
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
    assert not products.takes_swiglu(x, gate_up)
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
