"""Notes under a table: what failed and why, and what makes its numbers doubtful. No torch.

Everything here is a pure function of measured rows; a note is one line.
"""

import math
from collections.abc import Collection
from numbers import Real

import pandas as pd

from cat_bench import stats
from cat_bench.columns import TRAINING_PARTS, digits, milliseconds
from cat_bench.measurements import closed_rows, is_reference, latency_samples

PATTERN_FIELDS = {  # of Config -> the word in a note
    "num_heads": "heads", "pattern": "pattern", "stride": "stride", "window": "window",
}  # fmt: skip
PATTERN_LETTERS = " (c convolution, l linear attention, s window attention)"  # BASED's
MAX_PARTS_GAP = 0.05  # forward + backward + optimizer against the whole training step
MIN_LAUNCH_SHARE = 0.95  # of a step: GPU-bound, the launches end well before it
REMARKED = "\N{DAGGER}"  # in tables, behind a value that a remark is about
MAX_SHORT_PROMPT = 64  # tokens, whose first token is a matter of launching kernels
MIN_PROMPT_SHARE = 0.05  # of a latency
MAX_CLOCK_GAP = 0.02  # host clock against CUDA events (evaluation_spec.md 4.1)


def failures(rows: pd.DataFrame) -> tuple[str, ...]:
    """One note per case that failed, with the last line of its error, or is unsupported."""
    bad = rows[rows["status"].isin(["failed", "unsupported"])]
    return tuple(
        f"{row['status']}: {_case_name(row)}: "
        f"{_error_text(row['status'], str(row['error'] or 'no message'))} (case {row['case']})"
        for _, row in bad.iterrows()
    )


def name_of(row: pd.Series) -> str:
    """The label, and the implementation where the suite has several of one architecture."""
    implementation = row.get("implementation")
    return f"{row['label']} {implementation}" if implementation else row["label"]


def _case_name(row: pd.Series) -> str:
    return f"{name_of(row)}, batch {row['batch_size']}, length {row['seq_len']}"


def _error_text(status: str, error: str) -> str:
    """A traceback's last line names its error; of a sentence for users every line counts."""
    return " ".join(error.split()) if status == "unsupported" else error.strip().splitlines()[-1]


def configurations(rows: pd.DataFrame, half_window: Collection[str] = ()) -> tuple[str, ...]:
    """A note on what labels do not tell: heads, layer pattern, stride, window and layers of all
    that have one, as their cases were configured. `half_window`: labels whose window follows the
    length. The suite attention has one layer and no pattern.
    """
    rows = rows[rows["suite"] != "attention"] if "suite" in rows else rows
    found: dict[tuple[str, str], dict[str, None]] = {}
    layers: dict[int, dict[str, None]] = {}
    for _, row in rows.sort_values("seq_len", kind="stable").iterrows():
        name = row["arch"].partition(":")[0]  # a user's Config may mean something else by a field
        for field, word in PATTERN_FIELDS.items():
            size = row.get(f"config.{field}")
            if name == "gated_deltanet" and field == "num_heads" and pd.isna(size):
                size = _heads_by_rule(row)
            unused = field == "window" and row.get("config.hybrid") in (False,)  # GDN; numpy's, too
            if isinstance(size, Real | str) and size == size and not unused:
                size = size if isinstance(size, str) else f"{size:g}"
                says = PATTERN_LETTERS if (name, word) == ("based", "pattern") else ""
                found.setdefault((row["label"], word), {})[size + says] = None
        pattern, count = row.get("config.pattern"), row.get("config.num_layers")
        count = len(pattern) if name == "based" and isinstance(pattern, str) else count
        if isinstance(count, Real) and count == count:
            layers.setdefault(int(count), {})[row["label"]] = None
    by_label: dict[str, list[str]] = {}
    for (label, word), sizes in found.items():
        says = " (half the length)" if word == "window" and label in half_window else ""
        by_label.setdefault(label, []).append(f"{word} {', '.join(sizes)}{says}")
    alike: dict[str, list[str]] = {}  # what is told -> the labels of which it is
    for label, each in by_label.items():
        alike.setdefault(", ".join(each), []).append(label)
    parts = [f"{', '.join(labels)} {told}" for told, labels in alike.items()]
    parts += [_layers(layers)] if layers else []
    return (f"Settings: {'; '.join(parts)}.",) if parts else ()


