"""Tables -> what people read: terminal, JSON, CSV, Markdown, LaTeX, one-file HTML. No torch.

`report_text` is `cat-bench report`, `case_text` is `show --case`; tables.py makes the tables, and
the functions at the end print one, each in its format.
"""

import csv
import difflib
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable
from tabulate import tabulate

from cat_bench import store
from cat_bench.columns import faster
from cat_bench.environment import machine_line
from cat_bench.errors import UserError
from cat_bench.measurements import frame
from cat_bench.tables import Table, details_table, full_table, records_table, suites_of

# A section as report.html.j2 writes it: its text is escaped, so it holds no other </section>.
SECTION = re.compile(
    r'<section id="(.*?)">\n<h2>(.*?) <span class="status">(.*?)</span></h2>\n(.*?)</section>',
    re.DOTALL,
)
FORMATS = ("table", "json", "csv", "markdown", "latex", "html")
FORMAT_OF = {  # a file's ending -> what it must hold
    ".json": "json",
    ".csv": "csv",
    ".md": "markdown",
    ".markdown": "markdown",
    ".tex": "latex",
    ".html": "html",
    ".htm": "html",
}
ANY_FORMAT = ("", ".txt")  # endings that may hold whatever is asked for


def case_text(run: store.Run, key: str) -> str:
    """Every metric and sample of one case, then the environment (`show RUN --case KEY`)."""
    cases = run.cases()
    keys = [known for known in cases if known.startswith(key)]
    if len(keys) != 1:
        near = difflib.get_close_matches(key, cases, n=3, cutoff=0.3)
        what = "matches several cases" if keys else "is no case"
        hint = f"Near: {', '.join(keys[:5] or near or list(cases)[:5])}."
        raise UserError(f"'{key}' {what} of {run.name}, which has {len(cases)} cases.", hint)
    case, records = cases[keys[0]], run.records()
    lines = [f"case {case.key} of {run.name}", *_dict_lines(vars(case))]
    for record in records[records["case"] == case.key].itertuples():
        value = "-" if pd.isna(record.value) else f"{record.value:.6g}"
        lines.append(f"{record.metric}: {value} {record.unit}  {record.status}".rstrip())
        if record.samples:
            lines.append("  samples: " + ", ".join(f"{sample:.6g}" for sample in record.samples))
        if record.error and isinstance(record.error, str):
            lines.append("  " + record.error.strip().replace("\n", "\n  "))
    return "\n".join([*lines, "environment", *_dict_lines(run.environment)])


def _dict_lines(values: dict) -> list[str]:
    return [f"  {name}: {json.dumps(value, default=str)}" for name, value in values.items()]


# Reports over several runs, with the paper's values beside ours


def form_of(output: Path | None, asked: str | None) -> str:
    """The one of FORMATS that is asked for, else that of the file's ending, else "table"."""
    ending = output.suffix.lower() if output else ""
    told = FORMAT_OF.get(ending)
    if told is None and ending not in ANY_FORMAT:
        raise UserError(
            f"{output} has the ending {ending}, which no format of a report has.",
            f"Known endings: {', '.join([*FORMAT_OF, '.txt'])}.",
        )
    if asked and told and asked != told:
        raise UserError(
            f"{output} must hold {told} by its ending, but the format asked for is {asked}.",
            "Drop the format, or give the file another ending.",
        )
    return asked or told or "table"


def report_text(runs: Sequence[store.Run], form: str, published: Sequence = ()) -> str:
    """`cat-bench report`: the tables of all runs, in one of FORMATS.

    Suites, scales and devices never share a printed table; in JSON and CSV scale and device are
    columns, in JSON the suite is one, too.
    """
    if form not in FORMATS:
        raise UserError(f"unknown format '{form}'.", f"Available: {', '.join(FORMATS)}.")
    records = frame(runs)
    title = ", ".join(run.name for run in runs)
    if form == "csv":
        _check_one_table(title, suites_of(records))
    if form in ("json", "csv"):
        return WRITERS[form](_with_published(replace(full_table(records), title=title), published))
    tables = _report_tables(records, title, published)
    if form == "html":
        section = Section(title, tables=tuple(tables))
        return html_page("cat-bench report", [section], [run.environment for run in runs])
    return ("\n\n" if form == "table" else "\n").join(WRITERS[form](each) for each in tables)


