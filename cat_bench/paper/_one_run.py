"""Comparisons inside one run: ratios to a reference, who is best in a cell, where two lines cross.

A ratio of two runs would hold two states of the machine; so a run that lacks one side gives none of
its own: an exhibit may show that of an older run, and names it.
Rows are those of `_curves.measured`, of all runs of one device; "setting" = batch size, length and
prompt.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from cat_bench import stats
from cat_bench.case import Case
from cat_bench.measurements import is_marked, least

SETTING = ["batch_size", "seq_len", "prompt_len"]


def with_interval(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Adds <metric>_low and <metric>_high: the median's 95 % interval."""
    found = [stats.summary(_samples(row, metric)) for _, row in rows.iterrows()]
    ends = {f"{metric}_{end}": [getattr(one, end) for one in found] for end in ("low", "high")}
    return rows.assign(**ends)


def with_ratio(rows: pd.DataFrame, metric: str, reference: str, name: str) -> pd.DataFrame:
    """Adds `name`, <name>_low, <name>_high: `metric` of the architecture `reference` / of the row.

    NaN where the row's own run has not measured `reference` at this setting.
    """
    ok = rows[(rows["label"] == reference) & rows.get(metric, pd.Series(dtype=float)).notna()]
    by_setting = {_setting(row): row for _, row in ok.iterrows()}
    found = []
    for _, row in rows.iterrows():
        other = by_setting.get(_setting(row))
        if other is None or pd.isna(row[metric]):
            found.append((math.nan,) * 3)
        elif other.name == row.name:
            found.append((1.0,) * 3)
        else:
            found.append(stats.ratio(_samples(other, metric), _samples(row, metric))[:3])
    names = [name, f"{name}_low", f"{name}_high"]
    return rows.assign(**pd.DataFrame(found, index=rows.index, columns=names))


def with_older_ratio(rows: pd.DataFrame, metric: str, name: str) -> pd.DataFrame:
    """Where a measured row's run has no reference: `name` inside the newest run of this case that
    has one, unless a remark is about it there.

    Adds <name>_run, the run of the ratio: tables name it where it is not the row's own.
    """
    ends = [name, f"{name}_low", f"{name}_high"]
    known = _unmarked(rows[rows[name].notna()], metric)
    newest = {
        (row["label"], *(row[key] for key in SETTING)): row
        for _, row in known.sort_values("run", key=lambda runs: runs.map(number)).iterrows()
    }
    found = []
    for _, row in rows.iterrows():
        other = newest.get((row["label"], *(row[key] for key in SETTING)))
        is_lacking = row["status"] == "ok" and pd.notna(row[metric]) and pd.isna(row[name])
        source = other if is_lacking and other is not None else row
        found.append([*(source[end] for end in ends), source["run"]])
    names = [*ends, f"{name}_run"]
    return rows.assign(**pd.DataFrame(found, index=rows.index, columns=names))


def setting_of(case: Case) -> tuple[int, int, int]:
    return case.batch_size, case.seq_len, case.prompt_len


def _setting(row: pd.Series) -> tuple:
    return (row["run"], *(row[name] for name in SETTING))


def _samples(row: pd.Series, metric: str) -> list[float]:
    """The raw samples; of a byte count, which has none, its one value."""
    samples = row.get(f"{metric}.samples")
    if isinstance(samples, list) and samples:
        return samples
    return [] if pd.isna(row.get(metric)) else [row[metric]]


