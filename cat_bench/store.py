"""A run folder: append rows, read them as a DataFrame, resume.

    results/0004-fig2/  environment.json   machine, commit, versions, command line
                        plan.json          every case, and what its spec resolved to
                        records.jsonl      append-only, one row per Record, schema version in each
                        remarks.json       optional, by hand: remarks.py

One writer per run; readers modify nothing. A case's rows are written at once, its closing row
(metric "case") last, so a case counts as run exactly when its closing row is there. A line that an
interruption cut short is dropped by readers and cut off before the next write.
results/README.md documents every field. pandas (0.34 s to import) is loaded only to make a frame,
so that listing and finding runs stay instant.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_bench.case import Case, Record
from cat_bench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_RESULTS = Path("results")  # the folder of all runs, where nothing names another one
RESULTS_VARIABLE = "CAT_BENCH_RESULTS"  # environment variable that does
SCHEMA = 1  # raised when the meaning of a field changes; older rows stay readable
UNKNOWN_DEVICE = "unknown"  # a GPU or CPU whose name the machine does not tell
CLOSING = "case"  # the metric of the row that closes a case; its value is the wall time in seconds
COLUMNS = tuple(field.name for field in fields(Record)) + ("schema",)
_REQUIRED = frozenset(COLUMNS)
_TEXT, _NUMBER = (str, "a text"), (int | float | None, "a number or null")
_ROW_TYPES = {  # what a row holds, and how an error calls it; `schema` has a check of its own
    **dict.fromkeys(("case", "metric", "unit", "status", "environment", "at"), _TEXT),
    "error": (str | None, "a text or null"),
    "value": _NUMBER,
    "samples": (list, "a list of numbers"),
}
_ENVIRONMENT_TEXTS = ("command", "commit", "cpu_name", "cuda", "driver", "gpu_name", "torch")
CASE_FIELDS = tuple(field.name for field in fields(Case))


class Run:
    """One folder, one machine, one commit."""

    def __init__(self, path: Path, environment: dict[str, Any]):
        self.path, self.name = path, path.resolve().name
        self._environment = environment
        self._rows_path = path / "records.jsonl"

    @classmethod
    def create(
        cls,
        results: Path,
        name: str,
        environment: Mapping[str, Any],
        cases: Sequence[Case] = (),
        resolved: Mapping[str, dict] | None = None,
    ) -> "Run":
        """A new folder under `results` with the next free number: 0004-name."""
        check_folder(results)
        with _explained(results, "write"):
            results.mkdir(parents=True, exist_ok=True)
            path = _new_folder(results, sanitised(name))
            _write_json(path / "environment.json", environment)
            _write_json(path / "plan.json", _plan_document({}, {}))
        run = cls.open(path)
        run.extend_plan(cases, resolved or {})
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Raises UserError, having changed nothing, where the folder is not a whole run."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"{path} is not a run folder: there is no such folder.",
                "`cat-bench list runs` shows the runs.",
            )
        run = cls(path, _read_environment(path / "environment.json"))
        run._plan()  # a broken plan is reported before anything is measured
        return run

    @property
    def environment(self) -> dict[str, Any]:
        """The environment that rows written from now on carry the hash of."""
        return self._environment

    def environments(self) -> dict[str, dict[str, Any]]:
        """Every environment of this run by hash: the first, and one per resume that differs."""
        paths = sorted(self.path.glob("environment*.json"))
        return {digest(environment): environment for environment in map(_read_environment, paths)}

    def resume_under(self, environment: Mapping[str, Any]) -> None:
        """Keep a resume's own environment (other clocks, command line) beside the first one.

        Whether the two may share a run at all is decided before, by environment.conflicts.
        """
        hash_ = digest(environment)
        if hash_ not in self.environments():
            with _explained(self.path, "write"):
                _write_json(self.path / f"environment-{hash_}.json", environment)
        self._environment = dict(environment)

    @property
    def torn(self) -> bool:
        """Whether the last line was cut short by an interruption; such a line is not read."""
        with _explained(self._rows_path, "read"):
            return _last_byte(self._rows_path) not in (b"", b"\n")

    def append(self, records: Sequence[Record]) -> None:
        """Write rows in one flushed write, closing rows last; fill in `environment` and `at`."""
        closing_last = sorted(records, key=lambda record: record.metric == CLOSING)
        stamp = {"environment": digest(self.environment), "at": _now(), "schema": SCHEMA}
        rows = [{**_strict(dict(vars(record))), **stamp} for record in closing_last]
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        with _explained(self._rows_path, "write"):
            if self.torn:  # else the next row would be glued to the torn one
                _cut_to_last_newline(self._rows_path)
            with self._rows_path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def records(self, open_cases: bool = False) -> "pd.DataFrame":
        """One row per (case, metric) of every case's last closed attempt.

        `open_cases=True` also takes attempts without a closing row, which count as not run.
        """
        return _data_frame(_last_attempts(self._rows(), open_cases), COLUMNS)

    def closed(self) -> dict[str, str]:
        """Case key -> status of its last closing row. What is not in here has not been run."""
        return {row["case"]: row["status"] for row in self._rows() if row["metric"] == CLOSING}

    def cases(self) -> dict[str, Case]:
        """Case key -> Case, in the order of the plan."""
        try:
            return {key: Case.from_dict(case) for key, case in self._plan()["cases"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path / 'plan.json'} holds a case that this version cannot read: {error}",
                "Restore it, or use the version that wrote it: environment.json has its commit.",
            ) from error

    def resolved(self) -> dict[str, dict]:
        """Case key -> what the plan resolved: {"label": "CAT-8", "config": {...}, ...}."""
        resolved = self._plan()["resolved"]
        for key, entry in resolved.items():
            _check_resolved(entry, f"{self.path / 'plan.json'} is broken: 'resolved' of case {key}")
        return resolved

    def extend_plan(self, cases: Iterable[Case], resolved: Mapping[str, dict]) -> None:
        """Add cases to plan.json: the old ones stay, the file is replaced as a whole."""
        plan = self._plan()
        planned = plan["cases"] | {case.key: asdict(case) for case in cases}
        with _explained(self.path, "write"):
            document = _plan_document(planned, plan["resolved"] | dict(resolved))
            _write_json(self.path / "plan.json", document)

    def _plan(self) -> dict[str, Any]:
        path = self.path / "plan.json"
        plan = _read_json(path)
        _check_schema(plan.get("schema"), str(path))
        for part in ("cases", "resolved"):
            if not isinstance(plan.get(part), dict):
                raise UserError(
                    f"{path} is broken: it has no object '{part}'.",
                    "Restore the file (git, backup), or start a new run.",
                )
        return plan

    def _rows(self) -> list[dict[str, Any]]:
        """All whole rows, oldest first."""
        with _explained(self._rows_path, "read"):
            data = self._rows_path.read_bytes() if self._rows_path.exists() else b""
        lines = data.split(b"\n")[:-1]  # what follows the last newline is nothing or a torn line
        return [_parse(line, self._rows_path, number) for number, line in enumerate(lines, 1)]


def frame(runs: Sequence[Run], open_cases: bool = False) -> "pd.DataFrame":
    """The long table of reports: a row per (run, case, metric) with all that is known of its case.

    Columns: run, device_name, label, the fields of Case, the fields of Record, schema, and
    "config.<field>" for every field of the architectures' Configs (None where one has no such
    field).
    """
    rows = [row for run in runs for row in _described_rows(run, open_cases)]
    config = sorted({name for row in rows for name in row if name.startswith("config.")})
    return _data_frame(rows, ("run", "device_name", "label", *CASE_FIELDS, *COLUMNS, *config))


def find(results: Path, text: str) -> Run:
    """The run that `text` means: folder name, number, name, or path, from here or from `results`;
    ab/7 is run 7 of its subfolder ab. UserError names near ones.
    """
    check_folder(results)
    path = Path(text)
    matches = _matching(results, text)
    if not matches and text and path.is_dir():
        return Run.open(path)
    if not matches and path.parent != Path() and (results / path.parent).is_dir():
        results, text = results / path.parent, path.name
        matches = _matching(results, text)
    if len(matches) > 1:
        names = ", ".join(match.name for match in matches)
        raise UserError(f"'{text}' means several runs: {names}.", "Give the whole folder name.")
    if not matches:
        raise _no_such_run(results, text, folders(results))
    return Run.open(matches[0])


def _matching(results: Path, text: str) -> list[Path]:
    """The run folders in `results` whose name, number or given name `text` is."""
    paths = folders(results)
    matches = [path for path in paths if text in (path.name, _given_name(path))]
    if text.isdecimal():
        matches = [path for path in paths if _number(path) == int(text)] or matches
    return matches


def check_folder(results: Path) -> None:
    """Raises UserError where the folder of all runs is something else."""
    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results} is a file.", "Give the folder that holds the runs.")


def folders(results: Path) -> list[Path]:
    """The run folders under `results`, by number."""
    if not results.is_dir():
        return []
    with _explained(results, "read"):
        paths = [path for path in results.iterdir() if path.is_dir() and _number(path) is not None]
    return sorted(paths, key=lambda path: (_number(path), path.name))


def check_name(name: str) -> None:
    """Raises UserError for a name of a run by which it would not be found."""
    if name.isdecimal():
        raise UserError(
            f"--name {name} would mean the run of that number.", f"Example: --name run-{name}"
        )
    if name != sanitised(name):
        raise UserError(
            f"--name '{name}' cannot be a folder's name: it may hold 60 letters, digits, '.', '_' "
            "and '-', and neither starts nor ends with '.' or '-'.",
            f"Example: --name {sanitised(name)}",
        )


def sanitised(name: str) -> str:
    """A name that is safe as a folder name everywhere: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60].rstrip("-.") or "run"


