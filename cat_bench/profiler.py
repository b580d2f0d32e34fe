"""Clocks, counters and ceilings: how a number is measured, the same for every architecture.

Protocol of evaluation_spec.md 4.1: whole generations are repeated, every raw sample is kept, CUDA
events and the host clock run side by side. Each memory counter has a name of its own (4.2). The
ceilings (4.3) are measured on this device in the same run: a read-only kernel and a matmul.

Nothing here prints, stores or decides what is good: efficiency.py turns it into rows.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cat_bench.architecture import DTYPES, Architecture, State, Tokens, step_kind
from cat_bench.generate import Prompt, greedy

Clock = Callable[[], float]  # seconds
LONG_S = 2.0  # from here on one warm-up is enough
MIN_ENERGY_S = 1.0  # the counter moves every 20 to 100 ms: over less, its steps would show


# --- time -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One timed call. On CUDA `device_s` is between events; on a CPU it is the host clock."""

    device_s: float
    host_s: float
    decode_s: float | None  # device clock from the call's own mark to its end; None without mark
    energy_j: float | None


class Timing(NamedTuple):
    """All repeats of one thing, raw."""

    warmups: list[Call]  # the first is the first call ever, with lazy initialisation in it
    repeats: list[Call]

    @property
    def latency_s(self) -> list[float]:
        return [call.device_s for call in self.repeats]

    @property
    def host_latency_s(self) -> list[float]:
        return [call.host_s for call in self.repeats]

    @property
    def decode_s(self) -> list[float]:
        return [call.decode_s for call in self.repeats if call.decode_s is not None]

    @property
    def energy_j(self) -> list[float]:
        """Joules per repeat; empty without counter, or where all repeats are too short for it."""
        samples = [call.energy_j for call in self.repeats if call.energy_j is not None]
        return samples if sum(self.latency_s) >= MIN_ENERGY_S else []

    @property
    def clock_difference(self) -> float:
        """How far the two clocks' medians are apart: 0.02 is 2 %."""
        return statistics.median(self.host_latency_s) / statistics.median(self.latency_s) - 1


def num_warmups(one_s: float) -> int:
    """Warm-ups for something that takes `one_s` seconds."""
    return 3 if one_s < LONG_S else 1


def num_repeats(one_s: float) -> int:
    return 10 if one_s < 5 else 5 if one_s < 20 else 3


def timed(
    run: Callable[[Callable[[], None]], object],
    device: str,
    warmups: int | None = None,
    repeats: int | None = None,
    meter: Callable[[], float] | None = None,
    clock: Clock = time.perf_counter,
    first: Callable[[Callable[[], None]], object] | None = None,
) -> Timing:
    """Call `run(mark)` until there are enough warm-ups and repeats; keep every sample.

    Warm-ups or repeats None: by the rule, for the shortest call so far (the first may have tuned
    kernels in it). `run` may call `mark()` once: `decode_s` counts from there. `meter()` returns
    joules. `first`, if given, is called in place of `run` the first time, as a warm-up.
    """
    calls = [_call(first or run, device, meter, clock)]
    while True:
        one_s = min(call.host_s for call in calls)
        num_first = num_warmups(one_s) if warmups is None else warmups
        num_first = max(num_first, int(first is not None))
        if len(calls) >= num_first + (num_repeats(one_s) if repeats is None else repeats):
            return Timing(calls[:num_first], calls[num_first:])
        calls.append(_call(run, device, meter, clock))


def _call(
    run: Callable[[Callable[[], None]], object],
    device: str,
    meter: Callable[[], float] | None,
    clock: Clock,
) -> Call:
    reset_peaks(device)  # so the peaks read afterwards are those of the last repeat
    joules_before = meter() if meter else 0.0
    marks = Marks(device, clock)
    synchronize(device)
    start_s = clock()
    marks.add()
    run(marks.add)
    marks.add()
    synchronize(device)
    host_s = clock() - start_s
    parts_s = marks.intervals_s()
    return Call(
        device_s=sum(parts_s) if device == "cuda" else host_s,
        host_s=host_s,
        decode_s=parts_s[1] if len(parts_s) == 2 else None,
        energy_j=meter() - joules_before if meter else None,
    )


class Marks:
    """Points in time on the device's own clock: CUDA events, which never wait, or the host's."""

    def __init__(self, device: str, clock: Clock = time.perf_counter):
        self.device, self.clock, self.points = device, clock, []

    def add(self, *_: object) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(self.clock())

    def intervals_s(self) -> list[float]:
        """Seconds between neighbouring points. On CUDA all of them must have been reached."""
        pairs = zip(self.points, self.points[1:], strict=False)
        if self.device == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


