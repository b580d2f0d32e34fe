"""Prompts of 2500 tokens on decode path cuda_graph of architectures with windows, and next steps.

Windows of the real sizes, so that a prompt is several of them and no multiple. fla's chunked rule
multiplies float32 in TF32: hence the wider bound of GDN-H1. Forward path `compile` of the sliding
window stands here, too: its blocks of FlexAttention are those of a real window.
"""

from types import ModuleType

import contract
import pytest
import torch
import torch.nn.functional as F

from baselines import based, gated_deltanet, sliding_window
from cat_bench import spec
from cat_bench.architecture import DTYPES

pytestmark = pytest.mark.gpu

PROMPT, NUM_STEPS = 2500, 64
SIZES = {"width": 256, "vocab_size": 257}
SWA = sliding_window.Config(num_layers=3, window=512, **SIZES)
H1 = gated_deltanet.Config(num_layers=4, num_heads=2, hybrid=True, window=512, **SIZES)
SUBJECTS = [  # bounds: float32, bfloat16
    (sliding_window, SWA, (1e-4, 1e-2)),
    (sliding_window, sliding_window.Config(num_layers=2, num_kv_heads=2, **SIZES), (1e-4, 1e-2)),
    (gated_deltanet, H1, (5e-3, 3e-2)),
    (based, based.Config(pattern="clscl", num_heads=4, **SIZES), (1e-4, 2e-2)),
]  # fmt: skip
LABELS = ["sliding", "sliding-gqa", "gdn-h1", "based"]


def made(module: ModuleType, config: object, dtype: str, **paths: str) -> torch.nn.Module:
    """A model with the same weights at every call, as large as after training."""
    torch.manual_seed(0)
    model = contract.randomise(module.Model(config, **paths), std=0.03)
    return model.to("cuda", DTYPES[dtype]).eval()


def random_tokens(batch_size: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(257, (batch_size, num_tokens), generator=generator).cuda()


@pytest.mark.parametrize(("module", "config", "bounds"), SUBJECTS, ids=LABELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("segments", [(PROMPT,), (600, 1900)], ids=["whole", "in two"])
def test_prompts_and_the_next_steps_equal_eager(
    module: ModuleType,
    config: object,
    bounds: tuple[float, float],
    dtype: str,
    segments: tuple[int, ...],
) -> None:
    (info,) = (x for x in spec.architectures() if f"baselines.{x.name}" == module.__name__)
    if lacking := info.lacking("decode", "cuda_graph"):
        pytest.skip(f"needs {' and '.join(lacking)}")
    tokens = random_tokens(2, PROMPT + NUM_STEPS)
    got, expected = (
        contract.decode(made(module, config, dtype, decode_path=path), tokens, segments)[0]
        for path in ("cuda_graph", "eager")
    )
    assert got.shape[1] == NUM_STEPS + 1  # the prompt's own logits first
    bound = bounds[dtype == "bfloat16"]
    assert contract.relative_norm(got[:, 0], expected[:, 0]) < bound
    assert contract.relative_norm(got[:, 1:], expected[:, 1:]) < bound


@pytest.mark.parametrize("num_tokens", [1024, 2500])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_windows_and_their_gradients_equal_eager(dtype: str, num_tokens: int) -> None:
    """Bounds of test_fast_paths.py. 2500 is no multiple of a tile of 128."""
    torch.compiler.reset()
    bound, of_gradients = (1e-2, 9e-2) if dtype == "bfloat16" else (1e-5, 3e-4)
    models = [made(sliding_window, SWA, dtype, forward_path=path) for path in ("compile", "eager")]
    tokens = random_tokens(2, num_tokens)
    outputs = [model.forward(tokens) for model in models]
    assert contract.relative_norm(*outputs) < bound
    for logits in outputs:
        F.cross_entropy(logits.float().mT, tokens.roll(-1, 1)).backward()
    for (name, got), expected in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        error = contract.relative_norm(got.grad, expected.grad)
        assert error < of_gradients, f"gradient of {name}: {error:.1e}"
