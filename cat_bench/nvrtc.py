"""CUDA C++ of our own: compiled by NVRTC once, kept in Triton's cache, launched by the driver.

For what Triton cannot say (products.py). NVRTC comes with PyTorch, the driver with the GPU.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cat_bench.errors import UserError


class Kernel(NamedTuple):
    """A function loaded into the context of one device, and its dynamic shared memory."""

    driver: ctypes.CDLL
    function: ctypes.c_void_p
    shared_bytes: int

    def launch(
        self,
        grid: tuple[int, int, int],
        cluster: tuple[int, int, int],
        maps: Sequence[ctypes.Array],
        *others: Tensor | float,
    ) -> None:
        """384 threads a CTA, on the current stream; may start before the kernel ahead has ended.

        Arguments of the kernel: `maps`, then `others`: pointers, int and float.
        """
        passed = [as_argument(other) for other in others]
        values = [*(aligned(m) for m in maps), *(ctypes.addressof(value) for value in passed)]
        attributes = (Attribute * 2)()
        attributes[0].id, attributes[0].value[:3] = 4, cluster  # the cluster's size
        attributes[1].id, attributes[1].value[0] = 6, 1  # programmatic dependent launch
        stream = torch.cuda.current_stream().cuda_stream
        config = LaunchConfig(
            grid, (384, 1, 1), self.shared_bytes, stream, attributes, len(attributes)
        )
        arguments = (ctypes.c_void_p * len(values))(*values)
        status = self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None)
        check(status, "cuLaunchKernelEx")


def as_argument(value: Tensor | float) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def load(
    device: torch.device, name: str, source: str, options: tuple[str, ...], shared: int
) -> Kernel:
    """`source`'s function `name`, for the current device, which `device` must be."""
    driver, module, function = cuda_driver(), ctypes.c_void_p(), ctypes.c_void_p()
    image = cubin(name, source, options)
    check(driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    check(driver.cuFuncSetAttribute(function, 8, shared), "dynamic shared memory")
    return Kernel(driver, function, shared)


@cache
def cuda_driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def cubin(name: str, source: str, options: tuple[str, ...]) -> bytes:
    """The compiled kernel, from Triton's cache where an earlier process has left it."""
    from triton.runtime.cache import get_cache_manager

    text = "\n".join([source, *options, str(torch.version.cuda)])
    cache_manager = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
    found = cache_manager.get_file(f"{name}.cubin")
    if found is not None:
        return Path(found).read_bytes()
    image = compile_cuda(name, source, options)
    cache_manager.put(image, f"{name}.cubin", binary=True)
    return image


def compile_cuda(name: str, source: str, options: Sequence[str]) -> bytes:
    """CUDA C++ to machine code, by NVRTC. Raises RuntimeError with the compiler's words."""
    nvrtc, program, size = nvrtc_library(), ctypes.c_void_p(), ctypes.c_size_t()
    text = ctypes.c_char_p(source.encode())
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None
    )
    check(status, "nvrtcCreateProgram")
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name}.cu does not compile: {log.value.decode()}")
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
    beside = Path(str(torch.__file__)).parents[1].glob(f"nvidia/*/lib/{name}")
    try:
        return ctypes.CDLL(str(next(beside, name)))
    except OSError as error:
        package = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
        raise UserError(
            f"A kernel of decode path cuda_graph is compiled by NVRTC: no {name} ({error}).",
            f"Install it (pip install '{package}=={major}.*'), or use --decode-path eager.",
        ) from error


def tensor_map(
    driver: ctypes.CDLL, matrix: Tensor, box_rows: int, box_columns: int
) -> ctypes.Array:
    """What the copy engine must know of a bfloat16 matrix (rows, columns), to copy boxes of it.

    The matrix and its rows begin at multiples of 16 bytes. 128 bytes, from `aligned` on.
    """
    rows, columns = matrix.shape
    return encoded_map(
        driver, matrix.data_ptr(), rows, columns, matrix.stride(0), box_rows, box_columns
    )


@lru_cache(4096)  # weights stay where they are: half of a launch's time on the host
def encoded_map(
    driver: ctypes.CDLL,
    pointer: int,
    rows: int,
    columns: int,
    stride: int,
    box_rows: int,
    box_columns: int,
) -> ctypes.Array:
    memory = (ctypes.c_uint64 * 24)()
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * stride)
    box, ones = (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned(memory)), 9, 2, ctypes.c_void_p(pointer),  # 9: bfloat16
        sizes, strides, box, ones, 0, 3, 3, 0,  # swizzle 128 bytes, L2 fetches 256, zeros outside
    )  # fmt: skip
    check(status, "cuTensorMapEncodeTiled")
    return memory


def aligned(memory: ctypes.Array) -> int:
    """The first address in it that is a multiple of 64."""
    return (ctypes.addressof(memory) + 63) // 64 * 64


def check(status: int, what: str) -> None:
    """Raises RuntimeError unless `status` of the driver or of NVRTC is 0."""
    if status:
        raise RuntimeError(f"{what} failed with status {status}")


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [
        ("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16),
    ]  # fmt: skip


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip
