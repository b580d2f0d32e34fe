"""Rows of a store -> one row per closed case, with what follows from its samples. No torch.

Intervals, ratios to Dense, loop ratios, peaks and shares of a floor; SI units throughout. tables.py
prints them, figures.py and the exhibits draw them.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from cat_bench import remarks, stats, store
from cat_bench.columns import PERCENTILES
from cat_bench.environment import machine_line

# Of Case.settings: those that make another measurement.
SETTINGS = ("autocast", "checkpoint", "step")
SAME_SETTING = [
    *("suite", "scale", "device_name", "dtype", "prompt_len", "batch_size", "seq_len"),
    *SETTINGS,
]
MEMORY_RATIOS = {
    "memory_ratio": "peak_bytes",
    "allocated_ratio": "peak_allocated_bytes",
    "state_ratio": "state_bytes",
}
ATTENTION_SIZES = ("num_layers", "compressor_layers", "vocab_size")
HEAD_WIDTH = 64
TIMED = ("latency_s", "train_step_s", "forward_backward_s")  # of each suite one
PEAK = ("peak_reserved_bytes", "peak_rss_bytes")
ALLOCATED = ("peak_allocated_bytes", "peak_rss_bytes")
STEP_STATISTICS = ("mean", "first", "last", *(f"p{p}" for p in PERCENTILES))
DERIVED_FROM = {  # columns, also those that exhibits make -> the metrics in records.jsonl
    **dict.fromkeys(("latency_s", "time_s", "speedup", "speedup_2d"), TIMED),
    **dict.fromkeys(("time_ratio", "time_2d_ratio", "loop_ratio"), TIMED),
    "floor_share": ("floor_s", *TIMED),
    "tokens_per_s": ("tokens_per_s", "decode_s", "tpot_s", "train_step_s"),
    "mfu": ("mfu", "train_step_s"),
    "matmul_flops_ratio": ("matmul_flops_ratio", "train_step_s"),
    "forward_flops_per_s": ("forward_flops_per_s", "forward_s"),
    "forward_backward_flops_per_s": ("forward_backward_flops_per_s", "forward_backward_s"),
    "faster": ("tpot_s",),
    **dict.fromkeys(("sooner", "sooner_2d"), ("ttft_s",)),
    **{f"step_{name}_s": ("step_s",) for name in STEP_STATISTICS},
    **{f"step_inner_p{p}_s": ("step_s", "step_inner_s") for p in PERCENTILES},
    **{f"step_boundary_p{p}_s": ("step_s", "step_boundary_s") for p in PERCENTILES},
    **dict.fromkeys(("peak_bytes", "memory_ratio"), PEAK),
    **dict.fromkeys(("allocated_bytes", "allocated_ratio", "bytes_ratio"), ALLOCATED),
    "state_ratio": ("state_bytes",),
    "held_bytes": ("weights_bytes", "state_live_bytes"),
}
CEILINGS = ("read_bandwidth_bytes_per_s", "matmul_flops_per_s")


def frame(runs: Sequence[store.Run]) -> pd.DataFrame:
    """`store.frame` with columns more: "machine", the line that stands over a table of these rows,
    "commit", of the code that measured them ("3ffb64ca+": and changes to it), "remarks", those of
    the run that are about the row's architecture, and "best_<ceiling>", the highest in the run,
    drift references included.
    """
    records = store.frame(list(runs))
    environments = {run.name: run.environment for run in runs}
    pairs = list(zip(records["run"], records["device"], strict=True))
    records = records.assign(
        machine=[machine_line(environments[run], dev) for run, dev in pairs],
        commit=[_commit(environments[run]) for run, _ in pairs],
        remarks=_remarks(records, runs),
    )
    for ceiling in CEILINGS:
        values = records["value"].where(records["metric"] == ceiling)
        best = values.groupby([records["run"], records["device"]]).transform("max")
        records = records.assign(**{f"best_{ceiling}": best})
    return records


def _remarks(records: pd.DataFrame, runs: Sequence[store.Run]) -> list[tuple[remarks.Remark, ...]]:
    by_run = {run.name: remarks.read(run) for run in runs}
    columns = ("run", "label", "arch", "batch_size")
    rows = zip(*(records[name] for name in columns), strict=True)
    return [tuple(r for r in by_run[run] if r.is_about(*row)) for run, *row in rows]


def is_marked(row: pd.Series, metric: str) -> bool:
    """Whether a remark is about this value: then it takes part in no crossing, and is no best."""
    return bool(_remarks_about(row, metric))


def least(row: pd.Series, metric: str) -> float:
    """What present code's value is not below, as far as remarks tell: 0 where one has no bound."""
    return row[metric] * min((one.at_least for one in _remarks_about(row, metric)), default=1.0)


