"""What samples can and cannot say: median, interval, ratio, "can these tell them apart?", drift.

Stored rows keep raw samples; every statistic of a report comes from here. All is
deterministic: the bootstrap is seeded, so that a report rendered twice is the same report.

Intervals are 95 % percentile bootstraps of the median. (BCa gives NaN when all samples are equal,
as memory samples are.) Equal samples give an interval of zero width. Fewer than 3 samples give a
median and no interval (NaN): two values say next to nothing about their spread, and a single one
drawn as an interval of zero width would claim a certainty that nobody has.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Mark = Literal["+", "-", "~", "x"]

CONFIDENCE = 0.95
SIGNIFICANCE = 1 - CONFIDENCE
MIN_SAMPLES = 3  # for an interval
MIN_COVERED = 6  # from here on even the range holds the median in 95 of 100 cases
NUM_RESAMPLES = 2_000
MAX_BATCH_ELEMENTS = 2_000_000  # resampled values held at once: 16 MB
MAX_EXACT_SAMPLES = 40  # both sides together; beyond, the normal approximation is as good
MAX_PERMUTATIONS = 10_000
MARGIN = 0.03  # the drift that flags a run (evaluation_spec.md 4.1)


class Interval(NamedTuple):
    median: float
    low: float  # NaN: no interval, see the module's docstring
    high: float
    n: int


class Verdict(NamedTuple):
    separable: bool
    p_value: float  # two-sided Mann-Whitney
    smallest_p_value: float  # the least that so many samples can give
    sentence: str


class Comparison(NamedTuple):
    mark: Mark  # "+" worse, "-" better, "~" within noise, "x" nothing to compare
    ratio: Interval  # new / old
    sentence: str


def summary(samples: Sequence[float]) -> Interval:
    """The median and its 95 % interval; all NaN without samples."""
    values = np.asarray(samples, dtype=float)
    if len(values) == 0 or not np.isfinite(values).all():
        return Interval(math.nan, math.nan, math.nan, len(values))
    return Interval(float(np.median(values)), *_interval((values,), _median), len(values))


def ratio(a_samples: Sequence[float], b_samples: Sequence[float]) -> Interval:
    """median(a) / median(b) with its own interval; n is the smaller sample's.

    NaN where it is undefined: a side without samples or with a value that is not finite, or a
    median(b) of zero.
    """
    a, b = np.asarray(a_samples, dtype=float), np.asarray(b_samples, dtype=float)
    n = min(len(a), len(b))
    usable = n > 0 and np.isfinite(a).all() and np.isfinite(b).all() and np.median(b) != 0
    if not usable:
        return Interval(math.nan, math.nan, math.nan, n)
    return Interval(float(np.median(a) / np.median(b)), *_interval((a, b), _median_ratio), n)


def separable(a_samples: Sequence[float], b_samples: Sequence[float]) -> Verdict:
    """Whether a two-sided Mann-Whitney test tells the two apart, or whether it ever could.

    3 + 3 samples cannot go below p = 0.10, 5 + 5 reach 0.008, 10 + 10 0.00001.
    """
    a, b = np.asarray(a_samples, dtype=float), np.asarray(b_samples, dtype=float)
    smallest = _smallest_p_value(len(a), len(b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Verdict(False, math.nan, smallest, "some samples are not finite")
    if few := too_few(len(a), len(b)):
        return Verdict(False, math.nan, smallest, few)
    p_value = _mann_whitney_p_value(a, b)
    if p_value > SIGNIFICANCE:
        return Verdict(False, p_value, smallest, f"within noise (p = {p_value:.2g})")
    return Verdict(True, p_value, smallest, f"they differ (p = {p_value:.2g})")


def too_few(num_a: int, num_b: int) -> str:
    """Says that so many samples can never be told apart; empty where they can."""
    if _smallest_p_value(num_a, num_b) <= SIGNIFICANCE:
        return ""
    n = min(num_a, num_b)
    return f"{n} repeat{'' if n == 1 else 's'} cannot separate these"


def _smallest_p_value(num_a: int, num_b: int) -> float:
    return min(1.0, 2 / math.comb(num_a + num_b, num_a))


def compare(
    old_samples: Sequence[float],
    new_samples: Sequence[float],
    higher_is_better: bool = False,
    *,
    exact: bool = False,
    margin: float = MARGIN,
    words: tuple[str, str] = ("higher", "lower"),
) -> Comparison:
    """Is the new one worse (+), better (-), or within noise (~)? "x": a side has no samples.

    A verdict needs samples that can be told apart *and* a change beyond `margin`: repeats share
    one process, so they do not show what differs from one process to the next. `exact` is for
    counted values (bytes, parameters, FLOPs), where any change is real and one sample is enough.
    `words` say what a rise and a fall are called: ("slower", "faster").
    """
    change = ratio(new_samples, old_samples)
    old, new = summary(old_samples).median, summary(new_samples).median
    if math.isnan(old) or math.isnan(new):
        return Comparison("x", change, "not comparable: samples missing or not finite")
    if exact:
        same, sentence = old == new, "the same"
    else:
        same, sentence = _within_noise(old_samples, new_samples, margin)
    if same:
        return Comparison("~", change, sentence)
    worse = (new > old) != higher_is_better
    return Comparison("+" if worse else "-", change, _change_sentence(old, new, change, words))


def drift(samples: Sequence[float]) -> float:
    """Median of the last third / median of the first third - 1; NaN with fewer than 3 samples."""
    third = len(samples) // 3
    first = float(np.median(samples[:third])) if third else 0.0
    return float(np.median(samples[-third:])) / first - 1 if first else math.nan


def _interval(groups: tuple[np.ndarray, ...], statistic: Callable) -> tuple[float, float]:
    """Low and high of the percentile bootstrap; NaN where a group is too small for one."""
    if min(len(group) for group in groups) < MIN_SAMPLES:
        return math.nan, math.nan
    # scipy resamples in batches of its own size: without this, 2,000 x 8,192 steps sit in memory.
    batch = max(1, MAX_BATCH_ELEMENTS // max(len(group) for group in groups))
    with np.errstate(divide="ignore", invalid="ignore"):  # a resampled median of zero
        found = stats.bootstrap(
            groups,
            statistic,
            n_resamples=NUM_RESAMPLES,
            batch=batch,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = found.confidence_interval
    return (float(low), float(high)) if np.isfinite([low, high]).all() else (math.nan, math.nan)


def _median(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(values, axis=axis)


def _median_ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(a, axis=axis) / np.median(b, axis=axis)


def _mann_whitney_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Exact where that is possible: by formula without ties, by enumeration with ties."""
    both = np.concatenate([a, b])
    if len(np.unique(both)) == 1:
        return 1.0
    method: Any = "asymptotic"  # corrects for ties
    if len(np.unique(both)) == len(both) <= MAX_EXACT_SAMPLES:
        method = "exact"
    elif math.comb(len(both), len(a)) <= MAX_PERMUTATIONS:
        method = stats.PermutationMethod(n_resamples=MAX_PERMUTATIONS)
    return float(stats.mannwhitneyu(a, b, alternative="two-sided", method=method).pvalue)


def _within_noise(
    old_samples: Sequence[float], new_samples: Sequence[float], margin: float
) -> tuple[bool, str]:
    verdict = separable(old_samples, new_samples)
    if not verdict.separable:
        return True, verdict.sentence
    old, new = float(np.median(old_samples)), float(np.median(new_samples))
    return abs(new - old) <= margin * abs(old), f"within noise: at most {margin:.0%} apart"


def _change_sentence(old: float, new: float, change: Interval, words: tuple[str, str]) -> str:
    """ "1.23x slower [1.20, 1.26]": a fall is told as its inverse, so the factor is above 1."""
    word = words[0] if new > old else words[1]
    if old == 0 or new == 0:
        return f"{word}: {old:g} before, {new:g} now"
    factor, low, high = change.median, change.low, change.high
    if new < old:
        factor, low, high = 1 / factor, 1 / high, 1 / low if low else math.inf
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{factor:.2f}x {word}{interval}"
