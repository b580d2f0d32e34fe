"""SwiGLU of a few hundred rows in one launch, on Hopper GPUs: matrix product and activation.

cuBLAS cuts such a product into tiles for two thirds of the multiprocessors and leaves SwiGLU to
another kernel. This one (products.cu, in CUDA, for Triton knows no clusters that share a load) has
tiles of a size that fills them, and asks for weights before the kernel ahead has ended. Reference:
`kernels.swiglu(F.linear(x, gate_up))`. NVRTC, which comes with PyTorch, compiles it once a shape;
the result is kept in Triton's cache.
"""

import ctypes
import hashlib
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
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) != (9, 0) or torch.version.hip is not None:
        return None
    return tiling(num_rows, num_outputs, width, gpu.multi_processor_count)


def swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (2 n, d) times x (b, d) -> (b, n). Contiguous; inference only.

    `gate_up` is read before the kernel ahead has ended, which must not be the one that wrote it.
    """
    (num_rows, width), num_outputs = x.shape, len(gate_up) // 2
    tile = tiling_on(x.device, num_rows, num_outputs, width)
    assert tile is not None, f"no tiling for {tuple(x.shape)}: ask takes() first"
    out = x.new_empty(num_rows, num_outputs)
    with torch.cuda.device(x.device):
        kernel = load_kernel(x.device, tile, num_outputs, width)
        kernel.launch(tile, x, gate_up, out)
    return out


class Kernel(NamedTuple):
    driver: ctypes.CDLL
    function: ctypes.c_void_p
    shared_bytes: int

    def launch(self, tile: Tiling, x: Tensor, gate_up: Tensor, out: Tensor) -> None:
        num_rows, num_outputs = out.shape
        maps = (
            tensor_map(self.driver, x, 128 * tile.height),
            tensor_map(self.driver, gate_up, tile.columns // 2),
        )
        pointer, rows = ctypes.c_void_p(out.data_ptr()), ctypes.c_int(num_rows)
        values = (*(aligned(m) for m in maps), ctypes.addressof(pointer), ctypes.addressof(rows))
        attributes = (Attribute * 2)()
        attributes[0].id, attributes[0].value[:3] = 4, [1, 2, 1]  # cluster: two tiles of rows
        attributes[1].id, attributes[1].value[0] = 6, 1  # may start before the kernel ahead ends
        config = Config(
            (2 * num_outputs // tile.columns, tile.row_tiles, 1), (384, 1, 1), self.shared_bytes,
            torch.cuda.current_stream().cuda_stream, attributes, len(attributes),
        )  # fmt: skip
        arguments = (ctypes.c_void_p * len(values))(*values)
        check(
            self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None),
            "cuLaunchKernelEx",
        )


@cache
def load_kernel(device: torch.device, tile: Tiling, num_outputs: int, width: int) -> Kernel:
    """Of the current device, into its context."""
    stage = (128 * tile.height + tile.columns) * BLOCK_K * 2
    shared_bytes = tile.stages * (stage + 16) + 1024  # the ring begins at a multiple of 1024
    driver, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    image = cubin(tile, num_outputs, width)
    check(driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"swiglu_rows"), "the kernel")
    check(driver.cuFuncSetAttribute(function, 8, shared_bytes), "dynamic shared memory")
    return Kernel(driver, function, shared_bytes)


def cubin(tile: Tiling, num_outputs: int, width: int) -> bytes:
    """The compiled kernel, from Triton's cache where an earlier process has left it."""
    from triton.runtime.cache import get_cache_manager

    source = resources.files("cat_bench").joinpath("products.cu").read_text()
    source = source.replace("@WGMMA@", wgmma(tile.columns))
    options = [
        "--gpu-architecture=sm_90a", "--std=c++17", f"-DK={width}", f"-DHALF={num_outputs}",
        f"-DBN={tile.columns}", f"-DMI={tile.height}", f"-DSTAGES={tile.stages}",
    ]  # fmt: skip
    text = "\n".join([source, *options, str(torch.version.cuda)])
    cache_manager = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
    found = cache_manager.get_file("swiglu_rows.cubin")
    if found is not None:
        return Path(found).read_bytes()
    image = compile_cuda(source, options)
    cache_manager.put(image, "swiglu_rows.cubin", binary=True)
    return image


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
