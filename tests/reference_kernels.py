"""The references of our kernels under the kernels' own names: fast paths without a GPU.

`install` puts them in the place of the modules that need Triton, and leaves the captured step of
one architecture's module uncaptured.
"""

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import contract
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cat_bench
from cat_bench import graph, recurrent_steps, window
from cat_bench.blocks import Rope, rotate
from cat_bench.cat import chunk_rows_reference
from cat_bench.chunk_attention import chunk_mask
from cat_bench.short_attention import short_attention_reference


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: graph.Rows, rope: Rope
) -> Tensor:
    cos_sin = tuple(table[rows.rope_id][:, None] for table in rope)
    q, k, v = (x.unflatten(-1, (-1, 64))[:, :, None] for x in (q, k, v))
    q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    return graph.decode_attention_reference(q, k, v, keys, values, rows).flatten(1)


def rotate_(qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    heads = qkv.unflatten(-1, (-1, 64)).transpose(1, 2)[:, :num_heads]
    heads.copy_(rotate(heads, rope))
    return qkv


def short_attention_backward(do: Tensor, qkv: Tensor, num_heads: int, rope: Rope) -> Tensor:
    q, k, v = qkv.unflatten(-1, (-1, 64)).transpose(1, 2).split(num_heads, dim=1)
    do = do.unflatten(-1, (-1, 64)).transpose(1, 2)
    gradients = attention_backward(do, q, k, v, torch.ones((), dtype=torch.bool), rope)
    return torch.cat(gradients, dim=1).transpose(1, 2).flatten(2)


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, chunk_size: int, offset: int,
    rope: Rope | None = None,
) -> None:  # fmt: skip
    """The kernels' units: `lse` is the logarithm to base 2."""
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    score = q @ k.mT * q.shape[3] ** -0.5
    score.masked_fill_(~chunk_mask(q.shape[2], chunk_size, offset, q.device), -torch.inf)
    o.copy_(score.softmax(-1) @ v)
    lse.copy_(score.logsumexp(-1) / math.log(2))


def chunk_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, chunk_size: int, offset: int, rope: Rope | None = None,
) -> None:  # fmt: skip
    seen = chunk_mask(q.shape[2], chunk_size, offset, q.device)
    gradients = attention_backward(do, q, k, v, seen, rope)
    for out, gradient in zip((dq, dk, dv), gradients, strict=True):
        out.copy_(gradient)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (b, h, t, e) by formula: inside of a custom operator there is no autograd."""
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    scale = q.shape[3] ** -0.5
    weight = (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    d_weight = do @ v.mT
    d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdim=True)) * scale
    dq, dk = d_score @ k, d_score.mT @ q
    if rope is not None:
        back = rope[0], -rope[1]
        dq, dk = rotate(dq, back), rotate(dk, back)
    return dq, dk, weight.mT @ do


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def vector_linear(
    x: Tensor, weight: Tensor, norm: nn.RMSNorm | None = None, add_to: Tensor | None = None
) -> Tensor:
    out = F.linear(x if norm is None else norm(x), weight)
    return out if add_to is None else add_to.add_(out)


def vector_swiglu(x: Tensor, norm: nn.RMSNorm, gate_up: Tensor) -> Tensor:
    return swiglu(F.linear(norm(x), gate_up))


class Uncaptured:
    """CapturedStep without a graph; it runs the step beforehand too, as capturing does."""

    graph = SimpleNamespace(pool=lambda: None)

    def __init__(
        self,
        run: Callable,
        batch_size: int,
        device: torch.device,
        first_row: int = 0,
        pool: None = None,
        end: int | None = None,
    ) -> None:
        self.run = torch.no_grad()(run)
        token = torch.zeros(batch_size, dtype=torch.int64)
        self.logits = self.run(token, torch.full_like(token, first_row))

    def __call__(self, token: Tensor, row: int | Tensor) -> Tensor:
        """As a graph has it, every call overwrites the logits of the one before."""
        row = torch.full_like(token, row) if isinstance(row, int) else row
        return self.logits.copy_(self.run(token, row))


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    install_kernels(monkeypatch)
    monkeypatch.setattr(module, "CapturedStep", Uncaptured)


def install_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "flash_window_attention", window.window_attention)
    kernels = SimpleNamespace(
        chunk_rows=chunk_rows_reference,
        decode_attention=decode_attention,
        rms_norm=rms_norm,
        rotate_=rotate_,
        short_attention=short_attention_reference,
        short_attention_backward=short_attention_backward,
        swiglu=swiglu,
    )
    recurrent_kernels = SimpleNamespace(
        conv_rows=recurrent_steps.conv_rows_reference,
        conv_step=recurrent_steps.conv_step_reference,
        delta_step=recurrent_steps.delta_step_reference,
        gated_rms_norm=recurrent_steps.gated_rms_norm_reference,
        ssm_step=recurrent_steps.ssm_step_reference,
        taylor_rows=recurrent_steps.taylor_rows_reference,
        TAYLOR_ROW_FEATURES=16,
        taylor_step=recurrent_steps.taylor_step_reference,
    )
    chunk_kernels = SimpleNamespace(forward=chunk_forward, backward=chunk_backward)
    vector_kernels = SimpleNamespace(linear=vector_linear, swiglu=vector_swiglu)
    for name, stand_in in (
        ("kernels", kernels),
        ("chunk_kernels", chunk_kernels),
        ("recurrent_kernels", recurrent_kernels),
        ("vector_kernels", vector_kernels),
    ):
        monkeypatch.setitem(sys.modules, f"cat_bench.{name}", stand_in)
        monkeypatch.setattr(cat_bench, name, stand_in, raising=False)


def check_graphed_steps(
    subject: contract.Subject, batch_size: int, segments: tuple[int, ...]
) -> None:
    """Prompts and steps of `cuda_graph` equal the eager path's, also after a reset."""
    eager, fast = subject.model(), subject.model(decode_path="cuda_graph")
    fast.load_state_dict(eager.state_dict())  # some vectors are drawn
    tokens = subject.tokens(batch_size)
    expected, _ = contract.decode(eager, tokens, segments)
    got, state = contract.decode(fast, tokens, segments)
    contract.assert_same(got, expected, "steps")
    got, _ = contract.decode(fast, tokens, segments, fast.reset(state))
    contract.assert_same(got, expected, "steps after a reset")
    contract.assert_same(*(contract.forward(model, tokens) for model in (fast, eager)), "forward")
