"""Rows of a store -> tables of text: which columns, which ratios, which notes. No torch.

Everything here is a pure function of stored rows, so it works on any laptop. Rows hold SI units and
stay so in JSON and CSV; GiB and % appear only in print. Ratios carry an interval of their own
(stats.py), a case that did not end well shows its status instead of a number, and one machine line
stands over every table.

Where to look: `run_table` is `cat-bench show`, `details_table` its second half. What a column shows
is in columns.py, what stands under a table in notes.py; report.py prints.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cat_bench import stats, store
from cat_bench.columns import (
    DETAIL_COLUMNS,
    DETAIL_DEFINITIONS,
    KINDS,
    LOOP_COLUMN,
    LOOP_DEFINITION,
    OTHER_COLUMNS,
    PERCENTILES,
    UPSTREAM_COLUMNS,
    Column,
    defined,
    digits,
    whole,
)
from cat_bench.measurements import (
    SETTINGS,
    frame,
    is_marked,
    is_reference,
    joined,
    measured,
    summary,
)
from cat_bench.notes import (
    REMARKED,
    configurations,
    failures,
    foreign_dense,
    prompt_share,
    ranges,
    remarks,
    warnings,
)
from cat_bench.spec import name_of

NOT_GENERATING = ("training", "attention")  # suites without decode path, prompt and steps


@dataclass(frozen=True)
class Table:
    rows: pd.DataFrame  # SI values: what JSON and CSV hold
    text: pd.DataFrame  # the same as print shows it, all strings
    heading: str = ""  # machine and settings, one line
    notes: tuple[str, ...] = ()  # definitions and warnings, one line each
    best: pd.DataFrame | None = None  # booleans, the shape of `text`
    title: str = ""
    suffix: str = "table"  # of the file's name, where an exhibit writes it
    num_worse: int = 0  # regressions: `compare` exits with 4 where there are any


def run_table(run: store.Run, suite: str | None = None) -> Table:
    """What `cat-bench show` prints: all closed cases of one run, of one of its suites."""
    made = records_table(frame([run]), suite)
    num_open = len(run.cases()) - len(run.closed())
    if num_open:
        unfinished = f"{num_open} of {len(run.cases())} cases have not run: continue with --resume."
        made = replace(made, notes=(*made.notes, unfinished))
    return replace(made, title=run.name)


def suites_of(records: pd.DataFrame) -> list[str]:
    """The suites of all closed cases, drift references aside: each has a table of its own."""
    closing = records[records["metric"] == store.CLOSING]
    found = set(closing["suite"][~closing["settings"].map(is_reference).astype(bool)])
    return [*(suite for suite in KINDS if suite in found), *sorted(found - set(KINDS))]


def records_table(records: pd.DataFrame, suite: str | None = None) -> Table:
    """The table of one suite, by default of the first; of one not in KINDS, a column per metric.

    Ratios are taken over all records: a loop ratio of suite upstream stands beside its
    architecture everywhere.
    """
    rows, suite = measured(records), suite or next(iter(suites_of(records)), None)
    if suite is None:
        return Table(rows, pd.DataFrame(), notes=("No case is closed yet.",))
    rows = distinct_labels(_of_suite(rows, suite))
    if suite == "upstream":
        return _upstream_table(rows, records)
    timed = suite in KINDS
    if timed and "latency_s" not in rows:  # nothing went well: statuses still need a column
        rows["latency_s"] = math.nan
    own = records[records["suite"] == suite]
    columns, definitions = OTHER_COLUMNS + _metric_columns(own), ()
    by = ["batch_size", "seq_len", *SETTINGS]
    if suite == "attention":  # of each architecture the best implementation
        by.append("label")
    if timed:
        columns, definitions = KINDS[suite]
        rows = dense_first(rows)
    if "label" in by:  # batches shrink as lengths grow
        rows = rows.sort_values("seq_len", kind="stable")
    made = table(rows, (*_distinguishing(rows), *columns), by)
    notes = (
        *defined(definitions, made.text),
        *((LOOP_DEFINITION,) if LOOP_COLUMN.title in made.text else ()),
        *configurations(rows),
        *failures(rows),
        *foreign_dense(rows),
        *ranges(rows),
        *prompt_share(rows),
        *remarks(rows),
        *warnings(rows, records),
    )
    return replace(
        made,
        heading=" · ".join([*dict.fromkeys(rows["machine"]), *_settings_line(rows)]),
        notes=notes,
    )


def _of_suite(rows: pd.DataFrame, suite: str) -> pd.DataFrame:
    """The rows of one suite, without the columns that only other suites fill."""
    if set(rows["suite"]) == {suite}:
        return rows
    rows = rows[rows["suite"] == suite].reset_index(drop=True)
    known = {*store.CASE_FIELDS, *store.COLUMNS}
    return rows[[name for name in rows if name in known or rows[name].notna().any()]]


def distinct_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` in which no label means several specs at one shape: what they differ in is appended.

    A user's own `label` need not tell every setting, as architecture.full_label does.
    """
    told: dict[tuple[str, str], str] = {}
    for label, same in rows.groupby("label") if len(rows) else ():
        if same.groupby(["batch_size", "seq_len"])["arch"].nunique().max() > 1:
            pieces = {arch: _pieces(arch) for arch in same["arch"].unique()}
            shared = set.intersection(*map(set, pieces.values()))
            for arch, all_of_it in pieces.items():
                apart = ", ".join(piece for piece in all_of_it if piece not in shared)
                told[label, arch] = f"{label} ({apart})" if apart else label
    if not told:
        return rows
    pairs = zip(rows["label"], rows["arch"], strict=True)
    return rows.assign(label=[told.get(pair, pair[0]) for pair in pairs])


