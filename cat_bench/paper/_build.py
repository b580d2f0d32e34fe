"""Exhibits from stored runs: which cases exist, what status that means, files and the HTML report.

A case counts where a run has closed it; of several runs the one with the highest folder number
counts, so that runs made at the same time are not mixed point by point. All rows of one exhibit
come from one device: the one with most of its cases. Files: results/paper/<scale>/<exhibit>.md .tex
.csv for tables, .svg .pdf .png .csv for figures, and report.html with all of them: an exhibit
rendered alone takes its place there among the others, which stay as they were last rendered.
"""

import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pandas as pd

from cat_bench import figures, measurements, remarks, report, spec, store
from cat_bench.case import Case
from cat_bench.errors import UserError
from cat_bench.paper import _published, _settings
from cat_bench.paper._settings import Content

INDEX = "index.json"  # what each exhibit was last rendered from, to notice that its plan changed


@dataclass(frozen=True)
class Status:
    name: str  # "fig2"
    title: str
    status: str  # "not run", "partial 7/24", "done", "stale", "not built (needs suites: pretrain)"
    detail: str = ""  # what else to know: missing architectures, the device, cases not ok


@dataclass(frozen=True)
class Built:
    statuses: list[Status]
    files: list[Path]
    report_html: Path | None
    skipped: tuple[str, ...] = ()  # run folders that cannot be read, and why: warnings


@dataclass(frozen=True)
class Found:
    """The rows of one exhibit: one device, one row set per case."""

    planned: list[Case]
    records: pd.DataFrame
    device: str | None  # None: no case is closed
    others: tuple[str, ...]  # devices that have cases too, but fewer
    statuses: dict[str, str]  # case key -> status of its closing row
    stand_ins: frozenset[str] = frozenset()  # keys of which an earlier case is shown

    @property
    def num_closed(self) -> int:
        return len(self.statuses)


def statuses(results: Path, scale: str, warn: Callable[[str], None] | None = None) -> list[Status]:
    """Every exhibit with its status, in the paper's order; renders nothing.

    `warn` is called with a sentence for each run folder that cannot be read.
    """
    _settings.scale_of(scale)
    records, _, skipped = all_records(results)
    index = _index(results, scale)
    for text in skipped if warn else ():
        warn(text)
    return [
        _status(name, _found(name, scale, records), index.get(name), scale)
        for name, _ in spec.exhibits()
    ]


def build(
    names: Sequence[str],
    scale: str,
    results: Path,
    run_missing: Callable[[list[Case]], None] | None = None,
    device: str | None = None,
) -> Built:
    """Render `names` from what exists; `run_missing` measures, once, all cases that do not.

    `device` (a GPU's or CPU's name): another device's rows neither keep this one from measuring
    nor stand in for what it has measured. Exhibits of which it has nothing are drawn as without it.
    """
    _settings.scale_of(scale)
    records, runs, skipped = all_records(results)
    if run_missing:
        run_missing(missing_cases(names, scale, records, device))
        records, runs, skipped = all_records(results)
    folder = results / "paper" / scale
    files: list[Path] = []
    drawn: dict[str, Content] = {}
    made: list[Status] = []
    index = _index(results, scale)
    for name in names:
        found = _found(name, scale, records, device)
        if found.device is None:
            found = _found(name, scale, records)
        drawn[name] = exhibit(name).render(found.records, points_of(name), scale)
        files += write(drawn[name], folder, name)
        index[name] = sorted({case.key for case in found.planned})
        made.append(_status(name, found, index[name], scale))
    _write_index(folder, index)
    html = folder / "report.html"
    shown = _shown_on(html) | {s.name: _section(s, drawn[s.name], folder) for s in made}
    in_order = [shown[name] for name, _ in spec.exhibits() if name in shown]
    page = _html(scale, [*_left_out(skipped), *in_order], runs, records)
    html.write_text(page, encoding="utf-8")
    return Built(made, files, html, skipped)


def exhibit(name: str) -> ModuleType:
    """The module of an exhibit. Raises UserError where there is none of that name."""
    known = [known for known, _ in spec.exhibits()]
    if name not in known:
        raise UserError(f"unknown exhibit '{name}'.", f"Available: {', '.join(known)}.")
    return importlib.import_module(f"cat_bench.paper.{name}")


def points_of(name: str) -> list:
    """The paper's points; Figure 4 has none."""
    return [point for point in _published.load() if point.exhibit == name]


# --- rows ----------------------------------------------------------------------------------------