def _remarks_about(row: pd.Series, metric: str) -> list[remarks.Remark]:
    stored = {*DERIVED_FROM.get(metric, (metric,))}
    return [remark for remark in row.get("remarks", ()) if stored & {*remark.metrics}]


def _commit(environment: dict) -> str:
    changed = "+" if environment.get("dirty") else ""
    return (environment.get("commit") or "unknown")[:8] + changed


def is_reference(settings: Iterable) -> bool:
    """Whether a case exists only to watch the machine drift; no table shows those."""
    return any(name == "reference" for name, _ in settings)


def closed_rows(records: pd.DataFrame) -> pd.DataFrame:
    """One row per (run, case) that has ended: Case fields, a column per metric and its samples."""
    rows = []
    for _, case in records.groupby(["run", "case"], sort=False):
        closing = case[case["metric"] == "case"]
        if closing.empty:
            continue
        row = closing.iloc[-1].drop(["metric", "value", "unit", "samples"]).to_dict()
        for record in case[case["metric"] != "case"].itertuples():
            row[record.metric] = record.value
            row[f"{record.metric}.samples"] = record.samples
        rows.append(row)
    return pd.DataFrame(rows)


def measured(records: pd.DataFrame) -> pd.DataFrame:
    """`closed_rows` without drift references, plus intervals, floor share and ratios to Dense.

    Rows whose column "chosen" is False serve as references of their own run only, and are left out.
    """
    rows = closed_rows(records)
    if rows.empty:
        return rows
    rows = rows[~rows["settings"].map(is_reference)].reset_index(drop=True)
    rows = _with_attention(_with_step_as_latency(_with_peak(_with_settings(rows))))
    if "latency_s.samples" in rows:
        rows = _with_intervals(rows)
        rows = _with_dense_ratios(rows)
        if "upstream" in set(rows["suite"]):
            rows = _with_loop_ratios(rows)
    if {"floor_s", "latency_s"} <= set(rows):
        share = rows["floor_s"] * _ceiling_share(rows) / rows["latency_s"]
        rows = rows.assign(floor_share=share)
    return rows[rows["chosen"]].reset_index(drop=True) if "chosen" in rows else rows


def _with_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """A column for each of SETTINGS; empty where a case lacks it."""
    found = rows["settings"].map(lambda pairs: dict(map(tuple, pairs)))
    return rows.assign(**{k: [pairs.get(k, "") for pairs in found] for k in SETTINGS})


def _with_step_as_latency(rows: pd.DataFrame) -> pd.DataFrame:
    """What is timed of a case that generates nothing: ratios and `compare` work on it."""
    for metric in ("train_step_s", "forward_backward_s"):
        for name in ("", ".samples"):
            if f"{metric}{name}" in rows:
                steps = rows[f"{metric}{name}"]
                latency = rows.get(f"latency_s{name}", steps)
                rows = rows.assign(**{f"latency_s{name}": latency.where(latency.notna(), steps)})
    return rows