def _check_one_table(title: str, suites: list[str]) -> None:
    if not suites:
        raise UserError(f"{title}: no case is closed yet.", "cat-bench run --resume RUN")
    if len(suites) > 1:
        raise UserError(
            f"CSV holds one table, but {title} are of the suites {', '.join(suites)}.",
            "Give runs of one suite, or another --format.",
        )


def _report_tables(records: pd.DataFrame, title: str, published: Sequence) -> list[Table]:
    """One per scale, device and suite, each with its table of steps."""
    suites = suites_of(records)
    if published and suites and "efficiency" not in suites:
        raise UserError(
            f"--published has times of generation alone; these runs are of suite {suites[0]}.",
            "Drop --published.",
        )
    several = len(suites) > 1
    tables = []
    for _, group in records.groupby(["scale", "device_name"], sort=False):
        for suite in suites_of(group):
            named = f"{title}: suite {suite}" if several else title
            made = replace(records_table(group, suite), title=named)
            tables.append(_with_published(made, published if suite == "efficiency" else ()))
            details = details_table(group[group["suite"] == suite])
            tables += [] if details is None else [details]
    return tables or [replace(records_table(records), title=title)]


def _with_published(made: Table, points: Sequence) -> Table:
    return with_published(made, points) if points and len(made.rows) else made


def published_speedups(points: Iterable) -> dict[tuple[str, int, int], float]:
    """(label, batch size, length) -> Dense / row in the paper's plots."""
    seconds: dict[tuple[str, int, int], float] = {}
    for point in points:
        if (point.unit, point.kind) == ("s", "digitised") and {"batch_size", "seq_len"} <= set(
            point.x
        ):
            key = (point.row, int(point.x["batch_size"]), int(point.x["seq_len"]))
            seconds.setdefault(key, point.value)  # Figure 2 before 3 and 5, which repeat its points
    return {
        key: seconds["Dense", *key[1:]] / value
        for key, value in seconds.items()
        if ("Dense", *key[1:]) in seconds
    }


def with_published(made: Table, points: Sequence) -> Table:
    """Adds the paper's speed-up over Dense: another GPU, so ratios are all that can be compared."""
    speedups = published_speedups(points)
    keys = zip(made.rows["label"], made.rows["batch_size"], made.rows["seq_len"], strict=True)
    found = [speedups.get((label, int(batch), int(length))) for label, batch, length in keys]
    title = "paper (A100, digitised)"
    text = made.text.assign(**{title: [faster(r, math.nan, math.nan) if r else "-" for r in found]})
    rows = made.rows.assign(published_speedup=[ratio or math.nan for ratio in found])
    best = made.best if made.best is None else made.best.assign(**{title: False})
    note = (
        "paper = speed-up over Dense on one A100 80GB PCIe, read off a plot: compare ratios only."
    )
    return replace(made, text=text, rows=rows, best=best, notes=(*made.notes, note))


# Writers: one string per format


def terminal(made: Table, width: int | None = None) -> str:
    """For people: aligned columns, no boxes. Fits `width`, by default as wide as it needs."""
    rich_table = RichTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for number, title in enumerate(made.text.columns):
        rich_table.add_column(title, justify="right" if _numeric(made.text[title]) else "left")
        rich_table.columns[number].no_wrap = width is None
    for row in made.text.itertuples(index=False):
        rich_table.add_row(*(_unmarked(cell) for cell in row))
    stream = io.StringIO()
    console = Console(file=stream, width=width or 400, color_system=None, highlight=False)
    console.print(rich_table)
    body = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*filter(None, [made.title, made.heading]), *body, *made.notes])


def _unmarked(cell: str) -> str:
    """Brackets are markup to rich: intervals must survive."""
    return cell.replace("[", r"\[")


def _numeric(column: pd.Series) -> bool:
    return all(cell[:1].isdigit() or cell in ("-", "oom") for cell in column)


