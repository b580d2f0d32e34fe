"""Every fast decode path equals the eager path, which is the specification (contract test 11).

Paths are found like architectures: what `Model.decode_paths` names beyond "eager". Small models of
several layers, heads and chunks; float32 without TF32, so that only the order of sums differs.
"""

import dataclasses
import importlib.util

import contract
import pytest
import torch
from contract import Subject
from torch import Tensor

from baselines import sparse
from cat_bench import products, spec
from cat_bench.architecture import Architecture, build
from cat_bench.graph import CapturedStep
from cat_bench.spec import parse

pytestmark = pytest.mark.gpu

STD = 0.03  # as after training: larger weights amplify the rounding of one layer in the next
NUM_STEPS = 64
CACHED = (
    "cat",
    "dense",
    "sparse",
    "sliding_window",
)  # their state is rows that counters make valid, so it may hold anything


def fast_subjects(kind: str = "decode") -> list:
    """(subject, path) for every tiny variant with room for prompt and steps."""
    found = []
    for info in spec.architectures():
        for path in getattr(info, f"{kind}_paths")[1:]:
            packages = info.lacking(kind, path)
            reason = f"{info.name} needs {' and '.join(packages)} for {kind} path {path}"
            lacking = pytest.mark.skipif(bool(packages), reason=reason)
            for subject in contract.subjects_of(info.name):
                label = f"{subject.label}-{path}"
                found.append(pytest.param(longer(subject), path, marks=lacking, id=label))
    return found


def longer(subject: Subject, max_len: int = 576) -> Subject:
    """The same with room for `max_len` tokens, where a Config limits them."""
    if not hasattr(subject.config, "max_len"):
        return subject
    return dataclasses.replace(subject, config=dataclasses.replace(subject.config, max_len=max_len))


def pair(
    subject: Subject, path: str, dtype: str, kind: str = "decode"
) -> tuple[Architecture, Architecture]:
    """The eager and the fast model, with equal weights."""
    if kind == "forward":  # the compiler takes few sizes of one block before it refuses
        torch.compiler.reset()
    return tuple(
        subject.model(dtype, device="cuda", std=STD, **{f"{kind}_path": way})
        for way in ("eager", path)
    )


def decoded(model: Architecture, tokens: Tensor, prompt_len: int) -> Tensor:
    return contract.decode(model, tokens, [prompt_len])[0]


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
@pytest.mark.parametrize(("batch_size", "prompt_len"), [(1, 5), (3, 1), (3, 5), (3, 12), (40, 3)])
def test_float32_equals_eager(
    subject: Subject, path: str, batch_size: int, prompt_len: int
) -> None:
    """One sequence (kernels of its own), few and many, prompts on and off a boundary. Tiny models
    take few of the tiles of cached attention: test_decode_attention.py takes them all.
    """
    eager, fast = pair(subject, path, "float32")
    tokens = subject.tokens(batch_size, prompt_len + NUM_STEPS).cuda()
    expected = decoded(eager, tokens, prompt_len)
    contract.assert_same(decoded(fast, tokens, prompt_len), expected, path, 1e-5)
    with torch.no_grad():
        whole = expected[:, -1], eager.forward(tokens)[:, -1]
    contract.assert_same(*whole, "eager steps against forward", 1e-5)


