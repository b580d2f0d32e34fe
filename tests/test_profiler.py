"""The rule of warm-ups and repeats on a fake clock; counters, the state walker, ceilings."""

import gc
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cat_bench import profiler
from cat_bench.architecture import build
from cat_bench.generate import greedy, new_state, prompt_tokens, token_buffer
from cat_bench.profiler import Call, Timing, state_live_bytes, timed
from cat_bench.spec import parse


class FakeTime:
    """A clock that only work moves: each run takes the next of `durations_s`, the last for ever."""

    def __init__(self, *durations_s: float):
        self.durations_s, self.now_s, self.runs = list(durations_s), 0.0, 0

    def clock(self) -> float:
        return self.now_s

    def run(self, mark) -> None:
        self.now_s += self.durations_s[min(self.runs, len(self.durations_s) - 1)]
        self.runs += 1


@pytest.mark.parametrize(
    "one_s, warmups, repeats",
    [
        (0.01, 3, 10),
        (1.99, 3, 10),
        (2.0, 1, 10),
        (4.99, 1, 10),
        (5.0, 1, 5),
        (19.9, 1, 5),
        (20, 1, 3),
    ],
)
def test_warmups_and_repeats_follow_the_rule(one_s: float, warmups: int, repeats: int) -> None:
    fake = FakeTime(one_s)
    timing = timed(fake.run, "cpu", clock=fake.clock)
    assert (len(timing.warmups), len(timing.repeats)) == (warmups, repeats)
    assert fake.runs == warmups + repeats
    assert timing.latency_s == pytest.approx([one_s] * repeats)


def test_a_slow_first_call_does_not_fix_the_rule() -> None:
    """30 s of kernel tuning, then 1 s a generation: still 3 warm-ups and 10 repeats."""
    fake = FakeTime(30, 1)
    timing = timed(fake.run, "cpu", clock=fake.clock)
    assert [call.host_s for call in timing.warmups] == [30, 1, 1]
    assert timing.latency_s == [1] * 10


def test_given_numbers_override_the_rule() -> None:
    fake = FakeTime(30, 1)
    timing = timed(fake.run, "cpu", warmups=1, repeats=2, clock=fake.clock)
    assert (len(timing.warmups), timing.latency_s) == (1, [1, 1])


def test_raw_samples_stay_in_order() -> None:
    fake = FakeTime(1, 1, 1, 5, 1, 9)
    timing = timed(fake.run, "cpu", repeats=4, clock=fake.clock)
    assert timing.latency_s == [5, 1, 9, 9]  # no sample is dropped as an outlier


def test_decode_time_counts_from_the_mark() -> None:
    fake = FakeTime(0)

    def run(mark) -> None:
        fake.now_s += 1
        mark()
        fake.now_s += 3

    timing = timed(run, "cpu", repeats=2, clock=fake.clock)
    assert timing.latency_s == [4, 4]
    assert timing.decode_s == [3, 3]
    assert timed(fake.run, "cpu", repeats=2, clock=fake.clock).decode_s == []


def test_energy_is_the_counters_growth_of_each_repeat() -> None:
    fake = FakeTime(2)
    timing = timed(fake.run, "cpu", repeats=3, meter=lambda: fake.now_s * 300, clock=fake.clock)
    assert timing.energy_j == [600, 600, 600]
    fake = FakeTime(0.01)  # 3 x 10 ms: the counter's own steps would be all that one sees
    timing = timed(fake.run, "cpu", repeats=3, meter=lambda: fake.now_s * 300, clock=fake.clock)
    assert timing.energy_j == []


@pytest.mark.parametrize(("one_s", "num_samples"), [(0.375, 3), (0.3125, 0)])
def test_energy_needs_a_second_in_all(one_s: float, num_samples: int) -> None:
    fake = FakeTime(one_s)
    timing = timed(fake.run, "cpu", repeats=3, meter=lambda: fake.now_s * 300, clock=fake.clock)
    assert timing.energy_j == [300 * one_s] * num_samples


def test_no_meter_without_a_gpu() -> None:
    assert profiler.energy_meter("cpu") is None


def test_clock_difference_compares_medians() -> None:
    repeats = [Call(1.0, 1.03, None, None), Call(1.0, 1.03, None, None), Call(1.0, 9.0, None, None)]
    assert Timing([], repeats).clock_difference == pytest.approx(0.03)


# --- steps ----------------------------------------------------------------------------------------


