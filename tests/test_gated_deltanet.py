"""Gated DeltaNet and GDN-H1 against their definitions and against the tables of the specification.

Sources: cat_spec.md 1.6 (parameters) and 5 (FLOPs, bytes), evaluation_spec.md 4.4 (state).
"""

import dataclasses
import json
from unittest import mock

import contract
import pytest
import reference_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import gated_deltanet as gdn
from cat_bench import graph, recurrent_steps, spec, window
from cat_bench.architecture import Architecture, build, generation_flops, make_config
from cat_bench.errors import UserError

SMALL = gdn.Config(width=64, num_layers=4, vocab_size=97, window=6, **gdn.TINY)
HYBRID = dataclasses.replace(SMALL, hybrid=True)
SUBJECT, SUBJECT_H1 = (contract.Subject(c.label, c, gdn.Model) for c in (SMALL, HYBRID))


def planned(text: str) -> Architecture:
    return build(spec.parse(text), device="meta", dtype="bfloat16")


# --- costs at full size --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "millions"),
    [
        ("gdn", 282_914_960, 282.9),
        ("gdn:num_heads=5", 270_282_872, 270.3),
        ("gdn:num_heads=8", 308_179_136, 308.2),
        ("gdn-h1", 270_182_984, 270.2),
    ],
)
def test_parameter_counts(text: str, total: int, millions: float) -> None:
    model = planned(text)
    assert model.num_params == total
    assert round(model.num_params / 1e6, 1) == millions
    assert model.num_params_non_embedding == total - 2 * 50_432 * 1024


def matrix_elements(text: str) -> int:
    c = make_config(spec.parse(text))
    return c.num_delta_layers * c.heads * 128 * 256


@pytest.mark.parametrize(
    ("text", "mb_per_sequence", "gb_short", "gb_long"),
    [("gdn", 5.01, 2.57, 1.28), ("gdn-h1", 15.09, 7.73, 3.86)],
)
def test_state_table(text: str, mb_per_sequence: float, gb_short: float, gb_long: float) -> None:
    """The table has 2 bytes for every element; float32 doubles the matrix part and nothing else."""
    model, elements = planned(text), matrix_elements(text)

    def in_bfloat16(batch_size: int, seq_len: int) -> int:
        return model.state_bytes_float(batch_size, seq_len) - 2 * batch_size * elements

    assert round(in_bfloat16(1, 1024) / 1e6, 2) == mb_per_sequence
    assert round(in_bfloat16(512, 1024) / 1e9, 2) == gb_short
    assert round(in_bfloat16(256, 4096) / 1e9, 2) == gb_long
    assert model.state_bytes(3, 700) == model.state_bytes_float(3, 700)


def test_state_in_float32() -> None:
    """Elements of evaluation_spec.md 4.4 by hand, and the printed MB of cat_spec.md 5."""
    assert planned("gdn").state_bytes(1, 1024) == 12 * (4 * 6 * 128 * 256 + 2 * 4 * 3072)
    for text, megabytes in [("gdn", 9.4), ("gdn:num_heads=8", 12.6)]:
        assert round(4 * matrix_elements(text) / 1e6, 1) == megabytes
    half = planned("gdn").state_bytes(1, 1) // 2
    for text, seq_len, rows, megabytes in [
        ("gdn-h1", 1024, 512, 17.4),
        ("gdn-h1", 300, 300, None),
        ("gdn-h1:window=2048", 4096, 2048, 52.8 + 2 * matrix_elements("gdn-h1") / 1e6),
    ]:
        got = planned(text).state_bytes(1, seq_len)
        assert got == half + 6 * 2 * 1024 * rows * 2
        assert megabytes is None or got / 1e6 == pytest.approx(megabytes, abs=0.06)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_recurrent_sums_are_float32_at_least(dtype: str) -> None:
    state = SUBJECT_H1.model(dtype).init_state(2, 9)
    assert state.matrices.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert {str(part.dtype) for part in (state.inputs, state.keys)} == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("text", "seq_len", "mflops"),
    [
        ("gdn", 1024, 477),
        ("gdn", 4096, 477),
        ("gdn:num_heads=8", 1024, 532),
        ("gdn-h1", 1024, 454),
        ("gdn-h1:window=2048", 4096, 482),
    ],
)
def test_flops_per_token(text: str, seq_len: int, mflops: int) -> None:
    got = generation_flops(planned(text), 1, seq_len) / seq_len / 1e6
    assert got == pytest.approx(mflops, abs=0.6)


