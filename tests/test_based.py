"""BASED against its definition, three mixers one by one, and against the specification's tables.

The references are written from the equations alone: one token at a time, explicit sums, no code of
baselines/ or cat_bench/. The general contract is test_contract.py's.
"""

import itertools
import math
from collections.abc import Callable

import contract
import pytest
import reference_kernels
import torch
from torch import Tensor

from baselines import based
from cat_bench import recurrent_steps, spec
from cat_bench.architecture import Architecture, build, generation_flops
from cat_bench.blocks import Block
from cat_bench.errors import UserError

TINY = {"width": 64, "vocab_size": 61, "window": 5, "feature_dim": 4, "num_heads": 2}
TOLERANCE = 1e-12
SEQ_LEN = 23


def make(pattern: str, **settings: object) -> based.Model:
    """A tiny model in float64 with large random weights."""
    config = based.Config(**(TINY | {"pattern": pattern} | settings))
    return contract.randomise(based.Model(config).double().eval())


def random_tokens(num_tokens: int, batch_size: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (batch_size, num_tokens), generator=generator)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    contract.assert_same(got, expected, what, TOLERANCE)


def planned(text: str) -> Architecture:
    return build(spec.parse(text), device="meta", dtype="bfloat16")


# Linear attention


def phi(x: list[float]) -> list[float]:
    """1 + f + f^2 features: the Taylor expansion of exp(q.k / sqrt f), a quarter power a side."""
    f = len(x)
    first = [a / f**0.25 for a in x]
    second = [a * b / math.sqrt(2 * f) for a in x for b in x]
    return [1.0, *first, *second]


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One head: q k (t, f), v (t, e). S += phi(k) v, z += phi(k), y = phi(q) S / phi(q) z."""
    num_features, rows = len(phi(k[0].tolist())), []
    sums, norm = q.new_zeros(num_features, v.shape[-1]), q.new_zeros(num_features)
    for t in range(len(q)):
        phi_q, phi_k = (q.new_tensor(phi(x[t].tolist())) for x in (q, k))
        sums, norm = sums + torch.outer(phi_k, v[t]), norm + phi_k
        rows.append(phi_q @ sums / (phi_q @ norm))
    return torch.stack(rows), sums, norm


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without features: weights 1 + s + s^2 / 2 of every pair."""
    rows = []
    for t in range(len(q)):
        weights = [
            1 + s + s * s / 2
            for s in ((q[t] @ k[i]).item() / q.shape[1] ** 0.5 for i in range(t + 1))
        ]
        rows.append(sum(w * v[i] for i, w in enumerate(weights)) / sum(weights))
    return torch.stack(rows)


STATE_SHAPES = ((2, 3, 21, 5), (2, 3, 21))  # sums and norms: 3 heads, f = 4, e = 5
LENGTHS = [1, 2, based.CHUNK - 1, based.CHUNK, based.CHUNK + 1, 2 * based.CHUNK + 3]


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunks_equal_the_recurrence_and_the_quadratic_form(num_tokens: int) -> None:
    q, k = normal(2, 3, num_tokens, 4, seed=1), normal(2, 3, num_tokens, 4, seed=2)
    v = normal(2, 3, num_tokens, 5, seed=3)
    got, sums_of, norms_of = based.taylor_attention(q, k, v)
    for b, h in itertools.product(range(2), range(3)):
        rows, sums, norm = recurrence(q[b, h], k[b, h], v[b, h])
        assert_same(got[b, h], rows, "recurrence")
        assert_same(got[b, h], quadratic(q[b, h], k[b, h], v[b, h]), "quadratic form")
        assert_same(sums_of[b, h], sums, "sums")
        assert_same(norms_of[b, h], norm, "normaliser")