class StepTime(NamedTuple):
    kind: str  # of Architecture.step_kind
    num_tokens: int  # the step read this token number, 1-based
    duration_s: float


def step_times(
    model: Architecture, prompt: Prompt, state: State, tokens: Tokens, device: str
) -> list[StepTime]:
    """Every step of one generation, timed apart from the repeats: one event per step."""
    marks, first = Marks(device), prompt.shape[1] + 1
    new_tokens = tokens.shape[1] - prompt.shape[1]
    greedy(model, prompt, new_tokens, state, tokens, on_prefill=marks.add, on_step=marks.add)
    synchronize(device)
    return [
        StepTime(step_kind(model, n), n, duration_s)
        for n, duration_s in enumerate(marks.intervals_s(), first)
    ]


def stopwatch(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Host seconds of one call, the device's work included, and what it returned."""
    synchronize(device)
    start_s = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start_s, result


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- memory ---------------------------------------------------------------------------------------


# How libraries below torch word the lack of memory, as plain RuntimeErrors.
OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(problem) for text in OUT_OF_MEMORY_TEXTS)


def reset_peaks(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory_counters(device: str) -> dict[str, int]:
    """Bytes by counter name. Never compare one counter with another (evaluation_spec.md 4.2).

    On a CPU only the process's resident peak exists, interpreter and libraries included: torch's
    allocations are invisible to tracemalloc.
    """
    if device != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
        return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "graph_pool_bytes": graph_pool_bytes(torch.cuda.memory_snapshot()),
        "device_used_bytes": total - free,
    }


def graph_pool_bytes(segments: Iterable[dict]) -> int:
    """Bytes of private pools: after capture their blocks count as free, so no peak shows them."""
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def weights_bytes(model: Any) -> int:
    """Parameters and buffers of a torch module, shared ones once. Also right on the meta device."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def state_live_bytes(state: State) -> int:
    """Bytes of every tensor in nested tuples, lists and dicts, a shared storage once.

    A storage counts whole, also where the tensor shows a part of it. Other objects, such as
    captured graphs, hold no state.
    """
    storages = {}
    for tensor in _tensors(state):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


# --- energy ---------------------------------------------------------------------------------------


def energy_meter(device: str) -> Callable[[], float] | None:
    """A function that reads the GPU's energy counter, in joules. None: no GPU, NVML or counter."""
    if device != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{_device_uuid()}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older GPUs have no counter
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # mJ


def _device_uuid() -> str:
    """Of torch's current device: NVML numbers devices without looking at CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


# --- ceilings -------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What no generation on this device can beat."""

    read_bandwidth_bytes_per_s: float
    matmul_flops_per_s: float
    source: str  # "measured", or "assumed" from a table


def ceilings(device: str, dtype: str, repeats: int = 10) -> Ceilings:
    """Measure both; about a second on a GPU. Needs up to 4 GiB of free device memory."""
    return Ceilings(
        read_bandwidth_bytes_per_s(device, dtype, repeats),
        matmul_flops_per_s(device, dtype, repeats),
        "measured",
    )


def read_bandwidth_bytes_per_s(device: str, dtype: str, repeats: int = 10) -> float:
    """The best of four read-only kernels over a buffer far larger than any cache; each a median."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        num_bytes = min(4 * 2**30, free // 2)
    else:
        num_bytes = 128 * 2**20
    columns = 8192
    rows = num_bytes // (DTYPES[dtype].itemsize * columns)
    matrix = torch.ones(rows, columns, dtype=DTYPES[dtype], device=device)
    vector = torch.ones(columns, dtype=DTYPES[dtype], device=device)
    readers = (
        lambda: matrix.sum(),
        lambda: matrix.amax(dim=1),
        lambda: matrix.view(torch.int32).amax(),
        lambda: torch.mv(matrix, vector),
    )
    fastest_s = min(_median_s(reader, device, repeats) for reader in readers)
    return matrix.nbytes / fastest_s


def matmul_flops_per_s(device: str, dtype: str, repeats: int = 10) -> float:
    """2 n^3 over the median time of an n x n product of random numbers (zeros run faster)."""
    size = 8192 if device == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, dtype=DTYPES[dtype], device=device, generator=generator)
        for _ in range(2)
    )
    return 2 * size**3 / _median_s(lambda: left @ right, device, repeats)


def _median_s(function: Callable[[], object], device: str, repeats: int) -> float:
    timing = timed(lambda _: function(), device, warmups=3, repeats=repeats)
    return statistics.median(timing.latency_s)
