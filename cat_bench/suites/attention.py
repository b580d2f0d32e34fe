"""Attention alone: forward and backward time of chunk attention, its alternatives and dense.

No model runs: an architecture only says which attention (heads, chunk size or stride), and
q, k, v are random views of one projection, as in a block. One case per implementation:

    eager              a dense mask; up to 4,096 tokens
    two_part, fused    cat_bench/chunk_attention.py
    flex_interleaved   FlexAttention on CAT's published layout: [slot, C tokens] per chunk
    flex_permuted      FlexAttention with all slots first, then all tokens
    causal             dense causal attention, scaled_dot_product_attention

CAT has N + 1 rows for N tokens (published layout: N + N / C + 1), the others N. Useful FLOPs count
the pairs that the definition lets a query see, whatever an implementation computes: 4 e per pair
and head forward, 10 e backward. peak_allocated_bytes leaves out what was there before q, k and v.

Try it: cat-bench run attention --quick
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.spec import Spec, parse, tiny

if TYPE_CHECKING:
    from torch import Tensor

    from cat_bench.architecture import Architecture

ARCHITECTURES = ("cat:chunk_size=16", "dense-2d", "dense")  # 32, 32 and 16 heads
CHUNKED = ("eager", "two_part", "fused")
IMPLEMENTATIONS = {
    "cat": (*CHUNKED, "flex_interleaved", "flex_permuted"),
    "sparse": CHUNKED,
    "dense": ("causal",),
}
ON_CPU = ("eager", "two_part", "causal")
MAX_EAGER = 4096  # tokens: beyond it the mask and the scores no longer fit
SEQ_LENS = {"cpu": (64,), "cuda": (1024, 4096, 16_384, 65_536)}
TOKENS = {"cpu": 128, "cuda": 16_384}  # a call, shared out among sequences
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
CALLS = {"cpu": 1, "cuda": 10}  # a sample: behind the first, launching hides behind computing
HEAD_WIDTH = 64
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # per pair and element of a head: two products, five


class Shape(NamedTuple):
    """What of an architecture its attention depends on."""

    rows: int
    heads: int
    kv_heads: int
    chunk_size: int | None  # None: dense
    summary: str

    @property
    def pairs(self) -> int:
        """(query, key) that see each other, of one head of one sequence."""
        size = self.chunk_size or self.rows
        chunks, rest = divmod(self.rows, size)
        earlier = size * chunks * (chunks - 1) // 2 + rest * chunks
        return earlier + chunks * size * (size + 1) // 2 + rest * (rest + 1) // 2


def plan(specs: list[Spec], options: Options) -> list[Case]:
    """Architectures x lengths x implementations, in this order; batches of TOKENS tokens."""
    smoke = options.scale == "smoke"
    defaults = [parse(text) for text in ARCHITECTURES]
    specs = specs or ([tiny(spec) for spec in defaults] if smoke else defaults)
    cases = []
    for spec in specs:
        if spec.name not in IMPLEMENTATIONS:
            raise UserError(
                f"the suite attention knows no attention of '{spec.name}'.",
                f"It measures: {', '.join(IMPLEMENTATIONS)}.",
            )
        for seq_len in options.seq_lens or SEQ_LENS[options.device]:
            batch_sizes = options.batch_sizes or (max(1, TOKENS[options.device] // seq_len),)
            for implementation in IMPLEMENTATIONS[spec.name]:
                if implementation == "eager" and seq_len > MAX_EAGER:
                    continue
                if smoke and implementation not in ON_CPU:
                    continue
                cases += [
                    _case(spec, options, batch_size, seq_len, seed, implementation)
                    for batch_size in batch_sizes
                    for seed in options.seeds
                ]
    return list(dict.fromkeys(cases))


def _case(
    spec: Spec, options: Options, batch_size: int, seq_len: int, seed: int, implementation: str
) -> Case:
    """The model is built but not run: one layer and few words of it are enough."""
    small: dict[str, Any] = {"num_layers": 1, "vocab_size": 256}
    if spec.name == "cat":
        small |= {"compressor_layers": 1, "max_len": max(seq_len, 1024)}
    settings = ",".join(f"{key}={value}" for key, value in {**spec.overrides, **small}.items())
    chosen = {"implementation": implementation}
    if options.repeats is not None:
        chosen["repeats"] = str(options.repeats)
    return Case(
        suite="attention",
        arch=replace(parse(f"{spec.name}:{settings}"), typed="").text,
        batch_size=batch_size,
        prompt_len=seq_len,  # nothing is generated
        seq_len=seq_len,
        dtype=options.dtype or DTYPES[options.device],
        device=options.device,
        seed=seed,
        scale=options.scale,
        settings=tuple(sorted(chosen.items())),
    )


def measure(case: Case, model: "Architecture") -> Iterator[Record]:
    """Times, memory, and what they imply. Raises UserError for a GPU's implementation on a CPU."""
    import torch

    from cat_bench import profiler

    settings = dict(case.settings)
    implementation = settings["implementation"]
    if case.device == "cpu" and implementation not in ON_CPU:
        raise UserError(
            f"the implementation '{implementation}' needs a CUDA GPU.", "Use --device cuda."
        )
    shape = shape_of(parse(case.arch).name, model.config, case.seq_len)
    held = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    attend, num_rows = implementations(implementation, shape, case.device)
    q, k, v, do = _inputs(case, shape, num_rows)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def forward_backward() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), do)

    flops = case.batch_size * shape.heads * HEAD_WIDTH * shape.pairs
    yield Record(case.key, "attended_pairs", shape.pairs, "1")
    calls, repeats = CALLS[case.device], settings.get("repeats")
    for name, run, per_pair in (
        ("forward", forward, FORWARD_FLOPS),
        ("forward_backward", forward_backward, FORWARD_FLOPS + BACKWARD_FLOPS),
    ):
        timing = profiler.timed(
            lambda _, run=run: [run() for _ in range(calls)],
            case.device,
            warmups=3,
            repeats=int(repeats) if repeats else 10,
        )
        samples = [latency_s / calls for latency_s in timing.latency_s]
        median_s = statistics.median(samples)
        yield Record(case.key, f"{name}_s", median_s, "s", samples)
        yield Record(case.key, f"{name}_flops", per_pair * flops, "FLOP")
        yield Record(case.key, f"{name}_flops_per_s", per_pair * flops / median_s, "FLOP/s")
    counters = profiler.memory_counters(case.device)
    if "peak_allocated_bytes" in counters:  # of the last repeat: forward and backward
        peak = counters["peak_allocated_bytes"] - held
        yield Record(case.key, "peak_allocated_bytes", peak, "bytes")


