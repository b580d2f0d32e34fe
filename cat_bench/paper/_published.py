"""The paper's own numbers: reads cat_bench/published.toml and checks every line of it.

The file keeps the shape of the paper's tables, so that a reader can compare them by eye; here each
cell becomes one flat `Point`. Remarks say where the paper contradicts itself or cannot be trusted.

Try it: python -c "from cat_bench.paper import _published; print(_published.remarks('table2'))"
"""

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_bench.errors import UserError

PUBLISHED = Path(__file__).parents[1] / "published.toml"
SCHEMA = 1
BLOCK_KEYS = {"kind", "columns", "coordinates", "x", "rows", "notes", "points", "remarks"}

KINDS = ("printed", "digitised", "claim", "recomputed")
UNITS = ("1", "%", "s", "GiB", "x", "solved", "elements", "parameters", "tokens")
LABELS = (
    *("Dense", "Dense-2D", "Sparse", "Sparse-2D", "Sliding", "Mamba2", "GDN", "GDN-H1"),
    *("BASED", "BASED-2x", "BASED (unpatched)", "BASED (patched)"),
    *("CAT-4", "CAT-8", "CAT-16", "CAT-32", "CAT-64"),
    *("CAT", "All"),  # for sentences that name no chunk size, or every model
)

Coordinate = int | float | str


@dataclass(frozen=True)
class Point:
    """One number of the paper, or recomputed from its numbers."""

    exhibit: str  # "table2", "fig3"; "text" for sentences that belong to neither
    row: str  # a label as in our own tables
    metric: str
    value: float
    unit: str
    kind: str  # one of KINDS
    x: dict[str, Coordinate] = field(default_factory=dict)  # {"batch_size": 512, "seq_len": 1024}
    remark: str = ""


def load(path: Path = PUBLISHED) -> list[Point]:
    """All points, in the order of the file. Raises UserError on a file of another form."""
    return [point for name, block in _exhibits(path).items() for point in _points(name, block)]


def points(exhibit: str, path: Path = PUBLISHED) -> list[Point]:
    """The points of one exhibit; none for Figure 4, which has no numbers."""
    return _points(exhibit, _exhibit(exhibit, path))


def remarks(exhibit: str, path: Path = PUBLISHED) -> list[str]:
    """What to know before trusting an exhibit: on the whole of it, then on single numbers."""
    block = _exhibit(exhibit, path)
    _points(exhibit, block)  # refuses a malformed exhibit
    return [
        *block.get("remarks", []),
        *(_about_cells(note) for note in block.get("notes", [])),
        *(_about_point(point) for point in _outside(exhibit, block)),
    ]


def source(path: Path = PUBLISHED) -> dict[str, Coordinate]:
    """Which paper, which GPU, how it was timed: holds for every efficiency point."""
    return _table(_read(path).get("source"), "[source]")


def _about_cells(note: dict[str, Any]) -> str:
    """Which cells, then what about them: "Mamba2, latency_s, batch_size=16: Approximate." """
    metric = [note["metric"]] if "metric" in note else []
    return f"{', '.join([note['row'], *metric, *_pairs(note.get('x', {}))])}: {note['text']}"


def _about_point(point: Point) -> str:
    name = ", ".join([point.row, point.metric, *_pairs(point.x)])
    unit = "" if point.unit == "1" else f" {point.unit}"
    return f"{name}, {point.kind} {point.value:.10g}{unit}: {point.remark}"


def _pairs(x: dict[str, Coordinate]) -> list[str]:
    return [f"{name}={value}" for name, value in x.items()]


# ---- The file and its exhibits


