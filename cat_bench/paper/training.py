"""One training step of every architecture, 16,384 tokens long, at lengths 1024 and 4096.

The paper gives no table, only a claim (Appendix B.5): CAT takes at most twice Dense's time and
memory at length 1024 and at most 1.5 times at 4096. By FLOPs CAT costs about what Dense-2D does,
three to four times Dense, so the ratio to Dense-2D stands beside the claim.

Try it: cat-bench paper training --scale smoke
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from cat_bench import figures, spec, tables
from cat_bench.case import Case
from cat_bench.columns import (
    TRAINING_COLUMNS,
    TRAINING_DEFINITIONS,
    Column,
    defined,
    digits,
    gib,
    percent,
    whole,
)
from cat_bench.notes import (
    bound_by_launches,
    disturbances,
    failures,
    foreign_dense,
    hidden_dense,
    whole_logits,
)
from cat_bench.paper import _curves, _published, _settings
from cat_bench.paper._lacking import lacking, ranked
from cat_bench.paper._settings import Content

TITLE = "Training: time, memory and FLOPs of one step"
SUITES = ("training",)
TRAINED = _settings.ARCHITECTURES
TRAINED_SMOKE = ("dense", "cat-8")  # enough to prove the pipeline
TOKENS_PER_STEP = 16_384
SEQ_LENS = (1024, 4096)
FAST_PATHS = ("compile", "upstream")  # the first that a model has, as in suites/training.py
SETTINGS = (("autocast", "bfloat16"), ("step", "cuda_graph"))  # of every case on a GPU
CLAIMS = ("training_time_ratio", "training_memory_ratio")


def plan(scale: str) -> list[Case]:
    chosen = _settings.scale_of(scale)
    on_gpu = chosen.device == "cuda"
    return [
        Case(
            suite="training",
            arch=_settings.arch_text(name, scale, seq_len),
            batch_size=TOKENS_PER_STEP // seq_len if on_gpu else chosen.batch_size,
            prompt_len=0,
            seq_len=seq_len,
            dtype="float32",
            device=chosen.device,
            forward_path=fast_path(name) or "eager" if on_gpu else "eager",
            scale=scale,
            settings=SETTINGS if on_gpu else (),
        )
        for name in _names(scale)
        if not _lacks(name, scale)
        for seq_len in (SEQ_LENS if on_gpu else (chosen.seq_len,))
    ]


def earlier(case: Case) -> Case:
    """The case as the first runs have it: its step launched from Python."""
    others = tuple(pair for pair in case.settings if pair[0] != "step")
    return replace(case, settings=others)


def fast_path(name: str) -> str | None:
    paths = spec.describe(spec.parse(name).name).forward_paths
    return next((path for path in FAST_PATHS if path in paths), None)


def _names(scale: str) -> tuple[str, ...]:
    return TRAINED if _settings.scale_of(scale).device == "cuda" else TRAINED_SMOKE


def _lacks(name: str, scale: str) -> bool:
    """On a GPU a baseline without a fast path is not timed: it would flatter everything beside."""
    return _settings.scale_of(scale).device == "cuda" and fast_path(name) is None


def render(records: pd.DataFrame, published: Sequence, scale: str) -> Content:
    names = _names(scale)
    rows = _curves.measured(records, names, plan(scale), scale)
    claims = {
        (point.metric, point.x["seq_len"]): point.value
        for point in _published.points("text")
        if point.metric in CLAIMS
    }
    if rows.empty:
        return Content((_claims_alone(claims),))
    made = tables.table(_ranked(_with_ratios(rows, claims), scale), COLUMNS, ["seq_len"])
    notes = [
        *defined((TRAINING_DEFINITIONS[0], TRAINING_DEFINITIONS[3])),
        *NOTES,
        *_curves.patterns(rows),
        *whole_logits(rows),
        *failures(rows),
    ]
    notes += [
        *_launched(rows),
        *foreign_dense(rows),
        *hidden_dense(rows),
        *disturbances(rows),
        *bound_by_launches(rows),
    ]
    notes += lacking(rows, plan(scale), names, scale, ["seq_len"])
    absent = [_settings.label(name) for name in names if _lacks(name, scale)]
    notes += [f"Not timed, no fast forward path: {', '.join(absent)}."] if absent else []
    notes += [f"{figures.SMOKE_STAMP}."] if scale == "smoke" else []
    return Content((replace(made, title=TITLE, heading=_heading(rows), notes=tuple(notes)),))


def _launched(rows: pd.DataFrame) -> list[str]:
    """Which rows of a GPU are of earlier runs, whose steps were no CUDA graphs."""
    on_gpu = rows[rows["device"] == "cuda"]
    old = on_gpu[on_gpu["step"] == ""]
    if old.empty:
        return []
    cells: dict[str, list[str]] = {}
    for row in old.itertuples():
        cells.setdefault(row.label, []).append(str(row.seq_len))
    whose = "; ".join(f"{label} (length {', '.join(each)})" for label, each in cells.items())
    mixed = len(old) < len(on_gpu)
    end = f"{whose}. No ratio is taken between the two" if mixed else "all rows"
    return [f"Step launched from Python, not as CUDA graphs, so the host may bound it: {end}."]


def _ranked(rows: pd.DataFrame, scale: str) -> pd.DataFrame:
    """As in _lacking.py; nor is a replayed step ranked with one that is launched from Python."""
    rows = ranked(rows, plan(scale))
    one_path = rows.groupby("seq_len")["step"].transform("nunique") == 1
    return rows.assign(is_ranked=rows["is_ranked"] & one_path)


def _with_ratios(rows: pd.DataFrame, claims: dict[tuple[str, int], float]) -> pd.DataFrame:
    """Times and bytes over Dense's: the paper's way round. Claims stand in CAT's rows only."""
    rows = rows.assign(allocated_bytes=_first_of(rows, "peak_allocated_bytes", "peak_bytes"))
    for name, speedup in (("time", "speedup"), ("time_2d", "speedup_2d")):
        for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
            column = rows.get(f"{speedup}{other}", pd.Series(math.nan, index=rows.index))
            rows = rows.assign(**{f"{name}_ratio{end}": 1 / column})
    rows = rows.assign(bytes_ratio=1 / _first_of(rows, "allocated_ratio", "memory_ratio"))
    is_cat = rows["label"].str.startswith("CAT")
    for metric in CLAIMS:
        claimed = rows["seq_len"].map(lambda n, metric=metric: claims.get((metric, n)))
        rows = rows.assign(**{metric: claimed.where(is_cat).astype(float)})
    return rows


