"""Logits that were computed elsewhere and must come out again, under both RoPE rules.

Two files: tests/fixtures/cat_small.safetensors, made by the oracle (to make it again, see
`make_fixture`), and data/golden/cat_tiny.safetensors of the shared data, made by the published
implementations; the latter is looked for in $CAT_BENCH_SHARED, then beside the repository.
"""

import os
from pathlib import Path

import cat_oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_bench import cat, checkpoint
from cat_bench.errors import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "cat_small.safetensors"
CONFIG = {
    "chunk_size": 3,
    "width": 64,
    "decoder_width": 64,
    "num_layers": 2,
    "compressor_layers": 1,
    "max_len": 18,
    "vocab_size": 40,
}
INTEGER_STEP = 1 / 256  # the fixture stores weights as whole steps in int8: exact, and small

RULES = ["restart", "growing"]


def shared_golden() -> Path:
    beside = Path(__file__).parents[2] / "shared"
    shared = Path(os.environ.get("CAT_BENCH_SHARED", beside))
    return shared / "data" / "golden" / "cat_tiny.safetensors"


def needs_shared() -> dict[str, Tensor]:
    path = shared_golden()
    if not path.is_file():
        pytest.skip(f"no {path.name} in $CAT_BENCH_SHARED or beside the repository")
    return load_file(path)


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith("case.")}


def model_with(weights: dict[str, Tensor], **settings: object) -> cat.Model:
    model = cat.Model(cat.Config(**settings)).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def generated(model: cat.Model, tokens: Tensor, prompt_len: int) -> Tensor:
    """Logits (b, t - prompt_len + 1, v) of prefill and steps."""
    logits, state = model.prefill(tokens[:, :prompt_len], model.init_state(*tokens.shape))
    rows = [logits]
    for token in tokens[:, prompt_len:].unbind(1):
        logits, state = model.step(token, state)
        rows.append(logits)
    return torch.stack(rows, dim=1)


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=0)


# The published implementations' logits; float32 against exact arithmetic differs by 2.4e-5 there.

GOLDEN = {
    "chunk_size": 4,
    "width": 64,
    "decoder_width": 128,
    "num_layers": 2,
    "compressor_layers": 1,
    "max_len": 24,
    "vocab_size": 256,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_published_logits(rule: str, dtype: torch.dtype) -> None:
    case = needs_shared()
    weights = {name: t.to(dtype) for name, t in weights_of(case).items()}
    model, tokens = model_with(weights, rope=rule, **GOLDEN), case["case.input_ids"]
    expected = case[f"case.logits_{rule}"]
    with torch.no_grad():
        assert_near(model(tokens), expected, 5e-5)
        assert_near(generated(model, tokens, 6), expected[:, 5:], 5e-5)
        if rule == "restart":
            assert_near(model(tokens[:, :21]), case["case.logits_restart_first21"], 5e-5)
        summaries = model.compressor(tokens.unflatten(1, (-1, 4)), torch.arange(6))
    assert_near(summaries, case["case.summaries"], 5e-5)


@pytest.mark.parametrize("rule", RULES)
def test_oracle_has_the_published_logits(rule: str) -> None:
    case = needs_shared()
    weights = {name: t.double() for name, t in weights_of(case).items()}
    settings = cat_oracle.Settings(chunk_size=4, rope=rule)
    got = cat_oracle.logits(weights, settings, case["case.input_ids"])
    assert_near(got, case[f"case.logits_{rule}"], 5e-5)


def test_a_file_that_does_not_say_its_rope_rule_is_no_checkpoint() -> None:
    needs_shared()
    with pytest.raises(UserError):
        checkpoint.load(shared_golden())


# Our own fixture


def stored_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """int8 steps -> float64; norm weights are stored as their difference from 1."""
    scaled = {name: t.double() * INTEGER_STEP for name, t in weights_of(tensors).items()}
    return {name: t + ("norm" in name) for name, t in scaled.items()}


def make_fixture() -> dict[str, Tensor]:
    """What the fixture holds: random weights (std 0.12), ids, and the oracle's float64 results.

    To write it again: cd tests && python -c "import test_golden as t; t.write_fixture()"
    """
    generator = torch.Generator().manual_seed(20250)
    shapes = {name: p.shape for name, p in cat.Model(cat.Config(**CONFIG)).state_dict().items()}
    made = {}
    for name, shape in shapes.items():
        steps = torch.randn(shape, generator=generator) * 0.12 / INTEGER_STEP
        made[name] = steps.round().clamp(-127, 127).to(torch.int8)
    made["case.input_ids"] = torch.randint(40, (2, 17), generator=generator)
    return made | oracle_results(made)


def oracle_results(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits under both rules and the summaries of the closed chunks, rounded to float32."""
    weights, tokens = stored_weights(tensors), tensors["case.input_ids"]
    results = {}
    for rule in RULES:
        settings = cat_oracle.Settings(chunk_size=CONFIG["chunk_size"], rope=rule)
        results[f"case.logits_{rule}"] = cat_oracle.logits(weights, settings, tokens).float()
    summaries = torch.stack(cat_oracle.summaries(weights, settings, tokens), dim=1)
    return results | {"case.summaries": summaries.float()}


def write_fixture() -> None:
    save_file(make_fixture(), FIXTURE)


def test_fixture_is_small_and_the_oracle_still_gives_it() -> None:
    assert FIXTURE.stat().st_size < 300_000  # bytes
    stored = load_file(FIXTURE)
    for name, expected in oracle_results(stored).items():
        assert_near(stored[name], expected, 1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_fixture_logits(rule: str) -> None:
    """17 tokens, chunks of 3: five closed chunks and an open one."""
    stored = load_file(FIXTURE)
    model, tokens = (
        model_with(stored_weights(stored), rope=rule, **CONFIG),
        stored["case.input_ids"],
    )
    expected = stored[f"case.logits_{rule}"]
    with torch.no_grad():
        assert_near(model(tokens), expected, 2e-6)  # what float32 keeps of numbers around 10
        for prompt_len in (1, 3, 7):
            got = generated(model, tokens, prompt_len)
            assert_near(got, expected[:, prompt_len - 1 :], 2e-6)
        summaries = model.compressor(tokens[:, :15].unflatten(1, (-1, 3)), torch.arange(5))
    assert_near(summaries, stored["case.summaries"], 2e-6)


def test_fixture_tells_the_rules_apart() -> None:
    stored = load_file(FIXTURE)
    difference = stored["case.logits_restart"] - stored["case.logits_growing"]
    assert difference.abs().max() > 0.3
