"""Linear layers of 2 to 16 rows, and SwiGLU of a few hundred, on Hopper GPUs in bfloat16.

In CUDA: few_rows.cu reads weights into shared memory before the kernel ahead has ended and splits
a reduction over a cluster, which Triton cannot; swiglu_rows.cu has tiles that fill the
multiprocessors, where cuBLAS's fill two thirds, and does SwiGLU in the same launch. products.cu is
what both share. References: graph.norm_linear, graph.norm_swiglu and graph.add_linear_ of other
numbers of rows: one is for vector_kernels.py, the rest for cuBLAS.

Every function reads weights before the kernel ahead has ended: that must not have written them.
Shapes: b rows, d inputs, n outputs.
"""

import ctypes
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from cat_bench import nvrtc

BLOCK_K = 64  # inputs in a tile: 128 bytes, the width of the copy engine's swizzle
SHARED_BYTES = 227 * 1024  # of a multiprocessor
MIN_FILLED = 7 / 8  # of the rows in tiles, and of the multiprocessors: below, cuBLAS is as good
MAX_FEW = 16  # rows: at 64 cuBLAS is as good (docs/performance.md)
FEW_CTAS = 84  # that read weights, at least, where the reduction can be split so far


def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear`, `add_linear_` and `swiglu_of_few` are for x (b, d) and weight (n, d)."""
    if not 2 <= len(x) <= MAX_FEW or not fit_for_copies(x, weight):
        return False
    one_wave = len(weight) <= 128 * num_processors(x.device)
    return one_wave and len(weight) % 8 == 0


def fit_for_copies(*matrices: Tensor) -> bool:
    """Whether they are bfloat16 on a Hopper GPU and laid out as its copy engine asks."""
    return all(
        matrix.is_cuda
        and matrix.dtype == torch.bfloat16
        and matrix.is_contiguous()
        and matrix.shape[1] % 8 == 0
        and matrix.data_ptr() % 16 == 0
        and num_processors(matrix.device) > 0
        for matrix in matrices
    )


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T of few rows -> (b, n), in `out` if given."""
    out = x.new_empty(len(x), len(weight)) if out is None else out
    return launch_few(x, weight, out)


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y += x W^T of few rows, in place. y (b, n), bfloat16."""
    return launch_few(x, weight, y, add=True)


def swiglu_of_few(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (2 n, d) times x -> (b, n)."""
    return launch_few(x, gate_up, x.new_empty(len(x), len(gate_up) // 2), swiglu=True)


class FewTiling(NamedTuple):
    """`rows` of x with padding; `splits` of the reduction; stages of a CTA's ring."""

    rows: int
    splits: int
    stages: int


def few_tiling(num_rows: int, num_weight_rows: int, width: int) -> FewTiling:
    rows = 8 if num_rows <= 8 else 16
    tiles, steps = -(-num_weight_rows // 128), -(-width // BLOCK_K)
    possible = [splits for splits in (1, 2, 4, 8) if splits <= steps]
    splits = next((s for s in possible if tiles * s >= FEW_CTAS), possible[-1])
    # A long ring holds most of a tile before x is there. With little to read a short one is faster,
    # and it leaves room for a second CTA, where there are more of them than multiprocessors.
    ring = 100 * 1024 if splits == 8 or tiles * splits > 128 else 200 * 1024
    stage = stage_bytes(128 + rows)
    return FewTiling(rows, splits, max(2, min(-(-steps // splits), ring // stage)))


def launch_few(
    x: Tensor, weight: Tensor, out: Tensor, swiglu: bool = False, add: bool = False
) -> Tensor:
    (num_rows, width), num_weight_rows = x.shape, len(weight)
    rows, splits, stages = few_tiling(num_rows, num_weight_rows, width)
    stage = stage_bytes(128 + rows)
    shared = stages * (stage + 16) + 1024  # the ring, later the sums, begins at a multiple of 1024
    assert out.dtype == x.dtype and out.stride(1) == 1 and out.stride(0) % 4 == 0, "stored by fours"
    defines = (
        ("K", width), ("N", num_weight_rows), ("R", rows), ("SPLITS", splits), ("STAGES", stages),
        ("SWIGLU", int(swiglu)), ("ADD", int(add)),
    )  # fmt: skip
    with torch.cuda.device(x.device):
        kernel = load(x.device, "few_rows", shared, rows, defines)
        maps = tile_map(kernel, x, rows), tile_map(kernel, weight, 64)
        grid = (-(-num_weight_rows // 128) * splits, 1, 1)
        kernel.launch(grid, (splits, 1, 1), maps, out, num_rows, out.stride(0))
    return out


class Tiling(NamedTuple):
    """A CTA's tile: 128 `height` rows of x by `columns` of W, half gate and half up."""

    height: int
    columns: int
    row_tiles: int  # even: clusters are pairs of them
    stages: int


def tiling(num_rows: int, num_outputs: int, width: int, processors: int) -> Tiling | None:
    """Tiles that one wave of CTAs computes and that waste little, or None."""
    for height in (1, 2):
        row_tiles = 2 * -(-num_rows // (256 * height))
        if num_rows < MIN_FILLED * row_tiles * 128 * height:
            continue
        for half in range(88, 31, -8):
            num_programs = row_tiles * num_outputs // half
            filled = MIN_FILLED * processors <= num_programs <= processors
            if num_outputs % half == 0 and width % BLOCK_K == 0 and filled:
                stage = stage_bytes(128 * height + 2 * half)
                stages = (SHARED_BYTES - 2048) // stage
                return Tiling(height, 2 * half, row_tiles, min(8, stages))
    return None


def takes_swiglu(x: Tensor, gate_up: Tensor) -> bool:
    """Whether `swiglu` is for x (b, d) and gate_up (2 n, d): a shape with a `tiling`."""
    if not fit_for_copies(x, gate_up):
        return False
    return tiling_on(x.device, len(x), len(gate_up) // 2, x.shape[1]) is not None


@cache
def tiling_on(device: torch.device, num_rows: int, num_outputs: int, width: int) -> Tiling | None:
    count = num_processors(device)
    return tiling(num_rows, num_outputs, width, count) if count else None


@cache
def num_processors(device: torch.device) -> int:
    """Of a Hopper GPU; 0 of all others, whose instructions are others."""
    gpu = torch.cuda.get_device_properties(device)
    hopper = (gpu.major, gpu.minor) == (9, 0) and torch.version.hip is None
    return gpu.multi_processor_count if hopper else 0


def swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (2 n, d) times x (b, d) -> (b, n). Contiguous; inference only."""
    (num_rows, width), num_outputs = x.shape, len(gate_up) // 2
    tile = tiling_on(x.device, num_rows, num_outputs, width)
    assert tile is not None, f"no tiling for {tuple(x.shape)}: ask takes_swiglu() first"
    return launch_swiglu(tile, x, gate_up, x.new_empty(num_rows, num_outputs))


def launch_swiglu(tile: Tiling, x: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
    (num_rows, width), num_outputs = x.shape, len(gate_up) // 2
    stage = stage_bytes(128 * tile.height + tile.columns)
    defines = (
        ("K", width), ("HALF", num_outputs), ("BN", tile.columns), ("MI", tile.height),
        ("STAGES", tile.stages),
    )  # fmt: skip
    shared = tile.stages * (stage + 16) + 1024  # the ring begins at a multiple of 1024
    with torch.cuda.device(x.device):
        kernel = load(x.device, "swiglu_rows", shared, tile.columns, defines)
        maps = (
            tile_map(kernel, x, 128 * tile.height),
            tile_map(kernel, gate_up, tile.columns // 2),
        )
        grid = (2 * num_outputs // tile.columns, tile.row_tiles, 1)
        kernel.launch(grid, (1, 2, 1), maps, out, num_rows)
    return out


def stage_bytes(num_rows: int) -> int:
    """Of so many rows of x and W together: BLOCK_K of each row in bfloat16."""
    return num_rows * BLOCK_K * 2


def load(
    device: torch.device, name: str, shared: int, columns: int, defines: tuple[tuple[str, int], ...]
) -> nvrtc.Kernel:
    """The kernel of `name`.cu whose tensor cores' instruction has so many columns."""
    source, options = source_of(name, columns, defines)
    return nvrtc.load(device, name, source, options, shared)


@cache
def source_of(
    name: str, columns: int, defines: tuple[tuple[str, int], ...]
) -> tuple[str, tuple[str, ...]]:
    """Its text, and the compiler's options."""
    files = resources.files("cat_bench")
    source = "".join(files.joinpath(f"{file}.cu").read_text() for file in ("products", name))
    options = ("--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{k}={v}" for k, v in defines))
    return source.replace("@WGMMA@", wgmma(columns)), options


def tile_map(kernel: nvrtc.Kernel, matrix: Tensor, rows: int) -> ctypes.Array:
    return nvrtc.tensor_map(kernel.driver, matrix, rows, BLOCK_K)


def wgmma(columns: int) -> str:
    """The tensor cores' instruction for a tile of 64 rows: its length depends on the columns."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b, int add) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{registers}}},"
    " %{count}, %{count + 1}, p, 1, 1, 0, 0;}}\\n" : {sums} : "l"(a), "l"(b), "r"(add));
}}"""