def all_records(results: Path) -> tuple[pd.DataFrame, list[store.Run], tuple[str, ...]]:
    """The rows of all runs that can be read, those runs, and a text per folder that cannot.

    A broken run folder stops nobody else's figures.
    """
    store.check_folder(results)
    runs, skipped = [], []
    for path in store.folders(results):
        try:
            run = store.Run.open(path)
            store.frame([run])
            remarks.read(run)
        except UserError as error:
            skipped.append(f"{path.name} is left out: {error.message} {error.hint}".strip())
            continue
        runs.append(run)
    return measurements.frame(runs), runs, tuple(skipped)


def _found(name: str, scale: str, records: pd.DataFrame, device: str | None = None) -> Found:
    """What an exhibit draws. It may export `earlier`, the case as its plan had it before: shown,
    and told apart, until the one of today is measured.
    """
    module = exhibit(name)
    return find(records, module.plan(scale), device, getattr(module, "earlier", None))


def find(
    records: pd.DataFrame,
    planned: list[Case],
    device: str | None = None,
    earlier: Callable[[Case], Case] | None = None,
) -> Found:
    """The closed rows of `planned`, per case of the last run that closed it, all from one device:
    the given one, or that with most cases.

    All other closed rows of that device come along with "chosen" False: a ratio to Dense is taken
    inside one run, also where a later run has another Dense. A case is the same with any number of
    repeats: every table prints n. `earlier(case)` stands in for a case that no run has measured.
    """
    asked = {_repeats(settings) for settings in records.drop_duplicates("case")["settings"]}
    pairs = [(case.with_repeats(n), case.key) for case in planned for n in {None, *asked}]
    own = {case.key: key for case, key in pairs}
    keys = {earlier(case).key: key for case, key in pairs} | own if earlier else own
    records = records[records["case"].isin(keys)]
    is_own = records["case"].isin(own)
    records = records.assign(case=records["case"].map(keys), is_own=is_own)
    closing = records[records["metric"] == store.CLOSING]
    closing = closing.assign(number=closing["run"].map(_run_number), rank=_rank(closing))
    newest = closing.sort_values(["rank", "number"], kind="stable").drop_duplicates(
        ["case", "device_name"], keep="last"
    )
    counts = Counter(newest["device_name"])
    if device is None and counts:
        latest = newest.groupby("device_name")["number"].max()
        device = max(counts, key=lambda name: (counts[name], latest[name]))
    if device not in counts:
        return Found(planned, records.iloc[:0], None, tuple(sorted(counts)), {})
    chosen = newest[newest["device_name"] == device]
    pairs = pd.MultiIndex.from_frame(chosen[["run", "case"]])
    rows = records[records["device_name"] == device]
    rows = rows.assign(chosen=pd.MultiIndex.from_frame(rows[["run", "case"]]).isin(pairs))
    by_case = dict(zip(chosen["case"], chosen["status"], strict=True))
    others = tuple(sorted(name for name in counts if name != device))
    stand_ins = frozenset(chosen["case"][~chosen["is_own"]])
    return Found(planned, rows, device, others, by_case, stand_ins)


def _rank(closing: pd.DataFrame) -> pd.Series:
    """1: of today's plan. 0: a stand-in. -1: ended badly where a stand-in says more."""
    replaced = closing[~closing["is_own"]][["case", "device_name"]]
    has_stand_in = pd.MultiIndex.from_frame(closing[["case", "device_name"]]).isin(
        pd.MultiIndex.from_frame(replaced)
    )
    bad = closing["is_own"] & ~closing["status"].isin(["ok", "oom"]) & has_stand_in
    return closing["is_own"].astype(int).where(~bad, -1)


def _repeats(settings: Sequence[Sequence[str]]) -> int | None:
    """What --repeats asked for; None: nothing, and the rule of profiler.py held."""
    asked = dict(settings).get("repeats")
    return None if asked is None else int(asked)


def _run_number(name: str) -> int:
    """12 of "0012-fig2-h100": the order in which runs were started."""
    return int(name.partition("-")[0])


def missing_cases(
    names: Sequence[str], scale: str, records: pd.DataFrame, device: str | None = None
) -> list[Case]:
    """Cases of `names` that no run has closed on `device` (see `find`), each once; also those that
    were unsupported and need no package any more that is not here.
    """
    missing: dict[str, Case] = {}
    for name in names:
        found = find(records, exhibit(name).plan(scale), device)
        if _settings.only_reference(getattr(exhibit(name), "ARCHITECTURES", ()), scale):
            continue
        for case in found.planned:
            if _is_open(case, found.statuses.get(case.key)):
                missing[case.key] = case
    return list(missing.values())


def _is_open(case: Case, status: str | None) -> bool:
    if status != "unsupported":
        return status is None
    info = spec.describe(spec.parse(case.arch).name)
    paths = ("decode", case.decode_path), ("forward", case.forward_path)
    return not any(info.lacking(kind, path) for kind, path in paths)


# --- status --------------------------------------------------------------------------------------


