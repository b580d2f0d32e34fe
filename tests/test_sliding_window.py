"""Sliding window against its definition, 0 <= q - k < window, and the specification's tables.

`reference` is written from the equations alone: complex RoPE, one explicit softmax per query, no
code of baselines/ or cat_bench/. The general contract is test_contract.py's.
"""

from unittest import mock

import contract
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from baselines import dense, sliding_window
from cat_bench import blocks, spec
from cat_bench import window as window_module
from cat_bench.architecture import Architecture, build, generation_flops

TINY = {"width": 64, "num_layers": 2, "vocab_size": 61, "window": 5}
TOLERANCE = 1e-12
SEQ_LEN = 23


def make(**settings: object) -> sliding_window.Model:
    """A tiny model in float64 with large random weights."""
    config = sliding_window.Config(**(TINY | settings))
    return contract.randomise(sliding_window.Model(config).double().eval())


def random_tokens(num_tokens: int, batch_size: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (batch_size, num_tokens), generator=generator)


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    contract.assert_same(got, expected, what, TOLERANCE)


def planned(text: str) -> Architecture:
    return build(spec.parse(text), device="meta", dtype="bfloat16")


# The definition


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One query at a time; q k v (b, h, t, e), all of the same tokens."""
    rows = []
    for i in range(q.shape[2]):
        seen = [j for j in range(k.shape[2]) if 0 <= i - j < window]
        scores = torch.einsum("bhe,bhse->bhs", q[:, :, i], k[:, :, seen]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhs,bhse->bhe", scores.softmax(-1), v[:, :, seen]))
    return torch.stack(rows, dim=2)


def turned(x: Tensor) -> Tensor:
    """RoPE: dimensions i and i + 32 as one complex number, turned by position * 10000^(-i / 32)."""
    rate = 10_000.0 ** (-torch.arange(32, dtype=torch.float32) / 32)
    angle = (torch.arange(x.shape[2], dtype=torch.float32)[:, None] * rate).double()
    number = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag], dim=-1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@torch.no_grad()
def reference(model: sliding_window.Model, tokens: Tensor) -> Tensor:
    """Logits of every token from the weights and the equations."""
    weights, c = model.state_dict(), model.config
    x = weights["embed.weight"][tokens]
    for layer in range(c.num_layers):
        w = {
            name.removeprefix(f"blocks.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        qkv = normed(x, w["attn_norm.weight"]) @ w["qkv.weight"].T
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        o = naive_attention(turned(q), turned(k), v, c.window)
        x = x + o.transpose(1, 2).flatten(2) @ w["attn_out.weight"].T
        h = normed(x, w["mlp_norm.weight"])
        x = x + (functional.silu(h @ w["w1.weight"].T) * (h @ w["w3.weight"].T)) @ w["w2.weight"].T
    return normed(x, weights["norm.weight"]) @ weights["head.weight"].T


@pytest.mark.parametrize("window", [1, 2, 5, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1])
def test_forward_and_decoding_equal_the_equations(window: int) -> None:
    """To 1e-5 only: the model's RoPE tables are float32."""
    model, tokens = make(window=window, width=128), random_tokens(SEQ_LEN)
    expected = reference(model, tokens)
    contract.assert_same(contract.forward(model, tokens), expected, "forward", 1e-5)
    for prompt_len in (1, 4, 5, 6, 11, SEQ_LEN):
        got, _ = contract.decode(model, tokens, [prompt_len])
        contract.assert_same(got, expected[:, prompt_len - 1 :], f"prompt of {prompt_len}", 1e-5)


