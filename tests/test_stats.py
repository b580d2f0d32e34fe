"""Intervals cover, equal samples do not break, three repeats are never a verdict."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_bench.stats import compare, drift, ratio, separable, summary

QUICK = settings(max_examples=25, deadline=None)
positive = st.floats(min_value=1e-6, max_value=1e9)
samples = st.lists(positive, min_size=3, max_size=12)
TEN = [1.00, 1.01, 0.99, 1.02, 0.98, 1.03, 0.97, 1.005, 0.995, 1.015]


def times(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


# --- summary


@QUICK
@given(samples)
def test_the_interval_holds_the_median_and_stays_within_the_samples(values: list[float]):
    found = summary(values)
    assert found.median == np.median(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.n == len(values)


@QUICK
@given(samples, st.randoms(use_true_random=False))
def test_the_same_samples_give_the_same_interval(values: list[float], random):
    assert summary(values) == summary(values)
    np.random.seed(random.randrange(2**32))  # nothing depends on global state
    assert summary(values) == summary(values)


@QUICK
@given(positive, st.integers(min_value=3, max_value=12))
def test_equal_samples_give_zero_width(value: float, n: int):
    assert summary([value] * n) == (value, value, value, n)


@pytest.mark.parametrize("values", [[2.0], [2.0, 4.0]])
def test_fewer_than_three_samples_give_no_interval(values: list[float]):
    found = summary(values)
    assert found.median == np.median(values) and found.n == len(values)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_no_samples():
    found = summary([])
    assert found.n == 0 and math.isnan(found.median) and math.isnan(found.low)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_not_hidden(bad: float):
    found = summary([1.0, 2.0, bad, 3.0])
    assert math.isnan(found.median) and math.isnan(found.low) and found.n == 4


def test_the_interval_covers_the_true_median():
    generator = np.random.default_rng(0)
    found = [summary(generator.normal(1.0, 0.1, 25).tolist()) for _ in range(200)]
    covered = sum(interval.low <= 1.0 <= interval.high for interval in found)
    assert 0.88 * 200 < covered < 200  # 95 % in theory; the percentile bootstrap is a bit short


def test_more_samples_narrow_the_interval():
    generator = np.random.default_rng(0)
    few, many = (summary(generator.normal(1.0, 0.1, n).tolist()) for n in (10, 1000))
    assert many.high - many.low < (few.high - few.low) / 3


def test_outliers_are_kept():
    assert summary([*TEN[:4], 50.0]).high == 50.0


# --- ratio


def test_a_ratio_has_its_own_interval():
    found = ratio(times(TEN, 2.0), TEN)
    assert found.median == pytest.approx(2.0)
    assert 1.9 < found.low < 2.0 < found.high < 2.1
    assert found.n == 10


@QUICK
@given(samples, samples)
def test_the_ratio_is_that_of_the_medians(a: list[float], b: list[float]):
    found = ratio(a, b)
    assert found.median == pytest.approx(np.median(a) / np.median(b))
    tiny = 1e-12 * found.median
    assert found.low - tiny <= found.median <= found.high + tiny
    assert found.n == min(len(a), len(b))


def test_equal_samples_give_a_ratio_of_zero_width():
    assert ratio([3.0] * 5, [2.0] * 4) == (1.5, 1.5, 1.5, 4)


@pytest.mark.parametrize("a, b", [([], [1.0]), ([1.0], []), ([1.0], [0.0]), ([math.nan], [1.0])])
def test_an_undefined_ratio_is_nan(a: list[float], b: list[float]):
    assert math.isnan(ratio(a, b).median)


def test_a_ratio_of_few_samples_has_no_interval():
    found = ratio(TEN, [1.0, 1.0])
    assert found.median == pytest.approx(1.0025) and math.isnan(found.low)


def test_a_denominator_that_can_be_resampled_to_zero_has_no_interval():
    found = ratio(TEN, [0.0, 0.0, 1.0, 1.0, 1.0])
    assert found.median == pytest.approx(1.0025) and math.isnan(found.low)


# --- separable


@pytest.mark.parametrize("n, smallest", [(3, 0.1), (5, 0.0079365), (10, 0.0000108)])
def test_the_smallest_p_value(n: int, smallest: float):
    low, high = TEN[:n], times(TEN[:n], 2.0)
    found = separable(low, high)
    assert found.smallest_p_value == pytest.approx(smallest, rel=1e-2)
    assert found.separable == (n > 3)
    if n > 3:  # completely apart: the test reaches its smallest value
        assert found.p_value == pytest.approx(found.smallest_p_value)


def test_three_repeats_never_decide():
    found = separable([1.0, 1.1, 1.2], [100.0, 101.0, 102.0])
    assert not found.separable
    assert found.sentence == "3 repeats cannot separate these"
    assert separable([1.0], [2.0]).sentence == "1 repeat cannot separate these"
    assert not separable([], TEN).separable


def test_the_same_samples_are_not_separable():
    found = separable(TEN, list(reversed(TEN)))
    assert not found.separable and found.p_value > 0.9
    assert "within noise" in found.sentence


def test_ties_are_counted_exactly():
    assert separable([1.0] * 5, [1.0] * 5).p_value == 1.0
    # Five equal against five equal, apart: 2 of 252 arrangements are as extreme.
    assert separable([1.0] * 5, [2.0] * 5).p_value == pytest.approx(2 / 252)


def test_large_samples_use_the_approximation():
    generator = np.random.default_rng(0)
    a, b = generator.normal(1.0, 0.1, 500), generator.normal(1.1, 0.1, 500)
    assert separable(a.tolist(), b.tolist()).separable
    assert not separable(a.tolist(), generator.permutation(a).tolist()).separable


@QUICK
@given(samples, samples)
def test_the_order_of_the_two_does_not_matter(a: list[float], b: list[float]):
    one, other = separable(a, b), separable(b, a)
    assert one.separable == other.separable
    assert one.p_value == pytest.approx(other.p_value, nan_ok=True)


def test_false_alarms_are_rare():
    generator = np.random.default_rng(0)
    alarms = sum(separable(*generator.normal(size=(2, 10)).tolist()).separable for _ in range(400))
    assert 2 < alarms < 40  # 5 % of 400 is 20


# --- compare


@pytest.mark.parametrize(
    "factor, higher_is_better, mark",
    [(1.3, False, "+"), (0.7, False, "-"), (1.3, True, "-"), (0.7, True, "+"), (1.0, False, "~")],
)
def test_marks(factor: float, higher_is_better: bool, mark: str):
    assert compare(TEN, times(TEN, factor), higher_is_better).mark == mark


def test_a_fall_is_told_as_a_factor_above_one():
    words = ("slower", "faster")
    slower = compare(TEN, times(TEN, 2.0), words=words)
    faster = compare(TEN, times(TEN, 0.5), words=words)
    assert slower.sentence.startswith("2.00x slower [1.9")
    assert faster.sentence.startswith("2.00x faster [1.9")
    assert slower.ratio.median == pytest.approx(2.0)
    assert faster.ratio.median == pytest.approx(0.5)  # always new / old


def test_three_repeats_give_no_verdict():
    found = compare([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert found.mark == "~" and found.sentence == "3 repeats cannot separate these"
    assert found.ratio.median == pytest.approx(2.1 / 1.1)


def test_a_small_change_is_noise_even_where_repeats_agree():
    tight = [1 + 1e-6 * n for n in range(10)]
    found = compare(tight, times(tight, 1.02))
    assert found.mark == "~" and "3%" in found.sentence
    assert compare(tight, times(tight, 1.02), margin=0.01).mark == "+"
    assert compare(tight, times(tight, 1.05)).mark == "+"


def test_counted_values_need_one_sample_and_no_margin():
    assert compare([1000.0], [1001.0], exact=True).mark == "+"
    assert compare([1000.0], [999.0], exact=True).mark == "-"
    assert compare([1000.0], [1000.0], exact=True).mark == "~"
    assert compare([1000.0], [2000.0], exact=True).sentence == "2.00x higher"
    assert compare([0.0], [5.0], exact=True).sentence == "higher: 0 before, 5 now"
    assert compare([5.0], [0.0], exact=True).mark == "-"
    assert compare([0.0], [0.0], exact=True).mark == "~"


@pytest.mark.parametrize("old, new", [([], TEN), (TEN, []), (TEN, [math.nan] * 10)])
def test_missing_samples_are_not_comparable(old: list[float], new: list[float]):
    assert compare(old, new).mark == "x"
    assert compare(old, new, exact=True).mark == "x"


@QUICK
@given(samples, samples)
def test_swapping_old_and_new_swaps_the_marks(old: list[float], new: list[float]):
    swapped = {"+": "-", "-": "+", "~": "~"}
    assert compare(new, old, margin=0.0).mark == swapped[compare(old, new, margin=0.0).mark]


# --- drift


def test_drift_is_the_last_third_over_the_first():
    assert drift([1.0, 1.0, 1.0, 5.0, 5.0, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
    assert drift([1.0, 9.0, 0.9]) == pytest.approx(-0.1)
    assert drift([2.0] * 9) == 0.0


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [0.0, 1.0, 1.0]])
def test_drift_is_nan_where_it_means_nothing(values: list[float]):
    assert math.isnan(drift(values))


def test_statistics_need_no_torch():
    program = "import sys; import cat_bench.stats; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
