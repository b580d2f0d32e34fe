"""Who is fastest and who is smallest, by batch size and length, and where CAT's lines cross others.

Batch 16 from 1K to 32K tokens, decoding *at* a length: the prompt is all but the last SPAN tokens,
and the time per token is that of the steps after it. Every length has the same definition, and a
32K cell costs seconds instead of a whole generation. The prompt is read in one call, so the peak
memory of these cases holds its activations (Dense at 32K: 5.9 GB for gate and up); weights and
state are what stays while tokens are made, and "smallest" goes by them. A case that does not fit
the GPU is a row "oom".

Beside them the whole generations of Figure 3 (batch 256) and Figure 2 (length 1024), time per token
averaged from the prompt of 8 on. All ratios, winners and crossings are of cases of one run.

Try it: cat-bench paper crossover --scale smoke
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import figures, tables
from cat_bench.case import Case
from cat_bench.columns import (
    GIB,
    Column,
    faster,
    gib,
    milliseconds,
    milliseconds_with_interval,
    whole,
)
from cat_bench.notes import failures
from cat_bench.paper import _curves, _lines, _one_run, _settings, fig2, fig3
from cat_bench.paper._lacking import lacking, ranked
from cat_bench.paper._settings import Content

TITLE = "Crossover: who is fastest and who is smallest, where"
SUITES = ("efficiency",)
ARCHITECTURES = _settings.ARCHITECTURES
BATCH_SIZE = 16
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)  # tokens
SPAN = 256  # new tokens at the end of each length
REFERENCES = ("Dense", "Mamba2", "GDN")  # whose lines CAT's cross

PANELS = (
    figures.Panel(
        "tpot_s", "decode step at this length", "Step (ms)", "", low="tpot_s_low",
        high="tpot_s_high", divisor=1e-3,
    ),
    figures.Panel("held_bytes", "weights and state", "Held (GiB)", "", divisor=GIB),
    figures.Panel("peak_bytes", "peak, prompt in one call", "Peak memory (GiB)", "", divisor=GIB),
    figures.Panel("ttft_s", "time to first token", "TTFT (s)", ""),
)  # fmt: skip
NOTES = (
    "fastest = least time per step of the whole batch; ahead of = the second, its time / the "
    "first's with a 95 % interval, both of the run named; ~ = the interval holds 1, or the margin "
    "rounds to 1.00.",
    "smallest = least weights + live state while decoding. of = architectures compared. - = not "
    "known: no run has all of them, or one of the first two may be another by a remark.",
    "prompt 8: mean over a whole generation; longer prompts: mean of the steps after it.",
)


def plan(scale: str) -> list[Case]:
    cases = [*at_lengths(scale), *fig3.plan(scale), *fig2.plan(scale)]
    return list({case.key: case for case in cases}.values())


def at_lengths(scale: str) -> list[Case]:
    """The cases of the lines. Smoke takes Figure 3's: its pipeline is the same, its time short."""
    if scale == "smoke":
        return fig3.plan(scale)
    return [
        case
        for length in LENGTHS
        for case in _settings.timed_cases(
            ARCHITECTURES, scale, [BATCH_SIZE], [length], prompt_len=length - SPAN
        )
    ]


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    everything = _measured(records, scale)
    rows = everything[everything["is_chosen"]] if len(everything) else everything
    keys = {case.key for case in at_lengths(scale)}
    lines = rows[rows["case"].isin(keys)] if len(rows) else rows
    planned = Counter(map(_one_run.setting_of, plan(scale)))
    fastest, smallest = (
        _complete(_one_run.best(everything, metric), planned) if len(rows) else []
        for metric in ("tpot_s", "held_bytes")
    )
    maps = [
        _lines.Map("fastest per token", _map(fastest)),
        _lines.Map("smallest weights and state", _map(smallest)),
    ]
    axis = figures.LENGTH.planned_by(at_lengths(scale))
    by = ["batch_size", "seq_len", "prompt_len"]
    lacks = lacking(rows, plan(scale), ARCHITECTURES, scale, by)
    also = [figures.GAPS, *lacks] if figures.has_gaps(lines, axis) else lacks
    figure = _lines.line_figure(
        lines, PANELS, axis, _caption(lines, rows, scale, also), maps, scale == "smoke"
    )
    if rows.empty:
        return Content((), figure, None)
    made = [_winners((fastest, smallest), rows, scale, lacks), _crossings(everything, rows)]
    if len(lines):  # the cells of Figures 2 and 3 may be there before any of the lines
        made.append(_measurements(lines, scale))
    return Content(tuple(made), figure, _plotted(rows))


