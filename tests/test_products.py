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
        (256, 5632, 2048, True, Tiling(1, 192, 118, stages=5, norm=False)),
        (512, 5632, 2048, True, Tiling(2, 192, 118, stages=4, norm=False)),
        (256, 50432, 2048, False, Tiling(1, 192, 132, stages=5, norm=False)),
        (4352, 2816, 1024, True, Tiling(1, 256, 132, stages=4, norm=True)),
        (4352, 3072, 1024, False, Tiling(1, 224, 132, stages=5, norm=True)),
        (256, 2816, 1024, True, None),  # half of the multiprocessors would have nothing to do
        (256, 6144, 2048, False, None),
        (512, 50432, 2048, False, None),  # cuBLAS is as good
        (128, 5632, 2048, True, None),
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
            together = 1 if tile.norm else 2
            row_tiles = -(-num_rows // (128 * tile.height * together))
            num_tiles = row_tiles * -(-num_outputs // outputs)
            assert tile.num_programs == together * min(num_tiles, H100 // together)
            assert tile.norm == (num_rows >= 2048)
            assert tile.stages >= 2
            assert products.many_bytes(tile, width) <= 227 * 1024
            assert tile.columns <= 256 and tile.columns % 32 == 0
            # in a thread's registers: sums, half of it; with the norm two tiles of x, 16 each
            assert tile.height * tile.columns <= (256 if tile.norm else 2 * 192)
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
    assert not products.takes_many(x, x[0], gate_up, swiglu=True)
    assert not products.takes_few(x[:4], gate_up)


def test_a_missing_compiler_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(UserError, match=r"no libnvrtc\.so\.99(.|\n)*nvidia-cuda-nvrtc==99"):
        nvrtc.nvrtc_library()


def test_the_instruction_names_every_sum_once() -> None:
    shared, registers = products.wgmma(176).split("__device__")[1:]
    for text in (shared, registers):
        assert "m64n176k16" in text and "float (&d)[88]" in text
        assert all(text.count(f'"+f"(d[{i}])') == 1 for i in range(88))
    assert "u64 a" in shared and "%88, %89, p, 1, 1, 0, 0" in shared and "p, %90" in shared
    assert "u32 (&a)[4]" in registers and "p, %93" in registers
    assert "{%88, %89, %90, %91}, %92, p, 1, 1, 0;" in registers
