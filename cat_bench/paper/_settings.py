"""Scales and architectures of the exhibits: what is measured where, and which of it exists yet.

An exhibit lists architectures by the names users type; those whose file is not there yet are left
out and named in its status. Exhibits that compare all systems end their list with every file of
baselines/ that nobody has named here, so a new one appears in them without an edit.
Scales never share a table, so the scale is part of every case.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from cat_bench import spec
from cat_bench.case import Case
from cat_bench.errors import UserError
from cat_bench.tables import Table

HALF_WINDOW = ("gdn-h1",)  # the window is half the length: 512 at 1K, 2048 at 4K (cat_spec.md 1.7)

# Labels of the paper's tables, by the name an exhibit asks for. Others keep their name (`label`).
LABELS = {
    "dense": "Dense",
    "dense-2d": "Dense-2D",
    "sparse": "Sparse",
    "sparse-2d": "Sparse-2D",
    "sliding_window": "Sliding",
    "based": "BASED",
    "mamba2": "Mamba2",
    "gated_deltanet": "GDN",
    "gdn-h1": "GDN-H1",
    "based:window_cache=window": "BASED (patched)",
    "based:window_cache=max_len": "BASED (unpatched)",
}
# Figures 2 and 3: the paper's and the field's (evaluation_spec.md 4.3).
NAMED = (
    "dense", "dense-2d", "cat-8", "cat-16", "cat-32", "mamba2", "gated_deltanet", "gdn-h1",
    "based", "sparse-2d", "sliding_window",
)  # fmt: skip
UNNAMED = tuple(  # a user's own files: NAMED has neither their name nor a preset of theirs
    info.name for info in spec.architectures() if not {info.name, *info.presets} & set(NAMED)
)
ARCHITECTURES = NAMED + UNNAMED


@dataclass(frozen=True)
class Scale:
    name: str
    says: str  # in every caption
    device: str
    dtype: str
    batch_sizes: tuple[int, ...]  # of Figures 2 and 5; the largest one is Table 3's
    seq_lens: tuple[int, ...]  # tokens, of Figure 3
    seq_len: int  # tokens, of Figures 2 and 5
    batch_size: int  # of Figure 3


GPU_BATCHES = (1, 4, 16, 64, 128, 256, 512)
GPU_LENGTHS = (1024, 2048, 4096)
SCALES = {
    "smoke": Scale(
        "smoke", "Scale smoke: tiny models, random weights", "cpu", "float32", (1, 4), (32, 64),
        64, 4,
    ),
    "h100": Scale(
        "h100", "Scale h100: the paper's sizes on one Hopper GPU, random weights", "cuda",
        "bfloat16", GPU_BATCHES, GPU_LENGTHS, 1024, 256,
    ),
    "paper": Scale(
        "paper", "Scale paper: Appendix E in full", "cuda", "bfloat16", GPU_BATCHES, GPU_LENGTHS,
        1024, 256,
    ),
}  # fmt: skip
PROMPT_LEN = 8  # tokens, Appendix B.1


class Content(NamedTuple):
    """What an exhibit renders; _build.py writes the files."""

    tables: tuple[Table, ...] = ()
    figure: Figure | None = None
    plotted: pd.DataFrame | None = None  # the rows behind the figure


def scale_of(name: str) -> Scale:
    if name not in SCALES:
        raise UserError(f"unknown scale '{name}'.", f"Available: {', '.join(SCALES)}.")
    return SCALES[name]


def label(name: str) -> str:
    """ "cat-8" -> "CAT-8", "mamba2:d_state=16" -> "Mamba2"; a user's file keeps its name."""
    if name in UNNAMED:
        return name
    preset = name.partition(":")[0]
    return LABELS.get(name) or LABELS.get(preset, preset.upper())


def available(names: Iterable[str], scale: str) -> list[str]:
    """Those of `names` that can be timed at this scale (see `_lacks`)."""
    return [name for name in names if not _lacks(name, scale)]