def test_bytes_per_step() -> None:
    """GB of the table "Decode step", N = 1024, B = 512: weights, then state in float32."""
    for text, weights_gb, state_gb in [("gdn", 0.46, 10.0), ("gdn-h1", 0.44, 9.8)]:
        model = planned(text)
        steps = [model.step_costs(512, n) for n in range(1, 1025)]
        assert round(steps[0][0].num_bytes / 1e9, 2) == weights_gb
        assert round(sum(state.num_bytes for _, state in steps) / 1024 / 1e9, 1) == state_gb


# --- the rule against its definition -------------------------------------------------------------


def rule_inputs(seq_len: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, log_decay, beta, matrix; b = 2, h = 3, p = 4, e = 5."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(seq_len, 4), gdn.unit(draw(seq_len, 4)), draw(seq_len, 5)
    return [q, k, v, -F.softplus(draw(seq_len)), draw(seq_len).sigmoid(), draw(4, 5)]


def unrolled(q, k, v, log_decay, beta, matrix) -> tuple[Tensor, Tensor]:
    """Quadratic form: what token j wrote, times every transition e^g (I - beta k k^T) after it."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    outer = k[..., :, None] * k[..., None, :]
    transitions = log_decay.exp()[..., None, None] * (eye - beta[..., None, None] * outer)
    writes = beta[..., None, None] * k[..., :, None] * v[..., None, :]  # (b, h, t, p, e)
    outputs = []
    for i in range(q.shape[2]):
        memory, product = torch.zeros_like(matrix), eye
        for j in range(i, -1, -1):
            memory = memory + product @ writes[:, :, j]
            product = product @ transitions[:, :, j]
        memory = memory + product @ matrix
        outputs.append((q[:, :, i, None] @ memory)[:, :, 0])
    return torch.stack(outputs, dim=2), memory


RULES = [gdn.recurrent_delta_rule, gdn.chunked_delta_rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 9, 17])
def test_rule_equals_the_unrolled_sum(rule, seq_len: int, monkeypatch) -> None:
    monkeypatch.setattr(gdn, "CHUNK", 8)
    inputs = rule_inputs(seq_len)
    for got, expected in zip(rule(*inputs), unrolled(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seq_len", [63, 64, 65, 150])
def test_chunks_equal_the_recurrence_with_gradients(seq_len: int) -> None:
    results = []
    for rule in RULES:
        inputs = [x.requires_grad_() for x in rule_inputs(seq_len)]
        outputs, matrix = rule(*inputs)
        (outputs.sin().sum() + matrix.sin().sum()).backward()
        results.append([outputs, matrix, *(x.grad for x in inputs)])
    for recurrent, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, recurrent, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 70])  # the recurrence; a chunk and a part
def test_autocast_leaves_the_rule_in_float32(num_tokens: int, monkeypatch) -> None:
    name = "recurrent_delta_rule" if num_tokens == 1 else "chunked_delta_rule"
    rule, calls = getattr(gdn, name), []

    def recorded(*parts: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((parts, rule(*parts)))
        return calls[-1][1]

    monkeypatch.setattr(gdn, name, recorded)
    mixer = SUBJECT.model("float32").blocks[0].mixer
    x = torch.randn(2, num_tokens, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(x, mixer.empty(2))
    [(parts, found)] = calls
    assert {part.dtype for part in (*parts, *found)} == {torch.float32}
    exact = rule(*(part.double() for part in parts))
    for got, expected in zip(found, exact, strict=True):  # with bfloat16 products: 1e-3
        assert contract.relative_norm(got, expected) < 1e-5


@pytest.mark.parametrize("log_decay", [0.0, -40.0])
def test_chunks_keep_precision_at_the_extremes(log_decay: float) -> None:
    """One key again and again, corrected in full: float32, without decay and with nothing left."""
    q, k, v, _, beta, matrix = (x.float() for x in rule_inputs(130))
    k = k[:, :, :1].expand_as(k)
    inputs = [q, k, v, torch.full_like(beta, log_decay), torch.ones_like(beta), matrix]
    exact, _ = gdn.recurrent_delta_rule(*(x.double() for x in inputs))
    got, last = gdn.chunked_delta_rule(*inputs)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k[:, :, -1:] @ last, v[:, :, -1:])  # the last value alone


@pytest.mark.parametrize("rule", RULES)
def test_the_memory_decays_before_it_is_corrected(rule) -> None:
    """The same key twice: (1 - beta_2) e^g_2 beta_1 v_1 + beta_2 v_2; a gate acts at once."""
    k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    k[..., 1] = 1.0
    v = torch.tensor([[3.0], [5.0]], dtype=torch.float64)[None, None]
    beta, decay = torch.tensor([0.5, 0.75]).double(), torch.tensor([0.125, 0.25]).double()
    outputs, _ = rule(k, k, v, decay.log()[None, None], beta[None, None], k.new_zeros(1, 1, 4, 1))
    assert outputs.flatten().tolist() == pytest.approx([1.5, 0.25 * 0.25 * 1.5 + 3.75])


# --- the layer against its definition ------------------------------------------------------------


def naive_mixer(c: gdn.Config, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """One sequence x (t, d), token by token and head by head, from the parameters by name."""

    def convolved(name: str, i: int) -> Tensor:
        taps = w[f"{name}_conv1d.weight"][:, 0]  # (n, 4): the last tap is the present token's
        rows = [(i - 3 + tap, taps[:, tap]) for tap in range(4)]
        total = sum(tap * (w[f"{name}_proj.weight"] @ x[j]) for j, tap in rows if j >= 0)
        return F.silu(total)

    memories = [x.new_zeros(c.value_width, c.key_width) for _ in range(c.heads)]
    outputs = []
    for i, row in enumerate(x):
        heads = []
        for h in range(c.heads):
            q, k, v = (convolved(name, i).chunk(c.heads)[h] for name in "qkv")
            q, k = (z / (z.dot(z) + 1e-6).sqrt() for z in (q, k))
            beta = torch.sigmoid(w["b_proj.weight"][h].dot(row))
            rate = F.softplus(w["a_proj.weight"][h].dot(row) + w["dt_bias"][h])
            decayed = torch.exp(-w["A_log"][h].exp() * rate) * memories[h]
            memories[h] = decayed + beta * torch.outer(v - decayed @ k, k)
            o = memories[h] @ q / c.key_width**0.5
            o = o / (o.square().mean() + c.norm_eps).sqrt() * w["o_norm.weight"]
            gate = (w["g_proj.weight"] @ row).chunk(c.heads)[h]
            heads.append(o * gate * torch.sigmoid(gate))
        outputs.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


@torch.no_grad()
def test_mixer_equals_the_definition() -> None:
    mixer = SUBJECT.model().blocks[0].mixer
    x = torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, _ = mixer(x, mixer.empty(2))
    weights = dict(mixer.named_parameters())
    expected = torch.stack([naive_mixer(mixer.config, weights, row) for row in x])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_names_and_shapes_are_those_of_flash_linear_attention() -> None:
    mixer = planned("gdn").blocks[0].mixer
    shapes = {name: tuple(weight.shape) for name, weight in mixer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (768, 1024),
        "k_proj.weight": (768, 1024),
        "v_proj.weight": (1536, 1024),
        "a_proj.weight": (6, 1024),
        "b_proj.weight": (6, 1024),
        "g_proj.weight": (1536, 1024),
        "o_proj.weight": (1024, 1536),
        "q_conv1d.weight": (768, 1, 4),
        "k_conv1d.weight": (768, 1, 4),
        "v_conv1d.weight": (1536, 1, 4),
        "o_norm.weight": (256,),
        "A_log": (6,),
        "dt_bias": (6,),
    }


def test_initial_gates() -> None:
    torch.manual_seed(0)
    mixer = gdn.GatedDeltaNet(dataclasses.replace(SMALL, num_heads=2000))
    rate, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < rate.min() < 0.1 and 15.9 < rate.max() <= 16.001
    assert 0.00099 < dt.min() < 0.0011 and 0.09 < dt.max() < 0.1001
    assert dt.log10().mean().item() == pytest.approx(-2, abs=0.05)


# --- the sliding layers --------------------------------------------------------------------------


def test_layers_alternate_and_begin_with_gdn() -> None:
    names = [type(block).__name__ for block in planned("gdn-h1").blocks]
    assert names == ["DeltaBlock", "Block"] * 6
    assert {type(block) for block in planned("gdn").blocks} == {gdn.DeltaBlock}
    odd = gdn.Config(num_layers=5, hybrid=True)
    assert (odd.num_delta_layers, odd.num_sliding_layers) == (3, 2)


@torch.no_grad()
def test_only_a_ring_shorter_than_the_window_is_ever_full() -> None:
    tokens = SUBJECT_H1.tokens(1, 20)
    model = SUBJECT_H1.model()
    model.prefill(tokens, model.init_state(1, 6))  # as long as the window: goes round
    _, state = model.prefill(tokens[:, :5], model.init_state(1, 5))
    with pytest.raises(ValueError, match="made for 5 tokens, fewer than the window of 6; token 6"):
        model.step(tokens[:, 5], state)
    model = SUBJECT.model()
    model.prefill(tokens, model.init_state(1, 1))  # no ring, no limit


@pytest.mark.parametrize("subject", [SUBJECT, SUBJECT_H1], ids=lambda subject: subject.label)
@pytest.mark.parametrize("segments", [(64,), (65,), (63, 2), (130,), (1, 64, 64)])
def test_prefill_over_chunk_edges(subject: contract.Subject, segments: tuple[int, ...]) -> None:
    """The contract's sequences are shorter than one chunk of the scan."""
    model, tokens = subject.model(), subject.tokens(2, 133)
    got, _ = contract.decode(model, tokens, segments)
    expected = contract.forward(model, tokens)[:, sum(segments) - 1 :]
    contract.assert_same(got, expected, f"segments of {segments}")


# --- the cached step on kernels, here on what they are measured by -------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_reference_of_the_step_equals_the_rule(heads: int) -> None:
    c = dataclasses.replace(SMALL, num_heads=heads)
    mixer = contract.Subject("", c, gdn.Model).model().blocks[0].mixer
    generator = torch.Generator().manual_seed(0)
    qkv, a, b, matrix, gate = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((c.conv_channels,), (heads,), (heads,), (heads, 16, 32), (heads * 32,))
    )
    keys = heads * 16
    parts = qkv.split([keys, keys, heads * 32], dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1))[:, :, None] for part in parts)  # (b, h, 1, ...)
    log_decay = -mixer.A_log.exp() * F.softplus(a + mixer.dt_bias)
    expected, last = gdn.recurrent_delta_rule(
        gdn.unit(q) / 4, gdn.unit(k), v, log_decay[..., None], b.sigmoid()[..., None], matrix
    )
    got = recurrent_steps.delta_step_reference(
        qkv, a, b, mixer.A_log.detach(), mixer.dt_bias, matrix
    )
    torch.testing.assert_close(got, expected[:, :, 0])
    torch.testing.assert_close(matrix, last)
    normed = recurrent_steps.gated_rms_norm_reference(got, gate, mixer.o_norm.weight, 1e-5)
    scale = (got.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = (got * scale * mixer.o_norm.weight).flatten(1) * gate * gate.sigmoid()
    torch.testing.assert_close(normed, expected)


@pytest.fixture
def on_references(monkeypatch) -> None:
    reference_kernels.install(monkeypatch, gdn)
    monkeypatch.setattr(gdn.GatedDeltaNet, "mix_upstream", gdn.GatedDeltaNet.mix)


@pytest.mark.usefixtures("on_references")
@pytest.mark.parametrize("subject", [SUBJECT, SUBJECT_H1], ids=lambda subject: subject.label)
@pytest.mark.parametrize("segments", [(1,), (5,), (3, 8), (20,), (2, 18)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_graphed_step_equals_eager(
    subject: contract.Subject, batch_size: int, segments: tuple[int, ...]
) -> None:
    """Prompts of which each token is a step, and longer ones; one sequence has its own kernels."""
    reference_kernels.check_graphed_steps(subject, batch_size, segments)


def test_packing_keeps_values_names_and_trainability() -> None:
    mixer = SUBJECT.model().blocks[0].mixer
    before = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    weights = [mixer.q_proj.weight, mixer.b_proj.weight]
    with torch.inference_mode():  # as a captured state does it
        both = graph.packed(weights)
    assert torch.equal(both, torch.cat([*weights, torch.zeros(14, 64)]))  # 32 + 2 rows
    assert graph.packed(weights).data_ptr() == both.data_ptr()
    assert graph.packed(weights[::-1]).data_ptr() != both.data_ptr()
    assert all(torch.equal(weight, before[name]) for name, weight in mixer.state_dict().items())
    mixer.q_proj(torch.ones(1, 64, dtype=torch.float64)).sum().backward()
    assert mixer.q_proj.weight.grad is not None


# --- flash-linear-attention's names --------------------------------------------------------------

MLP = {"gate_proj": (256, 64), "up_proj": (256, 64), "down_proj": (64, 256)}
FLA_DELTA = {
    "q_proj.weight": (32, 64),
    "k_proj.weight": (32, 64),
    "v_proj.weight": (64, 64),
    "a_proj.weight": (2, 64),
    "b_proj.weight": (2, 64),
    "g_proj.weight": (64, 64),
    "o_proj.weight": (64, 64),
    "q_conv1d.weight": (32, 1, 4),
    "k_conv1d.weight": (32, 1, 4),
    "v_conv1d.weight": (64, 1, 4),
    "o_norm.weight": (64 // 2,),
    "A_log": (2,),
    "dt_bias": (2,),
}


def fla_shapes(config: gdn.Config) -> dict[str, tuple[int, ...]]:
    """What GatedDeltaNetForCausalLM of fla 0.6.0 has, at the sizes of SMALL."""
    shapes = {"model.embeddings.weight": (97, 64), "lm_head.weight": (97, 64)}
    shapes["model.norm.weight"] = (64,)
    for i in range(config.num_layers):
        sliding = {f"{name}_proj.weight": (64, 64) for name in "qkvo"}
        mixer = sliding if config.hybrid and i % 2 else FLA_DELTA
        inside = {f"attn.{name}": shape for name, shape in mixer.items()}
        inside |= {f"mlp.{name}.weight": shape for name, shape in MLP.items()}
        inside |= {"attn_norm.weight": (64,), "mlp_norm.weight": (64,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in inside.items()}
    return shapes


@pytest.mark.parametrize("subject", [SUBJECT, SUBJECT_H1], ids=lambda subject: subject.label)
def test_weights_travel_to_fla_and_back(subject: contract.Subject) -> None:
    ours = subject.model().state_dict()
    theirs = gdn.to_upstream(ours)
    assert {name: tuple(x.shape) for name, x in theirs.items()} == fla_shapes(subject.config)
    back = gdn.from_upstream(theirs)
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], weight) for name, weight in ours.items())
    if subject.config.hybrid:
        k = theirs["model.layers.1.attn.k_proj.weight"]
        assert torch.equal(k, ours["blocks.1.qkv.weight"][64:128])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.attn.q_norm.weight", "no weight like 'model.layers.1.attn.q_norm.weight'"),
        ("backbone.norm_f.weight", "called 'backbone.norm_f.weight'; expected .* model.embeddings"),
        ("model.embed_tokens.weight", "called 'model.embed_tokens.weight'; expected"),
    ],
)
def test_foreign_weights_are_refused_by_name(name: str, said: str) -> None:
    """fla's attention may normalise queries, which ours does not; others are another model's."""
    theirs = gdn.to_upstream(SUBJECT_H1.model().state_dict())
    with pytest.raises(ValueError, match=said):
        gdn.from_upstream(theirs | {name: torch.ones(64)})