def _status(name: str, found: Found, rendered: list[str] | None, scale: str) -> Status:
    module = exhibit(name)
    known = {suite for suite, _ in spec.suites()}
    unbuilt = [suite for suite in module.SUITES if suite not in known]
    names = getattr(module, "ARCHITECTURES", ())
    absent = _settings.missing(names, scale)
    alone = _settings.only_reference(names, scale)
    word = _word(found, unbuilt, absent, alone, rendered)
    if module.SUITES and not found.planned and not unbuilt:
        word = "nothing to measure at this scale"
    details = []
    if not word.startswith("not built"):
        details += [f"without {', '.join(absent)}"] if absent else []
        details += [f"needs suites: {', '.join(unbuilt)}"] if unbuilt else []
        details += [f"on {found.device}"] if found.device else []
    if found.others:
        details.append(f"cases of {', '.join(found.others)} left out")
    bad = Counter(status for status in found.statuses.values() if status != "ok")
    details += [f"{number} {status}" for status, number in bad.items()]
    if found.stand_ins:
        details.append(f"{len(found.stand_ins)} of an earlier plan, to be measured anew")
    return Status(name, module.TITLE, word, "; ".join(details))


def _word(
    found: Found,
    unbuilt: Sequence[str],
    absent: Sequence[str],
    only_reference: bool,
    rendered: list[str] | None,
) -> str:
    keys = sorted({case.key for case in found.planned})
    if unbuilt and not keys:
        return f"not built (needs suites: {', '.join(unbuilt)})"
    if only_reference:
        return f"not built (needs architectures: {', '.join(absent)})"
    if rendered is not None and rendered != keys:
        return "stale"
    num_closed = found.num_closed - len(found.stand_ins)
    if num_closed < len(keys):
        return f"partial {num_closed}/{len(keys)}" if found.num_closed else "not run"
    return "done in part" if unbuilt or absent else "done"  # 0 of 0: drawn, not measured


def _index(results: Path, scale: str) -> dict[str, list[str]]:
    """Exhibit -> keys of the cases in its plan when it was last rendered."""
    path = results / "paper" / scale / INDEX
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is broken: {error}.", "Remove it: the next `cat-bench paper all` writes it."
        ) from error


def _write_index(folder: Path, index: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(index.items())), indent=1)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


# --- files ---------------------------------------------------------------------------------------


def write(drawn: Content, folder: Path, name: str) -> list[Path]:
    """All files of one exhibit: NAME.csv holds a figure's points, NAME_table.* its table."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    if drawn.figure is not None:
        paths += figures.save(drawn.figure, folder, name)
    if drawn.plotted is not None:
        paths.append(folder / f"{name}.csv")
        drawn.plotted.to_csv(paths[-1], index=False, lineterminator="\n")
    for table in drawn.tables:
        stem = name if drawn.figure is None else f"{name}_{table.suffix}"
        for ending, form in (("md", "markdown"), ("tex", "latex"), ("csv", "csv")):
            paths.append(folder / f"{stem}.{ending}")
            paths[-1].write_text(report.WRITERS[form](table), encoding="utf-8")
    return paths


def _html(
    scale: str,
    sections: Sequence[report.Section],
    runs: Sequence[store.Run],
    records: pd.DataFrame,
) -> str:
    of_scale = set(records.loc[records["scale"] == scale, "run"])
    environments = [run.environment for run in runs if run.name in of_scale]
    title = f"cat-bench: the paper's exhibits, {_settings.scale_of(scale).says}"
    return report.html_page(title, sections, environments)


def _shown_on(page: Path) -> dict[str, report.Section]:
    """By name, the exhibits that the page already shows."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return {section.anchor: section for section in report.sections_of(text)}


def _about(remark: str) -> str:
    """The remark without the cells that it names, as a table's note says it."""
    return remark.partition(": ")[2] or remark


def _left_out(skipped: tuple[str, ...]) -> list[report.Section]:
    """First on the page: which runs are in no exhibit because their folders cannot be read."""
    title = "Warning: run folders that cannot be read"
    return [report.Section(title, "left-out", remarks=skipped)] if skipped else []


def _section(status: Status, drawn: Content, folder: Path) -> report.Section:
    svg = folder / f"{status.name}.svg"
    svgs = (svg.read_text(encoding="utf-8"),) if drawn.figure is not None else ()
    named = {point.exhibit for point in _published.load()}
    told = _published.remarks(status.name) if status.name in named else ()
    noted = " ".join(note for table in drawn.tables for note in table.notes)
    told = tuple(f"Remark: {text}" for text in told if _about(text) not in noted)
    word = f"{status.status} ({status.detail})" if status.detail else status.status
    shown = (*(replace(table, title="") for table in drawn.tables[:1]), *drawn.tables[1:])
    return report.Section(status.title, status.name, word, shown, svgs, told)
