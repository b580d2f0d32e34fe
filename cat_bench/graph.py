"""The decode path `cuda_graph`: one cached step on Triton kernels, captured once, then replayed.

Blocks of attention over cache rows (Dense, CAT), and what every captured step is made of: norms,
linear layers, the graph itself. The kernels and this file say the same thing twice:
`decode_attention_reference` is the specification in plain PyTorch, cat_bench/kernels.py the fast
form; tests/gpu compares them. The steps of recurrent layers are in recurrent_steps.py. Nothing here
imports Triton until a graph is captured.

Shapes: b batch, h query heads, g key-value heads, e head width (64), s cache rows, d width.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.blocks import HEAD_WIDTH, Attend, Block, Rope, attention, rotate
from cat_bench.short_attention import MAX_SHORT


class Rows(NamedTuple):
    """Where each sequence of the batch reads and writes: int64 (b,), on the device.

    A query sees rows 0 .. first_end - 1, rows second_start .. second_end - 1 if there are any, and
    the row that it writes itself. The ranges are apart; where `write` lies in one, the new row
    replaces the old.
    """

    write: Tensor
    rope_id: Tensor
    first_end: Tensor
    second_start: Tensor | None = None
    second_end: Tensor | None = None


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Rows
) -> Tensor:
    """Write one rotated row per sequence, attend. q (b, h, 1, e), k v (b, g, 1, e) -> as q.

    keys, values (b, g, s, e) are changed in place.
    """
    batch = torch.arange(len(rows.write), device=q.device)
    keys[batch, :, rows.write], values[batch, :, rows.write] = k[:, :, 0], v[:, :, 0]
    slot = torch.arange(keys.shape[2], device=q.device)
    seen = (slot < rows.first_end[:, None]) | (slot == rows.write[:, None])  # (b, s)
    if rows.second_start is not None:
        seen |= (slot >= rows.second_start[:, None]) & (slot < rows.second_end[:, None])
    return attention(q, keys, values, mask=seen[:, None, None])


def block_step_reference(
    block: Block, x: Tensor, keys: Tensor, values: Tensor, rows: Rows, rope: Rope
) -> Tensor:
    """`block_step` in plain PyTorch. x (b, d) -> (b, d); rope tables (ids, e/2)."""
    cos_sin = tuple(table[rows.rope_id][:, None] for table in rope)  # (b, 1, e/2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention_reference(q, k, v, keys, values, rows)

    return block(x[:, None], cos_sin, attend)[:, 0]


def block_step(
    block: Block, x: Tensor, keys: Tensor, values: Tensor, rows: Rows, rope: Rope
) -> Tensor:
    """One transformer block for one token per sequence, on the Triton kernels.

    x (b, d) is changed in place and returned; inference only.
    """
    from cat_bench import kernels

    qkv = norm_linear(x, block.attn_norm, block.qkv.weight)
    kv_width = block.num_kv_heads * HEAD_WIDTH
    q, k, v = qkv.split([block.num_heads * HEAD_WIDTH, kv_width, kv_width], dim=-1)
    if block.q_norm is not None:
        q = block.q_norm(q.unflatten(-1, (-1, HEAD_WIDTH))).flatten(1)
        k = block.k_norm(k.unflatten(-1, (-1, HEAD_WIDTH))).flatten(1)
    o = kernels.decode_attention(q, k, v, keys, values, rows, rope)
    return finish_block(block, x, o)


def fast_block(block: Block, x: Tensor, rope: Rope, attend: Attend | None = None) -> Tensor:
    """`block(x, rope, attend)` with norms, SwiGLU and residuals fused, for prefill and compressor.

    x (b, t, d) is changed in place and returned; inference only. Without `attend` every row sees
    all rows of its sequence, as blocks.attention has it.
    """
    from cat_bench import kernels

    rows = x.flatten(0, 1)
    qkv = norm_linear(rows, block.attn_norm, block.qkv.weight).view(*x.shape[:2], -1)
    if attend is None and block.q_norm is None and x.shape[1] <= MAX_SHORT:
        o = kernels.short_attention(qkv, block.num_heads, rope)
    elif block.q_norm is None and rope[0].dim() == 2:
        kernels.rotate_(qkv, block.num_heads + block.num_kv_heads, rope)
        o = (attend or attention)(*block.split_heads(qkv)).transpose(1, 2).flatten(2)
    else:
        q, k, v = block.split_heads(qkv)
        o = (attend or attention)(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)
    return finish_block(block, rows, o.flatten(0, 1)).view_as(x)


def plain_block(block: Block, x: Tensor, rope: Rope, attend: Attend = attention) -> Tensor:
    """The reference of `fast_block`."""
    return block(x, rope, attend)


def finish_block(block: Block, x: Tensor, o: Tensor) -> Tensor:
    """The block after its attention, in place: x and o (rows, d)."""
    add_linear_(x, o, block.attn_out.weight)
    h = norm_swiglu(x, block.mlp_norm, packed([block.w1.weight, block.w3.weight]))
    return add_linear_(x, h, block.w2.weight)


# Linear layers of a step. One row is a matter of memory and launches alone, and has kernels of its
# own; so have 2 to 16 rows, and some hundreds or more, in bfloat16 on Hopper GPUs. Elsewhere
# cuBLAS is as fast (docs/performance.md).


def norm_linear(x: Tensor, norm: nn.RMSNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """W RMSNorm(x). x (rows, d), weight (n, d) -> (rows, n); several rows in `out`, if given."""
    from cat_bench import products, vector_kernels

    if len(x) == 1:
        return vector_kernels.linear(x, weight, norm)
    if products.takes_many(x, norm.weight, weight, out):
        return products.norm_many(x, norm.weight, eps_of(norm), weight, out)
    h = rms_norm(x, norm)
    if products.takes_few(h, weight):
        return products.linear(h, weight, out)
    return torch.mm(h, weight.T, out=out)


def norm_swiglu(x: Tensor, norm: nn.RMSNorm, gate_up: Tensor) -> Tensor:
    """silu(gate) * up of RMSNorm(x). x (rows, d), gate_up (2 n, d) -> (rows, n)."""
    from cat_bench import kernels, products, vector_kernels

    if len(x) == 1:
        return vector_kernels.swiglu(x, norm, gate_up)
    if products.takes_many(x, norm.weight, gate_up, swiglu=True):
        return products.norm_many(x, norm.weight, eps_of(norm), gate_up, swiglu=True)
    h = rms_norm(x, norm)
    if products.takes_few(h, gate_up):
        return products.swiglu_of_few(h, gate_up)
    return kernels.swiglu(F.linear(h, gate_up))


def add_linear_(x: Tensor, o: Tensor, weight: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
    """x += W o, or W RMSNorm(o), in place. x (rows, d), o (rows, n), weight (d, n) -> x."""
    from cat_bench import products, vector_kernels

    if len(x) == 1:
        return vector_kernels.linear(o, weight, norm, add_to=x)
    o = o if norm is None else rms_norm(o, norm)
    if products.takes_few(o, weight):
        return products.add_linear_(x, o, weight)
    return x.addmm_(o, weight.T)  # the residual rides in the matmul's epilogue


def packed(weights: Sequence[Tensor]) -> Tensor:
    """The weights under each other in one tensor, then zero rows up to a multiple of 16: one matmul
    instead of several, for no additional memory.

    On first use they become views of one buffer; their values, names and shapes stay. The zeros
    keep every row of the product aligned to 16 bytes, which the fast matmuls ask for.
    """
    first, at, in_place = weights[0], weights[0].data_ptr(), True
    for weight in weights:
        same_buffer = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        in_place = in_place and same_buffer and weight.data_ptr() == at
        at += weight.nbytes
    num_rows = sum(len(weight) for weight in weights)
    num_zeros = -num_rows % 16
    length = (num_rows + num_zeros) * first[0].nbytes
    ours = first.untyped_storage().nbytes() == length  # of an earlier call, zeros included
    if not in_place or (num_zeros and not ours):
        with torch.inference_mode(False):  # the weights stay ordinary tensors, fit for training
            zeros = first.detach().new_zeros(num_zeros, *first.shape[1:])
            buffer = torch.cat([*(weight.detach() for weight in weights), zeros])
            parts = buffer.split([*(len(weight) for weight in weights), num_zeros])
            for weight, part in zip(weights, parts, strict=False):  # the last part is the zeros
                weight.data = part
        wait_for_weights(buffer)
    return first.detach().as_strided((num_rows + num_zeros, *first.shape[1:]), first.stride())


def wait_for_weights(weights: Tensor) -> None:
    """After writing weights anew: kernels that start early read them without waiting for it."""
    if weights.is_cuda:
        torch.cuda.current_stream().synchronize()


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMSNorm of (b, d) in one kernel."""
    from cat_bench import kernels

    return kernels.rms_norm(x, norm.weight, eps_of(norm))


