"""Strided attention against its definition, written out key by key, and its costs at full size.

Sources: cat_spec.md 1.6, 1.7 (mask, parameters), 5 (FLOPs, state); evaluation_spec.md 4.3 (MQAR
state), 4.4 (state). The contract of every architecture is in contract.py.
"""

import dataclasses
import math
from collections.abc import Iterator

import contract
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from baselines import sparse
from cat_bench import predict, spec
from cat_bench.architecture import build, generation_flops
from cat_bench.case import Options
from cat_bench.errors import UserError
from cat_bench.suites import training

LENGTH = 14  # tokens; neither 3 nor 4 divides it


@pytest.fixture(autouse=True)
def fresh_masks() -> Iterator[None]:
    """A planted fault must neither find the masks of a healthy test nor leave its own."""
    sparse.strided_mask.cache_clear()
    yield
    sparse.strided_mask.cache_clear()


def tiny(stride: int, **overrides) -> sparse.Model:
    config = {"width": 128, "num_layers": 2, "vocab_size": 61} | overrides
    model = sparse.Model(sparse.Config(stride=stride, **config)).double().eval()
    return contract.randomise(model)


def some_tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))


# The definition, one query at a time


def visible(query: int, stride: int) -> list[int]:
    block = query - query % stride
    return [*range(stride - 1, block, stride), *range(block, query + 1)]


def turned(x: Tensor, position: int) -> Tensor:
    """RoPE as a complex rotation of (x_k, x_{k + 32}). x (..., 64)."""
    angle = torch.tensor([position * 10_000 ** (-2 * k / 64) for k in range(32)])
    pair = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones(32), angle)
    return torch.cat([pair.real, pair.imag], dim=-1)


@torch.no_grad()
def by_definition(model: sparse.Model, tokens: Tensor) -> Tensor:
    """Logits (b, t, v) with explicit softmaxes over the visible keys."""
    x, stride = model.embed(tokens), model.config.stride
    for block in model.blocks:
        q, k, v = block.split_heads(block.qkv(block.attn_norm(x)))
        repeats = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        rows = []
        for query in range(tokens.shape[1]):
            keys = visible(query, stride)
            turned_q = turned(q[:, :, query], query)
            scores = [(turned_q * turned(k[:, :, key], key)).sum(-1) / 8 for key in keys]
            weights = torch.stack(scores, dim=-1).softmax(-1)  # (b, h, keys)
            rows.append(torch.einsum("bhk,bhke->bhe", weights, v[:, :, keys]).flatten(1))
        x = x + block.attn_out(torch.stack(rows, dim=1))
        h = block.mlp_norm(x)
        x = x + block.w2(silu(block.w1(h)) * block.w3(h))
    return model.head(model.norm(x))


def assert_forward_is_the_definition(stride: int, **overrides) -> None:
    model = tiny(stride, **overrides)
    got = contract.forward(model, some_tokens())
    # RoPE's tables are float32: angles differ by about 1e-7.
    contract.assert_same(got, by_definition(model, some_tokens()), f"stride {stride}", 1e-5)


STRIDES = [1, 2, 3, 4, LENGTH - 1, LENGTH, LENGTH + 3]


@pytest.mark.parametrize("stride", STRIDES)
def test_forward_is_the_definition(stride: int) -> None:
    assert_forward_is_the_definition(stride)


def test_grouped_heads_are_the_definition() -> None:
    assert_forward_is_the_definition(3, num_kv_heads=1)