def _measured(records: pd.DataFrame, scale: str) -> pd.DataFrame:
    """All closed rows of the device, with those of older runs: a ratio needs its own run's Dense.

    "is_chosen" marks those of the newest run of each case, which are shown.
    """
    if "chosen" in records:
        records = records.rename(columns={"chosen": "is_chosen"})
    rows = _curves.measured(records, ARCHITECTURES, plan(scale), scale)
    if rows.empty:
        return rows
    rows = rows.assign(is_chosen=rows.get("is_chosen", True))
    if {"weights_bytes", "state_live_bytes"} <= set(rows):
        rows = rows.assign(held_bytes=rows["weights_bytes"] + rows["state_live_bytes"])
    if "tpot_s" not in rows:
        return rows
    rows = _one_run.with_interval(rows, "tpot_s")
    return _one_run.with_ratio(rows, "tpot_s", "Dense", "faster")


def _caption(lines: pd.DataFrame, rows: pd.DataFrame, scale: str, also: Sequence[str]) -> str:
    says = _curves.caption(TITLE, rows, ARCHITECTURES, scale, PANELS, also)
    if rows.empty or scale == "smoke":
        return says
    if lines.empty:
        says += " No row of the lines yet."
    return (
        f"{says} Lines: batch {BATCH_SIZE}, the prompt is all but the last {SPAN} tokens and is "
        f"read in one call, so the peak holds its activations; time per token = mean step of the "
        f"whole batch after it. Maps: batch "
        f"{BATCH_SIZE} as the lines, all others whole generations from a prompt of 8 (Figures 2 "
        f"and 3); in each box the best and its margin to the second, of a run that has every "
        f"architecture planned there (else the box is empty); ~ = the interval of the margin "
        f"holds 1, or the margin rounds to 1.00."
    )


def _complete(found: Sequence[_one_run.Best], planned: Counter) -> list[_one_run.Best]:
    """Those of settings at which no architecture is missing: among some of them nobody has won."""
    return [one for one in found if one.num_compared >= planned[one[:3]]]


def _map(found: Sequence[_one_run.Best]) -> list[_lines.Won]:
    """One per box: where a setting was measured in both ways, the longer prompt's, as the lines."""
    by_box = {
        (one.batch_size, one.seq_len): one for one in sorted(found, key=lambda b: b.prompt_len)
    }
    return [_lines.Won(*box, one.label, _margin(one)) for box, one in by_box.items()]


def _margin(one: _one_run.Best) -> str:
    """ "1.42x", and " ~" where it is none."""
    return _times(one.margin.median) + ("" if one.is_clear else " ~")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


# --- tables ---------------------------------------------------------------------------------------


def _winners(
    found: tuple[Sequence[_one_run.Best], Sequence[_one_run.Best]],
    rows: pd.DataFrame,
    scale: str,
    lacks: Sequence[str],
) -> tables.Table:
    """`found`: who is fastest, and who is smallest. A row per setting of which something is known
    or at least measured.
    """
    quick_at, small_at = ({one[:3]: one for one in ones} for ones in found)
    ok = rows[rows["status"] == "ok"]
    measured = Counter(zip(*(ok[name] for name in _one_run.SETTING), strict=True))
    planned = Counter(map(_one_run.setting_of, plan(scale)))
    text, values = [], []
    for setting in sorted(measured):
        quick, small = quick_at.get(setting), small_at.get(setting)
        known = dict(zip(_one_run.SETTING, setting, strict=True))
        one = quick or small
        compared = str(one.num_compared) if one else f"{measured[setting]} of {planned[setting]}"
        text.append(
            {
                "batch": str(known["batch_size"]),
                "length": _lines.tokens(known["seq_len"]),
                "prompt": str(known["prompt_len"]),
                **_cells(quick, ("fastest", "ms/step", "ahead of"), milliseconds),
                **_cells(small, ("smallest", "GiB", "smaller than"), gib),
                "of": compared,
                "run": one.run if one else "-",
            }
        )
        values.append(
            known | _values("fastest", "tpot_s", quick) | _values("smallest", "held_bytes", small)
        )
    notes = [*NOTES, *_curves.patterns(rows), *failures(rows), *lacks]
    notes += [f"{figures.SMOKE_STAMP}."] if scale == "smoke" else []
    absent = _settings.missing(ARCHITECTURES, scale)
    notes += [f"Not timed: {', '.join(absent)}."] if absent else []
    shown = pd.DataFrame(text), pd.DataFrame(values)
    return tables.Table(shown[1], shown[0], _curves.heading(rows), tuple(notes), title=TITLE)