def _first_of(rows: pd.DataFrame, *names: str) -> pd.Series:
    """The first of these columns that there is: on a CPU nothing counts allocations."""
    found = [rows[name] for name in names if name in rows]
    return found[0] if found else pd.Series(math.nan, index=rows.index)


def _times(ratio: float, low: float = math.nan, high: float = math.nan) -> str:
    interval = "" if math.isnan(low) or low == high else f" [{low:.2f}, {high:.2f}]"
    return f"{ratio:.2f}x{interval}"


def _at_most(ratio: float) -> str:
    return f"<= {ratio:g}x"


COLUMNS = (
    *TRAINING_COLUMNS[:5],  # architecture, batch, length, step, tok/s
    Column("allocated GiB", ("allocated_bytes",), gib, min),
    Column("TFLOP", ("train_flops",), lambda flops: digits(flops / 1e12)),
    Column("MFU", ("mfu",), percent, max),
    Column("% of matmul", ("matmul_flops_ratio",), percent),
    Column("time / Dense", ("time_ratio", "time_ratio_low", "time_ratio_high"), _times),
    Column("paper", (CLAIMS[0],), _at_most),
    Column("memory / Dense", ("bytes_ratio",), _times),
    Column("paper (memory)", (CLAIMS[1],), _at_most),
    Column("time / Dense-2D", ("time_2d_ratio", "time_2d_ratio_low", "time_2d_ratio_high"), _times),
    Column("n", ("n",), whole),
    Column("forward path", ("forward_path",), str),
    TRAINING_COLUMNS[-1],
)
NOTES = (
    "allocated = most bytes in tensors during a step, weights, gradients and AdamW's moments "
    "included (CPU: resident set); memory / Dense is the ratio of those.",
    "paper = its claim for CAT (Appendix B.5); time / Dense, Dense-2D = median step over theirs in "
    "the same run, where that has Dense, 95 % interval.",
)


def _heading(rows: pd.DataFrame) -> str:
    machines, dtypes = ("; ".join(dict.fromkeys(rows[name])) for name in ("machine", "dtype"))
    runs = sorted(set(rows["run"]))
    word = "runs" if len(runs) > 1 else "run"
    autocast = ", ".join(filter(None, dict.fromkeys(rows["autocast"]))) or "no"
    graphs = " Steps are CUDA graphs." if (rows["step"] == "cuda_graph").all() else ""
    text = f"{machines}; {word} {', '.join(runs)}. {dtypes} weights, {autocast} autocast.{graphs}"
    return text + _curves.commits(rows)


def _claims_alone(claims: dict[tuple[str, int], float]) -> tables.Table:
    """Nothing is measured yet: what the paper claims."""
    lengths = sorted({length for _, length in claims})
    rows = pd.DataFrame(
        [{"label": "CAT", "seq_len": n, **{m: claims[m, n] for m in CLAIMS}} for n in lengths]
    )
    columns = (
        Column("architecture", ("label",), str),
        Column("length", ("seq_len",), whole),
        Column("time / Dense (paper)", (CLAIMS[0],), _at_most),
        Column("memory / Dense (paper)", (CLAIMS[1],), _at_most),
    )
    return replace(tables.table(rows, columns), title=TITLE, notes=("No row of ours yet.",))
