"""Attention alone: forward and backward time of chunk attention, its alternatives and dense.

No model runs: an architecture only says which attention (heads, chunk size or stride), and
q, k, v are random views of one projection, as in a block. One case per implementation:

    eager              a dense mask; up to 4,096 tokens
    two_part, fused    cat_bench/chunk_attention.py; fused up to its MAX_FUSED_CHUNK rows a chunk
    flex_interleaved   FlexAttention on CAT's published layout: [slot, C tokens] per chunk
    flex_permuted      FlexAttention with all slots first, then all tokens
    causal             dense causal attention, scaled_dot_product_attention

CAT has N + 1 rows for N tokens (published layout: N + N / C + 1), the others N. Useful FLOPs count
the pairs that the definition lets a query see, whatever an implementation computes: 4 e per pair
and head forward, 10 e backward. peak_allocated_bytes leaves out what was there before q, k and v.

On a GPU a sample is one CUDA graph of up to ten calls: the time of the kernels, without that of
launching them from Python, which a whole training step hides.

Try it: cat-bench run attention --quick
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.packages import install_command, is_installed, missing
from cat_bench.spec import Spec, describe, did_you_mean, parse, tiny
from cat_bench.suites import efficiency

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
PLAIN = ("eager", "two_part", "causal")  # the others are kernels of GPUs, which sum in float32
MAX_EAGER = 4096  # tokens: beyond it the mask and the scores no longer fit
SEQ_LENS = {"cpu": (64,), "cuda": (1024, 4096, 16_384, 65_536)}
TOKENS = {"cpu": 128, "cuda": 16_384}  # a call, shared out among sequences
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
CALLS = {"cpu": 1, "cuda": 10}  # a sample, but fewer where they take longer than
SAMPLE_S = 0.1  # seconds: then no launch is felt, and a graph of all would keep too much memory
WARMUPS = 3
HEAD_WIDTH = 64


class Shape(NamedTuple):
    """What of an architecture its attention depends on."""

    rows: int
    heads: int
    kv_heads: int
    chunk_size: int  # dense: all rows are one chunk
    summary: str

    @property
    def pairs(self) -> int:
        """(query, key) that see each other, of one head of one sequence."""
        size = self.chunk_size
        chunks, rest = divmod(self.rows, size)
        earlier = size * chunks * (chunks - 1) // 2 + rest * chunks
        return earlier + chunks * size * (size + 1) // 2 + rest * (rest + 1) // 2


def plan(specs: list[Spec], options: Options) -> list[Case]:
    """Architectures x lengths x implementations that device, dtype and chunk size have, of those
    asked for; TOKENS tokens a call. In the order of efficiency.by_cell.
    """
    from cat_bench.chunk_attention import MAX_FUSED_CHUNK

    defaults = [parse(text) for text in ARCHITECTURES]
    specs = specs or ([tiny(one) for one in defaults] if options.scale == "smoke" else defaults)
    _check(specs, options)
    seq_lens = options.seq_lens or SEQ_LENS[options.device]
    only_plain = options.device == "cpu" or options.dtype == "float64"
    cases = {}
    for spec, seq_len, seed in itertools.product(specs, seq_lens, options.seeds):
        if spec.name not in IMPLEMENTATIONS:
            raise UserError(
                f"the suite attention knows no attention of '{spec.name}'.",
                f"It measures: {', '.join(IMPLEMENTATIONS)}.",
            )
        batch_sizes = options.batch_sizes or (max(1, TOKENS[options.device] // seq_len),)
        for batch_size in batch_sizes:
            for name in IMPLEMENTATIONS[spec.name]:
                too_long = name == "eager" and seq_len > MAX_EAGER
                too_long |= name == "fused" and _chunk_size(spec) > MAX_FUSED_CHUNK
                asked = options.implementations is None or name in options.implementations
                if asked and not too_long and (name in PLAIN or not only_plain):
                    cases[_case(spec, options, batch_size, seq_len, seed, name)] = None
    if not cases:
        raise UserError(
            f"--implementation {','.join(options.implementations or ())}: none of these "
            f"architectures has it on {options.device} at these lengths.",
            "`cat-bench run attention --dry-run` lists what there is.",
        )
    return efficiency.by_cell(cases)


def _check(specs: list[Spec], options: Options) -> None:
    """Raises UserError for the first option that makes no sense."""
    for flag, value in (
        ("--prompt-len", options.prompt_lens),
        ("--new-tokens", options.new_tokens),
        ("--decode-path", options.decode_path),
        ("--forward-path", options.forward_path),
        ("--step-path", options.step_path),
        ("--activation-checkpointing", options.activation_checkpointing or None),
        ("--match", options.match),
        ("--reference-every", options.reference_every),
    ):
        if value is not None:
            raise UserError(f"{flag} means nothing to attention alone.", f"Drop {flag}.")
    check_implementations(options.implementations)
    efficiency.check_options(specs, options)


def check_implementations(names: tuple[str, ...] | None) -> None:
    """Raises UserError for one that no architecture has. None: not given."""
    known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
    for name in names or ():
        if name not in known:
            raise UserError(
                f"unknown implementation '{name}'.{did_you_mean(name, known)}",
                f"Available: {', '.join(known)}.",
            )


def _chunk_size(spec: Spec) -> int:
    key = {"cat": "chunk_size", "sparse": "stride"}[spec.name]
    return spec.overrides.get(key, describe(spec.name).fields[key].default)


def _case(
    spec: Spec, options: Options, batch_size: int, seq_len: int, seed: int, implementation: str
) -> Case:
    """The model is built but not run: one layer and few words of it are enough."""
    small = {"num_layers": 1, "vocab_size": 256}
    if spec.name == "cat":
        small |= {"compressor_layers": 1, "max_len": max(seq_len, 1024)}
    settings = ",".join(f"{key}={value}" for key, value in {**spec.overrides, **small}.items())
    chosen = {"implementation": implementation}
    if options.repeats is not None:
        chosen["repeats"] = str(options.repeats)
    return Case(
        suite="attention",
        arch=parse(f"{spec.name}:{settings}").text,
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
    if case.device == "cpu" and implementation not in PLAIN:
        raise UserError(
            f"the implementation '{implementation}' needs a CUDA GPU.", "Use --device cuda."
        )
    if implementation not in PLAIN and not is_installed("triton"):
        raise UserError(
            f"the implementation '{implementation}' needs the package {missing('triton')}.",
            f"Install it: {install_command('triton')}",
        )
    shape = shape_of(parse(case.arch).name, model.config, case.seq_len)
    held = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    attend, num_rows = implemented(implementation, shape, case.device)
    q, k, v, do = _inputs(case, shape, num_rows)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), do)

    yield Record(case.key, "attended_pairs", shape.pairs, "1")
    once = profiler.timed(lambda _: both(), case.device, warmups=1, repeats=1)
    counters = profiler.memory_counters(case.device)  # of one call, for graphs hold on to theirs
    if "peak_allocated_bytes" in counters:
        peak = counters["peak_allocated_bytes"] - held
        yield Record(case.key, "peak_allocated_bytes", peak, "bytes")
    calls = min(CALLS[case.device], max(1, int(SAMPLE_S / once.latency_s[0])))
    repeats = int(settings.get("repeats", 10))
    for name, run, per_pair in (("forward", forward, 4), ("forward_backward", both, 4 + 10)):
        sample = run if case.device == "cpu" else captured(run, calls)
        timing = profiler.timed(lambda _, s=sample: s(), case.device, WARMUPS, repeats)
        samples = [latency_s / calls for latency_s in timing.latency_s]
        median_s = statistics.median(samples)
        flops = per_pair * case.batch_size * shape.heads * HEAD_WIDTH * shape.pairs
        yield Record(case.key, f"{name}_s", median_s, "s", samples)
        yield Record(case.key, f"{name}_flops", flops, "FLOP")
        yield Record(case.key, f"{name}_flops_per_s", flops / median_s, "FLOP/s")


def captured(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """`calls` calls of `run` as one CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and tunes; not captured
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def shape_of(name: str, config: Any, seq_len: int) -> Shape:
    heads = (config.width_d if name == "cat" else config.width) // HEAD_WIDTH
    kv_heads = config.num_kv_heads or heads
    if name == "cat":
        return Shape(seq_len + 1, heads, kv_heads, config.chunk_size, "first")
    return Shape(seq_len, heads, kv_heads, getattr(config, "stride", seq_len), "last")