@pytest.mark.parametrize(("subject", "path"), fast_subjects("forward"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradients_equal_eager(subject: Subject, path: str, dtype: str) -> None:
    """Upstream's kernels multiply float32 in TF32 inside: hence its wider bounds.

    Outputs in bfloat16 are held to eager ones in float32, of the same weights: eager ones in
    bfloat16 are themselves up to 0.92e-2 away from those, so two of them up to 1.3e-2 apart.
    """
    eager, fast = pair(subject, path, dtype, "forward")
    exact = subject.model("float32", device="cuda", std=STD)
    exact.load_state_dict({name: value.float() for name, value in eager.state_dict().items()})
    bounds = {"compile": (1e-5, 1e-2), "upstream": (5e-3, 3e-2)}[path]
    bound = bounds[dtype == "bfloat16"]
    of_gradients = max(3 * bound, 9e-2 if dtype == "bfloat16" else 3e-4)
    for num_tokens in (64, 37):
        tokens = subject.tokens(3, num_tokens).cuda()
        outputs = [model.forward(tokens) for model in (fast, eager)]
        assert contract.relative_norm(outputs[0], exact.forward(tokens)) < bound
        assert contract.relative_norm(*outputs) < 1.5 * bound
        for model, logits in zip((fast, eager), outputs, strict=True):
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits.float().mT, tokens.roll(-1, 1)).backward()
        for (name, got), expected in zip(fast.named_parameters(), eager.parameters(), strict=True):
            if not expected.grad.any():  # CAT's token embeddings, where every chunk is one token
                assert not got.grad.any(), name
                continue
            error = contract.relative_norm(got.grad, expected.grad)
            assert error < of_gradients, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize(("subject", "path"), fast_subjects("forward"))
def test_checkpointing_keeps_the_gradients(subject: Subject, path: str) -> None:
    """The same kernels on the same inputs, once more in the backward pass."""
    torch.compiler.reset()  # the compiler takes few sizes of one block before it refuses
    model = subject.model("float32", device="cuda", std=STD, forward_path=path)
    tokens = subject.tokens(3, 64).cuda()
    found = []
    for checkpointed in (False, True):
        model.checkpoint_blocks = checkpointed
        model.zero_grad()
        model.forward(tokens).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert model.num_checkpointed >= subject.config.num_layers
    for got, expected in zip(*found, strict=True):
        assert contract.relative_norm(got, expected) < 1e-5 or not expected.any()


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
def test_bfloat16_by_relative_norm(subject: Subject, path: str) -> None:
    """Against eager, and against exact arithmetic on the same weights. Rounding of its own takes
    eager itself away from that, with one key head by 9e-3: two right paths lie further apart there.
    """
    eager, fast = pair(subject, path, "bfloat16")
    exact = subject.model("float64", device="cuda", std=STD)
    exact.load_state_dict(eager.state_dict())
    tokens = subject.tokens(3, NUM_STEPS).cuda()
    got, expected, true = (decoded(model, tokens, 5) for model in (fast, eager, exact))
    assert contract.relative_norm(got, true) < 1e-2
    few_heads = getattr(subject.config, "num_kv_heads", None) == 1
    assert contract.relative_norm(got, expected) < (1.5e-2 if few_heads else 1e-2)


@torch.no_grad()
def test_a_large_batch_in_bfloat16_equals_eager() -> None:
    """The products of hundreds of rows are for full width, in bfloat16, from 224 sequences on."""
    arch = "cat:chunk_size=8,compressor_layers=1,max_len=64,num_layers=2"
    eager, fast = (
        build(parse(arch), path, "cuda", "bfloat16", seed=0) for path in ("eager", "cuda_graph")
    )
    exact = build(parse(arch), "eager", "cuda", "float32", seed=0)
    for model in (fast, exact):
        model.load_state_dict(eager.state_dict())
    x, block = eager.decoder.embed.weight[:256], fast.decoder.blocks[0]
    gate_up = torch.cat([block.w1.weight, block.w3.weight])
    if products.num_processors(x.device):
        assert products.takes_many(x.contiguous(), block.mlp_norm.weight, gate_up, swiglu=True)
        assert products.takes_many(
            x.contiguous(), fast.decoder.norm.weight, fast.decoder.head.weight
        )
    tokens = torch.randint(0, 50_000, (256, 34), device="cuda")
    got, expected, true = (decoded(model, tokens, 10) for model in (fast, eager, exact))
    assert contract.relative_norm(got, true) < 1.2 * contract.relative_norm(expected, true)
    assert contract.relative_norm(got, expected) < 1.5e-2  # eager itself is 1e-2 from exact


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
def test_greedy_tokens_are_equal(subject: Subject, path: str) -> None:
    """512 tokens in float32: one wrong row anywhere sends the text elsewhere."""
    eager, fast = pair(subject, path, "float32")
    prompt = subject.tokens(2, 8).cuda()
    assert torch.equal(greedy(fast, prompt, 512), greedy(eager, prompt, 512))


@torch.no_grad()
def greedy(model: Architecture, prompt: Tensor, num_tokens: int) -> Tensor:
    state = model.init_state(len(prompt), prompt.shape[1] + num_tokens)
    logits, state = model.prefill(prompt, state)
    tokens = [logits.argmax(-1)]
    for _ in range(num_tokens - 1):
        logits, state = model.step(tokens[-1], state)
        tokens.append(logits.argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
def test_a_state_is_reused_after_reset(subject: Subject, path: str) -> None:
    """Captured graphs belong to the buffers: a second, shorter sequence must run on them too."""
    eager, fast = pair(subject, path, "float32")
    tokens = subject.tokens(3, NUM_STEPS).cuda()
    _, state = contract.decode(fast, subject.tokens(3, NUM_STEPS, seed=4).cuda(), [7])
    got, _ = contract.decode(fast, tokens[:, :40], [3], fast.reset(state))
    contract.assert_same(got, decoded(eager, tokens[:, :40], 3), path, 1e-5)


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
def test_two_states_do_not_disturb_each_other(subject: Subject, path: str) -> None:
    eager, fast = pair(subject, path, "float32")
    one, two = (subject.tokens(2, 40, seed=seed).cuda() for seed in (1, 4))
    expected = decoded(eager, one, 5)[:, -1]
    first, second = fast.init_state(2, 40), fast.init_state(2, 40)
    with torch.no_grad():
        _, first = fast.prefill(one[:, :5], first)
        _, second = fast.prefill(two[:, :4], second)
        for position in range(5, 40):
            logits, first = fast.step(one[:, position], first)
            last = logits.clone()
            _, second = fast.step(two[:, position - 1], second)
    contract.assert_same(last, expected, "one of two states", 1e-5)


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_rows_past_the_counters_are_never_read(subject: Subject, path: str, poison: float) -> None:
    if subject.label.split("[")[0] not in CACHED:
        pytest.skip("a recurrent state has no rows past a counter")
    eager, fast = pair(subject, path, "float32")
    tokens = subject.tokens(2, NUM_STEPS).cuda()
    state = fast.init_state(*tokens.shape)
    state.keys.fill_(poison)
    state.values.fill_(poison)
    got, _ = contract.decode(fast, tokens, [5], state)
    contract.assert_same(got, decoded(eager, tokens, 5), f"a cache full of {poison}", 1e-5)


@pytest.mark.parametrize(("subject", "path"), fast_subjects())
def test_ragged_batches_equal_rows_alone(subject: Subject, path: str) -> None:
    if not subject.label.startswith("cat"):
        pytest.skip("prefill takes no lengths")
    eager, fast = pair(subject, path, "float32")
    lengths = torch.tensor([1, 2, 3, 4, 7, 12], device="cuda")
    tokens = subject.tokens(6, 50).cuda()
    padded = tokens[:, :12].clone()
    padded[torch.arange(12, device="cuda") >= lengths[:, None]] = 0
    got = contract.ragged_decode(fast, tokens, padded, lengths, num_steps=36)
    positions = lengths[:, None] - 1 + torch.arange(37, device="cuda")
    with torch.no_grad():
        alone = eager.forward(tokens)[torch.arange(6, device="cuda")[:, None], positions]
    contract.assert_same(got, alone, "ragged rows", 1e-5)


def test_rms_norm_of_more_numbers_than_32_bits_address() -> None:
    """The rows of a prompt of 64 x 32,769 tokens; 9 GB."""
    kernels = pytest.importorskip("cat_bench.kernels", reason="needs the package triton")
    x = torch.ones(2**21 + 64, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1, 0] = 2.0
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    got = kernels.rms_norm(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x[-2:], (1024,), weight, 1e-5)
    torch.testing.assert_close(got[-2:], expected)


@pytest.mark.parametrize("stride", [8, 129])
def test_long_prompts_of_strided_attention(stride: int) -> None:
    """A first prompt (on the kernels up to a stride of 128), a second one and steps."""
    pytest.importorskip("triton")
    config = sparse.Config(stride=stride, width=128, num_layers=2, vocab_size=97, num_kv_heads=1)
    subject = Subject(f"sparse[stride={stride}]", config, sparse.Model)
    eager, fast = pair(subject, "cuda_graph", "float32")
    tokens = subject.tokens(2, 1050).cuda()
    got, expected = (contract.decode(model, tokens, [777, 200])[0] for model in (fast, eager))
    contract.assert_same(got, expected, "after a long prompt", 1e-5)


def test_triton_is_there() -> None:
    """Without it every test above is skipped, and a GPU run would prove nothing."""
    assert importlib.util.find_spec("triton") is not None


def test_a_second_graph_needs_no_second_workspace_of_cublas() -> None:
    device = torch.device("cuda", 0)
    x, weight = (torch.ones(256, 256, device=device) for _ in range(2))

    def capture() -> CapturedStep:
        return CapturedStep(lambda token, row: x @ weight, 1, device)

    first, before = capture(), torch.cuda.memory_allocated()
    second = capture()
    assert torch.cuda.memory_allocated() - before < 2**23  # a workspace has 32 MiB on an H100
    for step in (first, second):
        assert step(torch.zeros(1, device=device), 0).eq(256).all()