def test_visible_keys_of_the_default_stride() -> None:
    """The definition above, by hand: around the end of a block."""
    assert visible(6, 8) == [0, 1, 2, 3, 4, 5, 6]
    assert visible(7, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert visible(8, 8) == [7, 8]
    assert visible(23, 8) == [7, 15, 16, 17, 18, 19, 20, 21, 22, 23]
    assert visible(24, 8) == [7, 15, 23, 24]


@pytest.mark.parametrize("stride", STRIDES)
def test_mask_row_by_row(stride: int) -> None:
    seen = sparse.strided_mask(0, LENGTH, stride, torch.device("cpu"))
    for query in range(LENGTH):
        assert seen[query].nonzero()[:, 0].tolist() == visible(query, stride)


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_one_layer_moves_exactly_the_visible(stride: int) -> None:
    """Through the whole model: token k changes the logits of q where q sees k, nowhere else."""
    model, tokens = tiny(stride, num_layers=1), some_tokens()[:1]
    expected = contract.forward(model, tokens)
    here = torch.eye(LENGTH, dtype=torch.bool)
    changed = torch.where(here, (tokens + 1) % 61, tokens)  # row k: token k replaced
    moved = (contract.forward(model, changed) - expected).abs().amax(-1) > 1e-10  # (k, q)
    for query in range(LENGTH):
        assert moved[:, query].nonzero()[:, 0].tolist() == visible(query, stride)


def test_stride_one_and_a_stride_beyond_the_end_are_dense() -> None:
    from baselines import dense

    tokens, config = some_tokens(), {"width": 128, "num_layers": 2, "vocab_size": 61}
    reference = contract.randomise(dense.Model(dense.Config(**config)).double().eval())
    expected = contract.forward(reference, tokens)
    for stride in (1, LENGTH):
        contract.assert_same(contract.forward(tiny(stride), tokens), expected, f"stride {stride}")
    difference = contract.forward(tiny(LENGTH - 1), tokens) - expected
    assert difference[:, :-1].abs().max() < 1e-10 < difference[:, -1].abs().max()


# The cache


@pytest.mark.parametrize("stride", STRIDES)
def test_every_pair_of_segments_equals_forward(stride: int) -> None:
    model, tokens = tiny(stride), some_tokens()
    expected = contract.forward(model, tokens)
    for first in range(1, LENGTH):
        for second in range(1, LENGTH - first + 1, 2):
            got, _ = contract.decode(model, tokens, [first, second])
            what = f"stride {stride}, segments of {first} and {second}"
            contract.assert_same(got, expected[:, first + second - 1 :], what)


@pytest.mark.parametrize("segments", [(LENGTH,), (1,), (3, 5), (7, 1, 2)])
@pytest.mark.parametrize("stride", [3, 4, 7])
def test_cache_rows_hold_what_the_layout_says(stride: int, segments: tuple[int, ...]) -> None:
    """Layer 0: row i is position (i + 1) S - 1, row N//S + j is position j of the last block."""
    model, tokens = tiny(stride, num_layers=1), some_tokens()
    _, state = contract.decode(model, tokens, segments)
    block = model.blocks[0]
    with torch.no_grad():
        _, k, v = block.split_heads(block.qkv(block.attn_norm(model.embed(tokens))))
    num_columns, last_block = LENGTH // stride, (LENGTH - 1) // stride * stride
    positions = [stride - 1 + stride * i for i in range(num_columns)]
    positions += range(last_block, LENGTH)
    k = torch.stack([turned(k[:, :, position], position) for position in positions], dim=2)
    keys, values = (cache[0][:, :, : len(positions)] for cache in (state.keys, state.values))
    torch.testing.assert_close(keys, k, rtol=0, atol=1e-5)
    torch.testing.assert_close(values, v[:, :, positions], rtol=0, atol=1e-12)
    assert state.keys.shape[3] == num_columns + stride


def test_a_first_prompt_on_the_graphed_path_takes_the_kernels() -> None:
    """Everywhere else a mask; both are the same pattern, of which "two_part" is the CPU's form."""
    config, cpu = (
        sparse.Config(stride=4, width=64, num_layers=1, vocab_size=61),
        torch.device("cpu"),
    )
    graphed = sparse.Model(config, decode_path="cuda_graph")
    assert graphed._attend_live(0, 9, cpu) is sparse.fused_attention(4)
    q, k, v = torch.randn(3, 2, 1, 9, 64, dtype=torch.float64)
    expected = sparse.Model(config)._attend_live(0, 9, cpu)(q, k, v)
    got = sparse.chunk_attention(q, k, v, 4, "last", "two_part")
    torch.testing.assert_close(got, expected)
    for start, end in ((0, 1), (5, 9)):
        assert graphed._attend_live(start, end, cpu) is not sparse.fused_attention(4)
    wide = sparse.Model(dataclasses.replace(config, stride=129), decode_path="cuda_graph")
    assert wide._attend_live(0, 300, cpu) is not sparse.fused_attention(129)


@torch.no_grad()
def test_full_state_is_refused_with_the_reason() -> None:
    model, tokens = tiny(4), some_tokens(12)
    state = model.init_state(2, 8)
    _, state = model.prefill(tokens[:, :8], state)
    with pytest.raises(ValueError, match="room for 2 blocks of 4 tokens; token 12 closes block 3"):
        model.prefill(tokens[:, 8:], state)


# Planted faults: each must be noticed by a check above

FAULTY_MASKS = {
    "first token of a block": lambda q, k, s: (k <= q) & ((q // s == k // s) | (k % s == 0)),
    "window of S instead of blocks": lambda q, k, s: (k <= q) & ((q - k < s) | (k % s == s - 1)),
    "last but one of a block": lambda q, k, s: (k <= q) & ((q // s == k // s) | (k % s == s - 2)),
    "blocks shifted": lambda q, k, s: (k <= q) & ((q // s == (k - 1) // s) | (k % s == s - 1)),
    "no summary columns": lambda q, k, s: (k <= q) & (q // s == k // s),
    "dense": lambda q, k, s: k <= q,
    "not causal": lambda q, k, s: (q // s == k // s) | (k % s == s - 1),
}


@pytest.mark.parametrize("fault", FAULTY_MASKS)
def test_a_wrong_mask_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "sees", FAULTY_MASKS[fault])
    with pytest.raises(AssertionError, match="logits differ"):
        assert_forward_is_the_definition(4)


def live_off_by_one(which: str):
    healthy = sparse.Model._live

    def live(self, cache: Tensor, start: int) -> tuple[Tensor, Tensor]:
        columns, open_block = healthy(self, cache, start)
        if which == "columns":
            return columns[:, :, 1:], open_block
        return columns, open_block[:, :, 1:]

    return live


@pytest.mark.parametrize("which", ["columns", "open block"])
def test_a_lost_cache_row_is_noticed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse.Model, "_live", live_off_by_one(which))
    model, tokens = tiny(4), some_tokens()
    got, _ = contract.decode(model, tokens, [1])
    with pytest.raises(AssertionError, match="logits differ"):
        contract.assert_same(got, contract.forward(model, tokens), which)


# Costs at full size, on the meta device


def planned(text: str) -> sparse.Model:
    return build(spec.parse(text), device="meta", dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "total", "non_embedding_millions"),
    [("sparse", 257_451_008, 154.2), ("sparse-2d", 823_183_360, 616.6)],
)
def test_exact_counts(text: str, total: int, non_embedding_millions: float) -> None:
    """Attention's pattern has no parameters: the counts of Dense and Dense-2D."""
    assert planned(text).num_params == total
    assert round(planned(text).num_params_non_embedding / 1e6, 1) == non_embedding_millions


def test_wikitext_and_associative_recall_scale() -> None:
    wikitext = planned("sparse-wikitext")
    assert round(wikitext.num_params / 1e6, 1) == 91.6
    assert round(wikitext.num_params_non_embedding / 1e6, 1) == 42.5
    recall = planned("sparse-mqar")
    assert (recall.num_params, recall.num_params_non_embedding) == (1_179_968, 131_392)
    assert recall.state_bytes(1, 256) == 2 * 17_408  # elements of two bytes


@pytest.mark.parametrize(
    ("text", "short", "long"), [("sparse", 415, 424), ("sparse-2d", 1446, 1465)]
)
def test_useful_flops_per_token(text: str, short: int, long: int) -> None:
    model = planned(text)
    for seq_len, expected in [(1024, short), (4096, long)]:
        assert round(generation_flops(model, 1, seq_len) / seq_len / 1e6) == expected


def test_state_calibration_table() -> None:
    model = planned("sparse-2d")
    assert round(model.state_bytes_float(1, 1024) / 1e6, 2) == 13.37
    assert round(model.state_bytes_float(512, 1024) / 1e9, 2) == 6.85
    assert round(model.state_bytes_float(256, 4096) / 1e9, 2) == 13.09
    assert round(model.state_bytes_float(1, 4096) / 1e6, 1) == 51.1
    assert model.state_bytes(1, 1024) == 2 * 2 * 12 * 2048 * (1024 // 8 + 8)


@pytest.mark.parametrize("stride", [1, 3, 8, 100])
def test_mixing_cost_counts_the_visible_pairs(stride: int) -> None:
    model, row_flops = tiny(stride), 4 * 2 * 128  # 4 L D
    for num_tokens in range(1, 40):
        weights, state = model.step_costs(1, num_tokens)
        rows = len(visible(num_tokens - 1, stride))
        assert state.flops == row_flops * rows
        assert state.num_bytes == 2 * 2 * 128 * 8 * rows  # keys and values of 2 layers, float64
        assert weights.flops == 2 * (2 * (4 * 128**2 + 3 * 128 * 512) + 128 * 61)


def test_mean_decode_step_of_the_specification() -> None:
    """cat_spec.md 5, decode step: 1.44 GB of weights + 3.4 GB of cache, 0.74 TFLOP."""
    model = planned("sparse-2d")
    costs = [model.step_costs(512, num_tokens) for num_tokens in range(1, 1025)]
    assert round(costs[0][0].num_bytes / 1e9, 2) == 1.44
    assert round(math.fsum(c[1].num_bytes for c in costs) / 1024 / 1e9, 1) == 3.4
    flops = math.fsum(cost.flops for step in costs for cost in step) / 1024
    assert round(flops / 1e12, 2) == 0.74


# Names and errors


def test_label_tells_an_unusual_stride() -> None:
    assert sparse.Config().label == "Sparse"
    assert sparse.Config(width=2048).label == "Sparse-2D"
    assert sparse.Config(stride=4).label == "Sparse (stride=4)"
    assert sparse.Config(stride=16, width=2048).label == "Sparse-2D (stride=16)"
    assert sparse.Config(width=768).label == "Sparse (width=768)"


@pytest.mark.parametrize(
    ("longest", "beyond"),
    [("sparse:stride=128", "sparse:stride=129"), ("cat:chunk_size=128", "cat:chunk_size=129")],
)
def test_what_the_kernels_of_compile_cannot_take_is_refused_by_the_plan(
    longest: str, beyond: str
) -> None:
    """Also where nobody typed the path: on a GPU a training case takes `compile` by itself."""
    predict.resolve(training.plan([spec.parse(longest)], Options(device="cuda")))
    with pytest.raises(UserError, match="'compile' of .* up to 128, got 129") as refused:
        predict.resolve(training.plan([spec.parse(beyond)], Options(device="cuda")))
    assert "--forward-path eager" in refused.value.hint
    eager = Options(device="cuda", forward_path="eager")
    predict.resolve(training.plan([spec.parse(beyond)], eager))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stride": 0}, "stride must be at least 1 .* got 0"),
        ({"width": 100}, "multiple of 64"),
        ({"num_kv_heads": 3}, "must divide the 16 heads, got 3"),
        ({"num_layers": 0}, "num_layers must be at least 1 .* got 0"),
    ],
)
def test_impossible_settings_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.Config(**overrides)