def _pieces(arch: str) -> list[str]:
    """The name of a spec, then its settings."""
    name = name_of(arch)
    return [name, *filter(None, arch[len(name) + 1 :].split(","))]


def _upstream_table(rows: pd.DataFrame, records: pd.DataFrame) -> Table:
    """Suite upstream: our loop and the authors', pair by pair."""
    rows = rows.assign(loop=[dict(settings).get("loop", "") for settings in rows["settings"]])
    rows = rows.sort_values("loop", kind="stable")  # ours, upstream
    shown = dict.fromkeys([*rows.columns, "latency_s", "loop_ratio"])  # also where nothing ran
    rows = dense_first(rows).reindex(columns=list(shown))
    notes = (
        LOOP_DEFINITION,
        *configurations(rows),
        *failures(rows),
        *remarks(rows),
        *warnings(rows, records),
    )
    heading = " · ".join([*dict.fromkeys(rows["machine"]), *_settings_line(rows)])
    made = table(rows, (*_distinguishing(rows), *UPSTREAM_COLUMNS))
    return replace(made, heading=heading, notes=notes)


def details_table(records: pd.DataFrame) -> Table | None:
    """Per token and per case: what the efficiency table has no room for. None where no case
    generated.

    Steps come from one instrumented generation; a boundary step of CAT closes a chunk (compress,
    write the slot), all its others are inner steps.
    """
    return details_of(distinct_labels(measured(records)))


def details_of(rows: pd.DataFrame) -> Table | None:
    """`details_table` of rows that are measured and labelled already."""
    if not _has_generated(rows):
        return None
    rows = rows[~rows["suite"].isin(NOT_GENERATING)]
    several = rows["prompt_len"].nunique() > 1
    prompt = (Column("prompt", ("prompt_len",), whole),) if several else ()
    made = table(_with_step_statistics(dense_first(rows)), (*prompt, *DETAIL_COLUMNS))
    return replace(made, notes=defined(DETAIL_DEFINITIONS, made.text), suffix="steps")


def _has_generated(rows: pd.DataFrame) -> bool:
    return any(f"{name}.samples" in rows and rows[f"{name}.samples"].notna().any()
               for name in ("step_s", "ttft_s"))  # fmt: skip