def _cells(
    one: _one_run.Best | None, titles: Sequence[str], write: Callable[[float], str]
) -> dict[str, str]:
    cells = (one.label, write(one.value), _ahead(one)) if one else ("-",) * 3
    return dict(zip(titles, cells, strict=True))


def _ahead(one: _one_run.Best) -> str:
    ratio, low, high, _ = one.margin
    interval = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{one.second} {_times(ratio)}{interval}{'' if one.is_clear else ' ~'}"


def _values(word: str, metric: str, one: _one_run.Best | None) -> dict[str, object]:
    if one is None:
        return {}
    return {
        word: one.label, metric: one.value, f"{word}_second": one.second,
        f"{word}_margin": one.margin.median, f"{word}_run": one.run,
    }  # fmt: skip


def _crossings(everything: pd.DataFrame, rows: pd.DataFrame) -> tables.Table:
    """CAT against each reference: time and memory, along each of the three measured lines."""
    labels = list(dict.fromkeys(rows["label"]))
    text = []
    for subject in (label for label in labels if label.startswith("CAT-")):
        for reference in (label for label in REFERENCES if label in labels):
            line = {"subject": subject, "reference": reference}
            for name, part, axis, write in _measured_lines(everything):
                for metric, word in (("tpot_s", "time"), ("held_bytes", "memory")):
                    line[f"{word}, {name}"] = _one_run.crossing(
                        part, subject, reference, axis, metric, write
                    )
            text.append(line)
    notes = (
        "Between neighbouring measured points, both architectures of one run; interpolated in "
        "log-log a crossing would be a point, which claims more than was measured.",
        "time = per step; memory = weights + live state.",
    )
    frame = pd.DataFrame(text)
    return tables.Table(
        frame, frame, _curves.heading(rows), notes, title=f"{TITLE}: crossings", suffix="crossings"
    )


def _measured_lines(
    rows: pd.DataFrame,
) -> list[tuple[str, pd.DataFrame, str, Callable[[float], str]]]:
    """(name, rows, x, how x is written): each batch over the length, each length over the batch."""
    found = []
    ways = (("batch_size", "seq_len", _lines.tokens), ("seq_len", "batch_size", "{:.0f}".format))
    for fixed, x, write in ways:
        for value, part in rows.groupby(fixed):
            prompts = part["prompt_len"] != part["prompt_len"].min()
            spans = part[prompts] if fixed == "batch_size" and prompts.any() else part[~prompts]
            if spans[x].nunique() > 1:
                written = _lines.tokens(value) if fixed == "seq_len" else str(value)
                word = "batch" if fixed == "batch_size" else "length"
                found.append((f"{word} {written}", spans, x, write))
    return found


LINE_COLUMNS = (
    Column("architecture", ("label",), str),
    Column("batch", ("batch_size",), whole),
    Column("length", ("seq_len",), whole),
    Column(
        "ms/step [95 % CI]", ("tpot_s", "tpot_s_low", "tpot_s_high"),
        milliseconds_with_interval, min,
    ),
    Column("vs Dense", ("faster", "faster_low", "faster_high"), faster),
    Column("TTFT ms", ("ttft_s",), milliseconds, min),
    Column("weights + state GiB", ("held_bytes",), gib, min),
    Column("peak GiB", ("peak_bytes",), gib, min),
    Column("n", ("n",), whole),
)  # fmt: skip


def _measurements(lines: pd.DataFrame, scale: str) -> tables.Table:
    made = tables.table(ranked(lines, at_lengths(scale)), LINE_COLUMNS, ["batch_size", "seq_len"])
    notes = (
        "vs Dense = its median time per step / ours, both of one run.",
        "peak = most reserved by the allocator, the prompt's activations included.",
    )
    return replace(
        made, title=f"{TITLE}: the lines", heading=_curves.heading(lines), notes=notes,
        suffix="lines",
    )  # fmt: skip


def _plotted(rows: pd.DataFrame) -> pd.DataFrame:
    names = ["label", "batch_size", "seq_len", "prompt_len", "status", "device_name", "run"]
    keys = [key for column in LINE_COLUMNS for key in column.keys]
    return rows.reindex(columns=list(dict.fromkeys([*names, *keys]))).reset_index(drop=True)
