"""The greedy loop: the same tokens as full recompute, nothing kept, nothing waited for."""

import weakref

import pytest
import torch

from cat_bench.architecture import build
from cat_bench.generate import greedy, new_state, prompt_tokens, token_buffer
from cat_bench.spec import parse

SPECS = [
    "dense:width=64,num_layers=2,vocab_size=96",
    "cat:chunk_size=4,width=64,num_layers=2,max_len=32,vocab_size=96",
]


def tiny(text: str, device: str = "cpu"):
    return build(parse(text), device=device, dtype="float64")


def recomputed(model, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The specification: the whole forward pass again for every token."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(new_tokens):
            likeliest = model(tokens)[:, -1].argmax(-1)
            tokens = torch.cat([tokens, likeliest[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("prompt_len, new_tokens", [(1, 9), (3, 12), (4, 1), (8, 14)])
def test_greedy_equals_full_recompute(text: str, prompt_len: int, new_tokens: int) -> None:
    model = tiny(text)
    prompt = prompt_tokens(3, prompt_len, 1, "cpu", 96)
    tokens = greedy(model, prompt, new_tokens)
    assert tokens.shape == (3, prompt_len + new_tokens)
    assert torch.equal(tokens, recomputed(model, prompt, new_tokens))
    assert len(tokens[:, prompt_len:].unique()) > 1 or new_tokens == 1  # not one stuck token


@pytest.mark.parametrize("text", SPECS)
def test_a_state_and_a_buffer_are_used_again(text: str) -> None:
    model = tiny(text)
    state, buffer = new_state(model, 2, 20), token_buffer(2, 20, "cpu")
    for seed in (1, 2):
        prompt = prompt_tokens(2, 5, seed, "cpu", 96)
        tokens = greedy(model, prompt, 15, state, buffer)
        assert tokens.data_ptr() == buffer.data_ptr()
        assert torch.equal(tokens, greedy(model, prompt, 15))


class Spy:
    """A model that remembers its calls and, without keeping them, the logits it gave away."""

    decode_path = "compiled"  # a fast path of somebody's own, which knows no Triton

    def __init__(self, model):
        self.model, self.logits, self.calls = model, [], []

    def init_state(self, batch_size: int, max_len: int):
        self.calls.append(f"init_state {max_len}")
        return self.model.init_state(batch_size, max_len)

    def reset(self, state):
        self.calls.append("reset")
        return self.model.reset(state)

    def prefill(self, tokens, state):
        self.calls.append(f"prefill {tokens.shape[1]}")
        return self._give(*self.model.prefill(tokens, state))

    def step(self, token, state):
        self.calls.append("step")
        return self._give(*self.model.step(token, state))

    def _give(self, logits, state):
        self.logits.append(weakref.ref(logits))
        return logits, state

    def alive(self) -> int:
        return sum(logits() is not None for logits in self.logits)


def test_no_logits_are_kept() -> None:
    spy, alive = Spy(tiny(SPECS[0])), []
    greedy(spy, prompt_tokens(2, 4, 0, "cpu", 96), 12, on_step=lambda _: alive.append(spy.alive()))
    assert len(spy.logits) == 12  # one prefill, eleven steps
    assert max(alive) == 1


def test_one_prefill_then_one_step_less_than_new_tokens() -> None:
    spy = Spy(tiny(SPECS[0]))
    greedy(spy, prompt_tokens(1, 4, 0, "cpu", 96), 3)
    assert [call for call in spy.calls if call != "reset"] == [
        "init_state 7",
        "prefill 4",
        "step",
        "step",
    ]


def test_a_given_state_is_reset_not_made_again() -> None:
    spy = Spy(tiny(SPECS[0]))
    state = new_state(spy.model, 1, 7)
    greedy(spy, prompt_tokens(1, 4, 0, "cpu", 96), 3, state)
    assert spy.calls == ["reset", "prefill 4", "step", "step"]


def test_hooks_name_the_token_that_was_read() -> None:
    seen: list[object] = []
    greedy(
        tiny(SPECS[1]),
        prompt_tokens(1, 4, 0, "cpu", 96),
        4,
        on_prefill=lambda: seen.append("prefill"),
        on_step=seen.append,
    )
    assert seen == ["prefill", 5, 6, 7]  # the eighth token is never read


@pytest.mark.parametrize("text", SPECS)
def test_the_host_never_waits_for_a_value(text: str) -> None:
    """Tensors on the meta device have no values: any look at one from the host raises."""
    prompt = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert greedy(tiny(text, "meta"), prompt, 10).shape == (2, 15)


def test_prompts_depend_on_the_seed_alone() -> None:
    prompt = prompt_tokens(4, 64, 3, "cpu", 50_432)
    assert torch.equal(prompt, prompt_tokens(4, 64, 3, "cpu", 2_000))
    assert not torch.equal(prompt, prompt_tokens(4, 64, 4, "cpu", 50_432))
    assert 900 < prompt.max() < 1000
    assert prompt_tokens(4, 64, 3, "cpu", 10).max() == 9


def test_a_prompt_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    prompt_tokens(4, 64, 3, "cpu", 2_000)
    assert torch.equal(torch.rand(1), expected)


def test_nothing_to_generate_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 new token, got 4 and 0"):
        greedy(tiny(SPECS[0]), prompt_tokens(1, 4, 0, "cpu", 96), 0)
