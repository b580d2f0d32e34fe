"""Linear layers of 2 to 16 rows, and SwiGLU of a few hundred, on Hopper GPUs in bfloat16.

In CUDA, for Triton knows no clusters: few_rows.cu reads weights into shared memory before the
kernel ahead has ended and splits a reduction over a cluster; swiglu_rows.cu has tiles that fill the
multiprocessors, where cuBLAS's fill two thirds, and does SwiGLU in the same launch. References:
graph.norm_linear, graph.norm_swiglu and graph.add_linear_ of other numbers of rows, which stay with
cuBLAS. NVRTC, which comes with PyTorch, compiles a kernel once a shape; the result is kept in
Triton's cache.

Every function reads weights before the kernel ahead has ended: that must not have written them.
Shapes: b rows, d inputs, n outputs.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cat_bench.errors import UserError

BLOCK_K = 64  # inputs in a tile: 128 bytes, the width of the copy engine's swizzle
SHARED_BYTES = 227 * 1024  # of a multiprocessor
MIN_FILLED = 7 / 8  # of the rows in tiles, and of the multiprocessors: below, cuBLAS is as good
MAX_FEW = 16  # rows: at 64 cuBLAS is as good
FEW_CTAS = 84  # that read weights, at least, where the reduction can be split so far


def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear`, `add_linear_` and `swiglu_of_few` are for x (b, d) and weight (n, d)."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not 2 <= len(x) <= MAX_FEW:
        return False
    aligned_rows = x.is_contiguous() and x.shape[1] % 8 == 0 and len(weight) % 8 == 0
    one_wave = len(weight) <= 128 * num_processors(x.device)  # none on other GPUs
    return one_wave and aligned_rows and x.data_ptr() % 16 == 0


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T of few rows -> (b, n), in `out` if given."""
    out = x.new_empty(len(x), len(weight)) if out is None else out
    return launch_few(x, weight, out)


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y += x W^T of few rows, in place. y (b, n)."""
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
    # A long ring holds most of a tile before x is there; with little to read a short one is faster.
    ring = 100 * 1024 if splits == 8 else 200 * 1024
    stage = (128 + rows) * BLOCK_K * 2
    return FewTiling(rows, splits, max(2, min(-(-steps // splits), ring // stage)))


def launch_few(
    x: Tensor, weight: Tensor, out: Tensor, swiglu: bool = False, add: bool = False
) -> Tensor:
    (num_rows, width), num_weight_rows = x.shape, len(weight)
    rows, splits, stages = few_tiling(num_rows, num_weight_rows, width)
    stage = (128 + rows) * BLOCK_K * 2
    shared = max(stages * (stage + 16), rows * 132 * 4) + 1024  # a ring begins at multiples of 1024
    defines = (
        ("K", width), ("N", num_weight_rows), ("R", rows), ("SPLITS", splits), ("STAGES", stages),
        ("SWIGLU", int(swiglu)), ("ADD", int(add)),
    )  # fmt: skip
    with torch.cuda.device(x.device):
        kernel = load_kernel(x.device, "few_rows", shared, rows, defines)
        maps = tensor_map(kernel.driver, x, rows), tensor_map(kernel.driver, weight, 64)
        grid = (-(-num_weight_rows // 128) * splits, 1, 1)
        kernel.launch(grid, (splits, 1, 1), maps, out, num_rows, out.stride(0))
    return out


class Tiling(NamedTuple):
    """A CTA's tile: 128 `height` rows of x by `columns` of W, half gate and half up."""

    height: int
    columns: int
    row_tiles: int  # even: clusters are pairs of them
    stages: int