def missing(names: Iterable[str], scale: str) -> list[str]:
    """What is not built yet and why: one text per reason."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        reason = _lacks(name, scale)
        if reason:
            by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(lacking)} ({reason})" for reason, lacking in by_reason.items()]


def only_reference(names: Iterable[str], scale: str) -> bool:
    """Whether of all `names` only Dense exists, and not what the exhibit is about."""
    return available(names, scale) == ["dense"]


def _lacks(name: str, scale: str) -> str:
    """Why `name` cannot be timed at this scale; empty: it can.

    On a GPU a baseline without a fast path is not timed at all: its eager loop would be bound by
    launches, and a slow baseline flatters everything beside it.
    """
    try:
        parsed = spec.parse(name)
    except UserError:
        return "no such file or setting"
    fast = len(_info(parsed.name).decode_paths) > 1
    return "" if fast or scale_of(scale).device == "cpu" else "no fast decode path"


def arch_text(name: str, scale: str, seq_len: int) -> str:
    """The canonical spec of an available `name` at this scale, long enough for `seq_len` tokens."""
    parsed = spec.tiny(spec.parse(name)) if scale == "smoke" else spec.parse(name)
    info = _info(parsed.name)
    values = {key: field.default for key, field in info.fields.items()} | parsed.overrides
    changed = dict(parsed.overrides)
    if name in HALF_WINDOW:
        changed["window"] = _half(seq_len)
    if isinstance(values.get("max_len"), int) and values["max_len"] < seq_len:
        changed["max_len"] = seq_len
    settings = ",".join(f"{key}={str(value).lower()}" for key, value in changed.items())
    return spec.parse(f"{parsed.name}:{settings}").text


def _half(seq_len: int) -> int:
    """Half of 1024, and of 1032: the few new tokens after a long prompt change no window."""
    return 1 << max(0, (seq_len // 2).bit_length() - 1)


def _info(name: str) -> spec.ArchitectureInfo:
    return next(info for info in spec.architectures() if info.name == name)


def timed_cases(
    names: Sequence[str],
    scale: str,
    batch_sizes: Iterable[int],
    seq_lens: Iterable[int],
    prompt_len: int = PROMPT_LEN,
) -> list[Case]:
    """Efficiency cases of every available architecture; equal ones have equal keys everywhere."""
    chosen = scale_of(scale)
    return [
        Case(
            suite="efficiency",
            arch=arch,
            batch_size=batch_size,
            prompt_len=prompt_len,
            seq_len=seq_len,
            dtype=chosen.dtype,
            device=chosen.device,
            decode_path=path,
            scale=scale,
        )
        for name in available(names, scale)
        for path in [decode_path(name, chosen.device)]
        for seq_len in seq_lens
        for arch in [arch_text(name, scale, seq_len)]
        for batch_size in batch_sizes
    ]


def decode_path(name: str, device: str) -> str:
    """The fastest path that the architecture's file has for this device."""
    return _info(spec.parse(name).name).fastest(device)


def relabelled(
    rows: pd.DataFrame, names: Sequence[str], scale: str, seq_lens: Iterable[int]
) -> pd.DataFrame:
    """`rows` with the exhibit's labels: smoke's tiny "Dense (D=64)" stands for Dense."""
    if rows.empty:
        return rows
    texts = {
        arch_text(name, scale, seq_len): label(name)
        for name in available(names, scale)
        for seq_len in seq_lens
    }
    return rows.assign(label=rows["arch"].map(texts).fillna(rows["label"]))


def in_order(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Rows in the exhibit's order of architectures, then batch size, then length."""
    order = {label(name): place for place, name in enumerate(names)}
    keys = pd.DataFrame(
        {
            "place": rows["label"].map(order),
            "batch_size": rows["batch_size"],
            "seq_len": rows["seq_len"],
        }
    )
    return rows.loc[keys.sort_values(["seq_len", "batch_size", "place"], kind="stable").index]
