"""remarks.json of a run folder: what was found out after the run about some of its rows. No torch.

Written by hand, so it is checked: a misspelt name would silently mark nothing. results/README.md
documents its form.
"""

import json
from dataclasses import dataclass
from typing import Any

from cat_bench import store
from cat_bench.errors import UserError

FIELDS = ("text", "architectures", "metrics")


@dataclass(frozen=True)
class Remark:
    text: str  # one line
    architectures: tuple[str, ...]  # labels ("GDN") or file names ("mamba2": of any settings)
    metrics: tuple[str, ...]  # as in records.jsonl

    def is_about(self, label: str, arch: str) -> bool:
        return bool({label, arch.partition(":")[0]} & set(self.architectures))


def read(run: store.Run) -> tuple[Remark, ...]:
    """() where the folder has no such file. Raises UserError on a file of another form."""
    path = run.path / "remarks.json"
    if not path.exists():
        return ()
    known = {"architectures": _architectures(run), "metrics": set(run.records()["metric"])}
    try:
        entries = json.loads(path.read_bytes())
        if not isinstance(entries, list):
            raise ValueError(f"got {type(entries).__name__}, expected a list")
        return tuple(_remark(entry, known) for entry in entries)
    except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8, not of the form
        raise UserError(
            f"{path} is broken: {error}.", "Correct it; results/README.md shows its form."
        ) from error


def _architectures(run: store.Run) -> set[str]:
    """Labels and file names of the plan."""
    cases, resolved = run.cases(), run.resolved()
    labels = {resolved.get(key, {}).get("label", case.arch) for key, case in cases.items()}
    return labels | {case.arch.partition(":")[0] for case in cases.values()}


def _remark(entry: Any, known: dict[str, set[str]]) -> Remark:
    if not isinstance(entry, dict) or entry.keys() != set(FIELDS):
        raise ValueError(f"got {entry!r}, expected an object of {', '.join(FIELDS)}")
    text = entry["text"]
    if not isinstance(text, str) or len(text.splitlines()) != 1:
        raise ValueError(f"got text {text!r}, expected one line")
    for field, names in known.items():
        given = entry[field]
        is_list = isinstance(given, list) and all(isinstance(name, str) for name in given)
        if not is_list or not given:
            raise ValueError(f"got {field} {given!r}, expected a list of names")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"got {field} {unknown}, which this run lacks; it has {', '.join(sorted(names))}"
            )
    return Remark(text, tuple(entry["architectures"]), tuple(entry["metrics"]))