class Best(NamedTuple):
    """Who has the least of a metric at one setting, and how far the second is behind."""

    batch_size: int
    seq_len: int
    prompt_len: int
    run: str
    label: str
    value: float
    second: str
    margin: stats.Interval  # second / best
    num_compared: int  # architectures of that run that ended well at this setting, or out of memory

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the margin leaves 1 out, and the margin is not printed as 1.00.

        Without an interval the margin alone decides.
        """
        low = self.margin.median if math.isnan(self.margin.low) else self.margin.low
        return low > 1 and round(self.margin.median, 2) > 1


def best(rows: pd.DataFrame, metric: str) -> list[Best]:
    """Per setting, in the newest run that has every architecture which any run has there.

    Without such a run nobody is known to be best: the setting is left out. So it is where a value
    under a remark may be among the first two.
    """
    found = []
    if metric not in rows:
        return found
    ended = rows["status"] == "oom", (rows["status"] == "ok") & rows[metric].notna()
    for setting, part in rows[ended[0] | ended[1]].groupby(SETTING):
        by_run = dict(list(part.groupby("run")))
        whole = [run for run in by_run if set(by_run[run]["label"]) == set(part["label"])]
        for run in sorted(whole, key=number, reverse=True):
            ok = by_run[run][by_run[run]["status"] == "ok"]  # who ran out of memory has lost
            ranked = _unmarked(ok, metric).sort_values(metric)
            if len(ranked) < 2 or _may_be_below(ok, metric, ranked.iloc[1][metric]):
                continue
            first, second = ranked.iloc[0], ranked.iloc[1]
            margin = stats.ratio(_samples(second, metric), _samples(first, metric))
            names = first["label"], first[metric], second["label"]
            found.append(Best(*map(int, setting), run, *names, margin, len(by_run[run])))
            break
    return found


def _may_be_below(rows: pd.DataFrame, metric: str, bound: float) -> bool:
    """Whether present code may have made a value that a remark is about less than `bound`."""
    marked = [row for _, row in rows.iterrows() if is_marked(row, metric)]
    return any(least(row, metric) <= bound for row in marked)


def _unmarked(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Without the values that a remark of their run is about."""
    return rows.loc[[index for index, row in rows.iterrows() if not is_marked(row, metric)]]


def crossing(
    rows: pd.DataFrame,
    subject: str,
    reference: str,
    x: str,
    metric: str,
    write: Callable[[float], str] = str,
) -> str:
    """Between which measured points of `x` the line of `subject` crosses that of `reference`.

    Interpolated linearly in log-log, the point itself would claim more than was measured.
    """
    found = _gaps(rows, subject, reference, x, metric)
    gaps = {x: gap for x, gap in found.items() if gap}
    if len(found) < 2 or not gaps:
        return "-"
    between = [f"crosses between {write(x0)} and {write(x1)}" for (x0, _), (x1, _) in turns(gaps)]
    first, last = min(gaps), max(gaps)
    gap = gaps[first]
    word = "lower" if gap < 0 else "higher"
    if between:
        return f"{word} at {write(first)}, {', '.join(between)}"
    return f"{word} from {write(first)} to {write(last)}"


Gap = tuple[float, float]  # x, and how far one line is above the other there


def turns(gaps: dict[float, float]) -> list[tuple[Gap, Gap]]:
    """Neighbours of `gaps` between which the sign changes. Where it is 0 neither line is above."""
    known = sorted((x, gap) for x, gap in gaps.items() if gap)
    pairs = zip(known, known[1:], strict=False)
    return [(one, other) for one, other in pairs if (one[1] < 0) != (other[1] < 0)]


def _gaps(
    rows: pd.DataFrame, subject: str, reference: str, x: str, metric: str
) -> dict[float, float]:
    """x -> log(subject / reference), both of the newest run that has both; no marked value."""
    if metric not in rows:
        return {}
    ok = rows[(rows["status"] == "ok") & rows[metric].notna()]
    ok = _unmarked(ok, metric)
    ours, theirs = (
        {(row["run"], row[x]): row[metric] for _, row in ok[ok["label"] == label].iterrows()}
        for label in (subject, reference)
    )
    both = sorted(set(ours) & set(theirs), key=lambda key: number(key[0]))
    return {float(place): math.log(ours[run, place] / theirs[run, place]) for run, place in both}


def number(run: str) -> int:
    """12 of "0012-fig2-h100": the order in which runs were started."""
    return int(run.partition("-")[0])
