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
BATCH_SIZES, AT_LEAST = "batch_sizes", "at_least"  # optional fields


@dataclass(frozen=True)
class Remark:
    text: str  # one line
    architectures: tuple[str, ...]  # labels ("GDN") or file names ("mamba2": of any settings)
    metrics: tuple[str, ...]  # as in records.jsonl; (): it is said, and marks no value
    batch_sizes: tuple[int, ...] = ()  # (): all
    at_least: float = 0.0  # present code's values are no less than this share of the stored ones

    def is_about(self, label: str, arch: str, batch_size: int) -> bool:
        is_named = bool({label, arch.partition(":")[0]} & set(self.architectures))
        return is_named and (not self.batch_sizes or batch_size in self.batch_sizes)


def read(run: store.Run) -> tuple[Remark, ...]:
    """() where the folder has no such file. Raises UserError on a file of another form."""
    path = run.path / "remarks.json"
    if not path.exists():
        return ()
    known: dict[str, set] = {
        "architectures": _architectures(run),
        "metrics": set(run.records()["metric"]),
        BATCH_SIZES: {case.batch_size for case in run.cases().values()},
    }
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


def _remark(entry: Any, known: dict[str, set]) -> Remark:
    if not isinstance(entry, dict) or entry.keys() - {BATCH_SIZES, AT_LEAST} != set(FIELDS):
        raise ValueError(f"got {entry!r}, expected an object of {', '.join(FIELDS)}")
    text = entry["text"]
    if not isinstance(text, str) or len(text.splitlines()) != 1:
        raise ValueError(f"got text {text!r}, expected one line")
    for field, values in known.items():
        if field not in entry or (field == "metrics" and entry[field] == []):
            continue
        given, kind = entry[field], int if field == BATCH_SIZES else str
        if not isinstance(given, list) or not given or {type(value) for value in given} != {kind}:
            what = "numbers" if kind is int else "names"
            raise ValueError(f"got {field} {given!r}, expected a list of {what}")
        unknown = [value for value in given if value not in values]
        if unknown:
            has = ", ".join(str(value) for value in sorted(values))
            raise ValueError(f"got {field} {unknown}, which this run lacks; it has {has}")
    share = entry.get(AT_LEAST, 0.0)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ValueError(f"got {AT_LEAST} {share!r}, expected a share from 0 to 1")
    architectures, metrics = (tuple(entry[field]) for field in FIELDS[1:])
    return Remark(text, architectures, metrics, tuple(entry.get(BATCH_SIZES, ())), float(share))
