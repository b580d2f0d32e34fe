"""The chunked linear cross entropy equals F.cross_entropy, values and gradients, at any chunk."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import build
from cat_bench.loss import (
    IGNORE,
    linear_cross_entropy,
    losses_reference,
    next_token_loss,
    output_head,
)
from cat_bench.spec import parse

DENSE = "dense:num_layers=1,vocab_size=96,width=64"
CAT = "cat:chunk_size=4,max_len=64,num_layers=1,vocab_size=96,width=64"


def example(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    """hidden (2, 7, 5), weight (11, 5), targets (2, 7) of which three do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 7), generator=generator)
    targets[0, 3] = targets[1, :2] = IGNORE
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device)


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 14, 100])
def test_it_is_cross_entropy(chunk_tokens: int) -> None:
    """Loss and gradients, with a chunk whose targets all do not count, and an open last one."""
    hidden, weight, targets = example()
    got = linear_cross_entropy(hidden, weight, targets, chunk_tokens)
    expected = whole(hidden, weight, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(3 * got, (hidden, weight))
    for grad, known in zip(grads, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(grad, known, rtol=1e-10, atol=1e-14)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, targets = example()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=4), (hidden, weight)
    )


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_autocast_multiplies_in_bfloat16_and_adds_in_float32() -> None:
    hidden, weight, targets = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = whole(hidden, weight, targets)
    assert 0 < abs(loss - exact) / exact < 0.02
    for grad, known in zip(
        (hidden.grad, weight.grad), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert 0 < (grad - known).norm() / known.norm() < 0.02


@pytest.mark.parametrize(("chunk_tokens", "rows"), [(4, [4, 4, 4, 2]), (None, [7, 7])])
def test_the_logits_never_exist_in_full(
    chunk_tokens: int | None, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cat_bench import loss

    seen = []

    def counted(logits: Tensor, *arguments: object) -> Tensor:
        seen.append(tuple(logits.shape))
        return losses_reference(logits, *arguments)

    monkeypatch.setattr(loss, "losses_reference", counted)
    linear_cross_entropy(*example(), chunk_tokens=chunk_tokens).backward()
    assert seen == [(n, 11) for n in rows]


def test_a_target_outside_of_the_vocabulary_is_an_error() -> None:
    hidden, weight, targets = example()
    targets[0, 0] = 11
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


def test_wrong_arguments_get_a_sentence() -> None:
    hidden, weight, targets = example()
    with pytest.raises(ValueError, match="'eager' or 'triton', got 'fast'"):
        linear_cross_entropy(hidden, weight, targets, implementation="fast")
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match="computes in float32"):
        linear_cross_entropy(hidden, weight, targets, implementation="triton")
    with pytest.raises(ValueError, match="underflows in float16: use bfloat16 or float32"):
        linear_cross_entropy(hidden.half(), weight.half(), targets)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("arch", [DENSE, CAT])
def test_the_loss_of_a_model_is_that_of_its_logits(arch: str) -> None:
    model = build(parse(arch), dtype="float64")
    tokens = torch.randint(96, (2, 22), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    got = next_token_loss(model, inputs, targets)
    expected = F.cross_entropy(model.forward(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_model_without_hidden_states_or_a_plain_head_uses_its_logits() -> None:
    head = nn.Linear(3, 5, bias=False)
    assert output_head(SimpleNamespace(head=head)) is None
    assert output_head(SimpleNamespace(head=head, hidden=len)) is head
    assert output_head(SimpleNamespace(head=nn.Linear(3, 5), hidden=len)) is None
    for other in (512, None, nn.Linear(3, 3)):  # a width, or a layer, of that name
        assert output_head(SimpleNamespace(head=head, hidden=other)) is None
    logits = torch.randn(1, 4, 5)
    model = SimpleNamespace(forward=lambda tokens: logits)
    targets = torch.tensor([[1, 2, IGNORE, 4]])
    got = next_token_loss(model, targets, targets)
    torch.testing.assert_close(got, F.cross_entropy(logits[0], targets[0]))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_words", [97, 50_432])
def test_the_kernel_equals_its_reference(dtype: torch.dtype, num_words: int) -> None:
    from cat_bench import loss_kernels

    generator = torch.Generator("cuda").manual_seed(0)
    logits = 4 * torch.randn(300, num_words, device="cuda", generator=generator)
    targets = torch.randint(num_words, (300,), device="cuda", generator=generator)
    targets[5:9] = IGNORE
    share = torch.tensor(1 / 296, device="cuda")
    ours, known = (logits.to(dtype, copy=True) for _ in range(2))
    got = loss_kernels.losses(ours, targets, share, True)
    torch.testing.assert_close(got, losses_reference(known, targets, share, True))
    torch.testing.assert_close(ours, known, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5,
                               atol=1e-9)  # fmt: skip
    assert torch.equal(loss_kernels.losses(logits, targets, share, False), loss_kernels.losses(
        logits.clone(), targets, share, True))  # fmt: skip
    targets[0] = num_words
    assert loss_kernels.losses(logits, targets, share, False)[0].isnan()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("stride", [1, 3])
def test_both_implementations_train_alike(stride: int) -> None:
    """Also on targets that are a column of a larger table."""
    found = []
    for implementation in ("eager", "triton"):
        hidden, weight, targets = example(torch.float32, "cuda")
        targets = targets[..., None].expand(-1, -1, stride).contiguous()[..., 0]
        with torch.autocast("cuda", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, 4, implementation)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for ours, known in zip(*found, strict=True):
        torch.testing.assert_close(ours, known, rtol=1e-2, atol=1e-3)