def digest(environment: Mapping[str, Any]) -> str:
    """12 hex digits: the first of the SHA-256 of the canonical JSON."""
    text = json.dumps(environment, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _last_attempts(rows: list[dict[str, Any]], open_cases: bool) -> list[dict[str, Any]]:
    """The rows of every case's last attempt. An attempt ends with its closing row.

    A retry replaces the case whole: an old attempt's metrics never stand beside a new status. One
    `append` stamps all its rows alike, which tells rows apart that a torn attempt left behind.
    """
    closed: dict[str, dict[str, dict]] = {}  # case -> metric -> row
    unfinished: dict[str, dict[str, dict]] = {}
    for row in rows:
        attempt = unfinished.setdefault(row["case"], {})
        attempt[row["metric"]] = row
        if row["metric"] == CLOSING:
            whole = unfinished.pop(row["case"])
            together = {name: r for name, r in whole.items() if r["at"] == row["at"]}
            closed[row["case"]] = together if len(together) > 1 else whole
    chosen = closed | unfinished if open_cases else closed
    return [row for attempt in chosen.values() for row in attempt.values()]


def _described_rows(run: Run, open_cases: bool) -> Iterator[dict[str, Any]]:
    cases, resolved = run.cases(), run.resolved()
    described = {key: _describe(run, case, resolved.get(key, {})) for key, case in cases.items()}
    for row in _last_attempts(run._rows(), open_cases):
        if row["case"] not in described:
            raise UserError(
                f"{run.path}: records.jsonl has rows of case {row['case']}, plan.json does not.",
                "The two files do not belong together: restore them (git, backup).",
            )
        yield described[row["case"]] | row


def _describe(run: Run, case: Case, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a case that is not measured, flat."""
    processor = "gpu_name" if case.device == "cuda" else "cpu_name"
    known = {"run": run.name, "device_name": run.environment.get(processor) or UNKNOWN_DEVICE}
    config = {f"config.{name}": value for name, value in resolved.get("config", {}).items()}
    values = {name: getattr(case, name) for name in CASE_FIELDS}
    return known | {"label": resolved.get("label", case.arch)} | values | config


def _data_frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    def series(name: str) -> "pd.Series":
        values = [row.get(name) for row in rows]
        if name == "value":
            return pd.Series(values, dtype=float)
        # As objects where some are missing: a chunk size of 8 must not turn into 8.0.
        return pd.Series(values, dtype=object if None in values or not values else None)

    return pd.DataFrame({name: series(name) for name in columns})


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"got {type(row).__name__}, expected an object")
        if not row.keys() >= _REQUIRED:
            raise ValueError(f"fields missing: {', '.join(sorted(_REQUIRED - row.keys()))}")
        _check_types(row)
        if None in row["samples"]:  # how _strict writes NaN
            row["samples"] = [math.nan if value is None else value for value in row["samples"]]
    except (TypeError, ValueError) as error:  # ValueError: not JSON, not UTF-8
        raise UserError(
            f"{path}, line {number} is not a row: {error}. Nothing was changed.",
            "Restore the file (git, backup), or delete that line: its case then runs again.",
        ) from error
    _check_schema(row["schema"], f"{path}, line {number}")
    return row


def _check_types(row: dict[str, Any]) -> None:
    """Raises ValueError for the first field that holds something else than rows do."""
    for name, (kind, words) in _ROW_TYPES.items():
        if not isinstance(row[name], kind):
            raise ValueError(f"{name} is {row[name]!r}, expected {words}")
    for sample in row["samples"]:
        if not isinstance(sample, _NUMBER[0]):
            raise ValueError(f"samples hold {sample!r}, expected a list of numbers")


def _read_environment(path: Path) -> dict[str, Any]:
    """Raises UserError where a field that tables print is no text."""
    environment = _read_json(path)
    for name in _ENVIRONMENT_TEXTS:
        if not isinstance(environment.get(name), str | None):
            raise UserError(
                f"{path} has {name} {environment[name]!r}, expected a text or null.",
                "Restore the file (git, backup), or start a new run.",
            )
    return environment


def _check_resolved(entry: Any, where: str) -> None:
    """Raises UserError unless it is an object whose label is a text and whose config an object."""
    hint = "Restore the file (git, backup), or start a new run."
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {entry!r}, expected an object.", hint)
    for name, kind, words in (("label", str, "a text"), ("config", dict, "an object")):
        if not isinstance(entry.get(name, kind()), kind):
            raise UserError(f"{where} has {name} {entry[name]!r}, expected {words}.", hint)


def _check_schema(schema: Any, where: str) -> None:
    if not isinstance(schema, int):
        raise UserError(
            f"{where} has schema {schema!r}; expected a number up to {SCHEMA}.",
            "Restore the file (git, backup), or start a new run.",
        )
    if schema > SCHEMA:
        raise UserError(
            f"{where} was written by a newer cat-bench: schema {schema}; this one reads {SCHEMA}.",
            "Update cat-bench.",
        )


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """The row in strict JSON, which has no NaN and no infinity: null, and the error says which."""
    value = row["value"]
    if value is not None and not math.isfinite(value):
        row |= {"value": None, "error": row["error"] or f"the value was {value}"}
    row["samples"] = [sample if math.isfinite(sample) else None for sample in row["samples"]]
    return row


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(
            f"{path.parent} is not a whole run folder: {path.name} is missing.",
            "Restore the file (git, backup), or start a new run.",
        )
    with _explained(path, "read"):
        data = path.read_bytes()
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, expected an object")
    except ValueError as error:
        raise UserError(
            f"{path} is broken: {error}.", "Restore the file (git, backup), or start a new run."
        ) from error
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written beside, then renamed: readers see the old file or the new one, never a part."""
    text = json.dumps(content, indent=1) + "\n"
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _plan_document(cases: Mapping[str, dict], resolved: Mapping[str, dict]) -> dict[str, Any]:
    # Cases stand under the key they were run with: a later field of Case changes the keys of new
    # cases, but not which rows belong to this one.
    return {"schema": SCHEMA, "cases": cases, "resolved": resolved}


@contextmanager
def _explained(path: Path, action: str) -> Iterator[None]:
    """Turn the system's refusal (permission, disk full, not a folder) into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot {action} {path}: {error.strerror or error}.",
            "Rows written before are kept. Check permissions and free space of that folder.",
        ) from error


def _last_byte(path: Path) -> bytes:
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _cut_to_last_newline(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _new_folder(results: Path, name: str) -> Path:
    while True:
        number = max((_number(path) or 0 for path in folders(results)), default=0) + 1
        path = results / f"{number:04d}-{name}"
        try:
            path.mkdir()
        except FileExistsError:  # another process took the number just now
            continue
        return path


def _number(path: Path) -> int | None:
    match = re.match(r"(\d{4,})-.", path.name)
    return int(match.group(1)) if match else None


def _given_name(path: Path) -> str:
    return path.name.partition("-")[2]


def _no_such_run(results: Path, text: str, paths: list[Path]) -> UserError:
    if not paths:
        hint = f"There are no runs in {results} yet: `cat-bench run` makes one."
        return UserError(f"no run '{text}'.", hint)
    by_name = {name: path.name for path in paths for name in (path.name, _given_name(path))}
    near = {by_name[name] for name in get_close_matches(text, by_name, n=3)}
    near |= {path.name for path in paths if text and text.lower() in path.name.lower()}
    hint = f"Did you mean: {', '.join(sorted(near)[:5])}? " if near else ""
    latest = ", ".join(path.name for path in paths[-5:])
    return UserError(f"no run '{text}' in {results}.", f"{hint}Latest runs: {latest}.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
