"""Linear layers of 2 to 16 rows and of some hundreds or more, on Hopper GPUs in bfloat16.

In CUDA: few_rows.cu reads weights into shared memory before the kernel ahead has ended and splits
a reduction over a cluster, which Triton cannot; many_rows.cu has tiles that fill the
multiprocessors, where cuBLAS's often do not, and does the norm before and SwiGLU behind in the same
launch. products.cu is what both share. References: graph.norm_linear, graph.norm_swiglu and
graph.add_linear_ of other numbers of rows: one is for vector_kernels.py, the rest for cuBLAS.

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
# Rows where our products are faster than cuBLAS's: from so many on with SwiGLU, up to so many
# without, and from so many on with the norm on the way (docs/performance.md says at which shapes).
MIN_MANY, MAX_PLAIN, MIN_NORMED = 224, 256, 2048
# Share of the tensor cores' time that is used, below which cuBLAS is as good.
MIN_USED = {"swiglu": 0.5, "normed": 0.6, "plain": 0.7}
MAX_COLUMNS, MAX_NORMED_COLUMNS = 192, 256  # of a tile
STORING_CLOCKS = 4000  # of a tile, while the tensor cores wait
PRODUCTS_PER_CLOCK = 2048  # of bfloat16 on a multiprocessor
SHARED_BYTES = 227 * 1024  # of a multiprocessor
MAX_STAGES = 8  # of many rows' ring
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
    """Tiles of 128 `height` rows of x by `columns` rows of W, and how many programs share them.

    `norm`: done on the way, which only a height of 1 leaves registers for. Without it programs are
    pairs, which share the columns and ask for half of W each.
    """

    height: int
    columns: int
    num_programs: int
    stages: int
    norm: bool


def tiling(
    num_rows: int, num_outputs: int, width: int, processors: int, swiglu: bool = False
) -> Tiling | None:
    """The tiles that take least time, or None where cuBLAS is as good."""
    norm = num_rows >= MIN_NORMED
    if num_rows < MIN_MANY or not (norm or swiglu or num_rows <= MAX_PLAIN):
        return None
    together = 1 if norm else 2  # programs that go through the tiles side by side
    found = []
    for height in (1,) if norm else (1, 2):
        for columns in range(96, (MAX_NORMED_COLUMNS if norm else MAX_COLUMNS) + 1, 32):
            outputs = columns // 2 if swiglu else columns
            num_tiles = -(-num_rows // (128 * height * together)) * -(-num_outputs // outputs)
            waves = -(-num_tiles // (processors // together))
            clocks = waves * (width / 64 * clocks_of(height, columns) + STORING_CLOCKS)
            num_programs = together * min(num_tiles, processors // together)
            found.append((clocks, height, columns, num_programs))
    clocks, height, columns, num_programs = min(found)
    products = num_rows * num_outputs * width * (2 if swiglu else 1)
    least = MIN_USED["swiglu" if swiglu else "normed" if norm else "plain"]
    if products < least * clocks * processors * PRODUCTS_PER_CLOCK:
        return None
    without_ring = many_bytes(Tiling(height, columns, num_programs, 0, norm), width)
    stages = (SHARED_BYTES - without_ring) // (stage_bytes(128 * height + columns) + 16)
    stages = min(MAX_STAGES, stages)
    return Tiling(height, columns, num_programs, stages, norm) if stages >= 2 else None


def clocks_of(height: int, columns: int) -> int:
    """Of a multiprocessor for 64 inputs: its tensor cores, or its shared memory at 128 bytes a
    clock, into which every tile is written once and from which two warp groups read.
    """
    tensor_cores = 64 * 128 * height * columns // PRODUCTS_PER_CLOCK
    written, read = 128 * height + columns, height * (128 + 2 * columns)
    return max(tensor_cores, written + read)


def takes_many(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    out: Tensor | None = None,
    swiglu: bool = False,
) -> bool:
    """Whether `norm_many` is for these, shaped as there."""
    if len(x) < MIN_MANY or len(weight) % 16:
        return False
    if not fit_for_copies(x, norm_weight[None], weight, *([] if out is None else [out])):
        return False
    return tiling_on(x.device, len(x), *outputs_of(weight, swiglu), swiglu) is not None


@cache
def tiling_on(
    device: torch.device, num_rows: int, num_outputs: int, width: int, swiglu: bool = False
) -> Tiling | None:
    count = num_processors(device)
    return tiling(num_rows, num_outputs, width, count, swiglu) if count else None


def outputs_of(weight: Tensor, swiglu: bool) -> tuple[int, int]:
    """Outputs and inputs."""
    return len(weight) // (2 if swiglu else 1), weight.shape[1]


@cache
def num_processors(device: torch.device) -> int:
    """Of a Hopper GPU; 0 of all others, whose instructions are others."""
    gpu = torch.cuda.get_device_properties(device)
    hopper = (gpu.major, gpu.minor) == (9, 0) and torch.version.hip is None
    return gpu.multi_processor_count if hopper else 0


def norm_many(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    out: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """W RMSNorm(x) of hundreds of rows or more -> (b, n), in `out` if given. x (b, d), norm_weight
    (d,), weight (n, d); `swiglu`: silu(gate) * up of weight (2 n, d).
    """
    from cat_bench import kernels

    num_outputs, width = outputs_of(weight, swiglu)
    tile = tiling_on(x.device, len(x), num_outputs, width, swiglu)
    assert tile is not None, f"no tiling for {tuple(x.shape)}: ask takes_many() first"
    out = x.new_empty(len(x), num_outputs) if out is None else out
    shapes = x.shape[1], *norm_weight.shape, *out.shape
    assert shapes == (width, width, len(x), num_outputs), "inputs, norm and weights must fit"
    if not tile.norm:
        x = kernels.rms_norm(x, norm_weight, eps)
    assert out.dtype == x.dtype and out.stride(1) == 1 and out.stride(0) % 8 == 0, (
        "stored by eights"
    )
    defines = (
        ("K", width), ("N", num_outputs), ("MI", tile.height), ("BN", tile.columns),
        ("STAGES", tile.stages), ("SWIGLU", int(swiglu)), ("NORM", int(tile.norm)),
    )  # fmt: skip
    with torch.cuda.device(x.device):
        kernel = load(x.device, "many_rows", many_bytes(tile, width), tile.columns, defines)
        maps = tile_map(kernel, x, 128 * tile.height), tile_map(kernel, weight, tile.columns // 2)
        grid = (tile.num_programs, 1, 1)
        cluster = (1 if tile.norm else 2, 1, 1)
        kernel.launch(grid, cluster, maps, out, norm_weight, eps, len(x), out.stride(0))
    return out


def many_bytes(tile: Tiling, width: int) -> int:
    """Of shared memory: the ring, which begins at a multiple of 1024, and the norm's weight."""
    ring = tile.stages * (stage_bytes(128 * tile.height + tile.columns) + 16)
    return 1024 + ring + (-(-width // BLOCK_K) * BLOCK_K * 2 if tile.norm else 0)


def stage_bytes(num_rows: int) -> int:
    """Of so many rows of x and W together, 64 inputs of each in bfloat16."""
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
    """The tensor cores' instruction for a tile of 64 rows, which lies in shared memory or in
    registers: its length depends on the columns.
    """
    count = columns // 2
    descriptor = instruction(columns, "u64 a", f"%{count}", '"l"(a)', count + 1, "1, 1, 0, 0")
    four = ", ".join(f"%{count + i}" for i in range(4))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    held = instruction(columns, "u32 (&a)[4]", f"{{{four}}}", inputs, count + 4, "1, 1, 0")
    return descriptor + "\n" + held


def instruction(columns: int, a: str, operand: str, inputs: str, b: int, ending: str) -> str:
    """Of `a` as a parameter, an operand and inputs; `b` is the number of that operand."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""__device__ __forceinline__ void wgmma(float (&d)[{count}], {a}, u64 b, int add) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{b + 1}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{registers}}},"
    " {operand}, %{b}, p, {ending};}}\\n" : {sums} : {inputs}, "l"(b), "r"(add));
}}"""