def _read(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "Install cat-bench again."
        raise UserError(f"cannot read the published numbers: {error}.", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _malformed(str(path), f"not valid TOML: {error}") from error
    if document.get("schema") != SCHEMA:
        raise _malformed("schema", f"got {document.get('schema')!r}, expected {SCHEMA}")
    _only(document, {"schema", "source", "exhibit"}, "top level")
    return document


def _exhibits(path: Path) -> dict[str, dict[str, Any]]:
    exhibits = _table(_read(path).get("exhibit"), "[exhibit]")
    return {name: _table(block, f"[exhibit.{name}]") for name, block in exhibits.items()}


def _exhibit(name: str, path: Path) -> dict[str, Any]:
    exhibits = _exhibits(path)
    if name not in exhibits:
        message = f"the paper has no numbers for exhibit '{name}'."
        raise UserError(message, f"Available: {', '.join(exhibits)}.")
    return exhibits[name]


def _points(exhibit: str, block: dict[str, Any]) -> list[Point]:
    """Cells of the rows with their notes, then the numbers that stand outside the table."""
    where = f"[exhibit.{exhibit}]"
    _only(block, BLOCK_KEYS, where)
    for remark in _list(block.get("remarks", []), f"{where} remarks"):
        _text(remark, f"{where} remarks")
    cells = list(_cells(exhibit, block, where))
    for note in _list(block.get("notes", []), f"{where} notes"):
        cells = _annotated(cells, _table(note, f"{where} notes"), f"{where} notes")
    all_points = cells + _outside(exhibit, block)
    _refuse_duplicates(all_points, where)
    return all_points


def _cells(exhibit: str, block: dict[str, Any], where: str) -> Iterator[Point]:
    kind = _one_of(block.get("kind"), KINDS, f"{where} kind")
    columns = _table(block.get("columns", {}), f"{where} columns")
    names = [
        _text(name, f"{where} coordinates")
        for name in _list(block.get("coordinates", []), f"{where} coordinates")
    ]
    shared = _coordinates(block.get("x", {}), f"{where} x")
    for number, row in enumerate(_list(block.get("rows", []), f"{where} rows"), start=1):
        here = f"{where} row {number}"
        row = _list(row, here)
        width = 1 + len(names) + len(columns)
        if len(row) != width:
            raise _malformed(here, f"got {len(row)} cells, expected {width}: {row}")
        label = _one_of(row[0], LABELS, here)
        own = dict(zip(names, row[1 : 1 + len(names)], strict=True))
        x = shared | _coordinates(own, here)
        for (metric, unit), value in zip(columns.items(), row[1 + len(names) :], strict=True):
            unit = _one_of(unit, UNITS, f"{where} columns")
            yield Point(exhibit, label, metric, _number(value, here), unit, kind, x)


def _annotated(cells: list[Point], note: dict[str, Any], where: str) -> list[Point]:
    """The cells, with the note's text on every one that it matches."""
    _only(note, {"row", "metric", "x", "text"}, where)
    text = _text(note.get("text"), where)
    hits = [cell for cell in cells if _matches(cell, note, where)]
    if not hits:
        raise _malformed(where, f"got a note that matches no cell: {note}")
    return [_with_remark(cell, text) if cell in hits else cell for cell in cells]


def _matches(cell: Point, note: dict[str, Any], where: str) -> bool:
    wanted = _coordinates(note.get("x", {}), where)
    return (
        cell.row == note.get("row")
        and note.get("metric", cell.metric) == cell.metric
        and wanted.items() <= cell.x.items()
    )


def _with_remark(point: Point, text: str) -> Point:
    remark = f"{point.remark} {text}".strip()  # a cell can carry two notes
    return Point(**{**vars(point), "remark": remark})


def _outside(exhibit: str, block: dict[str, Any]) -> list[Point]:
    where = f"[exhibit.{exhibit}] points"
    return [_point(exhibit, fields, where) for fields in _list(block.get("points", []), where)]


def _point(exhibit: str, fields: object, where: str) -> Point:
    fields = _table(fields, where)
    _only(fields, {"row", "metric", "value", "unit", "kind", "x", "remark"}, where)
    return Point(
        exhibit,
        row=_one_of(fields.get("row"), LABELS, where),
        metric=_text(fields.get("metric"), where),
        value=_number(fields.get("value"), where),
        unit=_one_of(fields.get("unit"), UNITS, where),
        kind=_one_of(fields.get("kind"), KINDS, where),
        x=_coordinates(fields.get("x", {}), where),
        remark=_text(fields.get("remark"), where),  # such a number never stands without its source
    )


def _refuse_duplicates(all_points: list[Point], where: str) -> None:
    seen = set()
    for point in all_points:
        identity = (point.row, point.metric, point.kind, frozenset(point.x.items()))
        if identity in seen:
            raise _malformed(where, f"got {point.row}, {point.metric}, {point.x} twice")
        seen.add(identity)


# ---- Checks of single values


def _malformed(where: str, problem: str) -> UserError:
    hint = "Correct published.toml; its first lines explain the form."
    return UserError(f"published numbers, {where}: {problem}.", hint)


def _only(table: dict[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(table.keys() - allowed)
    if unknown:
        raise _malformed(where, f"got unknown keys {unknown}, expected some of {sorted(allowed)}")


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(where, f"got {value!r}, expected a table")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _malformed(where, f"got {value!r}, expected an array")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _malformed(where, f"got {value!r}, expected a text")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _malformed(where, f"got {value!r}, expected a finite number")


def _one_of(value: object, allowed: tuple[str, ...], where: str) -> str:
    if value not in allowed:
        raise _malformed(where, f"got {value!r}, expected one of {', '.join(allowed)}")
    return str(value)


def _coordinates(value: object, where: str) -> dict[str, Coordinate]:
    table = _table(value, where)
    for name, coordinate in table.items():
        if isinstance(coordinate, bool) or not isinstance(coordinate, (int, float, str)):
            raise _malformed(where, f"{name}: got {coordinate!r}, expected a number or a text")
    return table