def _heads_by_rule(row: pd.Series) -> float:
    """GDN's heads where no number is given: as baselines/gated_deltanet.py, which needs torch."""
    width, key_width = (row.get(f"config.{name}") for name in ("width", "key_width"))
    return 0.75 * width / key_width if pd.notna(width) and pd.notna(key_width) else math.nan


def _layers(labels_by_count: dict[int, dict[str, None]]) -> str:
    """ "layers 12, Mamba2 24": the usual number, then whose is another one."""
    usual = max(labels_by_count, key=lambda count: len(labels_by_count[count]))
    others = [
        f", {label} {count}"
        for count, labels in labels_by_count.items()
        if count != usual
        for label in labels
    ]
    is_cat = any(label.startswith("CAT") for label in labels_by_count[usual])
    return f"layers {usual}{' (CAT: of its decoder)' if is_cat else ''}{''.join(others)}"


def remarks(rows: pd.DataFrame) -> tuple[str, ...]:
    """The remarks on these rows, each once, with the run folders that have it."""
    if "remarks" not in rows:
        return ()
    texts: dict[str, dict[str, None]] = {}
    for row in rows.itertuples():
        for remark in row.remarks:
            texts.setdefault(row.run, {})[remark.text] = None
    runs: dict[str, list[str]] = {}
    for run, each in texts.items():
        runs.setdefault(" ".join(each), []).append(run)
    said = [f"Remark on {', '.join(sorted(names))}: {text}" for text, names in runs.items()]
    legend = f"{REMARKED} in tables, a ring in figures: a value that a remark is about."
    marks = any(remark.metrics for row in rows.itertuples() for remark in row.remarks)
    return (*said, legend) if marks else tuple(said)


