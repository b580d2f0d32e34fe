"""CAT against its published layout, and one test for each pitfall of cat_spec.md 8 that applies.

Left to others: the general contract (test_contract.py), recompiles (14), adaptive chunk sizes (19)
and recall metrics (20).
"""

import dataclasses
from pathlib import Path

import cat_oracle
import contract
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cat_bench import cat, checkpoint, mask, spec
from cat_bench.errors import UserError

TINY = {"width": 64, "num_layers": 2, "vocab_size": 61, "max_len": 48, "compressor_layers": 1}
TOLERANCE = 1e-12


def make(**settings: object) -> cat.Model:
    """A tiny CAT in float64 with large random weights."""
    model = cat.Model(cat.Config(**(TINY | {"chunk_size": 3} | settings))).double().eval()
    return contract.randomise(model)


def oracle_settings(config: cat.Config) -> cat_oracle.Settings:
    names = cat_oracle.Settings._fields
    return cat_oracle.Settings(**{name: getattr(config, name) for name in names})


def oracle(model: cat.Model, tokens: Tensor) -> Tensor:
    return cat_oracle.logits(model.state_dict(), oracle_settings(model.config), tokens)


def random_tokens(batch_size: int, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (batch_size, num_tokens), generator=generator)


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    contract.assert_same(got, expected, what, TOLERANCE)


# Against the published layout