def shape_of(name: str, config: Any, seq_len: int) -> Shape:
    width = config.width_d if name == "cat" else config.width
    heads = width // HEAD_WIDTH
    kv_heads = config.num_kv_heads or heads
    if name == "cat":
        return Shape(seq_len + 1, heads, kv_heads, config.chunk_size, "first")
    return Shape(seq_len, heads, kv_heads, getattr(config, "stride", None), "last")


def implementations(name: str, shape: Shape, device: str) -> tuple[Callable, int]:
    """The function of (q, k, v), and the rows that it needs."""
    from cat_bench.blocks import causal_attention
    from cat_bench.chunk_attention import chunk_attention

    if name == "causal":
        return causal_attention, shape.rows
    if name in CHUNKED:
        return lambda *qkv: chunk_attention(*qkv, shape.chunk_size, shape.summary, name), shape.rows
    return _flex(name == "flex_interleaved", shape, device)


def _flex(interleaved: bool, shape: Shape, device: str) -> tuple[Callable, int]:
    """FlexAttention, compiled; its mask is the one predicate, over the layout's row numbers."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from cat_bench.chunk_attention import sees

    size, tokens = shape.chunk_size, max(shape.chunk_size - 1, 1)
    slots = -(-shape.rows // size)
    num_rows = shape.rows + (shape.rows - 1) // size if interleaved else shape.rows

    def row(at: "Tensor") -> "Tensor":
        """Of the compact layout, for place `at` of the permuted one."""
        token = at - slots
        return torch.where(at < slots, at * size, token // tokens * size + token % tokens + 1)

    def seen(b, h, query, key):
        if interleaved:
            return sees(query, key, size + 1, 0)
        return sees(row(query), row(key), size, 0)

    blocks = torch.compile(create_block_mask)(seen, None, None, num_rows, num_rows, device=device)
    compiled = torch.compile(flex_attention)
    grouped = shape.heads != shape.kv_heads
    return lambda *qkv: compiled(*qkv, block_mask=blocks, enable_gqa=grouped), num_rows


def _inputs(case: Case, shape: Shape, num_rows: int) -> "tuple[Tensor, ...]":
    """q, k, v, which want gradients, and the gradient of the output."""
    import torch

    from cat_bench.architecture import DTYPES as TORCH_DTYPES

    like = {"dtype": TORCH_DTYPES[case.dtype], "device": case.device}
    heads = [shape.heads, shape.kv_heads, shape.kv_heads]
    rows = torch.randn(case.batch_size, num_rows, sum(heads), HEAD_WIDTH, **like)
    q, k, v = (x.requires_grad_() for x in rows.transpose(1, 2).split(heads, dim=1))
    do = torch.randn(case.batch_size, num_rows, shape.heads, HEAD_WIDTH, **like)
    return q, k, v, do.transpose(1, 2)