def foreign_dense(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note where a ratio had to take its reference from another run of the same device model."""
    told = []
    for column, name in (("dense_run", "Dense"), ("dense_2d_run", "Dense-2D")):
        if column in rows:
            foreign = rows[rows[column].notna() & (rows[column] != rows["run"])]
            pairs = sorted(
                {f"{one} against {other}" for one, other in foreign[["run", column]].values}
            )
            told += [f"warning: ratios to {name} across runs: {pair}." for pair in pairs]
    return tuple(told)


def hidden_dense(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note where ratios are to the Dense of an older run, and a newer one's row is shown."""
    if not {"dense_run", "latency_s"} <= set(rows):
        return ()
    setting = ["suite", "batch_size", "seq_len", "prompt_len", "device_name"]
    shown = rows[(rows["label"] == "Dense") & rows["latency_s"].notna()].set_index(setting)["run"]
    own = rows[rows["dense_run"].notna() & (rows["dense_run"] == rows["run"])]
    runs = {
        row.run
        for row in own.itertuples()
        for key in [tuple(getattr(row, name) for name in setting)]
        if key in shown.index and row.run not in {*shown.loc[[key]]}
    }
    whose = ", ".join(sorted(runs))
    return (f"Ratios of {whose}: to the Dense of that run; shown is a newer one's.",) * bool(runs)


def ranges(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note where an interval is no more than the range of its few samples."""
    counts = [int(n) for n in rows.get("n", pd.Series(dtype=float)).dropna()]
    few = [n for n in counts if stats.MIN_SAMPLES <= n < stats.MIN_COVERED]
    if not few:
        return ()
    held = 100 * (1 - 2 ** (1 - min(few)))
    return (
        f"Intervals of fewer than {stats.MIN_COVERED} repeats are their range, which holds the "
        f"median with a probability of 1 - 2^(1 - n): {held:.0f} % at n = {min(few)}. All are of "
        "repeats in one process.",
    )


def prompt_share(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note where reading a short prompt, launched from Python, is a good part of a latency."""
    if not {"latency_s", "ttft_s"} <= set(rows):
        return ()
    on_gpu = rows[(rows["device"] == "cuda") & (rows["prompt_len"] <= MAX_SHORT_PROMPT)]
    share = on_gpu["ttft_s"] / on_gpu["latency_s"]
    found = on_gpu[share > MIN_PROMPT_SHARE]
    if found.empty:
        return ()
    cells = ", ".join(
        f"{row['label']} {100 * share[index]:.0f} % (batch {row['batch_size']})"
        for index, row in found.iterrows()
    )
    return (f"Reading the prompt, launched from Python kernel by kernel, is of latency: {cells}.",)


def warnings(rows: pd.DataFrame, records: pd.DataFrame) -> tuple[str, ...]:
    """What makes numbers doubtful: drift of repeats or of the run, two clocks that disagree."""
    found = []
    for _, row in rows.iterrows():
        name = _case_name(row)
        samples = latency_samples(row)
        if len(samples) >= 3 and abs(stats.drift(samples)) > stats.MARGIN:
            found.append(f"warning: {name}: repeats drift by {100 * stats.drift(samples):+.1f} %.")
        host, device = row.get("host_latency_s"), row.get("latency_s")
        if row["device"] == "cuda" and pd.notna(host) and abs(host / device - 1) > MAX_CLOCK_GAP:
            gap = 100 * (host / device - 1)
            found.append(f"warning: {name}: host clock differs from CUDA events by {gap:+.1f} %.")
        gap = row.get("step_sum_difference")
        if pd.notna(gap):
            found.append(f"warning: {name}: the instrumented steps add up to {100 * gap:+.1f} %.")
    found += [*disturbances(rows), *bound_by_launches(rows), *whole_logits(rows)]
    found += _slow_downs(rows)
    return (*found, *_reference_drift(records))


def disturbances(rows: pd.DataFrame) -> tuple[str, ...]:
    """A warning per training case whose parts, which are timed apart, do not sum to its step."""
    if not {"train_step_s", *TRAINING_PARTS} <= set(rows):
        return ()
    sums = rows[list(TRAINING_PARTS)].sum(axis=1, min_count=len(TRAINING_PARTS))
    disturbed = rows[(sums / rows["train_step_s"] - 1).abs() > MAX_PARTS_GAP]
    return tuple(
        f"warning: {_case_name(row)}: measured under disturbance: parts sum to "
        f"{milliseconds(sums[index])} of {milliseconds(row['train_step_s'])} ms."
        for index, row in disturbed.iterrows()
    )


def bound_by_launches(rows: pd.DataFrame) -> tuple[str, ...]:
    """A warning per training case whose step ends when Python has launched it: not the GPU, but the
    processor beside it sets its time.
    """
    if not {"train_step_s", "launch_s"} <= set(rows):
        return ()
    bound = rows[rows["launch_s"] > MIN_LAUNCH_SHARE * rows["train_step_s"]]
    return tuple(
        f"warning: {_case_name(row)}: bound by the host: launching its kernels takes "
        f"{milliseconds(row['launch_s'])} of {milliseconds(row['train_step_s'])} ms."
        for _, row in bound.iterrows()
    )


def whole_logits(rows: pd.DataFrame) -> tuple[str, ...]:
    """A note per architecture whose training steps hold what those beside it do not."""
    if "chunked_loss" not in rows:
        return ()
    return tuple(
        f"{label}: its logits exist in full, in time and peak: it has no `hidden` with a head of "
        "one matrix (cat_bench/architecture.py)."
        for label in rows[rows["chunked_loss"] == 0]["label"].unique()
    )


def _slow_downs(rows: pd.DataFrame) -> list[str]:
    """Which reasons the GPU gave for lower clocks after how many cases."""
    notes = []
    for name in (c for c in rows if c.startswith("slow_down_") and c.endswith("_after")):
        count = int((rows[name] == 1).sum())
        reason = name.removeprefix("slow_down_").removesuffix("_after").replace("_", " ")
        if count:
            notes.append(f"clocks: {reason} was active at the end of {count} of {len(rows)} cases.")
    return notes


def _reference_drift(records: pd.DataFrame) -> list[str]:
    """The reference case at the start against the one at the end, per run."""
    rows = closed_rows(records)
    rows = rows[rows["settings"].map(is_reference) & (rows["status"] == "ok")]
    notes = []
    for run, group in rows.groupby("run", sort=False):
        if len(group) < 2:
            continue
        first, last = (group.sort_values("at")["latency_s"].iloc[i] for i in (0, -1))
        drift = last / first - 1
        word = "warning: " if abs(drift) > stats.MARGIN else ""
        notes.append(
            f"{word}reference case of {run}: {digits(first)} s first, {digits(last)} s last, "
            f"drift {100 * drift:+.1f} %."
        )
    return notes