def test_a_tied_head_becomes_a_copy_of_the_embedding() -> None:
    theirs = gdn.to_upstream(SUBJECT.model().state_dict())
    del theirs["lm_head.weight"]
    ours = gdn.from_upstream(theirs)
    assert torch.equal(ours["head.weight"], ours["embed.weight"])
    assert ours["head.weight"].data_ptr() != ours["embed.weight"].data_ptr()


def fla_attention(c: gdn.Config, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """fla's Attention over one sequence x (t, d): RoPE over the whole head, the half i of a pair
    being dimension i + 32; a query sees itself and window - 1 tokens before it.
    """
    q, k, v = (
        (x @ w[f"{name}_proj.weight"].T).unflatten(1, (-1, 64)).transpose(0, 1) for name in "qkv"
    )  # (h, t, e)
    position = torch.arange(len(x))
    angle = (position[:, None] * c.rope_base ** (-torch.arange(32) / 32)).double()  # (t, e/2)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(z[..., :32], z[..., 32:]) * turn for z in (q, k))
    score = (q @ k.mT.conj()).real / 8  # (h, t, t)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < c.window)
    o = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return o.transpose(0, 1).flatten(1) @ w["o_proj.weight"].T


def fla_logits(c: gdn.Config, theirs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What GatedDeltaNetForCausalLM computes, from weights under its names: (t,) -> (t, v)."""

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * theirs[name]

    x = theirs["model.embeddings.weight"][tokens]
    for layer in (f"model.layers.{i}." for i in range(c.num_layers)):
        inside = f"{layer}attn."
        w = {n.removeprefix(inside): x for n, x in theirs.items() if n.startswith(inside)}
        mix = naive_mixer if "A_log" in w else fla_attention
        x = x + mix(c, w, rms_norm(x, f"{layer}attn_norm.weight"))
        h = rms_norm(x, f"{layer}mlp_norm.weight")
        gate, up = (h @ theirs[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ theirs[f"{layer}mlp.down_proj.weight"].T
    return rms_norm(x, "model.norm.weight") @ theirs["lm_head.weight"].T


@pytest.mark.parametrize("hybrid", [False, True])
@torch.no_grad()
def test_mapped_weights_give_the_logits_of_flas_layers(hybrid: bool) -> None:
    """A map that is wrong in both directions would bring the weights back whole."""
    settings = {"width": 128, "num_heads": 3, "hybrid": hybrid, "rope_base": 100.0}
    config = dataclasses.replace(SMALL, **settings, norm_eps=1e-3)
    subject = contract.Subject("", config, gdn.Model)
    model, tokens = subject.model(), subject.tokens(1, 13)
    expected = fla_logits(config, gdn.to_upstream(model.state_dict()), tokens[0])
    contract.assert_same(model(tokens)[0], expected, "logits", 1e-6)  # our angles are float32


# --- and its settings ----------------------------------------------------------------------------


FLA = {"model_type": "gated_deltanet", "hidden_size": 1024, "num_hidden_layers": 4}
FLA_ATTN = {"layers": [1, 3], "num_heads": 16, "window_size": 512}


def test_what_flas_config_leaves_out_has_flas_default() -> None:
    assert gdn.settings_from_upstream(FLA) == {
        "width": 1024, "num_layers": 4, "num_heads": 6, "key_width": 256, "value_width": 512,
        "conv_width": 4, "vocab_size": 32_000, "norm_eps": 1e-6, "hybrid": False,
    }  # fmt: skip
    found = gdn.settings_from_upstream(FLA | {"head_dim": 128, "attn": [FLA_ATTN]})
    assert found["num_heads"] is None  # 6 by the rule
    assert (found["hybrid"], found["window"], found["rope_base"]) == (True, 512, 10_000.0)


@pytest.mark.parametrize(
    "config",
    [
        gdn.Config(),
        gdn.Config(width=2048, num_heads=7, key_width=96, value_width=160, norm_eps=1e-6),
        gdn.Config(hybrid=True, window=100, rope_base=5e5, num_layers=5, vocab_size=999),
    ],
    ids=lambda config: config.label,
)
def test_settings_travel_to_fla_and_back(config: gdn.Config) -> None:
    theirs = json.loads(json.dumps(gdn.upstream_config(config)))
    assert gdn.Config(**gdn.settings_from_upstream(theirs)) == config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "delta_net"}, "model_type='delta_net', but ours has 'gated_deltanet'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval=True, but ours has False"),
        ({"output_gate_activation": "sigmoid"}, "but ours has 'swish' or 'silu' built in"),
        ({"hidden_act": "powlu"}, "hidden_act='powlu'"),
        ({"attn": FLA_ATTN | {"layers": [0, 2]}}, r"layers=\[0, 2\], but ours has \[1, 3\]"),
        ({"attn": FLA_ATTN | {"num_heads": 8}}, "num_heads=8, but ours has 16"),
        ({"attn": FLA_ATTN | {"window_size": None}}, "no window_size"),
        ({"attn": [FLA_ATTN, FLA_ATTN]}, "2 kinds of layers in attn"),
    ],
)
def test_what_ours_does_not_compute_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gdn.settings_from_upstream(FLA | changed)


def test_fla_cannot_generate_with_sliding_layers_here() -> None:
    with pytest.raises(UserError, match="flash-attn"):
        gdn.upstream_generate(SUBJECT_H1.model())


# --- planted faults ------------------------------------------------------------------------------


def recurrence_corrected_first(q, k, v, log_decay, beta, matrix):
    """The correction looks at the memory before it decays."""
    i_k, i_q = k[:, :, 0, :, None], q[:, :, 0, :, None]
    u = beta[..., None] * (v - (matrix * i_k).sum(2)[:, :, None])
    matrix = log_decay[..., None].exp() * matrix + i_k * u
    return (matrix * i_q).sum(2)[:, :, None], matrix


def mask_one_wider(num_queries: int, num_keys: int, window: int, device) -> Tensor:
    distance = torch.arange(num_keys)[num_keys - num_queries :, None] - torch.arange(num_keys)
    return (distance >= 0) & (distance <= window)


def late_convolution(self, x: Tensor, inputs: Tensor):
    """The newest input is not kept: the next call's convolution starts one token too early."""
    q, k, v, new = CONVOLVED(self, x, inputs)
    return q, k, v, torch.cat([inputs[:, -1:], new[:, :-1]], dim=1)


CONVOLVED = gdn.GatedDeltaNet.convolved
FAULTS = [
    (gdn, "recurrent_delta_rule", recurrence_corrected_first),
    (window, "window_mask", mask_one_wider),
    (gdn.GatedDeltaNet, "convolved", late_convolution),
]


@pytest.mark.parametrize(
    ("owner", "name", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_planted_faults_are_found(owner, name: str, fault) -> None:
    check = contract.check_prefill_and_steps_equal_forward
    check(SUBJECT_H1)
    with mock.patch.object(owner, name, fault), pytest.raises(AssertionError, match="differ"):
        check(SUBJECT_H1)


def test_a_reset_that_forgets_to_forget_is_found() -> None:
    class NoReset(gdn.Model):
        def reset(self, state: gdn.State) -> gdn.State:
            return state._replace(num_tokens=0)

    with pytest.raises(AssertionError, match="used state"):
        contract.check_reset_empties_the_state(contract.Subject("", SMALL, NoReset))


# --- names and settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("gdn", "GDN"),
        ("gdn:num_heads=8", "GDN (num_heads=8)"),
        ("gdn:num_heads=6", "GDN"),  # the rule's
        ("gdn:num_heads=6,width=2048", "GDN (width=2048, num_heads=6)"),
        ("gdn:width=2048", "GDN (width=2048)"),
        ("gdn-h1", "GDN-H1"),
        ("gdn-h1:window=2048", "GDN-H1 (window=2048)"),
    ],
)
def test_labels(text: str, label: str) -> None:
    assert make_config(spec.parse(text)).label == label


@pytest.mark.parametrize(
    ("settings", "heads"),
    [({}, 6), ({"width": 2048}, 12), ({"width": 512}, 3), ({"width": 64, "key_width": 16}, 3)],
)
def test_heads_follow_the_width(settings: dict, heads: int) -> None:
    assert gdn.Config(**settings).heads == heads
    assert gdn.Config(**settings, num_heads=2).heads == 2


@pytest.mark.parametrize("text", ["gdn", "gdn-h1", "gdn:width=2048"])
def test_the_small_models_of_quick_have_whole_heads(text: str) -> None:
    small = make_config(spec.tiny(spec.parse(text)))
    assert 4 * small.heads * small.key_width == 3 * small.width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"conv_width": 0}, "conv_width must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ({"width": 100, "num_heads": 2, "hybrid": True}, "width must be a positive multiple of 64"),
        ({"width": 768}, r"width=768 .* key_width=128: .* gives 4.5. Give num_heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn.Config(**settings)