def eps_of(norm: nn.RMSNorm) -> float:
    """As nn.RMSNorm: without an eps, that of the dtype."""
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace (32 MiB) for every stream that it has run on."""
    return torch.cuda.Stream(device)


class CapturedStep:
    """A decoding step as one CUDA graph with two inputs: the tokens and the row to write.

    `run(token (b,), row (b,)) -> logits (b, v)` must not touch host values. The logits live in the
    graph's own memory: the next call overwrites them. `end`: rows from it on are refused, because
    tables of positions end there.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        batch_size: int,
        device: torch.device,
        first_row: int = 0,
        pool: tuple[int, int] | None = None,
        end: int | None = None,
    ):
        self.end = end
        self.token = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.row = torch.full_like(self.token, first_row)
        self.run = run  # a graph does not own its inputs: what `run` closes over must stay alive
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            side = capture_stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels, makes cuBLAS choose; not captured
                for _ in range(2):
                    run(self.token, self.row)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph, pool=pool, stream=side):
                self.logits = run(self.token, self.row)

    def __call__(self, token: Tensor, row: int | Tensor) -> Tensor:
        self.token.copy_(token)
        if isinstance(row, int):
            if self.end is not None and row >= self.end:
                raise ValueError(
                    f"the step was captured for {self.end} tokens; token {row + 1} was given."
                )
            self.row.fill_(row)
        else:
            self.row.copy_(row)
        self.graph.replay()
        return self.logits
