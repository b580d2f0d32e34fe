"""BASED's fast paths at real sizes: 16 features, heads of 64, window 128, rings that wrap.

The generic checks on tiny configurations are in test_fast_paths.py; the eager path is the
specification here too. float32 without TF32, so that only the order of sums differs.
"""

import contextlib
import importlib.util

import contract
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import based
from cat_bench import recurrent_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch.compile in float32
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
STD = 0.03  # as after training: larger weights amplify the rounding of one layer in the next
needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="forward path upstream needs the package fla"
)


def make(dtype: str, window_cache: str = "window", **paths: str) -> based.Model:
    config = based.Config(
        width=256, num_heads=4, pattern="clsclsc", vocab_size=512, window_cache=window_cache
    )
    model = based.Model(config, **paths).double()
    return contract.randomise(model, STD).to("cuda", DTYPES[dtype]).eval()


def random_tokens(batch_size: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(512, (batch_size, num_tokens), generator=generator).cuda()


# The kernel alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch_size", "num_heads", "feature_dim", "width"),
    [(1, 16, 16, 64), (512, 16, 16, 64), (3, 2, 4, 32), (2, 3, 24, 20), (2, 1, 16, 768)],
)
def test_taylor_step_equals_its_reference(
    batch_size: int, num_heads: int, feature_dim: int, width: int, dtype: torch.dtype
) -> None:
    from cat_bench import recurrent_kernels

    b, h, f, e = batch_size, num_heads, feature_dim, width
    shape = (b, h, 1 + f + f * f)
    got, expected = (
        [torch.zeros(*shape, e, device="cuda"), torch.zeros(shape, device="cuda")] for _ in "ab"
    )
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(5):
        packed = torch.randn(b, h * (2 * f + e), generator=generator, device="cuda").to(dtype)
        q, k, v = packed.split([h * f, h * f, h * e], dim=-1)  # strided, as in the step
        y, y_ref = (
            recurrent_kernels.taylor_step(q, k, v, *got),
            recurrent_steps.taylor_step_reference(q, k, v, *expected),
        )
        assert contract.relative_norm(y, y_ref) < (1e-5 if dtype == torch.float32 else 5e-3)
    for buffer, reference in zip(got, expected, strict=True):
        assert contract.relative_norm(buffer, reference) < 1e-6


# Decode path cuda_graph


@pytest.mark.parametrize("window_cache", ["window", "max_len"])
@pytest.mark.parametrize(
    ("batch_size", "prompt_len", "num_steps"),
    [(3, 1, 64), (3, 5, 300), (40, 200, 64), (1, 2000, 8)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_equal_eager(
    window_cache: str, batch_size: int, prompt_len: int, num_steps: int, dtype: str
) -> None:
    tokens = random_tokens(batch_size, prompt_len + num_steps)
    (got, state), (expected, eager) = (
        contract.decode(make(dtype, window_cache, decode_path=path), tokens, [prompt_len])
        for path in ("cuda_graph", "eager")
    )
    if dtype == "float32":
        contract.assert_same(got, expected, "steps", 1e-4)
        for name in ("sums", "norms", "conv"):
            assert contract.relative_norm(getattr(state, name), getattr(eager, name)) < 1e-4, name
    else:
        assert contract.relative_norm(got, expected) < 2e-2


def test_an_empty_state_holds_no_trace_of_the_capture() -> None:
    state = make("float32", decode_path="cuda_graph").init_state(2, 300)
    assert not any(buffer.any() for buffer in (state.sums, state.norms, state.conv))


def test_prompts_between_steps_and_a_reset() -> None:
    """The graph keeps reading the same buffers after prompts, steps and a reset."""
    model, tokens = make("float32", decode_path="cuda_graph"), random_tokens(3, 300)
    _, state = contract.decode(model, tokens[:, :150].flip(1), [7], model.init_state(3, 300))
    with torch.no_grad():
        expected = make("float32").forward(tokens)
        _, state = model.prefill(tokens[:, :100], model.reset(state))
        for token in tokens[:, 100:140].T:
            _, state = model.step(token, state)
        _, state = model.prefill(tokens[:, 140:290], state)
        for token in tokens[:, 290:].T:
            logits, state = model.step(token, state)
    contract.assert_same(logits, expected[:, -1], "prompt, steps, prompt, steps", 1e-4)
    with pytest.raises(ValueError, match="the state holds 300 tokens; token 301 was given"):
        model.step(tokens[:, 0], state)


# Forward path upstream


@needs_fla
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_forward_and_all_gradients_equal_eager(num_tokens: int, dtype: str) -> None:
    torch.compiler.reset()  # every case compiles anew, none reaches the limit of recompilations
    tokens = random_tokens(2, num_tokens)
    targets, models = tokens.roll(-1, 1), [make(dtype, forward_path="upstream"), make(dtype)]
    logits = []
    for model in models:
        with mixed_precision(dtype):
            logits.append(model.forward(tokens))
        F.cross_entropy(logits[-1].float().mT, targets).backward()
    bound = 1e-4 if dtype == "float32" else 2e-2
    assert contract.relative_norm(*logits) < bound
    for (name, got), expected in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        error = contract.relative_norm(got.grad, expected.grad)
        assert error < 5 * bound, f"gradient of {name}: {error:.1e}"


def mixed_precision(dtype: str) -> contextlib.AbstractContextManager:
    if dtype == "autocast":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@needs_fla
def test_scoring_without_gradients_equals_eager() -> None:
    torch.compiler.reset()
    tokens = random_tokens(3, 300)
    with torch.inference_mode():
        got, expected = (
            make("bfloat16", forward_path=path).forward(tokens) for path in ("upstream", "eager")
        )
    assert contract.relative_norm(got, expected) < 2e-2