@pytest.mark.parametrize("rope", ["restart", "growing"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_forward_equals_published_layout_at_every_length(chunk_size: int, rope: str) -> None:
    """Pitfalls 3 to 6: gather, positions, dummy (T < C, T = C), chunk index; open last chunk."""
    model, tokens = make(chunk_size=chunk_size, rope=rope), random_tokens(2, 3 * chunk_size + 2)
    expected = oracle(model, tokens)
    for length in range(1, tokens.shape[1] + 1):
        assert_same(
            contract.forward(model, tokens[:, :length]), expected[:, :length], f"T={length}"
        )


@pytest.mark.parametrize(
    "settings",
    [{"qk_norm": True}, {"decoder_width": 64}, {"decoder_width": 256, "num_kv_heads": 2}]
    + [{"compressor_layers": 3, "num_layers": 1}, {"rope_base": 100.0, "norm_eps": 0.1}],
    ids=str,
)
def test_settings_equal_published_layout(settings: dict[str, object]) -> None:
    model, tokens = make(**settings), random_tokens(2, 11)
    assert_same(contract.forward(model, tokens), oracle(model, tokens))


def test_oracle_has_the_published_number_of_rows() -> None:
    for num_chunks, size in [(1, 1), (3, 4), (5, 3)]:
        rows = cat_oracle.layout(num_chunks * size, size)
        assert len(rows) == num_chunks * size + num_chunks + 1
        published = mask.published_allowed(num_chunks * size, size)
        assert published.shape == (len(rows), len(rows))
        for query, key in np.ndindex(published.shape):
            assert published[query, key] == cat_oracle.sees(rows, query, key)


def test_useful_pairs_are_those_of_the_specification() -> None:
    """cat_spec.md 3, N=1024, C=8."""
    assert mask.allowed(1025, 8).sum() == 69_761
    assert mask.published_allowed(1024, 8).sum() == 79_041


# Pitfalls of cat_spec.md 8


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_01_no_token_leaks_into_its_own_chunk(chunk_size: int) -> None:
    """Logits up to t stay identical, bit for bit, when the tokens after t are replaced."""
    model, tokens = make(chunk_size=chunk_size), random_tokens(1, 14)
    expected = contract.forward(model, tokens)
    for t in range(13):
        changed = tokens.clone()
        changed[:, t + 1 :] = (tokens[:, t + 1 :] + 1) % TINY["vocab_size"]
        got = contract.forward(model, changed)
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert ((got - expected)[:, t + 1 :].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_02_mask_against_sets(size: int) -> None:
    """Row (i, j) sees slots 0..i and its own chunk's rows up to itself, and nothing else."""
    allowed = mask.allowed(5 * size + 2, size)
    for row in range(len(allowed)):
        chunk, offset = divmod(row, size)
        slots = {i * size for i in range(chunk + 1)}
        own = {chunk * size + j for j in range(1, offset + 1)}
        assert set(np.flatnonzero(allowed[row])) == slots | own


def test_03_an_overfitted_sequence_is_generated_across_chunk_boundaries() -> None:
    torch.manual_seed(0)
    model = cat.Model(cat.Config(**(TINY | {"chunk_size": 3, "decoder_width": 64})))
    tokens = random_tokens(1, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    state = model.init_state(1, 16)
    with torch.no_grad():
        logits, state = model.prefill(tokens[:, :2], state)
        generated = [logits.argmax(-1)]
        for _ in range(13):
            logits, state = model.step(generated[-1], state)
            generated.append(logits.argmax(-1))
    assert torch.stack(generated, 1).tolist() == tokens[:, 2:].tolist()


def test_04_a_checkpoint_keeps_its_rope_rule(tmp_path: Path) -> None:
    tokens = random_tokens(2, 11)
    for rule in ("restart", "growing"):
        model = make(rope=rule)
        settings = ",".join(f"{key}={value}" for key, value in TINY.items())
        checkpoint.save(tmp_path / rule, spec.parse(f"cat:rope={rule},{settings}"), model)
        loaded = checkpoint.load(tmp_path / rule, dtype="float64")
        assert loaded.config == model.config
        assert_same(contract.forward(loaded, tokens), contract.forward(model, tokens))


def test_04_a_checkpoint_without_its_rope_rule_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, spec.parse("cat"), make())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope": "restart",', ""))
    with pytest.raises(UserError, match="rope"):
        checkpoint.load(tmp_path)


def test_04_the_two_rope_rules_differ_by_much() -> None:
    tokens, restart, growing = random_tokens(2, 11), make(), make(rope="growing")
    assert restart.state_dict().keys() == growing.state_dict().keys()
    difference = contract.forward(restart, tokens) - contract.forward(growing, tokens)
    assert difference.abs().max() > 0.3


def test_06_summaries_depend_on_chunk_number_and_order() -> None:
    model, chunk = make(), random_tokens(1, 3)
    twice = model.compressor(torch.stack([chunk, chunk], dim=1), torch.arange(2))  # (1, 2, D)
    assert (twice[:, 0] - twice[:, 1]).abs().max() > 0.1
    tokens = random_tokens(1, 9)
    swapped = torch.cat([tokens[:, 3:6], tokens[:, :3], tokens[:, 6:]], dim=1)
    moved = contract.forward(model, tokens)[:, -1] - contract.forward(model, swapped)[:, -1]
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("rope", ["restart", "growing"])
def test_07_stale_cache_rows_are_never_read(rope: str) -> None:
    """A cache full of NaN serves as well as an empty one; the ragged path masks, so it gets 1e4."""
    model, tokens = make(rope=rope), random_tokens(2, 14)
    state = model.init_state(2, 14)
    state.keys.fill_(torch.nan), state.values.fill_(torch.nan)
    got, _ = contract.decode(model, tokens, [5], state)
    assert_same(got, oracle(model, tokens)[:, 4:])
    lengths = torch.tensor([2, 6])
    state = model.init_state(2, 14)
    state.keys.fill_(1e4), state.values.fill_(1e4)
    with torch.no_grad():
        logits, state = model.prefill(tokens[:, :6], state, lengths=lengths)
        logits, state = model.step(tokens[[0, 1], lengths], state)
    assert_same(logits, oracle(model, tokens)[[0, 1], lengths])


def test_07_a_used_cache_serves_a_shorter_sequence() -> None:
    model, tokens = make(), random_tokens(2, 14)
    _, state = contract.decode(model, random_tokens(2, 14, seed=5), [14])
    got, _ = contract.decode(model, tokens[:, :8], [1], model.reset(state))
    assert_same(got, oracle(model, tokens[:, :8]))


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("rope", ["restart", "growing"])
def test_08_prompts_of_any_length(chunk_size: int, rope: str) -> None:
    model, tokens = make(chunk_size=chunk_size, rope=rope), random_tokens(2, 4 * chunk_size + 2)
    expected = oracle(model, tokens)
    for prompt_len in range(1, 3 * chunk_size + 2):
        end = prompt_len + chunk_size + 1
        got, _ = contract.decode(model, tokens[:, :end], [prompt_len])
        assert_same(got, expected[:, prompt_len - 1 : end], f"prompt of {prompt_len}")


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("rope", ["restart", "growing"])
def test_09_ragged_batches(chunk_size: int, rope: str) -> None:
    """Every phase side by side, and more padding than the longest prompt needs (pitfall 10)."""
    model, tokens = make(chunk_size=chunk_size, rope=rope), random_tokens(6, 18)
    lengths = torch.tensor([1, 2, 3, 4, 7, 9])
    padded = torch.full((6, 13), 7)
    for row, length in enumerate(lengths):
        padded[row, :length] = tokens[row, :length]
    got = contract.ragged_decode(model, tokens, padded, lengths, num_steps=9)
    positions = lengths[:, None] - 1 + torch.arange(10)
    assert_same(got, oracle(model, tokens)[torch.arange(6)[:, None], positions])


def test_10_padding_changes_no_earlier_logits() -> None:
    model, tokens = make(), random_tokens(2, 10)
    expected = contract.forward(model, tokens)
    for bucket in (11, 12, 16, 24):
        for pad in (0, 60):
            padded = functional.pad(tokens, (0, bucket - 10), value=pad)
            assert_same(contract.forward(model, padded)[:, :10], expected, f"{bucket} tokens")


def test_11_beyond_the_chunk_positions_is_refused() -> None:
    model, tokens = make(max_len=12), random_tokens(1, 15)
    contract.assert_refused(lambda: model.forward(tokens), "15 tokens, forward")
    contract.assert_refused(lambda: model.init_state(1, 15), "15 tokens, state")
    contract.assert_refused(lambda: model.prefill(tokens, model.init_state(1, 12)), "prefill")
    _, state = contract.decode(model, tokens[:, :14], [12], model.init_state(1, 12))
    contract.assert_refused(lambda: model.step(tokens[:, 14], state), "one step too many")


def test_12_row_t_predicts_token_t_plus_one() -> None:
    """The model shifts nothing: row t moves with token t, so labels are shifted once, outside."""
    model, tokens = make(), random_tokens(1, 9)
    expected = contract.forward(model, tokens)
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % TINY["vocab_size"]
        moved = (contract.forward(model, changed) - expected).abs().amax((0, 2))
        assert (moved[:t] == 0).all() and moved[t] > 1e-6


def test_13_folded_chunks_equal_a_loop_over_chunks() -> None:
    model, tokens = make(chunk_size=4), random_tokens(3, 20)
    folded = model.compressor(tokens.unflatten(1, (-1, 4)), torch.arange(5))
    alone = cat_oracle.summaries(model.state_dict(), oracle_settings(model.config), tokens)
    assert_same(folded, torch.stack(alone, dim=1))


def test_15_bfloat16_by_relative_norm() -> None:
    tokens = random_tokens(2, 14)
    model = contract.randomise(make(), std=0.03)
    expected = contract.forward(model, tokens)
    assert contract.relative_norm(contract.forward(model.bfloat16(), tokens), expected) < 1e-2


@pytest.mark.parametrize(("chunk_size", "num_tokens"), [(1, 3), (3, 2), (3, 3), (3, 7)])
def test_16_gradients_by_finite_differences(chunk_size: int, num_tokens: int) -> None:
    """Through the dummy and the chunk positions: row 0, C=1, K=0 and K=1 included."""
    model, tokens = make(chunk_size=chunk_size, max_len=9), random_tokens(1, num_tokens)
    names = ["decoder.dummy"] + ["compressor.positions.weight"] * (num_tokens >= chunk_size)
    inputs = tuple(model.get_parameter(name).detach().requires_grad_() for name in names)

    def logits(*values: Tensor) -> Tensor:
        replaced = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, replaced, (tokens,))

    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_17_and_18_state_is_slots_and_one_chunk(chunk_size: int) -> None:
    """2 layers x key and value x (K + C) rows x D_d, and the ids of the open chunk."""
    model = make(chunk_size=chunk_size)
    state = model.init_state(3, 24)
    elements = 2 * 2 * 3 * (24 // chunk_size + chunk_size) * model.config.width_d
    assert state.keys.numel() + state.values.numel() == elements
    assert model.state_bytes_float(3, 24) == elements * 8
    assert model.state_bytes(3, 24) == sum(contract.storages(state).values())


# Initialisation, cost of a prompt, layout of the parameters


def test_initial_weights() -> None:
    """cat_spec.md 1.5: std sqrt(2 / 5d), into the residual 1 / (sqrt(d) L), norms 1."""
    torch.manual_seed(0)
    config = cat.Config(width=256, num_layers=4, vocab_size=512, max_len=4096)
    for name, weight in cat.Model(config).named_parameters():
        inside = name.startswith("compressor")
        width, layers = (256, 2) if inside else (512, 4)
        expected = (2 / (5 * width)) ** 0.5
        if name.endswith(("attn_out.weight", "w2.weight")):
            expected = 1 / (width**0.5 * layers)
        if "norm" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize(("chunk_size", "std"), [(4, 1.26), (8, 1.79), (16, 2.53)])
def test_initial_summaries(chunk_size: int, std: float) -> None:
    torch.manual_seed(0)
    config = cat.Config(chunk_size=chunk_size, width=256, num_layers=2, vocab_size=64)
    chunks = random_tokens(4, 8 * chunk_size).unflatten(1, (8, chunk_size))
    summaries = cat.Model(config).compressor(chunks, torch.arange(8))
    assert summaries.std().item() == pytest.approx(std, rel=0.05)


def test_a_prompt_enters_the_decoder_as_slots_and_tail() -> None:
    """1 + P // C + P mod C decoder rows: 15 for a prompt of 47 tokens with chunks of 4."""
    model, rows = make(chunk_size=4), []
    hook = model.decoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[1])
    )
    contract.decode(model, random_tokens(1, 48), [47])
    hook.remove()
    assert rows == [1 + 11 + 3, 1]  # the prompt, then one row per token


def test_embeddings_and_head_are_untied() -> None:
    model = make(decoder_width=64)
    tables = model.compressor.embed, model.decoder.embed, model.decoder.head
    assert len({table.weight.data_ptr() for table in tables}) == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"chunk_size": 0}, "chunk_size .* got 0"),
        ({"chunk_size": 64}, "max_len=48, got 64"),
        ({"width": 100}, "multiple of 64"),
        ({"num_kv_heads": 3}, "num_kv_heads .* got 3"),
        ({"num_layers": 0}, "layers must be at least 1"),
        ({"rope": "shrinking"}, "got 'shrinking'"),
    ],
)
def test_a_config_that_cannot_work_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cat.Config(**(TINY | settings))