def tiling(num_rows: int, num_outputs: int, width: int, num_processors: int) -> Tiling | None:
    """Tiles that one wave of CTAs computes and that waste little, or None."""
    for height in (1, 2):
        row_tiles = 2 * -(-num_rows // (256 * height))
        if num_rows < MIN_FILLED * row_tiles * 128 * height:
            continue
        for half in range(88, 31, -8):
            num_programs = row_tiles * num_outputs // half
            filled = MIN_FILLED * num_processors <= num_programs <= num_processors
            if num_outputs % half == 0 and width % BLOCK_K == 0 and filled:
                stage = (128 * height + 2 * half) * BLOCK_K * 2
                stages = (SHARED_BYTES - 2048) // stage
                return Tiling(height, 2 * half, row_tiles, min(8, stages))
    return None


def takes(x: Tensor, gate_up: Tensor) -> bool:
    """Whether `swiglu` is for these: bfloat16, a Hopper GPU, and a shape with a `tiling`."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
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
    assert tile is not None, f"no tiling for {tuple(x.shape)}: ask takes() first"
    return launch_swiglu(tile, x, gate_up, x.new_empty(num_rows, num_outputs))


def launch_swiglu(tile: Tiling, x: Tensor, gate_up: Tensor, out: Tensor) -> Tensor:
    (num_rows, width), num_outputs = x.shape, len(gate_up) // 2
    stage = (128 * tile.height + tile.columns) * BLOCK_K * 2
    defines = (
        ("K", width), ("HALF", num_outputs), ("BN", tile.columns), ("MI", tile.height),
        ("STAGES", tile.stages),
    )  # fmt: skip
    shared = tile.stages * (stage + 16) + 1024  # the ring begins at a multiple of 1024
    with torch.cuda.device(x.device):
        kernel = load_kernel(x.device, "swiglu_rows", shared, tile.columns, defines)
        maps = (
            tensor_map(kernel.driver, x, 128 * tile.height),
            tensor_map(kernel.driver, gate_up, tile.columns // 2),
        )
        grid = (2 * num_outputs // tile.columns, tile.row_tiles, 1)
        kernel.launch(grid, (1, 2, 1), maps, out, num_rows)
    return out


class Kernel(NamedTuple):
    driver: ctypes.CDLL
    function: ctypes.c_void_p
    shared_bytes: int

    def launch(
        self,
        grid: tuple[int, int, int],
        cluster: tuple[int, int, int],
        maps: Sequence[ctypes.Array],
        out: Tensor,
        *numbers: int,
    ) -> None:
        """On the current stream, with threads of two warp groups and one that loads."""
        pointer, integers = ctypes.c_void_p(out.data_ptr()), [ctypes.c_int(n) for n in numbers]
        addresses = [ctypes.addressof(value) for value in (pointer, *integers)]
        values = [*(aligned(m) for m in maps), *addresses]
        attributes = (Attribute * 2)()
        attributes[0].id, attributes[0].value[:3] = 4, cluster
        attributes[1].id, attributes[1].value[0] = 6, 1  # may start before the kernel ahead ends
        stream = torch.cuda.current_stream().cuda_stream
        config = Config(grid, (384, 1, 1), self.shared_bytes, stream, attributes, len(attributes))
        arguments = (ctypes.c_void_p * len(values))(*values)
        status = self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None)
        check(status, "cuLaunchKernelEx")


@cache
def load_kernel(
    device: torch.device, name: str, shared: int, columns: int, defines: tuple[tuple[str, int], ...]
) -> Kernel:
    """Of the current device, into its context."""
    driver, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    image = cubin(name, columns, defines)
    check(driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    check(driver.cuFuncSetAttribute(function, 8, shared), "dynamic shared memory")
    return Kernel(driver, function, shared)


def cubin(name: str, columns: int, defines: tuple[tuple[str, int], ...]) -> bytes:
    """The compiled kernel, from Triton's cache where an earlier process has left it."""
    from triton.runtime.cache import get_cache_manager

    source, options = source_of(name, columns, defines)
    text = "\n".join([source, *options, str(torch.version.cuda)])
    cache_manager = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
    found = cache_manager.get_file(f"{name}.cubin")
    if found is not None:
        return Path(found).read_bytes()
    image = compile_cuda(source, options)
    cache_manager.put(image, f"{name}.cubin", binary=True)
    return image


def source_of(
    name: str, columns: int, defines: tuple[tuple[str, int], ...]
) -> tuple[str, list[str]]:
    """The text of a kernel whose instruction has so many columns, and the compiler's options."""
    files = resources.files("cat_bench")
    source = "".join(files.joinpath(f"{file}.cu").read_text() for file in ("products", name))
    options = ["--gpu-architecture=sm_90a", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in defines]
    return source.replace("@WGMMA@", wgmma(columns)), options


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


def compile_cuda(source: str, options: list[str]) -> bytes:
    """CUDA C++ to machine code, by NVRTC. Raises RuntimeError with the compiler's words."""
    nvrtc, program, size = nvrtc_library(), ctypes.c_void_p(), ctypes.c_size_t()
    text = ctypes.c_char_p(source.encode())
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"products.cu", 0, None, None)
    check(status, "nvrtcCreateProgram")
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"products.cu does not compile: {log.value.decode()}")
    check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    image = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetCUBIN(program, image), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def nvrtc_library() -> ctypes.CDLL:
    """PyTorch's own: beside it where pip installed it, otherwise where the loader looks.

    Raises UserError where there is none.
    """
    major = str(torch.version.cuda).split(".")[0]
    name = f"libnvrtc.so.{major}"
    beside = Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}")
    try:
        return ctypes.CDLL(str(next(beside, name)))
    except OSError as error:
        package = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
        raise UserError(
            f"A kernel of decode path cuda_graph is compiled by NVRTC: no {name} ({error}).",
            f"Install it (pip install '{package}=={major}.*'), or use --decode-path eager.",
        ) from error


def tensor_map(driver: ctypes.CDLL, matrix: Tensor, box_rows: int) -> ctypes.Array:
    """What the copy engine must know of a bfloat16 matrix (rows, columns); 128 bytes, `aligned`."""
    memory = (ctypes.c_uint64 * 24)()
    sizes = (ctypes.c_uint64 * 2)(matrix.shape[1], matrix.shape[0])
    strides = (ctypes.c_uint64 * 1)(2 * matrix.stride(0))
    box, ones = (ctypes.c_uint32 * 2)(BLOCK_K, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned(memory)), 9, 2, ctypes.c_void_p(matrix.data_ptr()),  # 9: bfloat16
        sizes, strides, box, ones, 0, 3, 3, 0,  # swizzle 128 bytes, L2 fetches 256, zeros outside
    )  # fmt: skip
    check(status, "cuTensorMapEncodeTiled")
    return memory


def aligned(memory: ctypes.Array) -> int:
    """The first address in it that is a multiple of 64."""
    return (ctypes.addressof(memory) + 63) // 64 * 64


def check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with CUDA error {status}")


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [
        ("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16),
    ]  # fmt: skip


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip
