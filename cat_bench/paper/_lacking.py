"""What an exhibit lacks: cases of its plan that no run has closed, and what its rows are remarked.

An exhibit is read without the list of runs beside it: a system or cell that is not there must not
look as if nobody had meant to measure it, nor a number that is known to be stale like any other.
"""

import textwrap
from collections.abc import Callable, Sequence

import pandas as pd

from cat_bench.case import Case
from cat_bench.notes import remarks
from cat_bench.paper import _one_run, _settings

MAX_CHARACTERS = 400
KNOWN = ("ok", "oom")  # statuses of a case that says how its architecture fares
WORDS = {"batch_size": "batch", "seq_len": "length", "prompt_len": "prompt"}


def lacking(
    rows: pd.DataFrame,
    cases: Sequence[Case],
    names: Sequence[str],
    scale: str,
    by: Sequence[str],
    name_of: Callable[[Case], str] | None = None,
) -> list[str]:
    """ "Not measured, 3 of 8 cases: GDN; Mamba2 (length 1024)." and the remarks of the rows' runs.

    `by`: the fields of a case that tell an architecture's cells apart. Without any row the exhibit
    says so itself.
    """
    name_of = name_of or _by_architecture(names, cases, scale)
    return [*_not_measured(rows, cases, by, name_of), *remarks(rows)]


def ranked(rows: pd.DataFrame, cases: Sequence[Case]) -> pd.DataFrame:
    """`rows` with "is_ranked": False where a planned case of the same batch, length and prompt is
    missing. Among some of them nobody is known to be best, and tables mark none.
    """
    if rows.empty:
        return rows
    known = set(rows["case"][rows["status"].isin(KNOWN)])
    missing = {_one_run.setting_of(case) for case in cases if case.key not in known}
    settings = rows[_one_run.SETTING].itertuples(index=False, name=None)
    return rows.assign(is_ranked=[setting not in missing for setting in settings])


def _not_measured(
    rows: pd.DataFrame, cases: Sequence[Case], by: Sequence[str], name_of: Callable[[Case], str]
) -> list[str]:
    closed = set(rows["case"]) if len(rows) else set()
    missing = [case for case in cases if case.key not in closed]
    if not missing or rows.empty:
        return []
    planned, unmeasured = _cells(cases, by, name_of), _cells(missing, by, name_of)
    groups: dict[tuple, list[str]] = {}
    for name, cells in unmeasured.items():
        groups.setdefault(() if cells == planned[name] else tuple(cells), []).append(name)
    parts = []
    for cells, group in groups.items():
        who = "all" if len(group) == len(planned) > 1 else ", ".join(group)
        parts.append(f"{who} ({_said(cells, by)})" if cells else who)
    text = f"Not measured, {len(missing)} of {len(cases)} cases: {'; '.join(parts)}."
    return [textwrap.shorten(text, MAX_CHARACTERS, placeholder=" ...")]


def _by_architecture(
    names: Sequence[str], cases: Sequence[Case], scale: str
) -> Callable[[Case], str]:
    """The label; the name where several have one label (Mamba2 of several state sizes)."""
    labels = [_settings.label(name) for name in names]
    shown = {
        _settings.arch_text(name, scale, seq_len): name if labels.count(label) > 1 else label
        for name, label in zip(names, labels, strict=True)
        if _settings.available([name], scale)
        for seq_len in {case.seq_len for case in cases}
    }
    return lambda case: shown.get(case.arch, case.arch)


def _cells(
    cases: Sequence[Case], by: Sequence[str], name_of: Callable[[Case], str]
) -> dict[str, list[tuple]]:
    found: dict[str, list[tuple]] = {}
    for case in cases:
        cell = tuple(getattr(case, field) for field in by)
        cells = found.setdefault(name_of(case), [])
        if cell not in cells:
            cells.append(cell)
    return {name: sorted(cells) for name, cells in found.items()}


def _said(cells: Sequence[tuple], by: Sequence[str]) -> str:
    """ "length 1024, 4096"; of two fields "batch 1, 4 x length 1024 and batch 16 x length 2048"; of
    three "batch 16 x length 1024 of prompt 768".
    """
    if len(by) == 1:
        return f"{WORDS[by[0]]} {', '.join(str(x) for (x,) in cells)}"
    seconds: dict[int, list[str]] = {}
    for first, second, *third in cells:
        of = f" of {WORDS[by[2]]} {third[0]}" if third else ""
        seconds.setdefault(first, []).append(f"{second}{of}")
    firsts: dict[tuple, list[int]] = {}
    for first, each in seconds.items():
        firsts.setdefault(tuple(each), []).append(first)
    return " and ".join(
        f"{WORDS[by[0]]} {', '.join(map(str, group))} x {WORDS[by[1]]} {', '.join(each)}"
        for each, group in firsts.items()
    )