def implemented(name: str, shape: Shape, device: str) -> tuple[Callable, int]:
    """The function of (q, k, v), and the rows that it needs."""
    from cat_bench.blocks import causal_attention
    from cat_bench.chunk_attention import chunk_attention

    if name == "causal":
        return causal_attention, shape.rows
    if name in CHUNKED:
        chosen = {"summary": shape.summary, "implementation": name}
        return partial(chunk_attention, chunk_size=shape.chunk_size, **chosen), shape.rows
    return _flex(name, shape, device)


def _flex(name: str, shape: Shape, device: str) -> tuple[Callable, int]:
    """FlexAttention, compiled, with its mask of tiles made beforehand."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen, num_rows = flex_layout(name, shape)
    blocks = torch.compile(create_block_mask)(seen, None, None, num_rows, num_rows, device=device)
    compiled, grouped = torch.compile(flex_attention), shape.heads != shape.kv_heads
    return lambda *qkv: compiled(*qkv, block_mask=blocks, enable_gqa=grouped), num_rows


def flex_layout(name: str, shape: Shape) -> tuple[Callable, int]:
    """mask_mod(b, h, query, key) and the number of rows: the one predicate, in another order."""
    from cat_bench.chunk_attention import sees

    size, slots = shape.chunk_size, -(-shape.rows // shape.chunk_size)
    if name == "flex_interleaved":  # all slots but the first come on top of the tokens
        return lambda b, h, query, key: sees(query, key, size + 1, 0), shape.rows + slots - 1

    def row(at: "Tensor") -> "Tensor":
        """In the compact layout."""
        token, per_chunk = at - slots, max(size - 1, 1)
        is_slot = at < slots
        return is_slot * at * size + ~is_slot * (token + token // per_chunk + 1)

    return lambda b, h, query, key: sees(row(query), row(key), size, 0), shape.rows


def _inputs(case: Case, shape: Shape, num_rows: int) -> "tuple[Tensor, ...]":
    """q, k, v, which want gradients, and the gradient of the output."""
    import torch

    from cat_bench.architecture import DTYPES as TORCH_DTYPES

    heads = [shape.heads, shape.kv_heads, shape.kv_heads, shape.heads]
    size = case.batch_size, num_rows, sum(heads), HEAD_WIDTH
    rows = torch.randn(size, dtype=TORCH_DTYPES[case.dtype], device=case.device)
    *qkv, do = rows.transpose(1, 2).split(heads, dim=1)
    return *(x.requires_grad_() for x in qkv), do
