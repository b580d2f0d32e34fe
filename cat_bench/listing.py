"""What `cat-bench list` shows: architectures, suites, exhibits and runs, one dict per entry.

Files are read, never imported, and neither torch nor pandas is needed: the list comes at once.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cat_bench import spec, store
from cat_bench.errors import UserError
from cat_bench.packages import install_command, other_version

KINDS = ("architectures", "suites", "exhibits", "runs")
Entry = dict[str, Any]


def entries(kind: str, results: Path, archs: Sequence[str] = ()) -> list[Entry]:
    """What there is of one of KINDS; of architectures only `archs`, where some are given."""
    if kind == "architectures":
        return _architectures(archs)
    if kind == "runs":
        return _runs(results)
    named = spec.suites() if kind == "suites" else spec.exhibits()
    return [{"name": name, "summary": summary} for name, summary in named]


def lines(entry: Entry, width: int) -> Iterator[str]:
    """An entry for the terminal, its name padded to `width`."""
    yield f"{entry['name']:{width}}  {entry['summary']}"
    indent = " " * (width + 2)
    if entry.get("presets"):
        yield f"{indent}presets: {', '.join(entry['presets'])}"
    if "settings" in entry:
        settings = " ".join(f"{key}={value}" for key, value in entry["settings"].items())
        yield f"{indent}settings: {settings}"
    for kind in ("decode", "forward"):
        for path, state in entry.get(f"{kind}_paths", {}).items():
            yield f"{indent}{kind} path {path}: {state}"


# --- architectures -------------------------------------------------------------------------------


def _architectures(archs: Sequence[str]) -> list[Entry]:
    if not archs:
        return [_architecture(info, spec.Spec(info.name)) for info in spec.architectures()]
    asked = [spec.parse(text) for text in archs]
    return [_architecture(spec.describe(one.name), one) for one in asked]


def _architecture(info: spec.ArchitectureInfo, one: spec.Spec) -> Entry:
    """The file behind a spec, with the settings of that spec: "cat-8" shows chunk_size=8."""
    if not {"Config", "Model"} <= info.exports:
        raise UserError(
            f"{info.name} is no architecture: it lacks Config or Model.",
            "README.md, 'Add your architecture', says what such a file exports.",
        )
    defaults = {key: _default(field) for key, field in info.fields.items()}
    return {
        "name": one.text,
        "summary": info.summary,
        "settings": defaults | one.overrides,
        "presets": {} if info.name.endswith(".py") else info.presets,  # a path has no other name
        "decode_paths": {path: _readiness(info, "decode", path) for path in info.decode_paths},
        "forward_paths": {path: _readiness(info, "forward", path) for path in info.forward_paths},
    }


def _default(field: spec.Field) -> Any:
    return None if field.default is spec.NO_DEFAULT else field.default


def _readiness(info: spec.ArchitectureInfo, kind: str, path: str) -> str:
    """Whether there is a GPU is not asked here: `doctor` says that."""
    lacking = [
        f"{other_version(name) or name}: {install_command(name)}"
        for name in info.lacking(kind, path)
    ]
    if info.lacks:
        return f"not ready: its Model lacks {', '.join(info.lacks)}"
    if lacking:
        return f"needs {'; '.join(lacking)}"
    return "ready on a GPU" if info.needs_gpu(kind, path) else "ready"


# --- runs ----------------------------------------------------------------------------------------


def _runs(results: Path) -> list[Entry]:
    """A folder that cannot be read is listed with the reason: the others must stay visible."""
    found = []
    for path in store.folders(results):
        try:
            run = store.Run.open(path)
            machine = run.environment.get("machine_line", "unknown machine")
            summary = f"{_num_closed(run)} of {len(run.cases())} cases; {machine}"
        except UserError as error:
            summary = f"unreadable: {error.message}"
        found.append({"name": path.name, "summary": summary})
    return found


def _num_closed(run: store.Run) -> int:
    """How many cases have a closing row. Read as text: parsing every sample would make `list` slow.

    A file in which any line looks unlike a row is read in full, which says what is wrong.
    """
    path = run.path / "records.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    rows = ROW.findall(data)
    if len(rows) != data.count(b"\n"):
        return len(run.closed())
    return len({case for case, metric in rows if metric == store.CLOSING.encode()})


# A whole row as the store writes it: its case and metric.
ROW = re.compile(
    rb'^\{"case": "([^"]*)", "metric": "([^"]*)", "value": .*, "schema": %d\}\n' % store.SCHEMA,
    re.MULTILINE,
)