def as_json(made: Table) -> str:
    """One document: SI rows, heading, notes. NaN becomes null."""
    rows = [
        {name: _plain(value) for name, value in row.items()}
        for row in made.rows.to_dict(orient="records")
    ]
    document = {"title": made.title, "machine": made.heading, "rows": rows, "notes": made.notes}
    return json.dumps(document, indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no NumPy."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(made: Table) -> str:
    stream = io.StringIO()
    made.rows.to_csv(stream, index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    return stream.getvalue()


def as_markdown(made: Table) -> str:
    """A pipe table with the best of each group in bold."""
    text = made.text.map(lambda cell: cell.replace("|", r"\|"))
    if made.best is not None:
        text = text.where(~made.best, "**" + text + "**")
    align = ["right" if _numeric(made.text[title]) else "left" for title in text.columns]
    body = tabulate(
        text.values.tolist(), list(text.columns), "pipe", colalign=align, disable_numparse=True
    )
    head = [f"**{made.title}**", ""] if made.title else []
    machine = [made.heading, ""] if made.heading else []
    notes = ["", *(f"- {note}" for note in made.notes)] if made.notes else []
    return "\n".join([*head, *machine, body, *notes]) + "\n"


def as_latex(made: Table) -> str:
    """A booktabs table, ready for \\input; the best of each group in bold."""
    style = made.text.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    if made.best is not None and len(made.text):
        bold = made.best.map(lambda best: "textbf:--rwrap;" if best else "")
        style = style.apply(lambda _: bold, axis=None)
    align = "".join("r" if _numeric(made.text[title]) else "l" for title in made.text.columns)
    comments = [f"% {line}" for line in (made.title, made.heading, *made.notes) if line]
    return "\n".join(comments) + "\n" + style.to_latex(hrules=True, column_format=align)


@dataclass(frozen=True)
class Section:
    """One exhibit or run on an HTML page."""

    title: str
    anchor: str = ""
    status: str = ""
    tables: tuple[Table, ...] = ()
    svgs: tuple[str, ...] = ()  # whole SVG documents, as figures.py writes them
    remarks: tuple[str, ...] = ()
    body: Markup = Markup()  # in place of these: the HTML of an earlier page


def sections_of(page: str) -> list[Section]:
    """The sections of a page by `html_page`, to be shown again as they are. Trusted: our own."""
    return [
        Section(html.unescape(title), anchor, html.unescape(status), body=Markup(body))
        for anchor, title, status, body in SECTION.findall(page)
    ]


def html_page(title: str, sections: Sequence[Section], environments: Sequence[dict] = ()) -> str:
    """One file that needs no network: tables, drawings, and at the foot environment and command."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"inline_svg": _inline_svg, "cells": _html_cells, "columns": _html_columns}
    foot = [
        {"machine": machine_line(e), "command": _command(e), "lines": _dict_lines(e)}
        for e in environments
    ]
    template = engine.get_template("report.html.j2")
    return template.render(title=title, sections=sections, environments=foot)


def _inline_svg(svg: str) -> Markup:
    """The <svg> element alone: an XML declaration is not allowed inside HTML. Trusted: our own."""
    return Markup(svg[svg.index("<svg") :])


def _html_columns(made: Table) -> list[tuple[str, bool]]:
    return [(title, _numeric(made.text[title])) for title in made.text.columns]


def _html_cells(made: Table) -> list[list[tuple[str, bool, bool]]]:
    """(text, is best, is a number) of each cell."""
    best = made.text.map(lambda _: False) if made.best is None else made.best
    numeric = [is_number for _, is_number in _html_columns(made)]
    return [
        list(zip(texts, marks, numeric, strict=True))
        for texts, marks in zip(made.text.values.tolist(), best.values.tolist(), strict=True)
    ]


def _command(environment: dict) -> str:
    command = environment.get("command", "")
    return command if isinstance(command, str) else " ".join(command)


def as_html(made: Table) -> str:
    """One page with this table and nothing else."""
    title = made.title or "cat-bench"
    return html_page(title, [Section(title, tables=(made,))])


WRITERS: dict[str, Callable[[Table], str]] = {
    "table": terminal,
    "json": as_json,
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
    "html": as_html,
}