def full_table(records: pd.DataFrame) -> Table:
    """Both tables in one, with run, scale and device: JSON and CSV have no page to fit."""
    rows, suites = distinct_labels(measured(records)), suites_of(records)
    if len(suites) < 2 and (rows.empty or "latency_s" not in rows):
        return records_table(records)
    rows = dense_first(rows)
    fixed = ("run", "scale", "device_name", "decode_path", "forward_path", *SETTINGS)
    columns = [Column(name, (name,), str) for name in fixed]
    if len(suites) > 1 or "loop" in rows:
        columns.append(Column("suite", ("suite",), str))
    for suite in [name for name in suites if name in KINDS]:
        titles = {c.title for c in columns}
        columns += [c for c in KINDS[suite][0] if c.title not in titles]
    if _has_generated(rows):
        rows = _with_step_statistics(rows)
        titles = {c.title for c in columns}
        columns += [c for c in DETAIL_COLUMNS if c.title not in titles]
    made = [records_table(records, suite) for suite in suites]
    heading = "; ".join(dict.fromkeys(each.heading for each in made))
    notes = dict.fromkeys(note for each in made for note in each.notes)
    return replace(table(rows, columns), heading=heading, notes=tuple(notes))


def table(rows: pd.DataFrame, columns: Sequence[Column], by: Sequence[str] = ()) -> Table:
    """Print `columns` of `rows`; the best of each group of equal `by` is marked.

    A case with another status than ok shows it in the first column that lacks its value.
    """
    columns = [c for c in columns if set(c.keys) & set(rows.columns)]
    keys = list(dict.fromkeys(key for c in columns for key in c.keys))
    rows = rows.reset_index(drop=True).reindex(columns=list(dict.fromkeys([*rows.columns, *keys])))
    text = pd.DataFrame([_line(row, columns) for _, row in rows.iterrows()])
    text = text.reindex(columns=[c.title for c in columns])
    marks = [name for name in ("status", "error") if name in rows]
    return Table(
        rows[keys + [m for m in marks if m not in keys]], text, best=_best(rows, columns, by)
    )


def _line(row: pd.Series, columns: Sequence[Column]) -> dict[str, str]:
    status, cells = row.get("status", "ok"), {}
    for column in columns:
        values = [row[key] for key in column.keys]
        if not pd.isna(values[0]):
            marked = any(is_marked(row, key) for key in column.keys)
            cells[column.title] = column.write(*values) + REMARKED * marked
        else:
            cells[column.title] = "-" if status in ("ok", "") else str(status)
            status = ""  # said once per row
    return cells


def _best(rows: pd.DataFrame, columns: Sequence[Column], by: Sequence[str]) -> pd.DataFrame:
    """True where a cell is the best of its group. A group of one has no best, nor has one with a
    value under a remark, with "is_ranked" False, or whose best cannot be told from the others.
    """
    best = pd.DataFrame(False, index=rows.index, columns=[c.title for c in columns])
    parts = [part for _, part in rows.groupby(list(by), sort=False)] if by else [rows]
    for column in (c for c in columns if c.best):
        key = column.keys[0]
        for part in parts:
            marked = any(is_marked(row, key) for _, row in part.iterrows())
            is_ranked = "is_ranked" not in part or part["is_ranked"].all()
            part = part[part[key].notna()]
            if len(part) > 1 and is_ranked and not marked:
                first = part[key] == column.best(part[key])
                if _is_apart(part[first], part[~first], key):
                    best.loc[part.index[first], column.title] = True
    return best


RESIDENT_ON_CPU = ("peak_bytes", "allocated_bytes")


def _is_apart(first: pd.DataFrame, others: pd.DataFrame, key: str) -> bool:
    """Whether `first`, which share one value, are known to be best: by the rule of `compare`.

    Counted bytes of one run are exact, but not a process's resident set. A time or rate needs the
    margin that a run may drift by, from run to run and inside one, and samples that differ, where
    so many could.
    """
    value = first[key].iloc[0]
    near = others[(others[key] / value - 1).abs() <= stats.MARGIN]
    is_resident = key in RESIDENT_ON_CPU and "cpu" in set(first.get("device", ()))
    if key.endswith("_bytes") and not is_resident:
        together = pd.concat([first, near])
        return "run" not in together or together["run"].nunique() == 1
    pairs = [(a, b) for _, a in first.iterrows() for _, b in others.iterrows()]
    return len(first) == 1 and near.empty and not any(_is_noise(*pair, key) for pair in pairs)