@pytest.mark.parametrize("window", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("past", [0, 1, 7, 8, 9, 30])
def test_blocks_of_queries_equal_one_query_at_a_time(
    window: int, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block edges: blocks of 8 to 10 queries, the last one not full."""
    monkeypatch.setattr(window_module, "MIN_QUERIES", 8)
    monkeypatch.setattr(window_module, "MAX_QUERIES", 10)  # fewer than the largest window
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 1, past + 21, 64, generator=generator, dtype=torch.float64)
    got = window_module.window_attention(q[:, :, past:], k, v, window)
    assert_same(got, naive_attention(q, k, v, window)[:, :, past:])


def test_blocks_of_the_real_size() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 1, 1, 600, 64, generator=generator, dtype=torch.float64)
    for window in (64, 300):
        assert_same(
            window_module.window_attention(q, k, v, window), naive_attention(q, k, v, window)
        )


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("past", [0, 9])
def test_flash_is_asked_for_the_window(
    past: int, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel needs a GPU; here its arguments, by what they mean, and the operator's own."""
    op = torch.ops.aten._flash_attention_forward

    def flash(q, k, v, _q, _k, max_q, max_k, dropout, causal, debug, **window) -> tuple:
        assert (max_q, max_k, dropout, causal) == (q.shape[1], k.shape[1], 0.0, False)
        meta = (x.to("meta", torch.bfloat16) for x in (q, k, v))
        assert op(*meta, _q, _k, max_q, max_k, dropout, causal, debug, **window)[0].shape == q.shape
        back = torch.arange(max_k)[max_k - max_q :, None] - torch.arange(max_k)
        seen = (back <= window["window_size_left"]) & (-back <= window["window_size_right"])
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return blocks.attention(*heads, seen).transpose(1, 2), None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 2, 21, 64, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, num_kv_heads, past + 21, 64, generator=generator, dtype=q.dtype)
    for window in (1, 5, 40):
        got = window_module.flash_window_attention(q, k, v, window)
        assert_same(got, window_module.window_attention(q, k, v, window))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_reach_is_exactly_the_window(window: int) -> None:
    """One layer sees 0 .. window - 1 back; two layers 0 .. 2 (window - 1)."""
    tokens = random_tokens(SEQ_LEN, batch_size=1)
    for num_layers in (1, 2):
        model = make(window=window, num_layers=num_layers)
        changed = tokens.clone()
        changed[0, 6] += 1 - 2 * (tokens[0, 6] == TINY["vocab_size"] - 1)
        moved = contract.forward(model, changed) - contract.forward(model, tokens)
        reached = (moved.abs().amax(-1)[0] > 0).nonzero()[:, 0].tolist()
        assert reached == list(range(6, 6 + num_layers * (window - 1) + 1))


def test_window_beyond_the_sequence_is_dense() -> None:
    tokens = random_tokens(SEQ_LEN)
    shared = {key: value for key, value in TINY.items() if key != "window"}
    full = dense.Model(dense.Config(**shared)).double().eval()
    for window, same in [(SEQ_LEN, True), (SEQ_LEN - 1, False)]:
        model = make(window=window)
        full.load_state_dict(model.state_dict())
        difference = contract.forward(model, tokens) - contract.forward(full, tokens)
        assert (difference[:, :-1].abs().max() < TOLERANCE) and (
            (difference[:, -1].abs().max() < TOLERANCE) == same
        )


# The ring


@pytest.mark.parametrize("window", [1, 2, 5])
def test_two_segments_of_every_kind_then_steps(window: int) -> None:
    model, tokens = make(window=window), random_tokens(25)
    expected = contract.forward(model, tokens)
    for first in range(1, 2 * window + 3):
        for second in (1, 2, 4, 5, 6, 10, 11):
            end = first + second
            got, _ = contract.decode(model, tokens[:, : end + 2], [first, second])
            assert_same(got, expected[:, end - 1 : end + 2], f"{first} + {second}")


def test_ring_rows_after_prefill_and_after_steps_are_the_same() -> None:
    """Token p lies in row p mod window, however it was read."""
    model, tokens = make(), random_tokens(SEQ_LEN)
    states = [contract.decode(model, tokens, segments)[1] for segments in ([SEQ_LEN], [1], [7, 6])]
    for state in states[1:]:
        assert_same(state.keys, states[0].keys, "keys")
        assert_same(state.values, states[0].values, "values")
    assert states[0].keys.shape[3] == 5


@torch.no_grad()
def test_stale_rows_are_never_read() -> None:
    """Even NaN in rows that were not written since the reset changes nothing."""
    model, tokens = make(), random_tokens(SEQ_LEN)
    expected = contract.forward(model, tokens)
    for segments in ([1], [2], [3, 1], [9]):
        state = model.init_state(*tokens.shape)
        state.keys.fill_(float("nan"))
        state.values.fill_(float("nan"))
        got, _ = contract.decode(model, tokens, segments, model.reset(state))
        assert_same(got, expected[:, sum(segments) - 1 :], f"prompt of {segments}")


@torch.no_grad()
def test_state_for_fewer_tokens_than_a_window() -> None:
    """It holds all that it was made for, and refuses the token that would drop one in sight."""
    model, tokens = make(window=8), random_tokens(7)
    got, state = contract.decode(model, tokens[:, :6], [2], model.init_state(2, 6))
    assert state.keys.shape[3] == 6
    assert_same(got, contract.forward(model, tokens[:, :6])[:, 1:])
    with pytest.raises(ValueError, match="6 tokens, fewer than the window of 8; token 7"):
        model.step(tokens[:, 6], state)
    with pytest.raises(ValueError, match="token 7"):
        model.prefill(tokens, model.reset(state))


# Planted faults: what the tests above compare must notice each of them


def mask_one_too_wide(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    return original_mask(num_queries, num_keys, window + 1, device)


def mask_one_too_narrow(
    num_queries: int, num_keys: int, window: int, device: torch.device
) -> Tensor:
    return original_mask(num_queries, num_keys, window - 1, device)


def rows_in_ring_order(ring: Tensor, num_tokens: int, count: int) -> Tensor:
    return ring[:, :, :count]


def without_the_two_oldest(ring: Tensor, num_tokens: int, count: int) -> Tensor:
    return original_last_rows(ring, num_tokens, count)[:, :, 2:]


def one_row_too_far(ring: Tensor, rows: Tensor, start: int) -> None:
    original_write_rows(ring, rows, start + 1)


original_mask = window_module.window_mask
original_last_rows, original_write_rows = window_module.last_rows, window_module.write_rows
FAULTS = [
    ("window_mask", mask_one_too_wide),
    ("window_mask", mask_one_too_narrow),
    ("last_rows", rows_in_ring_order),
    ("last_rows", without_the_two_oldest),
    ("write_rows", one_row_too_far),
]


@pytest.mark.parametrize(
    ("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_planted_faults_are_noticed(name: str, fault: object) -> None:
    model, tokens = make(), random_tokens(SEQ_LEN)
    expected = reference(model, tokens)
    with mock.patch.object(window_module, name, fault):
        got, _ = contract.decode(model, tokens, [7, 2])  # the last token sees what the first saw
    moved = (got - expected[:, 8:]).abs().max()
    assert not moved < 1e-3  # true for NaN too


# Costs at full size


@pytest.mark.parametrize("preset", ["sliding_window", "swa", "swa-512", "swa-64"])
def test_parameters_are_dense_s(preset: str) -> None:
    model = planned(preset)
    assert model.num_params == planned("dense").num_params == 257_451_008
    assert round(model.num_params_non_embedding / 1e6, 1) == 154.2


def test_parameters_at_the_smaller_scales() -> None:
    wikitext = planned("swa-wikitext")
    assert round(wikitext.num_params / 1e6, 1) == 91.6
    assert round(wikitext.num_params_non_embedding / 1e6, 1) == 42.5
    recall = planned("swa-mqar")
    assert (recall.num_params, recall.num_params_non_embedding) == (1_179_968, 131_392)
    assert recall.state_bytes_float(1, 256) // 2 == 16_384  # elements (evaluation_spec.md 1.5)


# (preset, MFLOP per token at 1024 and 4096, MB of state at 1024 and 4096): cat_spec.md 5
TABLE = [("swa-64", 415, 415, 3.1, 3.1), ("swa-512", 430, 435, 25.2, 25.2)]


@pytest.mark.parametrize(("preset", "mflops_1k", "mflops_4k", "mb_1k", "mb_4k"), TABLE)
def test_flops_and_state_of_the_table(
    preset: str, mflops_1k: int, mflops_4k: int, mb_1k: float, mb_4k: float
) -> None:
    model = planned(preset)
    for seq_len, mflops, mb in [(1024, mflops_1k, mb_1k), (4096, mflops_4k, mb_4k)]:
        assert round(generation_flops(model, 1, seq_len) / seq_len / 1e6) == mflops
        assert round(model.state_bytes_float(1, seq_len) / 1e6, 1) == mb


def test_state_and_flops_formulas() -> None:
    """2 L D min(W, N) elements; mixing 4 D L n, n = [W (W + 1) / 2 + (N - W) W] / N."""
    for window in (64, 512):
        model = planned(f"sliding_window:window={window}")
        for seq_len in (1, window - 1, window, window + 1, 4096):
            rows = min(window, seq_len)
            assert model.state_bytes(3, seq_len) == 3 * 2 * (2 * 12 * 1024 * rows)
        n, w = 1024, window
        mixing = 4 * 1024 * 12 * (w * (w + 1) / 2 + (n - w) * w)
        weights = 2 * 12 * 12_845_056 + 2 * 1024 * 50_432
        assert generation_flops(model, 1, n) == n * weights + mixing


def test_traffic_of_a_step() -> None:
    """cat_spec.md 5, decode step at N=1024, B=512: GB of weights + mean traffic, TFLOP."""
    for preset, traffic_gb, tflops in [("swa-512", 9.7, 0.22), ("swa-64", 1.6, 0.21)]:
        model = planned(preset)
        steps = [dict((c.part, c) for c in model.step_costs(512, n)) for n in range(1, 1025)]
        assert round(steps[0]["weights"].num_bytes / 1e9, 2) == 0.41
        traffic = sum(costs["state"].num_bytes for costs in steps) / 1024
        assert round(traffic / 1e9, 1) == traffic_gb
        flops = sum(cost.flops for costs in steps for cost in costs.values()) / 1024
        assert round(flops / 1e12, 2) == tflops


# Settings


def test_labels() -> None:
    assert sliding_window.Config().label == "Sliding"
    assert sliding_window.Config(window=64).label == "Sliding (window=64)"
    assert sliding_window.Config(width=768, window=64).label == "Sliding (width=768, window=64)"


def test_presets_are_read_without_importing() -> None:
    assert spec.parse("swa") == spec.parse("swa-512") == spec.parse("sliding_window")
    assert spec.parse("swa-64").text == "sliding_window:window=64"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window must be at least 1 .*got 0"),
        ({"width": 100}, "multiple of 64"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_kv_heads": 5}, "num_kv_heads must divide the 16 heads, got 5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sliding_window.Config(**settings)
