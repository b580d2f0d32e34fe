"""Costs at full size, on the meta device: parameters, state and FLOPs of the specification.

Sources: cat_spec.md 1.6 (parameters), evaluation_spec.md 4.4 (state), cat_spec.md 5 (FLOPs).
"""

import pytest

from cat_bench import spec
from cat_bench.architecture import Architecture, build, generation_flops


def planned(text: str) -> Architecture:
    return build(spec.parse(text), device="meta", dtype="bfloat16")


# (spec, parameters, millions of them that are no embedding, head, chunk position or dummy)
EXACT = [
    ("dense", 257_451_008, 154.2),
    ("dense-2d", 823_183_360, 616.6),
    ("cat-4", 960_562_176, 702.1),
    ("cat-8", 968_819_712, 710.5),
    ("cat-16", 985_531_392, 727.3),
    ("cat-32", 1_019_053_056, 760.8),
    ("cat-1x", 394_697_728, 239.6),
    ("cat-1x:compressor_layers=3", 356_156_416, 201.1),
    ("cat-8:num_layers=8,compressor_layers=4", 737_588_224, 479.2),
]


@pytest.mark.parametrize(("text", "total", "non_embedding_millions"), EXACT)
def test_exact_counts(text: str, total: int, non_embedding_millions: float) -> None:
    model = planned(text)
    assert model.num_params == total
    assert round(model.num_params_non_embedding / 1e6, 1) == non_embedding_millions


# (spec, millions of parameters, millions non-embedding), as printed
ROUNDED = [
    ("cat-4:compressor_layers=3", 922.0, 663.5),
    ("cat-8-q", 930.3, 671.9),
    ("cat-16:compressor_layers=3", 947.0, 688.7),
    ("cat-32:compressor_layers=3", 980.5, 722.3),
    ("cat-8:decoder_width=1280", 512.3, 331.4),
    ("cat-8:decoder_width=1536", 636.1, 429.4),
    ("dense-wikitext", 91.6, 42.5),
    ("cat-8-wikitext", 323.5, 200.6),
    ("cat-16-wikitext", 332.9, 210.0),
    ("cat-32-wikitext", 351.8, 228.9),
    ("cat-64-wikitext", 389.5, 266.6),
]


@pytest.mark.parametrize(("text", "total_millions", "non_embedding_millions"), ROUNDED)
def test_rounded_counts(text: str, total_millions: float, non_embedding_millions: float) -> None:
    model = planned(text)
    assert round(model.num_params / 1e6, 1) == total_millions
    assert round(model.num_params_non_embedding / 1e6, 1) == non_embedding_millions


def test_associative_recall_scale() -> None:
    dense = planned("dense-mqar")
    assert (dense.num_params, dense.num_params_non_embedding) == (1_179_968, 131_392)
    cat = planned("cat-mqar")
    assert (cat.num_params, cat.num_params_non_embedding) == (1_790_528, 213_504)


# (spec, MB per sequence at 1024, GB at batch 512 and 1024 tokens, GB at batch 256 and 4096 tokens)
STATES = [
    ("dense", 50.33, 25.77, 51.54),
    ("dense-2d", 100.66, 51.54, 103.08),
    ("cat:chunk_size=4", 25.56, 13.09, 25.87),
    ("cat:chunk_size=8", 13.37, 6.85, 13.09),
    ("cat:chunk_size=16", 7.86, 4.03, 6.85),
    ("cat:chunk_size=32", 6.29, 3.22, 4.03),
]


@pytest.mark.parametrize(("text", "mb_per_sequence", "gb_short", "gb_long"), STATES)
def test_state_calibration_table(
    text: str, mb_per_sequence: float, gb_short: float, gb_long: float
) -> None:
    model = planned(text)
    assert round(model.state_bytes_float(1, 1024) / 1e6, 2) == mb_per_sequence
    assert round(model.state_bytes_float(512, 1024) / 1e9, 2) == gb_short
    longer = planned(f"{text},max_len=4096") if text.startswith("cat") else model
    assert round(longer.state_bytes_float(256, 4096) / 1e9, 2) == gb_long


@pytest.mark.parametrize("chunk_size", [4, 8, 16, 32])
def test_state_elements_of_cat(chunk_size: int) -> None:
    """2 L D_d (N/C + C) elements of two bytes; ids and counters come on top."""
    model = planned(f"cat:chunk_size={chunk_size}")
    elements = 2 * 12 * 2048 * (1024 // chunk_size + chunk_size)
    assert model.state_bytes_float(1, 1024) == 2 * elements
    assert 0 < model.state_bytes(1, 1024) - 2 * elements < 1024


def test_state_ratios_to_dense() -> None:
    dense = planned("dense")
    cat = planned("cat:chunk_size=8")
    ratio = dense.state_bytes_float(512, 1024) / cat.state_bytes_float(512, 1024)
    assert round(ratio, 2) == 3.76
    weights = 2 * dense.num_params, 2 * cat.num_params  # bytes
    totals = (
        m.state_bytes_float(512, 1024) + w for m, w in zip((dense, cat), weights, strict=True)
    )
    assert round(next(totals) / next(totals), 1) == 3.0


# (spec, useful MFLOP per token, forward, at 1024 and at 4096 tokens; compact layout)
FLOPS = [
    ("dense", 437, 512),
    ("dense-2d", 1490, 1641),
    ("cat:chunk_size=4", 1651, 1688),
    ("cat:chunk_size=8", 1625, 1643),
    ("cat:chunk_size=16", 1613, 1622),
    ("cat:chunk_size=32", 1608, 1612),
    ("cat:chunk_size=8,compressor_layers=3", 1539, 1557),
    ("cat:chunk_size=4,compressor_layers=3", 1554, 1591),
    ("cat:chunk_size=16,compressor_layers=3", 1531, 1540),
    ("cat:chunk_size=8,decoder_width=1024", 591, 600),
    ("cat:chunk_size=8,decoder_width=1024,compressor_layers=3", 504, 513),
]


@pytest.mark.parametrize(("text", "mflops_short", "mflops_long"), FLOPS)
def test_useful_flops_per_token(text: str, mflops_short: int, mflops_long: int) -> None:
    """The table counts the dummy's row, which generation does in prefill: one row in N, 0.1 %."""
    for seq_len, expected in [(1024, mflops_short), (4096, mflops_long)]:
        model = planned(f"{text},max_len={seq_len}" if text.startswith("cat") else text)
        mflops = generation_flops(model, 1, seq_len) / seq_len / 1e6
        assert mflops == pytest.approx(expected, rel=0.0015, abs=0.6)
