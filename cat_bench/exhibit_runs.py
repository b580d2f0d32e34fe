"""What `cat-bench paper --run` measures: the missing cases that were asked for, in one new run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cat_bench import measuring, planning, spec, store
from cat_bench.case import DEFAULT_TIMEOUT_S, Case, Options
from cat_bench.errors import UserError
from cat_bench.messages import plural, warn

if TYPE_CHECKING:
    from cat_bench.runner import Summary

MAX_NAMED = 5  # specs in a warning


def exhibit_names(asked: str) -> list[str]:
    """["fig2", "fig3"] of "fig2,fig3"; every exhibit for "all"."""
    names = [name for name, _ in spec.exhibits()]
    if asked == "all":
        return names
    for one in asked.split(","):
        if one not in names:
            raise UserError(
                f"unknown exhibit '{one}'.{spec.did_you_mean(one, names)}",
                f"Available: all, {', '.join(names)}.",
            )
    return asked.split(",")


def this_device(scale: str) -> str:
    """The GPU or CPU of this machine that cases of `scale` run on."""
    from cat_bench import environment
    from cat_bench.paper import _settings

    return environment.processor_name(_settings.scale_of(scale).device)


def chosen(
    exhibits: Sequence[str],
    scale: str,
    only: tuple[str, ...] | None,
    batch_sizes: tuple[int, ...] | None,
    seq_lens: tuple[int, ...] | None,
    implementations: tuple[str, ...] | None = None,
) -> Callable[[Case], bool]:
    """Whether a case is one of those that the flags of `paper` ask for.

    An exhibit may export an `arch_text` of its own, where its cases are no models of full size.
    """
    from cat_bench.paper import _build, _settings
    from cat_bench.suites.attention import check_implementations

    for name in only or ():
        spec.parse(name)  # a misspelt one is refused, also where nothing is missing
    check_implementations(implementations)
    modules = [_build.exhibit(exhibit) for exhibit in exhibits]
    texts = [getattr(module, "arch_text", _settings.arch_text) for module in modules]

    def is_chosen(case: Case) -> bool:
        archs = {text(name, scale, case.seq_len) for name in only or () for text in texts}
        way = dict(case.settings).get("implementation")
        return (
            (only is None or case.arch in archs)
            and (implementations is None or way in implementations)
            and (batch_sizes is None or case.batch_size in batch_sizes)
            and (seq_lens is None or case.seq_len in seq_lens)
        )

    return is_chosen


def measure_missing(
    results: Path,
    name: str,
    sweeps: "list[tuple[store.Run, Summary]]",
    is_chosen: Callable[[Case], bool],
    repeats: int | None = None,
) -> Callable[[list[Case]], None]:
    """What measures the cases that an exhibit lacks, all in one new run folder."""

    def measure(missing: list[Case]) -> None:
        order = _order(missing, is_chosen, repeats)
        if not order:
            return
        measuring.check_machine(order)
        machine = planning.machine(order[0].device)
        resolved = planning.resolve(order, machine.get("gpu_name"))
        target = store.Run.create(results, name, machine, order, resolved)
        summary = measuring.measure(target, order, frozenset(), DEFAULT_TIMEOUT_S)
        sweeps.append((target, summary))
        if summary.interrupted:
            measuring.exit_after(target, summary)

    return measure


def missing(
    results: Path,
    names: Sequence[str],
    scale: str,
    is_chosen: Callable[[Case], bool],
    repeats: int | None,
    gpu: str | None,
) -> list[Case]:
    """What `measure_missing` would measure, in its order: on this machine, or on a --gpu; where
    neither is told, whatever the GPU lacks that the exhibits show.
    """
    from cat_bench.paper import _build

    records, _, _ = _build.all_records(results)
    device: str | None = this_device(scale)
    device = None if device == store.UNKNOWN_DEVICE else device
    if gpu:  # by its whole name in the runs, "NVIDIA H100 80GB HBM3"; one that none has lacks all
        names_of_it = [name for name in records["device_name"].unique() if gpu in name]
        device = names_of_it[0] if names_of_it else gpu
    return _order(_build.missing_cases(names, scale, records, device), is_chosen, repeats)


def _order(
    missing: list[Case], is_chosen: Callable[[Case], bool], repeats: int | None
) -> list[Case]:
    from cat_bench.suites import efficiency

    efficiency.check_counts("--repeats", None if repeats is None else [repeats])
    cases = [case.with_repeats(repeats) for case in missing if is_chosen(case)]
    if missing and not cases:
        of = _shortened(list(dict.fromkeys(case.arch for case in missing)))
        warn(f"no missing case was asked for; missing: {plural(len(missing), 'case')} of {of}.")
    return _in_order(cases) if cases else []


def _shortened(texts: list[str]) -> str:
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return ", ".join(texts[:MAX_NAMED]) + more


def _in_order(cases: list[Case]) -> list[Case]:
    """By shape; on a GPU, the drift reference of evaluation_spec.md 4.1 first, last, in between."""
    from cat_bench.suites import efficiency

    like, cases = cases[0], efficiency.by_cell(cases)
    if like.device != "cuda":
        return cases
    options = Options(device=like.device, seeds=(like.seed,), scale=like.scale)
    return efficiency.with_references(cases, options, efficiency.REFERENCE_EVERY)