def _with_attention(rows: pd.DataFrame) -> pd.DataFrame:
    """Suite attention: implementation, heads, and labels without sizes that it does not depend on.

    Tiny ones (scale smoke) go by their roles: the wider of two Dense is Dense-2D.
    """
    mine = rows["suite"] == "attention"
    if not mine.any():
        return rows
    empty = pd.Series(math.nan, index=rows.index)
    width, decoder_width = (
        pd.to_numeric(rows.get(f"config.{name}", empty)) for name in ("width", "decoder_width")
    )
    name = rows["arch"].str.partition(":")[0]
    heads = decoder_width.fillna(width * np.where(name == "cat", 2, 1)) / HEAD_WIDTH
    implementation = [dict(map(tuple, s)).get("implementation", "") for s in rows["settings"]]
    tiny = rows["scale"] == "smoke"
    is_wide = tiny & (name == "dense") & (heads > heads[mine & (name == "dense")].min())
    labels = rows["label"].map(_without_sizes).where(~tiny, rows["label"].str.partition(" (")[0])
    labels = labels.mask(is_wide, "Dense-2D").where(mine, rows["label"])
    return rows.assign(label=labels, heads=heads, implementation=implementation)


def _without_sizes(label: str) -> str:
    """A label without what the suite attention's own plan makes small."""
    name, _, rest = label.partition(" (")
    fields = filter(None, rest.removesuffix(")").split(", "))
    kept = [field for field in fields if field.partition("=")[0] not in ATTENTION_SIZES]
    return f"{name} ({', '.join(kept)})" if kept else name


def _ceiling_share(rows: pd.DataFrame) -> pd.Series:
    """What the worse of a case's ceilings was of the best in its run, at most 1.

    A ceiling measured while the device was still busy is too low and its floor too high. A row
    stores the floor as a whole, so all of it is taken times the worse share: never more than the
    floor at the run's best ceilings, and less where the other ceiling binds.
    """
    share = pd.Series(1.0, index=rows.index)
    for ceiling in CEILINGS:
        if ceiling in rows:
            share = share.combine(rows[ceiling] / rows[f"best_{ceiling}"], min)
    return share


