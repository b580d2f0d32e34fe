"""The one greedy decode loop: the profiler, the recall tasks and lm-eval all generate with it.

The same for every architecture (evaluation_spec.md 4.1): argmax on the device, written into a
preallocated tensor; no logits kept, no host synchronisation, no end-of-text test, no sampling.

A generation of n new tokens is one prefill, which gives the first of them, and n - 1 steps; the
last new token is never read.

Shapes: b batch, p prompt tokens, t all tokens.
Try it: greedy(build(parse("dense")), prompt_tokens(1, 8, 0, "cpu", 50_432), new_tokens=24)
"""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from cat_bench.architecture import Architecture, NextLogits, State, Tokens
from cat_bench.packages import is_installed

Prompt = Int[Tensor, "b p"]

PROMPT_IDS = 1000  # ids below it exist in every vocabulary of the paper


@torch.inference_mode()
def greedy(
    model: Architecture,
    prompt: Prompt,
    new_tokens: int,
    state: State | None = None,
    tokens: Tokens | None = None,
    on_prefill: Callable[[], object] | None = None,
    on_step: Callable[[int], object] | None = None,
) -> Tokens:
    """The prompt and the `new_tokens` likeliest tokens after it. (b, p) -> (b, t).

    `state` and `tokens` (of `new_state`, `token_buffer`) are used again where given, with their
    captured graphs; the result then is that buffer. `on_prefill()` runs once the first new token is
    queued, `on_step(n)` after the step that reads token number n (1-based): for instruments only.
    """
    batch_size, prompt_len = prompt.shape
    if new_tokens < 1 or prompt_len < 1:
        raise ValueError(
            f"need a prompt and at least 1 new token, got {prompt_len} and {new_tokens}."
        )
    seq_len = prompt_len + new_tokens
    if state is None:
        state = model.init_state(batch_size, seq_len)
    if tokens is None:
        tokens = token_buffer(batch_size, seq_len, prompt.device)
    state = first_token(model, prompt, state, tokens)
    if on_prefill is not None:
        on_prefill()
    for n in range(prompt_len + 1, seq_len):
        logits, state = model.step(tokens[:, n - 1], state)
        choose(model, logits, tokens[:, n])
        if on_step is not None:
            on_step(n)
    return tokens


@torch.inference_mode()
def first_token(model: Architecture, prompt: Prompt, state: State, tokens: Tokens) -> State:
    """Empty the state, read the prompt, write the first new token: what a user waits for first."""
    prompt_len = prompt.shape[1]
    tokens[:, :prompt_len] = prompt
    logits, state = model.prefill(prompt, model.reset(state))
    choose(model, logits, tokens[:, prompt_len])
    return state


def choose(model: Architecture, logits: NextLogits, out: Tensor) -> None:
    """The likeliest token of each sequence, logits (b, v) -> out (b,); the first of equals.

    On the fast paths of a GPU in one launch of our own: PyTorch's argmax takes 8 to 14 us longer
    (H100). A path of somebody else's model may know no Triton: then it is PyTorch's.
    Raises ValueError for logits of another shape, whatever tokens might come of them.
    """
    if logits.dim() != 2 or len(logits) != len(out):
        raise ValueError(
            f"prefill or step returned logits of shape {tuple(logits.shape)}, expected (b, v) with "
            f"b = {len(out)}: of each sequence those of the token after its last one."
        )
    fast = model.decode_path != "eager" and logits.is_cuda and logits.stride(1) == 1
    argmax = fast_argmax() if fast else None
    if argmax is None:
        torch.argmax(logits, dim=-1, out=out)
    else:
        argmax(logits, out)


@cache
def fast_argmax() -> Callable[[NextLogits, Tensor], None] | None:
    """Looked for once, not at every step."""
    if not is_installed("triton"):
        return None
    from cat_bench import kernels

    return kernels.argmax


@torch.inference_mode()
def new_state(model: Architecture, batch_size: int, max_len: int) -> State:
    """A state for `greedy`; a graphed decode path captures here."""
    return model.init_state(batch_size, max_len)


def token_buffer(batch_size: int, seq_len: int, device: torch.device | str) -> Tokens:
    """An empty (b, t) tensor. Its columns are contiguous: a step reads one and writes the next."""
    return torch.zeros(seq_len, batch_size, dtype=torch.int64, device=device).T


def prompt_tokens(
    batch_size: int, prompt_len: int, seed: int, device: torch.device | str, vocab_size: int
) -> Prompt:
    """Random ids below min(1000, vocab_size), the same for every architecture and device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (batch_size, prompt_len)
    ids = torch.randint(0, min(PROMPT_IDS, vocab_size), shape, generator=generator)
    return ids.to(device)