@pytest.mark.parametrize("cut", [1, 5, based.CHUNK, based.CHUNK + 1])
def test_the_sums_carry_all_that_came_before(cut: int) -> None:
    q, k, v = (normal(1, 2, based.CHUNK + 9, 4, seed=seed) for seed in (1, 2, 3))
    whole, *last = based.taylor_attention(q, k, v)
    _, *state = based.taylor_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
    rest, *state = based.taylor_attention(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], *state)
    assert_same(rest, whole[:, :, cut:])
    for got, expected in zip(state, last, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("batched", [1, 8, 24, 1000])
def test_chunks_read_together_change_no_result(
    batched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, one, three and all of the chunks of 4 tokens and 2 heads at a time."""
    q, k, v = (normal(1, 2, 35, 4, seed=seed) for seed in (1, 2, 3))
    expected = based.taylor_attention(q, k, v)
    monkeypatch.setattr(based, "CHUNK", 4)
    monkeypatch.setattr(based, "BATCHED", batched)
    assert sum(size * count for size, count in based.chunks(35, 2)) == 35
    for got, same in zip(based.taylor_attention(q, k, v), expected, strict=True):
        assert_same(got, same)


def test_autocast_leaves_the_sums_in_float32() -> None:
    q, k, v = (normal(1, 2, 9, 4, seed=seed).float() for seed in (1, 2, 3))
    expected = based.taylor_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = based.taylor_attention(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_kernel_s_reference_is_the_eager_step(dtype: torch.dtype) -> None:
    """Three tokens one by one, by the reference and by the definition's code."""
    sums, norms = (torch.zeros(shape, dtype=based.sum_dtype(dtype)) for shape in STATE_SHAPES)
    state = (sums.clone(), norms.clone())
    for seed in range(3):
        q, k, v = (normal(2, 3 * n, seed=seed + n).to(dtype) for n in (4, 4, 5))
        heads = (x.unflatten(-1, (3, 1, -1)) for x in (q, k, v))  # (b, h, 1, .)
        expected, *state = based.taylor_attention(*heads, *state)
        got = recurrent_steps.taylor_step_reference(q, k, v, sums, norms)
        tolerance = 4 * torch.finfo(dtype).eps
        contract.assert_same(got, expected[:, :, 0].flatten(1), "step", tolerance)
    for got, expected in zip((sums, norms), state, strict=True):
        contract.assert_same(got, expected, "state", 1e-6)


def test_features_are_the_paper_s_273_and_expand_the_exponential() -> None:
    q, k = 0.1 * normal(16, seed=1), 0.1 * normal(16, seed=2)
    assert recurrent_steps.taylor_features(q).shape == (273,)
    assert based.Config().num_features == 273
    product, s = recurrent_steps.taylor_features(q) @ recurrent_steps.taylor_features(k), q @ k / 4
    assert product.item() == pytest.approx(1 + s.item() + s.item() ** 2 / 2, abs=1e-15)
    assert product.item() == pytest.approx(math.exp(s), abs=abs(s.item()) ** 3)


def test_weights_are_positive_so_the_normaliser_never_vanishes() -> None:
    """1 + s + s^2 / 2 >= 1/2: the worst s is -1."""
    q, k = -torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)  # f = 1: s = -1
    _, _, norms = based.taylor_attention(q, k, torch.ones(1, 1, 1, 1))
    assert (recurrent_steps.taylor_features(q) @ norms[..., None]).item() == pytest.approx(0.5)


def test_gradients_through_chunks_and_sums() -> None:
    inputs = [normal(1, 1, 4, 2, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    inputs += [normal(1, 1, 7, *e, seed=4).abs().requires_grad_() for e in ((2,), ())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(based, "CHUNK", 3)
        assert torch.autograd.gradcheck(based.taylor_attention, inputs)


def test_sums_of_a_bfloat16_model_are_float32_and_exact_beyond_256() -> None:
    """Feature 0 is 1, so the normaliser there counts the tokens: bfloat16 stops at 256."""
    model = make("l").to(torch.bfloat16)
    state = model.init_state(1, 300)
    with torch.no_grad():
        for token in random_tokens(300, 1).T:
            _, state = model.step(token, state)
    assert state.sums.dtype == state.norms.dtype == torch.float32
    assert state.norms[0, 0, :, 0].tolist() == [300.0, 300.0]
    assert make("l").init_state(1, 1).sums.dtype == torch.float64


# The residual layer around each mixer


def naive_norm(x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def naive_rest(layer: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """What follows the mixer: projection, residual, SwiGLU."""
    x = x + mixed @ layer.attn_out.weight.T
    h = naive_norm(x, layer.mlp_norm)
    gate, up = h @ layer.w1.weight.T, h @ layer.w3.weight.T
    return x + (gate * gate.sigmoid() * up) @ layer.w2.weight.T


def layer_output(kind: str, x: Tensor, **settings: object) -> tuple[Tensor, Block]:
    model = make(kind, **settings)
    call = model._call(0, torch.zeros(x.shape[:2], dtype=torch.int64))
    with torch.no_grad():
        return model.blocks[0](x, call), model.blocks[0]


# Sliding window


def naive_sliding(layer: based.WindowLayer, x: Tensor, window: int) -> Tensor:
    """One sequence x (t, 64), one head: complex RoPE, then one softmax per query."""
    normed = naive_norm(x, layer.attn_norm)
    q, k, v = (normed @ weight.T for weight in layer.qkv.weight.split(64))
    angle = torch.arange(len(x), dtype=torch.float32)[:, None] * 10_000.0 ** (
        -torch.arange(32, dtype=torch.float32) / 32
    )
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    q, k = (torch.complex(a[:, :32], a[:, 32:]) * turn for a in (q, k))
    rows = []
    for i in range(len(x)):
        seen = [j for j in range(len(x)) if 0 <= i - j < window]
        scores = torch.stack([(q[i] * k[j].conj()).real.sum() / 8 for j in seen])
        rows.append(scores.softmax(0) @ v[seen])
    return naive_rest(layer, x, torch.stack(rows))


def sliding_output(window: int, x: Tensor) -> tuple[Tensor, based.WindowLayer]:
    return layer_output("s", x, window=window)


@pytest.mark.parametrize("window", [1, 2, 5, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1])
def test_window_attention_is_its_definition(window: int) -> None:
    x = normal(1, SEQ_LEN, 64)
    got, layer = sliding_output(window, x)
    # RoPE tables are float32: their rounding, not the attention's, sets the tolerance.
    contract.assert_same(got[0], naive_sliding(layer, x[0], window), "window", 1e-5)


@pytest.mark.parametrize("wrong", [4, 6])
def test_a_window_off_by_one_is_seen(wrong: int) -> None:
    x = normal(1, SEQ_LEN, 64)
    got, layer = sliding_output(5, x)
    with pytest.raises(AssertionError, match="logits differ"):
        contract.assert_same(got[0], naive_sliding(layer, x[0], wrong), "window", 1e-3)


@pytest.mark.parametrize("window_cache", ["window", "max_len"])
@pytest.mark.parametrize("segments", [(1,), (4,), (5,), (6,), (3, 9), (5, 5), (11, 1, 6)])
def test_rows_outside_of_the_window_are_never_read(window_cache: str, segments: tuple) -> None:
    """All rows start as NaN; a read before the write, or one row too far, would spread it."""
    model, tokens = make("s", window_cache=window_cache), random_tokens(SEQ_LEN)
    state = model.init_state(2, SEQ_LEN)
    state.keys.fill_(float("nan"))
    state.values.fill_(float("nan"))
    got, _ = contract.decode(model, tokens, segments, state)
    assert_same(got, contract.forward(model, tokens)[:, sum(segments) - 1 :])


@pytest.mark.parametrize("window", [1, 3, 5, SEQ_LEN])
def test_both_window_caches_give_the_same_logits(window: int) -> None:
    """The fault of the paper's C.7 costs memory, nothing else."""
    tokens, settings = random_tokens(SEQ_LEN), {"window": window}
    patched, unpatched = (
        make("clsl", **settings, window_cache=name) for name in ("window", "max_len")
    )
    got, state = contract.decode(patched, tokens, [7])
    other, large = contract.decode(unpatched, tokens, [7])
    assert torch.equal(got, other)
    assert (state.keys.shape[3], large.keys.shape[3]) == (window, SEQ_LEN)


# Short convolution


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_convolution_is_its_definition(kernel: int) -> None:
    x = normal(1, 7, 64)
    got, layer = layer_output("c", x, conv_kernel=kernel)
    with torch.no_grad():
        inner = naive_norm(x[0], layer.attn_norm) @ layer.qkv.weight.T
        u, gate, taps = inner[:, :128], inner[:, 128:], layer.taps
        rows = []
        for t in range(7):  # the last tap weighs the present token
            y = sum(taps[:, kernel - 1 - back] * u[t - back] for back in range(min(kernel, t + 1)))
            rows.append(y * gate[t])
        assert_same(got[0], naive_rest(layer, x[0], torch.stack(rows)))


# Reach: how far one token is seen, by forward and by decoding


def forward_logits(model: based.Model, tokens: Tensor) -> Tensor:
    return contract.forward(model, tokens)


def decoded_logits(model: based.Model, tokens: Tensor) -> Tensor:
    return contract.decode(model, tokens, [1])[0]


@pytest.mark.parametrize("logits_of", [forward_logits, decoded_logits])
@pytest.mark.parametrize(
    ("pattern", "reach"),
    [("s", 5), ("c", 3), ("cc", 5), ("ss", 9), ("cs", 7), ("l", SEQ_LEN), ("clsc", SEQ_LEN)],
)
def test_reach_of_a_token(pattern: str, reach: int, logits_of: Callable) -> None:
    """Window 5 and kernel 3: a token moves as many logits, its own included, and no more."""
    model, tokens = make(pattern), random_tokens(SEQ_LEN, batch_size=1)
    before = logits_of(model, tokens)
    for position in (0, 1, 9):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % TINY["vocab_size"]
        moved = (logits_of(model, changed) - before)[0].abs().amax(-1) > 1e-13
        expected = [position <= t < position + reach for t in range(SEQ_LEN)]
        assert moved.tolist() == expected, f"token {position}"


def test_reset_after_nan() -> None:
    """A state that met infinities is as good as new after a reset."""
    model, tokens = make("clsc"), random_tokens(SEQ_LEN)
    state = model.init_state(2, SEQ_LEN)
    for buffer in contract.walk(state):
        buffer.fill_(float("nan"))
    got, _ = contract.decode(model, tokens, [4], model.reset(state))
    assert_same(got, contract.forward(model, tokens)[:, 3:])


@pytest.mark.parametrize("window_cache", ["window", "max_len"])
def test_more_tokens_than_the_state_holds_are_refused(window_cache: str) -> None:
    model, tokens = make("clsc", window_cache=window_cache), random_tokens(9)
    _, state = contract.decode(model, tokens, [8], model.init_state(2, 9))
    with pytest.raises(ValueError, match="the state holds 9 tokens; token 10 was given"):
        model.step(tokens[:, 0], state)


# Decode path cuda_graph, on the references of its kernels


@pytest.mark.parametrize("window_cache", ["window", "max_len"])
@pytest.mark.parametrize(
    ("batch_size", "segments"), [(2, (1,)), (2, (2, 1, 5)), (2, (70, 64, 1)), (1, (1, 7))]
)
def test_fast_prompts_and_steps_equal_eager(
    window_cache: str, batch_size: int, segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_kernels.install(monkeypatch, based)
    model = make("clscl", window_cache=window_cache)
    tokens = random_tokens(sum(segments) + 7, batch_size)
    expected, _ = contract.decode(model, tokens, segments)
    monkeypatch.setattr(model, "decode_path", "cuda_graph")
    got, _ = contract.decode(model, tokens, segments)
    assert_same(got, expected, "prompts and steps")


@pytest.mark.parametrize("feature_dim", [4, 20])
def test_prompts_of_16_bits_have_kernels_of_their_own(
    feature_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16 features; float32, float64 and more features are the eager chunks'."""
    reference_kernels.install(monkeypatch, based)
    model = make("clscl", feature_dim=feature_dim).bfloat16()
    tokens, calls = random_tokens(60), []
    original = based.LinearLayer.mix
    monkeypatch.setattr(
        based.LinearLayer, "mix", lambda *args: (calls.append(1), original(*args))[1]
    )
    expected, _ = contract.decode(model, tokens, (20, 30))
    monkeypatch.setattr(model, "decode_path", "cuda_graph")
    calls.clear()
    got, _ = contract.decode(model, tokens, (20, 30))
    assert contract.relative_norm(got, expected) < 3e-2
    assert len(calls) == (0 if feature_dim == 4 else 4)  # two layers, two prompts


def test_a_short_prompt_goes_through_the_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not need the memory of a prompt's kernels: those are not called."""
    reference_kernels.install(monkeypatch, based)
    model = make("cl")
    monkeypatch.setattr(model, "decode_path", "cuda_graph")
    monkeypatch.setattr(based.Layer, "fast", lambda *_: pytest.fail("a prompt's kernels ran"))
    tokens, state = random_tokens(17), model.init_state(2, 17)
    model.prefill(tokens[:, :16], state)
    with pytest.raises(pytest.fail.Exception, match="a prompt's kernels"):
        model.prefill(tokens, model.reset(state))


# Planted faults: the checks above and the contract see them


@pytest.mark.parametrize("fault", ["no half", "no quarter power", "not causal", "no normaliser"])
def test_planted_faults_of_linear_attention_are_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, total = based.taylor_features, Tensor.sum
    if fault == "no half":
        monkeypatch.setattr(based, "taylor_features", lambda x: features(x) * 2**0.5)
    elif fault == "no quarter power":
        monkeypatch.setattr(based, "taylor_features", lambda x: features(2 * x))
    elif fault == "not causal":
        monkeypatch.setattr(Tensor, "tril", lambda x: x)
    else:
        monkeypatch.setattr(Tensor, "sum", lambda x, *dims, **kw: 2 * total(x, *dims, **kw))
    with pytest.raises(AssertionError, match="recurrence|sums|normaliser"):
        test_chunks_equal_the_recurrence_and_the_quadratic_form(based.CHUNK + 1)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_ring_off_by_one_is_seen(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ring_attention = based.ring_attention

    def shifted(*args: object) -> Tensor:
        *same, window, attend = args
        return ring_attention(*same, window + shift, attend)

    monkeypatch.setattr(based, "ring_attention", shifted)
    with pytest.raises(AssertionError):
        test_rows_outside_of_the_window_are_never_read("window", (3, 9))


# The specification's tables


@pytest.mark.parametrize(
    ("text", "total_millions"), [("based", 271.1), ("based-wikitext", 95.6), ("based-2x", 92.4)]
)
def test_parameter_counts(text: str, total_millions: float) -> None:
    assert round(planned(text).num_params / 1e6, 1) == total_millions


def test_exact_parameter_count_by_parts() -> None:
    """Matrices, taps, norms, embedding and head, each written out."""
    linear = 2 * 256 * 1024 + 2 * 1024**2
    conv = 6 * 1024**2 + 3 * 2048
    mixers = 2 * linear + 2 * 4 * 1024**2 + 8 * conv
    inside = mixers + 12 * 3 * 1024 * 2816 + 25 * 1024
    model = planned("based")
    assert model.num_params_non_embedding == inside == 167_846_912
    assert model.num_params == inside + 2 * 50_432 * 1024 == 271_131_648


def test_layers_of_the_default_and_of_the_presets() -> None:
    letters = {"c": "conv", "l": "linear", "s": "sliding"}
    expected = ["conv", "conv", "linear", "conv", "sliding", "conv"] * 2
    assert [letters[kind] for kind in based.Config().pattern] == expected
    for preset, layers in (("based-wikitext", [1, 1, 4]), ("based-2x", [2, 2, 2])):
        pattern = spec.parse(preset).overrides["pattern"]
        assert [pattern.count(kind) for kind in "lsc"] == layers


@pytest.mark.parametrize("seq_len", [1024, 4096])
def test_flops_per_token(seq_len: int) -> None:
    """The table prints 442 for both; below it the formula of section 5, to the FLOP."""
    total, width, window = generation_flops(planned("based"), 1, seq_len), 1024, 128
    assert round(total / seq_len / 1e6) == 442
    pairs = window * (window + 1) / 2 + (seq_len - window) * window
    per_token = (
        2 * (2 * (2 * 256 * width + 2 * width**2) + 4 * 16 * 273 * 65)
        + 2 * 8 * width**2
        + 8 * (12 * width**2 + 6 * 2 * width)
        + 12 * 6 * width * 2816
        + 2 * width * 50_432
    )
    assert total == per_token * seq_len + 2 * 4 * width * pairs


THREE = "based:pattern=clcsclcsclcs"
UNPATCHED = "window_cache=max_len"
STATES = [  # (spec, MB at 1024, GB at 512 x 1024, GB at 256 x 4096): bf16 sums, no convolution
    ("based", 2.18, 1.12, 0.56),
    (THREE, 3.28, 1.68, 0.84),
    (f"based:{UNPATCHED}", 9.52, 4.88, 8.88),
    (f"{THREE},{UNPATCHED}", 14.29, 7.31, 13.32),
]


def state_parts(text: str, batch_size: int, seq_len: int) -> tuple[int, int, int]:
    """Bytes of the sums, of the window rows and of the convolution inputs, as allocated."""
    state = planned(text).init_state(batch_size, seq_len)
    assert state.sums.dtype == state.norms.dtype == torch.float32
    return (
        state.sums.nbytes + state.norms.nbytes,
        state.keys.nbytes + state.values.nbytes,
        state.conv.nbytes,
    )


@pytest.mark.parametrize(("text", "mb", "gb_short", "gb_long"), STATES)
def test_state_calibration_table(text: str, mb: float, gb_short: float, gb_long: float) -> None:
    """The table counts 2 bytes per sum ("fp32 doubles the matrix part") and no convolution."""
    shapes = [((1, 1024), mb, 1e6), ((512, 1024), gb_short, 1e9), ((256, 4096), gb_long, 1e9)]
    for shape, expected, unit in shapes:
        sums, window, conv = state_parts(text, *shape)
        assert round((sums / 2 + window) / unit, 2) == expected
        assert planned(text).state_bytes_float(*shape) == sums + window + conv
        assert planned(text).state_bytes(*shape) == sums + window + conv


def test_state_elements_of_the_specification() -> None:
    """n_l 16 273 65 + n_s 2 128 D + n_c 3 2D elements; 2.3 MB in bf16, 3.4 with float32 sums."""
    linear, window, conv = 2 * 16 * 273 * 65, 2 * 2 * 128 * 1024, 8 * 3 * 2 * 1024
    assert state_parts("based", 1, 1024) == (4 * linear, 2 * window, 2 * conv)
    assert round(2 * (linear + window + conv) / 1e6, 1) == 2.3
    assert round(planned("based").state_bytes(1, 1024) / 1e6, 1) == 3.4
    sums, rows, inputs = state_parts(THREE, 1, 1024)
    assert round((sums / 2 + rows + inputs) / 1e6, 2) == 3.35


def test_window_rows_never_exceed_the_sequence() -> None:
    model = planned("based")
    assert model.state_bytes(1, 127) < model.state_bytes(1, 128) == model.state_bytes(1, 129)
    step = 2 * 2 * 1024 * 2  # key and value rows of two layers, 2 bytes
    assert model.state_bytes(1, 128) - model.state_bytes(1, 127) == step


def test_step_reads_and_writes_the_recurrent_state() -> None:
    sums, _, conv = state_parts("based", 1, 1024)
    row = 2 * 2 * 1024 * 2
    for text in ("based", f"based:{UNPATCHED}"):  # a larger cache is not read further
        for num_tokens, rows in [(1, 1), (127, 127), (128, 128), (129, 128), (1024, 128)]:
            weights, state = planned(text).step_costs(3, num_tokens)
            assert state.num_bytes == 3 * (2 * (sums + conv) + rows * row)
            assert weights.num_bytes == 2 * (271_131_648 - 50_432 * 1024 - 25 * 1024)
    # cat_spec.md 5: 1.8 GB a step at batch 512, mean over 1024 tokens, with sums of 2 bytes
    model = planned("based")
    mean = sum(model.step_costs(512, n)[1].num_bytes for n in range(1, 1025)) / 1024
    assert round((mean - 512 * sums) / 1e9, 1) == 1.8


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": ""}, "pattern must be letters of c"),
        ({"pattern": "cxl"}, "got 'cxl'"),
        ({"num_heads": 3}, "num_heads must divide the width of 64, got 3"),
        ({"num_heads": 0}, "num_heads must divide"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"conv_kernel": 0}, "conv_kernel must be at least 1, got 0"),
        ({"expand_proj": 3}, "expand_proj must be even and positive, got 3"),
        ({"window_cache": "none"}, "window_cache must be 'window' or 'max_len', got 'none'"),
        ({"width": 100}, "multiple of 64"),
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
    ],
)
def test_impossible_settings_get_a_sentence(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        based.Config(**(TINY | settings))


def test_the_command_line_refuses_an_unknown_cache() -> None:
    with pytest.raises(UserError, match="window_cache='ring' is not one of"):
        spec.parse("based:window_cache=ring")


def test_labels() -> None:
    def label(text: str) -> str:
        return planned(text).config.label

    assert label("based") == "BASED"
    assert label("based:window_cache=max_len") == "BASED (window_cache=max_len)"
    assert label("based-2x") == "BASED-2x (width=768, window=64, vocab_size=32000)"


def test_upstream_needs_a_gpu() -> None:
    model = based.Model(based.Config(**TINY), forward_path="upstream")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        model.forward(random_tokens(3))