def test_labels() -> None:
    assert cat.Config().label == "CAT-8"
    assert dataclasses.replace(cat.Config(), chunk_size=16).label == "CAT-16"


@pytest.mark.parametrize("field", ["compressor_layers", "decoder_width", "num_layers"])
def test_an_explicit_zero_is_refused_and_no_default(field: str) -> None:
    with pytest.raises(ValueError, match="got"):
        cat.Config(**{field: 0})


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ({}, "CAT-8"),
        ({"chunk_size": 16, "max_len": 4096}, "CAT-16"),
        ({"compressor_layers": 3}, "CAT-8-q"),
        ({"decoder_width": 1024}, "CAT-1x-8"),
        ({"rope": "growing"}, "CAT-8 (rope=growing)"),
        ({"num_layers": 8}, "CAT-8 (num_layers=8)"),
        ({"width": 768}, "CAT-8 (width=768)"),
    ],
)
def test_a_label_hides_no_setting(overrides: dict, label: str) -> None:
    assert cat.Config(**overrides).label == label


@torch.no_grad()
def test_any_id_pads_a_ragged_batch_also_one_outside_the_vocabulary() -> None:
    config = cat.Config(chunk_size=3, width=64, num_layers=1, vocab_size=31, max_len=24)
    model = cat.Model(config)
    tokens = torch.randint(31, (2, 11))
    lengths = torch.tensor([4, 11])
    expected, _ = model.prefill(tokens, model.init_state(2, 24), lengths)
    tokens[0, 4:] = -100
    got, _ = model.prefill(tokens, model.init_state(2, 24), lengths)
    assert torch.equal(got, expected)
