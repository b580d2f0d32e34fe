"""What the commands print on stdout: text for people, or with --json one document."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cat_bench import listing, planning, store
from cat_bench.case import Case
from cat_bench.errors import UserError

if TYPE_CHECKING:
    from cat_bench.environment import Check


def print_entries(found: dict[str, list[listing.Entry]], as_json: bool) -> None:
    """`list`: the entries of each kind under its name."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for kind, entries in found.items():
        typer.echo(kind if entries else f"{kind}: none yet")
        width = max((len(entry["name"]) for entry in entries), default=0)
        for entry in entries:
            for line in listing.lines(entry, width):
                typer.echo(f"  {line}")


def print_checks(checks: "list[Check]", as_json: bool) -> None:
    """`doctor`: one line per check, and one for the repair of what is not ok."""
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in checks], indent=1))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{check.status:4}  {check.name:{width}}  {check.detail}")
        if check.fix and check.status != "ok":
            typer.echo(f"{'':4}  {'':{width}}  -> {check.fix}")


# --- runs ----------------------------------------------------------------------------------------


def print_plan(
    cases: list[Case],
    resolved: dict[str, dict],
    memory: tuple[float | None, str],
    as_json: bool,
) -> None:
    """`--dry-run`. `memory`: bytes that the cases must fit into, and what has them."""
    from cat_bench import predict

    if as_json:
        plan = [{"key": case.key, **asdict(case), **resolved[case.key]} for case in cases]
        typer.echo(json.dumps(plan, indent=1))
        return
    table = predict.plan_table(cases, resolved, *memory)
    typer.echo(f"plan: {planning.plan_line(cases)}")
    typer.echo("\n".join(f"  {line}" for line in table.to_string(index=False).splitlines()))
    if predict.LEAST in table:
        typer.echo(predict.LEAST_NOTE)
    typer.echo("Nothing was run.")


def print_run(target: store.Run, as_json: bool) -> None:
    """`run` and `show`: the table of a run."""
    from cat_bench import measurements, report, tables

    if as_json:
        typer.echo(report.as_json(tables.full_table(measurements.frame([target]))))
        return
    records = measurements.frame([target])
    made = [tables.run_table(target, suite) for suite in tables.suites_of(records) or [None]]
    details = tables.details_table(records)
    made += [] if details is None else [details]
    typer.echo("\n\n".join(report.terminal(each) for each in made))


def case_document(found: store.Run, key: str) -> dict[str, Any]:
    """One case with all rows and the run's environment, for --json."""
    cases = {known: case for known, case in found.cases().items() if known.startswith(key)}
    if len(cases) != 1:
        raise UserError(
            f"'{key}' means {len(cases)} cases of {found.name}, expected one.",
            f"Its cases: {', '.join(list(found.cases())[:5])} ...",
        )
    full_key, case = cases.popitem()
    records = found.records()
    rows = str(records[records["case"] == full_key].to_json(orient="records"))
    return {"case": asdict(case), "records": json.loads(rows), "environment": found.environment}


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}.", "Give -o a file in a folder that exists."
        ) from error


# --- paper ---------------------------------------------------------------------------------------


def print_statuses(statuses: list[Any], as_json: bool) -> None:
    """`paper` without a name: every exhibit."""
    if as_json:
        typer.echo(json.dumps([asdict(status) for status in statuses], indent=1))
        return
    widths = [max(len(getattr(s, part)) for s in statuses) for part in ("name", "title")]
    for status in statuses:
        line = f"{status.name:{widths[0]}}  {status.title:{widths[1]}}  {status.status}"
        typer.echo(f"{line}; {status.detail}" if status.detail else line)


def print_built(built: Any, as_json: bool) -> None:
    """`paper fig2`: what was rendered, as _build.Built tells it."""
    if as_json:
        typer.echo(json.dumps(_built_document(built), indent=1, default=str))
        return
    print_statuses(built.statuses, as_json=False)
    _print_files(built.files, built.report_html)


def _print_files(files: list[Path], report_html: Path | None) -> None:
    """Where the results are, last and easy to find."""
    for folder in sorted({path.parent for path in files}):
        kinds = sorted({path.suffix for path in files if path.parent == folder})
        typer.echo(f"Tables and figures: {folder} ({' '.join(kinds)})")
    if report_html is not None:
        typer.echo(f"HTML report:        {report_html}")


def _built_document(built: Any) -> dict[str, Any]:
    return {
        "statuses": [asdict(status) for status in built.statuses],
        "files": [str(path) for path in built.files],
        "report_html": str(built.report_html) if built.report_html else None,
    }