def _is_noise(a: pd.Series, b: pd.Series, key: str) -> bool:
    samples = [row.get(f"{key}.samples") for row in (a, b)]
    if not all(isinstance(one, list) for one in samples):
        return False
    few = stats.too_few(*map(len, samples))
    return not few and not stats.separable(*samples).separable


def _with_step_statistics(rows: pd.DataFrame) -> pd.DataFrame:
    return joined(rows, [_step_statistics(row) for _, row in rows.iterrows()])


def _step_statistics(row: pd.Series) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("step", "step_inner", "step_boundary"):
        samples = row.get(f"{kind}_s.samples")
        if isinstance(samples, list) and samples:
            cuts = np.percentile(samples, PERCENTILES)
            found |= {f"{kind}_p{p}_s": c for p, c in zip(PERCENTILES, cuts, strict=True)}
            found[f"{kind}_mean_s"], found[f"{kind}_count"] = float(np.mean(samples)), len(samples)
    samples = row.get("step_s.samples")
    if isinstance(samples, list) and samples:
        tenth = max(1, len(samples) // 10)
        found["step_first_s"] = float(np.mean(samples[:tenth]))
        found["step_last_s"] = float(np.mean(samples[-tenth:]))
    if "step_boundary_count" in found:
        found["boundary_share"] = found["step_boundary_count"] / found["step_count"]
    ttft = row.get("ttft_s.samples")
    if isinstance(ttft, list) and ttft:
        interval = summary(tuple(ttft))
        found["ttft_s_low"], found["ttft_s_high"] = interval.low, interval.high
    return found


def dense_first(rows: pd.DataFrame) -> pd.DataFrame:
    """By batch size and length; within them Dense, then the others by name, whatever ran first."""

    def place(label: str) -> tuple:  # CAT-8 before CAT-16
        numbers_apart = re.split(r"(\d+)", label)
        return not label.startswith("Dense"), [int(p) if p.isdigit() else p for p in numbers_apart]

    order = {label: n for n, label in enumerate(sorted(rows["label"].unique(), key=place))}
    rows = rows.assign(place=rows["label"].map(order))
    rows = rows.sort_values(["batch_size", "seq_len", "place", "run"], kind="stable")
    return rows.drop(columns="place").reset_index(drop=True)


def _distinguishing(rows: pd.DataFrame) -> list[Column]:
    """A column for each setting in which the rows of one table differ."""
    names = ("run", "decode_path", "forward_path", "dtype", "prompt_len", "seed", "weights")
    names += SETTINGS
    if rows["suite"].isin(NOT_GENERATING).all():
        names = tuple(name for name in names if name != "prompt_len")
    return [Column(name, (name,), str) for name in names if rows[name].nunique() > 1]


def _metric_columns(records: pd.DataFrame) -> tuple[Column, ...]:
    metrics = [m for m in records["metric"].unique() if m != "case"]
    return tuple(Column(metric, (metric,), digits) for metric in metrics)


def _settings_line(rows: pd.DataFrame) -> list[str]:
    """What all rows share is said once, above the table; what differs is listed."""
    parts = [", ".join(dict.fromkeys(rows["dtype"]))]
    generating = rows[~rows["suite"].isin(NOT_GENERATING)]
    if len(generating):
        parts.append(", ".join(dict.fromkeys(generating["decode_path"])))
    forward_paths = list(dict.fromkeys(rows["forward_path"]))
    if "training" in set(rows["suite"]) or forward_paths != ["eager"]:
        parts.append(f"forward {', '.join(forward_paths)}")
    for name in SETTINGS:
        values = list(filter(None, dict.fromkeys(rows[name])))
        parts += [f"{name} {', '.join(values)}"] if values else []
    prompts = sorted(set(generating["prompt_len"]))
    if prompts:
        parts.append(f"prompt {', '.join(str(p) for p in prompts)} tokens")
    if "smoke" in set(rows["scale"]):
        parts.append("smoke scale: proves the pipeline, numbers are meaningless")
    return parts
