"""Mamba-2 against its definition: the scan, the convolution's window, initialisation and counts.

The contract (test_contract.py) compares prefill, steps and forward with each other; here they are
compared with formulas that share no code with baselines/mamba2.py. Sources of the numbers:
cat_spec.md 1.6 (parameters) and 5 (FLOPs, decode traffic), evaluation_spec.md 4.4 (state).
"""

import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import contract
import pytest
import reference_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import mamba2
from cat_bench import spec
from cat_bench.architecture import Architecture, build, generation_flops, step_flops
from cat_bench.errors import UserError
from cat_bench.upstream import import_mamba_ssm


def planned(text: str, dtype: str = "bfloat16") -> Architecture:
    return build(spec.parse(text), device="meta", dtype=dtype)


def tiny(seed: int = 2, **overrides: int) -> mamba2.Model:
    """A float64 model with large random weights."""
    settings = {"width": 32, "num_layers": 2, "vocab_size": 97, "d_state": 8, "headdim": 16}
    model = mamba2.Model(mamba2.Config(**(settings | overrides))).double().eval()
    return contract.randomise(model, seed=seed)


def tokens_of(batch_size: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(97, (batch_size, seq_len), generator=generator)


# --- the scan


def scan_inputs(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, log_decay, key, query and an S that is not zero: b = 2, h = 3, e = 4, n = 5."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, 3, 4), (num_tokens, 3), (num_tokens, 5), (num_tokens, 5), (3, 4, 5)]
    parts = [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes]
    parts[1] = -torch.nn.functional.softplus(parts[1])
    return [part.to(dtype) for part in parts]


def quadratic(
    x: Tensor, log_decay: Tensor, key: Tensor, query: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = (prod a_1..a_t) S_0 C_t + sum over s <= t of (prod a_{s+1}..a_t) (C_t . B_s) x_s."""
    a = log_decay.exp()
    num_tokens = x.shape[1]
    y = torch.zeros_like(x)
    for t in range(num_tokens):
        from_start = a[:, : t + 1].prod(1)[..., None]  # (b, h, 1)
        y[:, t] = from_start * (matrix * query[:, t, None, None]).sum(-1)
        for s in range(t + 1):
            weight = (query[:, t] * key[:, s]).sum(-1)[:, None] * a[:, s + 1 : t + 1].prod(1)
            y[:, t] += weight[..., None] * x[:, s]
    last = a.prod(1)[..., None, None] * matrix
    for s in range(num_tokens):
        outer = x[:, s, :, :, None] * key[:, s, None, None, :]
        last = last + a[:, s + 1 :].prod(1)[..., None, None] * outer
    return y, last


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 21])
def test_recurrence_and_chunks_equal_the_quadratic_form(num_tokens: int) -> None:
    inputs = scan_inputs(num_tokens)
    expected = quadratic(*inputs)
    found = {"recurrence": mamba2.recurrence(*inputs)}
    for size in (1, 3, 8, 64):
        found[f"chunks of {size}"] = mamba2.chunked_scan(*inputs, chunk_size=size)
    for what, (y, last) in found.items():
        torch.testing.assert_close(y, expected[0], rtol=1e-11, atol=1e-12, msg=what)
        torch.testing.assert_close(last, expected[1], rtol=1e-11, atol=1e-12, msg=what)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_gradients_of_the_chunks_equal_those_of_the_recurrence(size: int) -> None:
    gradients = []
    for scan in (mamba2.recurrence, lambda *parts: mamba2.chunked_scan(*parts, chunk_size=size)):
        inputs = [part.requires_grad_() for part in scan_inputs(10)]
        y, last = scan(*inputs)
        gradients.append(torch.autograd.grad(y.sin().sum() + last.cos().sum(), inputs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_strong_decay_keeps_digits_and_finite_gradients() -> None:
    """The sum of a chunk's decays is in the thousands; between neighbours it may be 0.001."""
    x, log_decay, key, query, matrix = scan_inputs(256)
    log_decay[:, ::2] = -60.0
    log_decay[:, 1::2] = -0.001
    exact, _ = mamba2.recurrence(x, log_decay, key, query, matrix)
    inputs = [p.float().requires_grad_() for p in (x, log_decay, key, query, matrix)]
    y, last = mamba2.chunked_scan(*inputs)
    assert contract.relative_norm(y.detach(), exact) < 16 * torch.finfo(torch.float32).eps
    for gradient in torch.autograd.grad(y.sum() + last.sum(), inputs):
        assert gradient.isfinite().all()


# --- one layer and the whole model


def naive_layer(mixer: mamba2.Mixer, u: Tensor) -> Tensor:
    """out (t, d) of one sequence u (t, d), in scalars and loops over tokens, heads and taps."""
    c, w = mixer.config, dict(mixer.named_parameters())
    inner, n, e = c.expand * c.width, c.d_state, c.headdim
    rows = u @ w["in_proj.weight"].T
    z, x, key, query, dt = rows.split([inner, inner, n, n, inner // e], dim=-1)
    xbc = torch.cat([x, key, query], dim=-1)
    conv = torch.zeros_like(xbc) + w["conv1d.bias"]
    for t in range(len(u)):
        for back in range(min(c.conv_width, t + 1)):  # the last tap is the token itself
            conv[t] += w["conv1d.weight"][:, 0, c.conv_width - 1 - back] * xbc[t - back]
    conv = conv * conv.sigmoid()
    y = torch.zeros_like(z)
    for h in range(inner // e):
        own = slice(h * e, (h + 1) * e)
        s = torch.zeros(e, n, dtype=u.dtype)
        for t in range(len(u)):
            delta = (dt[t, h] + w["dt_bias"][h]).exp().log1p()
            s = (-delta * w["A_log"][h].exp()).exp() * s
            s = s + delta * torch.outer(conv[t, own], conv[t, inner : inner + n])
            y[t, own] = s @ conv[t, inner + n :] + w["D"][h] * conv[t, own]
    gated = y * z * z.sigmoid()
    scale = (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (gated * scale * w["norm.weight"]) @ w["out_proj.weight"].T


@pytest.mark.parametrize("overrides", [{}, {"conv_width": 1}, {"conv_width": 2, "expand": 3}])
@torch.no_grad()
def test_a_layer_equals_its_definition(overrides: dict[str, int]) -> None:
    model = tiny(**overrides)
    mixer = model.blocks[0].mixer
    u = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    columns, matrix = model._zeros(2)
    expected = torch.stack([naive_layer(mixer, row) for row in u])
    for scan in (mamba2.chunked_scan, mamba2.recurrence):
        out, _, _ = mixer(u, columns, matrix, scan)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_the_model_is_pre_norm_residual_layers_and_an_untied_head() -> None:
    model, tokens = tiny(), tokens_of(1, 9)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    with torch.no_grad():
        x = model.embed.weight[tokens[0]]
        for block in model.blocks:
            x = x + naive_layer(block.mixer, rms_norm(x, block.norm.weight))
        expected = rms_norm(x, model.norm.weight) @ model.head.weight.T
        torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-10, atol=1e-10)
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()


def test_chunk_boundaries_of_forward_prefill_and_steps() -> None:
    """Around 64 and 128 tokens, and in segments that end beside them."""
    model, tokens = tiny(), tokens_of(2, 131)
    expected = contract.forward(model, tokens)
    for segments in [(1,), (63, 1, 1), (64, 64), (65, 63, 2), (130,)]:
        end = sum(segments)
        got, _ = contract.decode(model, tokens, segments)
        contract.assert_same(got, expected[:, end - 1 :], f"segments of {segments}, then steps")


@pytest.mark.parametrize("conv_width", [1, 2, 4])
@torch.no_grad()
def test_the_state_holds_the_last_inputs_of_the_convolution(conv_width: int) -> None:
    """Oldest first, zeros before the first token; prefill, steps and short prompts agree."""
    model, tokens = tiny(conv_width=conv_width), tokens_of(2, 7)
    block = model.blocks[0]
    c = model.config
    inputs = block.mixer.in_proj(block.norm(model.embed(tokens)))
    xbc = inputs[..., c.inner_width : c.inner_width + c.conv_channels]
    padded = torch.cat([xbc.new_zeros(2, conv_width, c.conv_channels), xbc], dim=1)
    for num_tokens in range(1, 8):
        expected = padded[:, num_tokens : num_tokens + conv_width]
        for first in {1, num_tokens}:
            _, state = contract.decode(model, tokens[:, :num_tokens], [first])
            torch.testing.assert_close(state.columns[0], expected)


@torch.no_grad()
def test_the_convolution_sees_exactly_four_tokens() -> None:
    """With S cut off (decay of 1e-40 per token), one layer sees the last w tokens and no more."""
    model, tokens = tiny(num_layers=1), tokens_of(1, 12)
    model.blocks[0].mixer.A_log.fill_(math.log(1e6))
    model.blocks[0].mixer.dt_bias.fill_(5.0)
    before = contract.forward(model, tokens)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 97
    moved = (contract.forward(model, changed) - before).abs().amax(-1)[0] > 1e-12
    assert moved.tolist() == [4 <= position <= 7 for position in range(12)]


def test_the_scan_is_float32_at_least() -> None:
    for kept, stored in [("model", torch.bfloat16), ("float32", torch.float32)]:
        assert tiny(state_dtype=kept).init_state(1, 8).matrices.dtype == torch.float64
        state = tiny(state_dtype=kept).to(torch.bfloat16).init_state(1, 8)
        assert (state.columns.dtype, state.matrices.dtype) == (torch.bfloat16, stored)
    for model, autocast in [(tiny().to(torch.bfloat16), False), (tiny().float(), True)]:
        calls = []

        def scan(*parts: Tensor, calls: list = calls) -> tuple[Tensor, Tensor]:
            calls.append((parts, mamba2.chunked_scan(*parts)))
            return calls[-1][1]

        u = torch.randn(1, 5, 32).to(model.head.weight.dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.blocks[0](u, *model._zeros(1), scan)
        [(parts, found)] = calls
        assert {part.dtype for part in (*parts, *found)} == {torch.float32}
        exact = mamba2.recurrence(*(part.double() for part in parts))
        for got, expected in zip(found, exact, strict=True):  # with bfloat16 products: 1e-3
            assert contract.relative_norm(got, expected) < 1e-6, f"autocast {autocast}"


@torch.no_grad()
def test_long_sums_in_bfloat16_models() -> None:
    """400 tokens that almost never decay: a bfloat16 S stops growing at 256 equal summands."""
    errors = {}
    for kept in ("float32", "model"):
        rounded = tiny(num_layers=1, state_dtype=kept).to(torch.bfloat16)
        rounded.blocks[0].mixer.A_log.fill_(-12.0)
        exact = tiny(num_layers=1)
        exact.load_state_dict(rounded.state_dict())
        tokens = torch.full((1, 400), 5)
        last, expected = (
            contract.decode(model, tokens, [1])[1].matrices for model in (rounded, exact)
        )
        errors[kept] = contract.relative_norm(last, expected)
        # In one call, the sums are float32: S is rounded once.
        whole = contract.decode(rounded, tokens, [399])[1].matrices
        assert contract.relative_norm(whole, expected) < 0.02
    assert errors["float32"] < 0.02
    assert errors["model"] > 0.1


# --- initialisation, names, configuration


def test_initial_time_steps_and_decay_rates() -> None:
    torch.manual_seed(0)
    for dtype, slack in [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = mamba2.Model(mamba2.Config(width=1024, num_layers=4, vocab_size=8, d_state=8))
        finally:
            torch.set_default_dtype(before)
        mixers = [block.mixer for block in model.blocks]
        bias = torch.cat([mixer.dt_bias.detach().double() for mixer in mixers])
        dt = torch.nn.functional.softplus(bias).log()
        low, high = math.log(1e-3), math.log(1e-1)
        assert low - slack <= dt.min() and dt.max() <= high + slack
        assert abs(dt.mean() - (low + high) / 2) < 0.4  # 128 draws, standard error 0.12
        rate = torch.cat([mixer.A_log.detach().double() for mixer in mixers]).exp()
        assert 1 - slack <= rate.min() and rate.max() <= 16 * (1 + slack)
        assert abs(rate.mean() - 8.5) < 1.3  # standard error 0.38
        assert all((mixer.D == 1).all() and (mixer.norm.weight == 1).all() for mixer in mixers)
        # uniform within 1 / sqrt(fan in), so std is that / sqrt(3); out_proj over sqrt(layers) too
        assert mixers[0].in_proj.weight.std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.02)
        std = mixers[0].out_proj.weight.std().item()
        assert std == pytest.approx((3 * 2048 * 4) ** -0.5, rel=0.02)


def test_names_and_shapes_are_those_of_mamba_ssm() -> None:
    mixer = {
        "in_proj.weight": (2 * 2048 + 2 * 128 + 32, 1024),
        "conv1d.weight": (2048 + 2 * 128, 1, 4),
        "conv1d.bias": (2048 + 2 * 128,),
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "norm.weight": (2048,),
        "out_proj.weight": (1024, 2048),
    }
    expected = {
        f"blocks.{i}.mixer.{name}": shape for i in range(24) for name, shape in mixer.items()
    }
    expected |= {f"blocks.{i}.norm.weight": (1024,) for i in range(24)} | {"norm.weight": (1024,)}
    expected |= {"embed.weight": (50_432, 1024), "head.weight": (50_432, 1024)}
    found = {name: tuple(value.shape) for name, value in planned("mamba2").state_dict().items()}
    assert found == expected


def test_labels_tell_models_apart() -> None:
    labels = [spec_config(text).label for text in ("mamba2", "mamba2-16", "mamba2:conv_width=3")]
    assert labels == ["Mamba2", "Mamba2-16", "Mamba2 (conv_width=3)"]


def spec_config(text: str) -> mamba2.Config:
    return mamba2.Config(**spec.parse(text).overrides)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("headdim", 60, "divide expand . width = 2048, got 60"),
        ("d_state", 0, "d_state must be at least 1, got 0"),
        ("vocab_size", 1, "vocab_size must be at least 2, got 1"),
        ("conv_width", 0, "conv_width must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(key: str, value: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mamba2.Config(**{key: value})


# --- the authors' packages and weights; tests/gpu/test_mamba2_upstream.py runs their kernels


@pytest.fixture
def no_memory_of_imports() -> Iterator[None]:
    """The import is done anew, and forgotten after the test."""
    forget_imports()
    yield
    forget_imports()


def forget_imports() -> None:
    import_mamba_ssm.cache_clear()
    for name in [*sys.modules]:
        if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda"):
            del sys.modules[name]


def lacking(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in names else found(name)
    )


@pytest.mark.usefixtures("no_memory_of_imports")
def test_a_missing_package_is_told_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "mamba_ssm")
    for path in ("upstream", "upstream_graph"):
        model = mamba2.Model(tiny().config, decode_path=path)
        with pytest.raises(UserError, match="(?s)package mamba_ssm.*pip install .*mamba-ssm=="):
            model.init_state(2, 8)
    with pytest.raises(UserError, match="package mamba_ssm"):
        mamba2.Model(tiny().config, forward_path="upstream")(tokens_of(1, 4))


@pytest.mark.usefixtures("no_memory_of_imports")
def test_mamba_ssm_is_imported_without_its_own_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in whose __init__ fails, as upstream's does without the extension of Mamba-1."""
    (tmp_path / "mamba_ssm" / "ops").mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('selective_scan')")
    (tmp_path / "mamba_ssm" / "ops" / "part.py").write_text("import selective_scan_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    lacking(monkeypatch, "causal_conv1d_cuda")
    import_mamba_ssm()
    assert importlib.import_module("mamba_ssm.ops.part").selective_scan_cuda
    for needs_conv1d in (
        lambda: mamba2.Model(tiny().config, forward_path="upstream")(tokens_of(1, 4)),
        lambda: mamba2.upstream_generate(tiny()),
    ):
        with pytest.raises(UserError, match="(?s)package causal_conv1d.*causal-conv1d=="):
            needs_conv1d()


@pytest.mark.usefixtures("no_memory_of_imports")
def test_mamba_ssms_own_model_needs_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("mamba_ssm", "causal_conv1d_cuda"):
        (tmp_path / f"{module}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    lacking(monkeypatch, "transformers")
    with pytest.raises(UserError, match=r"(?s)package transformers.*pip install -e '\.\[eval\]'"):
        mamba2.upstream_generate(tiny())


def test_the_authors_kernels_are_not_asked_for_more_than_they_address() -> None:
    model = mamba2.Model(mamba2.Config(num_layers=1, vocab_size=8), forward_path="upstream")
    assert model._upstream_batch(4096) == (2**31 - 1) // (4096 * 4384) == 119
    assert model._upstream_batch(1) == (2**31 - 1) // (2048 * 128)
    assert model._upstream_batch(10**9) == 1
    model._check_upstream_size(119, 4096)
    with pytest.raises(UserError, match="at most 119 sequences of 4096 tokens at once, got 120"):
        model._check_upstream_size(120, 4096)


def test_weights_to_mamba_ssm_and_back() -> None:
    model, tokens = tiny(), tokens_of(1, 9)
    ours = model.state_dict()
    theirs = mamba2.to_upstream(ours)
    outside = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert {name for name in theirs if not name.startswith("backbone.layers.")} == outside
    first = {name for name in theirs if name.startswith("backbone.layers.0.")}
    assert {name.removeprefix("backbone.layers.0.") for name in first} == {
        "norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias",
        "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight",
    }  # fmt: skip
    back = mamba2.from_upstream(theirs)
    assert back.keys() == ours.keys()
    assert all(back[name] is ours[name] for name in ours)
    fresh = tiny(seed=3)
    fresh.load_state_dict(back)
    assert torch.equal(fresh(tokens), model(tokens))


def test_a_tied_head_becomes_a_copy_of_the_embedding() -> None:
    theirs = mamba2.to_upstream(tiny().state_dict())
    del theirs["lm_head.weight"]
    ours = mamba2.from_upstream(theirs)
    assert torch.equal(ours["head.weight"], ours["embed.weight"])
    assert ours["head.weight"].data_ptr() != ours["embed.weight"].data_ptr()


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="called 'transformer.wte.weight'; expected .*backbone"):
        mamba2.from_upstream({"transformer.wte.weight": torch.zeros(1)})


MAMBA = {"d_model": 768, "n_layer": 24, "vocab_size": 50_277, "pad_vocab_size_multiple": 16}


def test_what_mamba_ssms_config_leaves_out_has_its_default() -> None:
    """As in the config.json of state-spaces/mamba2-130m."""
    found = mamba2.settings_from_upstream(MAMBA | {"ssm_cfg": {"layer": "Mamba2"}})
    assert found == {
        "width": 768, "num_layers": 24, "d_state": 128, "conv_width": 4, "expand": 2,
        "headdim": 64, "vocab_size": 50_288, "norm_eps": 1e-5,
    }  # fmt: skip


def test_settings_travel_to_mamba_ssm_and_back() -> None:
    for settings in ({}, {"width": 96, "d_state": 8, "headdim": 32, "expand": 3, "conv_width": 3}):
        config = mamba2.Config(**settings, vocab_size=1001)
        theirs = json.loads(json.dumps(mamba2.upstream_config(config)))
        assert mamba2.Config(**mamba2.settings_from_upstream(theirs)) == config
    with pytest.raises(ValueError, match="norm_eps 1e-05 built in, got 1e-06"):
        mamba2.upstream_config(mamba2.Config(norm_eps=1e-6))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({}, "layer='Mamba1', but ours has 'Mamba2'"),
        ({"layer": "Mamba2", "ngroups": 2, "d_state": 64}, "ngroups=2, but ours has 1"),
        ({"layer": "Mamba2", "norm_before_gate": True}, "norm_before_gate=True"),
        ({"layer": "Mamba2", "dt_limit": [0.0, 0.5]}, r"dt_limit=\[0.0, 0.5\]"),
    ],
)
def test_what_ours_does_not_compute_is_refused(layer: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mamba2.settings_from_upstream(MAMBA | {"ssm_cfg": layer})


def test_another_config_is_refused() -> None:
    with pytest.raises(ValueError, match="no d_model"):
        mamba2.settings_from_upstream({"model_type": "mamba2", "layer": "Mamba2"})


def test_logits_equal_those_of_transformers() -> None:
    """An independent Mamba-2 in plain PyTorch, which reads mamba-ssm's weights but for one name."""
    reason = "transformers is an optional package"
    transformers = pytest.importorskip("transformers", reason=reason)
    model = tiny(conv_width=3).float()
    c = model.config
    config = transformers.Mamba2Config(
        num_heads=c.num_heads,
        head_dim=c.headdim,
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        state_size=c.d_state,
        num_hidden_layers=c.num_layers,
        layer_norm_epsilon=c.norm_eps,
        expand=c.expand,
        conv_kernel=c.conv_width,
        n_groups=1,
        chunk_size=8,
        tie_word_embeddings=False,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    weights = mamba2.to_upstream(model.state_dict())
    weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    theirs.load_state_dict(weights)
    tokens = tokens_of(2, 21)
    with torch.no_grad():
        contract.assert_same(model(tokens), theirs(tokens).logits, "logits", 1e-5)


# --- costs at full size


def test_parameter_counts() -> None:
    layer = 1024 * (2 * 2048 + 2 * 128 + 32) + 2304 * (4 + 1) + 3 * 32 + 2048 + 2048 * 1024 + 1024
    model = planned("mamba2")
    assert model.num_params == 24 * layer + 1024 + 2 * 50_432 * 1024 == 261_711_104
    assert model.num_params_non_embedding == 158_426_368
    wikitext = planned("mamba2-wikitext")
    assert round(wikitext.num_params / 1e6, 1) == 94.3


# (spec, MB per sequence, GB at batch 512, GB at batch 256), as printed: two bytes per element
STATES = [
    ("mamba2", 13.03, 6.67, 3.33),
    ("mamba2-16", 1.97, 1.01, 0.50),
    ("mamba2-32", 3.55, 1.82, 0.91),
    ("mamba2-64", 6.71, 3.44, 1.72),
]


@pytest.mark.parametrize(("text", "mb_per_sequence", "gb_short", "gb_long"), STATES)
def test_state_calibration_table(
    text: str, mb_per_sequence: float, gb_short: float, gb_long: float
) -> None:
    """The table's bytes; with S in float32 the matrix part once more."""
    model, wide = planned(text), planned(f"{text}:state_dtype=float32")
    n = model.config.d_state
    matrices, columns = 24 * 2048 * n, 24 * 4 * (2048 + 2 * n)  # elements
    table = 2 * (matrices + columns)
    assert round(table / 1e6, 2) == mb_per_sequence
    assert round(512 * table / 1e9, 2) == gb_short
    assert round(256 * table / 1e9, 2) == gb_long
    for batch_size, seq_len in [(1, 1024), (512, 1024), (256, 4096)]:
        assert model.state_bytes_float(batch_size, seq_len) == batch_size * table
        assert model.state_bytes(batch_size, seq_len) == batch_size * table
        assert wide.state_bytes(batch_size, seq_len) == batch_size * (table + 2 * matrices)
    assert planned(text, "float32").state_bytes(1, 1024) == 2 * table


def test_float32_state_in_megabytes() -> None:
    wide = planned("mamba2:state_dtype=float32")
    assert round(wide.state_bytes_float(1, 1024) / 1e6, 2) == 25.61


def test_flops_per_token() -> None:
    """24 [2 (D (2 i + 2 n + 32) + i D) + 4 i n + 8 (i + 2 n)] + 2 D V, at every length."""
    model = planned("mamba2")
    linear = 2 * (1024 * (2 * 2048 + 2 * 128 + 32) + 2048 * 1024)
    mixing = 4 * 2048 * 128 + 8 * (2048 + 2 * 128)
    assert step_flops(model, 1, 1) == 24 * (linear + mixing) + 2 * 1024 * 50_432
    for seq_len in (1024, 4096):
        assert round(generation_flops(model, 1, seq_len) / seq_len / 1e6) == 445


def test_bytes_of_a_step() -> None:
    """cat_spec.md 5, decode step at batch 512: weights 0.42 GB, state 13.3, or 26.2 in float32."""
    weights, state = planned("mamba2").step_costs(512, 1024)
    assert round(state.num_bytes / 1e9, 1) == 13.3
    weights, state = planned("mamba2:state_dtype=float32").step_costs(512, 1024)
    assert (weights.part, state.part) == ("weights", "state")
    assert round(weights.num_bytes / 1e9, 2) == 0.42
    assert round(state.num_bytes / 1e9, 1) == 26.2
    assert round((weights.flops + state.flops) / 1e12, 2) == 0.23


# --- decode path cuda_graph, on the references of its kernels


def authors_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_states: Tensor, **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What mamba_chunk_scan_combined computes, by our own scan."""
    dt = F.softplus(dt + dt_bias)
    inputs = (dt[..., None] * x, dt * A, B[:, :, 0], C[:, :, 0], initial_states)
    y, last = mamba2.chunked_scan(*(part.double() for part in inputs))
    return y + D[:, None] * x, last


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("segments", [(4,), (1, 70, 65, 3), (64, 64)])
def test_a_long_prompt_on_the_fast_paths_is_the_eager_one(
    segments: tuple[int, ...], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state goes from one way of reading to the other; S is handed over in float32."""
    module = types.SimpleNamespace(mamba_chunk_scan_combined=authors_scan)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
    monkeypatch.setattr(mamba2, "upstream_gate", lambda mixer, y, z: mixer.norm(y * F.silu(z)))
    monkeypatch.setattr(mamba2, "import_mamba_ssm", lambda: None)
    reference_kernels.install(monkeypatch, mamba2)
    model, tokens = tiny(), tokens_of(batch_size, sum(segments) + 3)
    expected, exact = contract.decode(model, tokens, segments)
    monkeypatch.setattr(model, "decode_path", "cuda_graph")
    got, state = contract.decode(model, tokens, segments)
    contract.assert_same(got, expected, "logits", 1e-6)
    contract.assert_same(state.matrices, exact.matrices, "S", 1e-6)
    contract.assert_same(state.columns, exact.columns, "inputs of the convolution", 1e-6)


@pytest.mark.parametrize("kept", ["model", "float32"])
@torch.no_grad()
def test_the_fused_step_is_the_eager_one(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens on a state that is not empty."""
    reference_kernels.install(monkeypatch, mamba2)
    model, tokens = tiny(state_dtype=kept), tokens_of(3, 9)
    _, state = model.prefill(tokens[:, :4], model.init_state(3, 9))
    expected, exact = contract.decode(model, tokens, [4])
    for position in range(4, 9):
        x = model.embed(tokens[:, position])
        for block, *memory in zip(model.blocks, state.columns, state.matrices, strict=True):
            x = mamba2.fused_step(block, x, *memory)
    contract.assert_same(model.head(model.norm(x)), expected[:, -1], "logits", 1e-12)
    contract.assert_same(state.matrices, exact.matrices, "S", 1e-12)
    contract.assert_same(state.columns, exact.columns, "inputs of the convolution", 1e-12)
