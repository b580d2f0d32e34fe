"""Published tables: the paper's cells as printed, ours beside them, "not built" where none can be.

A metric that we have measured gets two columns, paper and ours. All others keep the paper's column,
and a last column "ours" says why it is empty. Numbers recomputed from the paper's own and claims
in its text stay out of the cells; they stand in the remarks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from cat_bench.paper._settings import Content
from cat_bench.tables import Table


class Heading(NamedTuple):
    title: str
    lower_is_better: bool | None = None  # None: neither


HEADINGS = {
    "fineweb_ppl": Heading("FineWeb ppl", True),
    "wikitext_ppl": Heading("Wiki ppl", True),
    "wikitext103_ppl": Heading("WikiText-103 ppl", True),
    "lambada_ppl": Heading("LAMBADA ppl", True),
    "lm_eval_mean": Heading("LM eval %", False),
    "swde": Heading("SWDE %", False),
    "drop": Heading("DROP %", False),
    "squad": Heading("SQuAD %", False),
    "triviaqa": Heading("TriviaQA %", False),
    "hellaswag": Heading("HellaSwag", False),
    "piqa": Heading("PIQA", False),
    "arc_easy": Heading("ARC-E", False),
    "arc_challenge": Heading("ARC-C", False),
    "winogrande": Heading("WinoGrande", False),
    "openbookqa": Heading("OpenBookQA", False),
    "recall_mean": Heading("recall mean %", False),
    "speedup": Heading("speed-up", False),
    "memory_reduction": Heading("memory reduction", False),
    "solved": Heading("solved"),
    "state_paper": Heading("state (paper's count)"),
    "chunk_size": Heading("C"),
    "width": Heading("D"),
    "decoder_width": Heading("D_d"),
    "num_layers": Heading("decoder layers"),
    "compressor_layers": Heading("compressor layers"),
}
Ours = Mapping[tuple[str, str], tuple[float, str]]  # (row, metric) -> SI value, printed text


def content(title: str, published: Sequence, needs: Sequence[str]) -> Content:
    """An exhibit of which nothing can be measured yet: the paper's table, `needs` named."""
    return Content((comparison(title, published, {}, needs),))


def comparison(
    title: str,
    published: Sequence,
    ours: Ours,
    needs: Sequence[str] = (),
    heading: str = "",
    notes: Sequence[str] = (),
) -> Table:
    """The paper's printed cells with ours beside them, then the rows that are ours alone. `needs`:
    suites that are not built.
    """
    cells = [point for point in published if point.kind == "printed"]
    keys = list(dict.fromkeys((point.row, tuple(point.x.items())) for point in cells))
    printed = {row for row, _ in keys}
    keys += [(row, keys[0][1]) for row in dict.fromkeys(r for r, _ in ours) if row not in printed]
    metrics = list(dict.fromkeys(point.metric for point in cells))
    paper = {(p.row, tuple(p.x.items()), p.metric): p for p in cells}
    varied = _varied(keys)
    rows, text = [], []
    for row, x in keys:
        coordinates = {name: value for name, value in x if name in varied}
        values, line = {"row": row, **coordinates}, {"method": row}
        line |= {HEADINGS[name].title: str(value) for name, value in coordinates.items()}
        for metric in metrics:
            _add_cell(values, line, paper.get((row, x, metric)), ours, (row, metric), cells)
        if needs:
            line["ours"] = "not built"
        rows.append(values)
        text.append(line)
    notes = [*notes, *_remarks(cells)]
    if needs:
        notes = [*notes, f"ours: not built (needs suites: {', '.join(needs)})."]
    table_text = pd.DataFrame(text).fillna("-")
    table_rows = pd.DataFrame(rows)
    best = _best(table_rows, table_text, metrics)
    return Table(table_rows, table_text, heading, tuple(notes), best, title)


def _remarks(cells: Sequence) -> list[str]:
    """What published.toml says of single cells: once for all metrics of a row that share it."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for point in (cell for cell in cells if cell.remark):
        name = HEADINGS[point.metric].title if point.metric in HEADINGS else point.metric
        shared = metrics.setdefault((point.row, point.remark), [])
        shared += [] if name in shared else [name]
    return [
        f"Paper, {row}, {', '.join(names)}: {remark}" for (row, remark), names in metrics.items()
    ]


def _varied(keys: Sequence[tuple[str, tuple]]) -> list[str]:
    """Coordinates that differ between rows; what all rows share belongs to the remarks."""
    names = dict.fromkeys(name for _, x in keys for name, _ in x)
    return [name for name in names if len({dict(x).get(name) for _, x in keys}) > 1]


def _add_cell(
    values: dict, line: dict, point, ours: Ours, key: tuple[str, str], cells: Sequence
) -> None:
    """One metric of one row, into the SI values and the printed line."""
    metric = key[1]
    name = HEADINGS[metric].title if metric in HEADINGS else metric
    has_ours = any(own_metric == metric for _, own_metric in ours)
    paper_name = f"{name} (paper)" if has_ours else name
    line[paper_name] = _printed(point, cells) if point else "-"
    values[f"{metric}_paper"] = point.value if point else None
    if has_ours:
        value, shown = ours.get(key, (None, "-"))
        line[f"{name} (ours)"] = shown
        values[f"{metric}_ours"] = value


def _printed(point, cells: Sequence) -> str:
    """As in the paper: all cells of a column with the digits of its longest."""
    if point.unit == "solved":
        return "yes" if point.value else "no"
    if point.unit == "elements":
        return f"{point.value:,.0f}"
    column = [cell.value for cell in cells if cell.metric == point.metric]
    decimals = max(len(f"{value:g}".partition(".")[2]) for value in column)
    return f"{point.value:.{decimals}f}" + ("x" if point.unit == "x" else "")


def _best(rows: pd.DataFrame, text: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The paper's best value of each column in bold, as in the paper."""
    best = pd.DataFrame(False, index=text.index, columns=text.columns)
    for metric in metrics:
        heading = HEADINGS.get(metric, Heading(metric))
        values = rows[f"{metric}_paper"].dropna()
        if heading.lower_is_better is None or values.empty:
            continue
        wanted = values.min() if heading.lower_is_better else values.max()
        titles = [title for title in (heading.title, f"{heading.title} (paper)") if title in text]
        best.loc[values.index[values == wanted], titles[0]] = True
    return best