def test_step_times_cover_every_step_and_its_class() -> None:
    text = "cat:chunk_size=4,width=64,num_layers=1,max_len=32,vocab_size=96"
    model = build(parse(text))
    prompt, state = prompt_tokens(1, 3, 0, "cpu", 96), new_state(model, 1, 14)
    tokens = token_buffer(1, 14, "cpu")
    steps = profiler.step_times(model, prompt, state, tokens, "cpu")
    assert [step.num_tokens for step in steps] == list(range(4, 14))
    assert [n for _, n, _ in steps if model.step_kind(n) == "boundary"] == [4, 8, 12]
    assert all(step.kind == model.step_kind(step.num_tokens) for step in steps)
    assert all(step.duration_s > 0 for step in steps)
    assert torch.equal(tokens, greedy(model, prompt, 11))


def test_stopwatch_returns_the_result() -> None:
    duration_s, result = profiler.stopwatch(lambda: 7, "cpu")
    assert duration_s > 0 and result == 7


# --- memory ---------------------------------------------------------------------------------------


class Graph:
    """Like a captured graph: an object that refers to buffers, no part of the state."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer


class Nested(NamedTuple):
    keys: list[Tensor]
    inner: tuple
    by_name: dict[str, Tensor]
    captured: Graph
    num_tokens: int = 3


def test_live_bytes_walk_nested_containers_and_count_a_storage_once() -> None:
    base = torch.zeros(10, dtype=torch.float64)  # 80 bytes
    state = Nested(
        keys=[base, base[2:5], base.view(2, 5)],
        inner=(torch.zeros(3, dtype=torch.bfloat16), (torch.zeros(4, dtype=torch.int64),)),
        by_name={"conv": torch.zeros(2, dtype=torch.float32)},
        captured=Graph(torch.zeros(1000)),
    )
    assert state_live_bytes(state) == 80 + 6 + 32 + 8


def test_live_bytes_count_a_storage_whole() -> None:
    assert state_live_bytes((torch.zeros(100, dtype=torch.int8)[:3],)) == 100


def test_graph_pool_bytes_leave_the_common_pool_out() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000},
        {"segment_pool_id": (0, 1), "total_size": 20},
        {"segment_pool_id": (7, 0), "total_size": 3},
    ]
    assert profiler.graph_pool_bytes(segments) == 23


def test_weights_bytes_count_tied_parameters_once_and_buffers_too() -> None:
    for device in ("cpu", "meta"):
        layers = [torch.nn.Linear(4, 4, bias=False, device=device) for _ in range(2)]
        model = torch.nn.Sequential(*layers)
        model[1].weight = model[0].weight
        model.register_buffer("table", torch.zeros(5, device=device))
        assert profiler.weights_bytes(model) == 4 * (16 + 5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_resident_peak_is_in_bytes() -> None:
    peak = profiler.memory_counters("cpu")["peak_rss_bytes"]
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    assert peak == pytest.approx(1024 * kib, rel=0.05)


# --- ceilings -------------------------------------------------------------------------------------


def test_ceilings_of_this_cpu_are_positive_and_called_measured() -> None:
    found = profiler.ceilings("cpu", "float32", repeats=1)
    assert found.source == "measured"
    assert 1e8 < found.read_bandwidth_bytes_per_s < 5e12
    assert 1e8 < found.matmul_flops_per_s < 1e14


@pytest.mark.gpu
def test_graph_pools_are_seen_by_their_own_counter_only() -> None:
    gc.collect()  # graphs of earlier tests must not give their pools back in between
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    before = profiler.memory_counters("cuda")
    with torch.cuda.graph(graph):
        inside = torch.ones(64 * 2**20, device="cuda")
    del inside
    after = profiler.memory_counters("cuda")
    assert after["graph_pool_bytes"] - before["graph_pool_bytes"] >= 256 * 2**20


@pytest.mark.gpu
def test_both_clocks_agree_on_a_gpu() -> None:
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def run(mark) -> None:
        mark()
        for _ in range(200):
            matrix @ matrix

    timing = timed(run, "cuda", repeats=5)
    assert abs(timing.clock_difference) < 0.02
    assert timing.decode_s == pytest.approx(timing.latency_s, rel=0.02)


def test_the_first_call_may_be_another_one() -> None:
    """It is a warm-up; all repeats are of `run`."""
    called = []
    timing = profiler.timed(
        lambda mark: called.append("run"),
        "cpu",
        warmups=2,
        repeats=3,
        first=lambda mark: called.append("first"),
    )
    assert called == ["first", "run", "run", "run", "run"]
    assert (len(timing.warmups), len(timing.repeats)) == (2, 3)