def _with_peak(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds peak_bytes: reserved on a GPU, resident set on a CPU; the two never share a table.

    Reserved, because allocated misses what captured graphs hold, which differs by architecture.
    """
    names = [name for name in ("peak_reserved_bytes", "peak_rss_bytes") if name in rows]
    return rows.assign(peak_bytes=rows[names].bfill(axis=1).iloc[:, 0]) if names else rows


def _with_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds latency_s_low, latency_s_high and n (repeats)."""

    def interval(samples: Any) -> dict[str, float]:
        if not isinstance(samples, list) or not samples:
            return {}
        found = summary(tuple(samples))
        return {"latency_s_low": found.low, "latency_s_high": found.high, "n": len(samples)}

    return joined(rows, [interval(samples) for samples in rows["latency_s.samples"]])


def _with_dense_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds speedup (Dense seconds / seconds) with its interval and n, the same over Dense-2D, and
    MEMORY_RATIOS over Dense."""

    def ratios(row: pd.Series) -> dict[str, Any]:
        found: dict[str, Any] = {}
        dense, wide = dense_of(rows, row), dense_of(rows, row, "Dense-2D")
        if dense is not None:
            found |= _speedup("speedup", dense, row) | {"dense_run": dense["run"]}
            for name, metric in MEMORY_RATIOS.items():
                if metric in rows:
                    found[name] = dense[metric] / row[metric]
        if wide is not None and not (row["label"] == "Dense" and _is_dense(rows)[row.name]):
            found |= _speedup("speedup_2d", wide, row) | {"dense_2d_run": wide["run"]}
        return found

    return joined(rows, [ratios(row) for _, row in rows.iterrows()])


def _with_loop_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds "loop" (ours, upstream) and loop_ratio, our latency / upstream's, with its interval.

    A row of suite upstream, loop ours, has its own; one of another suite the largest that its
    architecture has on the same device and path: served badly anywhere, it is marked everywhere.
    """
    rows = rows.assign(loop=[dict(settings).get("loop", "") for settings in rows["settings"]])
    same = ["run", "arch", "device_name", "dtype", "decode_path"]
    shape = ["prompt_len", "batch_size", "seq_len", "seed"]
    theirs = {
        tuple(row[same + shape]): tuple(latency_samples(row))
        for _, row in rows[rows["loop"] == "upstream"].iterrows()
    }
    own: dict[Any, stats.Interval] = {}
    worst: dict[tuple, stats.Interval] = {}
    for index, row in rows[rows["loop"] == "ours"].iterrows():
        samples = latency_samples(row), theirs.get(tuple(row[same + shape]), ())
        if all(samples):
            own[index] = found = _ratio(tuple(samples[0]), samples[1])
            architecture = tuple(row[same[1:]])
            worst[architecture] = max(found, worst.get(architecture, found))

    def ratio(index: Any, row: pd.Series) -> dict[str, float]:
        found = own.get(index) if row["loop"] else worst.get(tuple(row[same[1:]]))
        names = ("loop_ratio", "loop_ratio_low", "loop_ratio_high")
        return dict(zip(names, found, strict=False)) if found else dict.fromkeys(names, math.nan)

    return joined(rows, [ratio(index, row) for index, row in rows.iterrows()])


def joined(rows: pd.DataFrame, found: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.concat([rows, pd.DataFrame(found, index=rows.index)], axis=1)


def _speedup(name: str, reference: pd.Series, row: pd.Series) -> dict[str, float]:
    """Reference seconds / seconds, its interval's ends and n; 1 for the reference itself."""
    found = stats.Interval(1.0, 1.0, 1.0, len(latency_samples(row)))
    if reference.name != row.name:
        found = _ratio(tuple(latency_samples(reference)), tuple(latency_samples(row)))
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_n"), found, strict=True))


@cache
def summary(samples: tuple[float, ...]) -> stats.Interval:
    return stats.summary(samples)  # exhibits share cases, and a bootstrap takes a while


@cache
def _ratio(a: tuple[float, ...], b: tuple[float, ...]) -> stats.Interval:
    return stats.ratio(a, b)


def dense_of(rows: pd.DataFrame, row: pd.Series, name: str = "Dense") -> pd.Series | None:
    """The row of `name` to compare `row` with: same setting; same run, seed, path if there is one.

    Of other runs one of the same commit, and the one whose number is next to it: its code and its
    machine are likest. None without one, or where several models could be meant (two Dense of other
    sizes). Its label alone makes no file of a user's the reference.
    """
    all_dense = rows[_is_dense(rows)]
    for setting in SAME_SETTING:
        all_dense = all_dense[all_dense[setting] == row[setting]]
    dense = all_dense[all_dense["label"] == name]
    if dense.empty and name == "Dense":  # a tiny or resized one stands in, if it is the only one
        dense = all_dense[~all_dense["label"].str.startswith("Dense-2D")]
        dense = dense if dense["arch"].nunique() == 1 else dense.iloc[:0]
    dense = dense.loc[[index for index, one in dense.iterrows() if latency_samples(one)]]
    for setting in ("run", "commit", "seed", "decode_path", "forward_path"):
        same = dense[dense[setting] == row[setting]]
        dense = dense if same.empty else same
    if dense.empty or not latency_samples(row):
        return None
    return min((one for _, one in dense.iterrows()), key=lambda one: _apart(one["run"], row["run"]))


def _apart(run: str, other: str) -> tuple[int, int]:
    """How far two runs' numbers are apart, then the first's: of two as near the older is less."""
    heads = [name.partition("-")[0] for name in (run, other)]
    first, second = (int(head) if head.isdigit() else 0 for head in heads)
    return abs(first - second), first


def _is_dense(rows: pd.DataFrame) -> pd.Series:
    """Whether the architecture is baselines/dense.py, at whatever width."""
    return rows["arch"].str.partition(":")[0] == "dense"


def latency_samples(row: pd.Series) -> list[float]:
    """Latency samples; empty where a case has none (pandas then holds NaN)."""
    samples = row.get("latency_s.samples")
    return samples if isinstance(samples, list) else []
