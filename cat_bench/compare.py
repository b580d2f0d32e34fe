"""`cat-bench compare A B`: what got faster or slower between two runs, and whether one can tell.

Equal cases are paired by key, whatever --repeats asked for; the ratio carries an interval, and a
verdict needs samples that can separate the two (stats.py). No torch.

Try it: cat-bench compare 1 2
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd

from cat_bench import stats, store
from cat_bench.columns import Column, digits, faster, percent, whole
from cat_bench.errors import UserError
from cat_bench.measurements import SETTINGS, frame, latency_samples, measured
from cat_bench.messages import plural
from cat_bench.notes import name_of, remarks
from cat_bench.tables import Table, dense_first, distinct_labels, table


def compare_table(run_a: store.Run, run_b: store.Run, across_machines: bool = False) -> Table:
    """`compare A B`: equal cases of both, latency of B over A with an interval, and a mark.

    + worse, - better, ~ within noise, ! newly failing, x not comparable. Raises UserError where no
    case can be compared, and where the runs come from different GPUs, unless ratios to Dense are
    asked for.
    """
    rows_a, rows_b = _rows(run_a), _rows(run_b)
    devices = [_device(rows) for rows in (rows_a, rows_b)]
    if devices[0] != devices[1] and not across_machines:
        raise UserError(
            f"runs {run_a.name} ({devices[0]}) and {run_b.name} ({devices[1]}) come from different "
            "machines; their seconds are not comparable.",
            "Compare ratios with --across-machines.",
        )
    compare_case = _compare_ratios if across_machines else _compare_seconds
    pairs = _pairs(rows_a, rows_b)
    lines = [_compare(a, b, compare_case) for a, b in pairs if a is not None and b is not None]
    names = f"runs {run_a.name} and {run_b.name}"
    if not lines:
        same_suite = {*rows_a["suite"]} & {*rows_b["suite"]}
        hint = NOTHING_SHARED if same_suite else "Compare two runs of one suite."
        raise UserError(f"{names} share no case: {_difference(rows_a, rows_b)}.", hint)
    rows = pd.DataFrame(lines)
    if (rows["mark"] == "x").all():
        reasons = rows["remark"].where(rows["remark"] != "", rows["change"])
        raise UserError(
            f"no case of {names} can be compared: {'; '.join(reasons.unique())}.",
            "`cat-bench show RUN` says how its cases ended.",
        )
    num_alone = len(pairs) - len(lines)
    num_worse = int(rows["mark"].isin(["+", "!"]).sum())
    heading = f"{run_a.name}: {devices[0]} · {run_b.name}: {devices[1]}"
    return replace(
        table(rows, COMPARE_COLUMNS),
        heading=heading,
        notes=(
            _verdict(rows, num_worse, num_alone) + _other_step_path(pairs),
            *_compare_notes(across_machines),
            *remarks(rows_a),
            *remarks(rows_b),
        ),
        num_worse=num_worse,
    )


COMPARE_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column("change", ("change",), str),
    Column("ratio [95 % CI]", ("factor", "factor_low", "factor_high"), faster),
    Column("mark", ("mark",), str),
    Column("remark", ("remark",), str),
)


NOTHING_SHARED = "Measure the same cases in both, or print them in one table: cat-bench report A B."


def _rows(run: store.Run) -> pd.DataFrame:
    """The measured rows of a run; a case is the same with any number of repeats."""
    rows = distinct_labels(measured(frame([run])))
    if rows.empty:
        raise UserError(
            f"run {run.name} has no finished case.", f"cat-bench run --resume {run.name}"
        )
    keys = {key: case.with_repeats(None).key for key, case in run.cases().items()}
    return rows.assign(case=rows["case"].map(keys))


def _difference(rows_a: pd.DataFrame, rows_b: pd.DataFrame) -> str:
    """Why no case of one run is one of the other: settings of which they share no value."""
    settings = [name for name in (*store.CASE_FIELDS, *SETTINGS) if name != "settings"]
    apart = [n for n in settings if not {*rows_a[n].astype(str)} & {*rows_b[n].astype(str)}]
    if not apart:
        return "no two of them have the same settings throughout"
    return f"they differ in {', '.join(apart)}"


def _device(rows: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(rows["device_name"].fillna("unknown")))


def _pairs(rows_a: pd.DataFrame, rows_b: pd.DataFrame) -> list[tuple]:
    """(row of A or None, row of B or None) for each case of either, by batch size and length."""
    by_key = [
        {row["case"]: row for _, row in dense_first(rows).iterrows()} for rows in (rows_a, rows_b)
    ]
    keys = dict.fromkeys([*by_key[0], *by_key[1]])
    return [(by_key[0].get(key), by_key[1].get(key)) for key in keys]


def _compare(a: pd.Series, b: pd.Series, compare_case: Callable) -> dict[str, Any]:
    line = {"label": name_of(b), **{name: b[name] for name in ("batch_size", "seq_len", "case")}}
    line |= {"change": "-", "factor": None, "factor_low": None, "factor_high": None, "remark": ""}
    if a["status"] == "ok" and b["status"] != "ok":
        return line | {"mark": "!", "change": f"ok -> {b['status']}"}
    if b["status"] != "ok" or a["status"] != "ok":
        mark = "-" if b["status"] == "ok" else "x"
        return line | {"mark": mark, "change": f"{a['status']} -> {b['status']}"}
    if not latency_samples(a) or not latency_samples(b):
        return line | {"mark": "x", "remark": "no latency"}
    return line | compare_case(a, b)


def _compare_seconds(a: pd.Series, b: pd.Series) -> dict[str, Any]:
    found = stats.compare(latency_samples(a), latency_samples(b), words=("slower", "faster"))
    return {
        "change": f"{digits(a['latency_s'])} s -> {digits(b['latency_s'])} s",
        **_factor(1 / found.ratio.median, 1 / found.ratio.high, 1 / found.ratio.low),
        "mark": found.mark,
        "remark": found.sentence if found.mark in "~x" else "",
    }


def _compare_ratios(a: pd.Series, b: pd.Series) -> dict[str, Any]:
    """Across machines only speed-ups over Dense of the same machine can be set side by side."""
    if pd.isna(a.get("speedup")) or pd.isna(b.get("speedup")):
        return {"mark": "x", "remark": "no Dense row of the same setting"}
    factor = b["speedup"] / a["speedup"]
    # Ends against opposite ends: wider than a joint interval, so a verdict is never too bold.
    low, high = b["speedup_low"] / a["speedup_high"], b["speedup_high"] / a["speedup_low"]
    few = stats.too_few(int(a["speedup_n"]), int(b["speedup_n"]))
    sure = not few and (low > 1 or high < 1) and abs(factor - 1) > stats.MARGIN
    return {
        "change": f"{a['speedup']:.2f}x -> {b['speedup']:.2f}x Dense",
        **_factor(factor, low, high),
        "mark": ("-" if factor > 1 else "+") if sure else "~",
        "remark": few,
    }


def _factor(factor: float, low: float, high: float) -> dict[str, float]:
    """Above 1, the second run is faster."""
    return {"factor": factor, "factor_low": low, "factor_high": high}


def _verdict(rows: pd.DataFrame, num_worse: int, num_alone: int) -> str:
    alone = ""
    if num_alone:
        is_or_are = "is" if num_alone == 1 else "are"
        alone = f" {plural(num_alone, 'case')} {is_or_are} in one of the runs only."
    num_both = int((rows["mark"] != "x").sum())
    return f"{num_worse} of {num_both} comparable cases got worse.{alone}"


def _other_step_path(pairs: list[tuple]) -> str:
    """A training step launched from Python in one run and replayed in the other is no pair."""
    alone: list[dict[tuple, str]] = [{}, {}]
    for pair in pairs:
        for side, row in enumerate(pair):
            if row is not None and pair[1 - side] is None:
                alone[side][row["arch"], row["batch_size"], row["seq_len"]] = row["step"]
    apart = sum(alone[1].get(cell, step) != step for cell, step in alone[0].items())
    return f" {plural(apart, 'pair')} of them differ in --step-path." if apart else ""


def _compare_notes(across_machines: bool) -> tuple[str, ...]:
    marks = "+ worse, - better, ~ within noise, ! newly failing, x not comparable."
    rule = (
        f"A change counts beyond {percent(stats.MARGIN)} and where the samples tell the runs apart."
    )
    if across_machines:
        rule = "Different machines: speed-ups over Dense are compared, never seconds. " + rule
    return (marks, rule)
