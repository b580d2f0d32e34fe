"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 all ok; 1 internal error; 2 usage; 3 some cases failed, records kept; 4 `compare`
found a regression; 130 interrupted, records kept. Everything heavy is imported inside the function
that needs it, so that `--help` and `list` answer at once, without torch and pandas.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cat_bench import spec, store
from cat_bench.case import Case, Options
from cat_bench.errors import UserError
from cat_bench.packages import install_command

if TYPE_CHECKING:
    from cat_bench.runner import Progress, Summary

EXIT_USAGE, EXIT_FAILED_CASES, EXIT_REGRESSION, EXIT_INTERRUPTED = 2, 3, 4, 130

app = typer.Typer(
    help="Measures the Compress-and-Attend Transformer (CAT) beside its competitors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # main() prints errors
    rich_markup_mode=None,  # plain text; importing rich would double the start time
)


def main() -> None:
    """The console script. UserError is caught here and nowhere else."""
    if "--debug" not in sys.argv:
        sys.excepthook = _one_line
    command = typer.main.get_command(app)  # calling `app` itself would set its own excepthook
    try:
        command(prog_name="cat-bench")
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        _say(f"error: {error}")
        sys.exit(EXIT_USAGE)


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """In place of a traceback; Python then exits with code 1."""
    _say(f"internal error: {kind.__name__}: {' '.join(str(error).split())[:300]}")
    _say("       Nothing stored was lost. Run it again with --debug for the traceback.")


def _say(text: str) -> None:
    """To stderr: progress, warnings, errors."""
    typer.echo(text, err=True)


# --- flags that several commands share -----------------------------------------------------------


def _complete_architecture(incomplete: str) -> list[str]:
    names = [name for info in spec.architectures() for name in (info.name, *info.presets)]
    return [name for name in names if name.startswith(incomplete)]


def _complete_suite(incomplete: str) -> list[str]:
    return [name for name, _ in spec.suites() if name.startswith(incomplete)]


def _complete_exhibit(incomplete: str) -> list[str]:
    names = ["all", *(name for name, _ in spec.exhibits())]
    return [name for name in names if name.startswith(incomplete)]


Results = Annotated[
    Path, typer.Option("--results", envvar="CAT_BENCH_RESULTS", help="The folder of all runs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Suite = Annotated[
    str | None, typer.Argument(help="What to measure.", autocompletion=_complete_suite)
]
Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "-a",
        "--arch",
        help="name:key=value,...; a file name, a preset, or a path. Repeatable.",
        autocompletion=_complete_architecture,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; default: cuda where there is a GPU.")
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help="With --dry-run: predict for an H100, H200 or A100 instead."),
]
Match = Annotated[
    str | None,
    typer.Option(help="params, state, flops or latency: widths that match the first -a."),
]
Exhibit = Annotated[
    str | None,
    typer.Argument(
        help="table1 ... fig8, several (fig2,fig3), or all.", autocompletion=_complete_exhibit
    ),
]
DEFAULT_RESULTS = Path("results")


# --- commands ------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="architectures, suites, exhibits or runs.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show architectures, suites, exhibits and runs."""
    if what not in (None, *LISTINGS):
        raise UserError(f"cannot list '{what}'.", f"It is one of: {', '.join(LISTINGS)}.")
    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results} is a file.", "Give the folder that holds the runs.")
    found = {kind: LISTINGS[kind](results) for kind in LISTINGS if what in (None, kind)}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for kind, entries in found.items():
        typer.echo(kind if entries else f"{kind}: none yet")
        width = max((len(entry["name"]) for entry in entries), default=0)
        for entry in entries:
            for line in _entry_lines(entry, width):
                typer.echo(f"  {line}")


@app.command()
def run(
    context: typer.Context,
    suite: Suite = None,
    arch: Architectures = None,
    batch_size: Annotated[str | None, typer.Option(help="1,64,256")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Prompt + new tokens: 1024,4096")] = None,
    prompt_len: Annotated[str | None, typer.Option(help="Tokens: 8,1024")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="After each prompt, instead of --seq-len.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.")] = None,
    device: Device = None,
    seed: Annotated[str, typer.Option(help="0,1,2")] = "0",
    decode_path: Annotated[str | None, typer.Option(help="eager, cuda_graph, ...")] = None,
    forward_path: Annotated[str | None, typer.Option(help="eager, compile, ...")] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Suite training: less memory.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(help="Default: by the time one takes.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint folder for the one -a; default: random.")
    ] = None,
    reference_every: Annotated[
        int | None, typer.Option(help="A reference case before every k-th: shows drift.")
    ] = None,
    match: Match = None,
    name: Annotated[str | None, typer.Option(help="Of the run; default: the suite's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, run nothing.")
    ] = False,
    gpu: Gpu = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run.")] = None,
    retry: Annotated[str, typer.Option(help="With --resume: oom,failed,unsupported.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 3600.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models on the CPU.")] = False,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure, each case in a fresh process, into one run folder."""
    if retry and not resume:
        raise UserError("--retry needs --resume RUN.", "Add the run whose cases to measure again.")
    if not timeout > 0:  # nor nan
        raise UserError(f"--timeout {timeout:g} is no time.", "Example: --timeout 3600 (seconds)")
    if resume:
        _check_only_resume(context)
        retried = _retried(retry)
        target = _resumed(results, resume)
        cases = list(target.cases().values())
    else:
        options = Options(
            batch_sizes=_counts("--batch-size", batch_size),
            seq_lens=_counts("--seq-len", seq_len),
            prompt_lens=_counts("--prompt-len", prompt_len),
            new_tokens=new_tokens,
            dtype=dtype,
            device=_device(_device_for(gpu, device, dry_run, quick), quick),
            seeds=_counts("--seed", seed) or (0,),
            decode_path=decode_path,
            forward_path=forward_path,
            activation_checkpointing=activation_checkpointing,
            repeats=repeats,
            match=match,
            scale="smoke" if quick else "custom",
            reference_every=reference_every,
        )
        environment = _environment(options.device) | _assumed_gpu(gpu)
        gpu_name = environment.get("gpu_name")
        cases, first = _plan(suite, arch or [], options, gpu_name)
        cases = cases if weights is None else _with_weights(cases, weights)
        if not dry_run:
            _check_machine(cases)
        resolved = _resolve(cases, gpu_name, match, first)
        if dry_run:
            _print_plan(cases, resolved, _memory(options.device, environment, gpu), as_json)
            return
        run_name = name or (f"quick-{suite}" if quick else str(suite))
        target = store.Run.create(results, run_name, environment, cases, resolved)
        retried = frozenset()
    summary = _measure(target, cases, retried, timeout)
    _print_run(target, as_json)
    _exit_after(target, summary)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Number, name or path.")],
    case: Annotated[str | None, typer.Option(help="Every sample of this case (its key).")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the table of a run, or every sample of a case."""
    from cat_bench import report

    found = _found(results, run)
    if case is None:
        _print_run(found, as_json)
    elif as_json:
        typer.echo(json.dumps(_case_document(found, case), indent=1))
    else:
        typer.echo(report.case_text(found, case))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The run before.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run after.")],
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Ratios to Dense, for different GPUs.")
    ] = False,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two runs; exit code 4 where a case got slower.

    + worse, - better, ~ within noise, ! newly failing, x not comparable.
    """
    from cat_bench import report
    from cat_bench.compare import compare_table

    made = compare_table(_found(results, a), _found(results, b), across_machines)
    typer.echo(report.as_json(made) if as_json else report.terminal(made))
    if made.num_worse:
        raise typer.Exit(EXIT_REGRESSION)


@app.command("report")
def report_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One or several runs.")],
    form: Annotated[
        str, typer.Option("--format", help="table, json, csv, markdown, latex or html.")
    ] = "table",
    published: Annotated[
        bool, typer.Option("--published", help="The paper's ratios beside ours.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a file.")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print one table of several runs, in any format."""
    from cat_bench import report
    from cat_bench.paper import _published

    found = [_found(results, text) for text in runs]
    points = _published.load() if published else ()
    text = report.report_text(found, "json" if as_json else form, points)
    if output is None:
        typer.echo(text)
    else:
        _write(output, text)
        _say(f"written: {output}")


@app.command()
def convert(
    arch: Annotated[str, typer.Argument(metavar="SPEC", help="mamba2:vocab_size=50288")],
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="Safetensors, or a folder that holds them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder.")],
    to_upstream: Annotated[
        bool, typer.Option("--to-upstream", help="From our checkpoint folder to the authors'.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make our checkpoint folder of the authors' weights, or the way back."""
    from cat_bench import convert as conversion

    made = conversion.to_upstream if to_upstream else conversion.from_upstream
    num_tensors = made(spec.parse(arch), source, output)
    if as_json:
        typer.echo(json.dumps({"folder": str(output), "num_tensors": num_tensors}))
    else:
        typer.echo(f"written: {output} ({_plural(num_tensors, 'tensor')})")


@app.command()
def doctor(results: Results = DEFAULT_RESULTS, as_json: Json = False, debug: Debug = False) -> None:
    """Check this machine, and say how to repair it."""
    from cat_bench import environment

    checks = environment.doctor(results)
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{check.status:4}  {check.name:{width}}  {check.detail}")
            if check.fix and check.status != "ok":
                typer.echo(f"{'':4}  {'':{width}}  -> {check.fix}")
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_FAILED_CASES)


@app.command()
def paper(
    exhibit: Exhibit = None,
    scale: Annotated[str, typer.Option(help="smoke, h100 or paper; never mixed.")] = "h100",
    run_missing: Annotated[
        bool, typer.Option("--run", help="Measure what is missing (smoke always does).")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Measure only these architectures: dense,cat-16")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Measure only these: 1,64")] = None,
    seq_len: Annotated[str | None, typer.Option(help="Measure only these: 1024")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Render the paper's tables and figures (fig2,fig3 or all), or list them.

    Without a name: every exhibit with its status.
    """
    from cat_bench.paper import _build

    wanted = exhibit is not None and (run_missing or scale == "smoke")
    if not wanted and (only, batch_size, seq_len) != (None, None, None):
        raise UserError(
            "--only, --batch-size and --seq-len choose what is measured, but nothing is measured.",
            "Add --run to an exhibit's name, or drop them.",
        )
    if exhibit is None:
        _print_statuses(_build.statuses(results, scale, _warn), as_json)
        return
    sweeps: list[tuple[store.Run, Summary]] = []
    name = scale if exhibit == "all" else f"{exhibit.replace(',', '-')}-{scale}"
    names = _exhibit_names(exhibit)
    chosen = _chosen(
        names, scale, only, _counts("--batch-size", batch_size), _counts("--seq-len", seq_len)
    )
    measure = _measure_missing(results, name, sweeps, chosen) if wanted else None
    built = _build.build(names, scale, results, measure, _this_device(scale) if wanted else None)
    for text in built.skipped:
        _warn(text)
    if as_json:
        typer.echo(json.dumps(_build_document(built), indent=1, default=str))
    else:
        _print_statuses(built.statuses, as_json=False)
        _print_files(built.files, built.report_html)
    for target, summary in sweeps:
        _exit_after(target, summary)


# --- list ----------------------------------------------------------------------------------------


def _list_architectures(_: Path) -> list[dict[str, Any]]:
    return [
        {
            "name": info.name,
            "summary": info.summary,
            "settings": {key: _setting(field) for key, field in info.fields.items()},
            "presets": info.presets,
            "decode_paths": {path: _readiness(info, path) for path in info.decode_paths},
            "forward_paths": {path: _readiness(info, path) for path in info.forward_paths},
        }
        for info in spec.architectures()
    ]


def _setting(field: spec.Field) -> Any:
    return None if field.default is spec.NO_DEFAULT else field.default


def _readiness(info: spec.ArchitectureInfo, path: str) -> str:
    package = info.missing(path)
    return f"needs {package}: {install_command(package)}" if package else "ready"


def _list_suites(_: Path) -> list[dict[str, Any]]:
    return [{"name": name, "summary": summary} for name, summary in spec.suites()]


def _list_exhibits(_: Path) -> list[dict[str, Any]]:
    return [{"name": name, "summary": title} for name, title in spec.exhibits()]


def _list_runs(results: Path) -> list[dict[str, Any]]:
    """A folder that cannot be read is listed with the reason: the others must stay visible."""
    entries = []
    for path in store.folders(results):
        try:
            found = store.Run.open(path)
            machine = found.environment.get("machine_line", "unknown machine")
            summary = f"{_num_closed(found)} of {len(found.cases())} cases; {machine}"
        except UserError as error:
            summary = f"unreadable: {error.message}"
        entries.append({"name": path.name, "summary": summary})
    return entries


def _num_closed(found: store.Run) -> int:
    """How many cases have a closing row. Read as text: parsing every sample would make `list` slow.

    A file in which any line looks unlike a row is read in full, which says what is wrong.
    """
    path = found.path / "records.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    rows = ROW.findall(data)
    if len(rows) != data.count(b"\n"):
        return len(found.closed())
    return len({case for case, metric in rows if metric == store.CLOSING.encode()})


# A whole row as the store writes it: its case and metric.
ROW = re.compile(
    rb'^\{"case": "([^"]*)", "metric": "([^"]*)", "value": .*, "schema": %d\}\n' % store.SCHEMA,
    re.MULTILINE,
)

LISTINGS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "architectures": _list_architectures,
    "suites": _list_suites,
    "exhibits": _list_exhibits,
    "runs": _list_runs,
}


def _entry_lines(entry: dict[str, Any], width: int) -> Iterator[str]:
    yield f"{entry['name']:{width}}  {entry['summary']}"
    indent = " " * (width + 2)
    if entry.get("presets"):
        yield f"{indent}presets: {', '.join(entry['presets'])}"
    if "settings" in entry:
        settings = " ".join(f"{key}={value}" for key, value in entry["settings"].items())
        yield f"{indent}settings: {settings}"
    for kind in ("decode", "forward"):
        for path, state in entry.get(f"{kind}_paths", {}).items():
            yield f"{indent}{kind} path {path}: {state}"


# --- run -----------------------------------------------------------------------------------------


def _counts(flag: str, text: str | None) -> tuple[int, ...] | None:
    """(1, 64) of "1,64". Raises UserError for anything but whole numbers."""
    if text is None:
        return None
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{flag} '{text}' is not a list of whole numbers.", f"Example: {flag} 1,64"
        ) from error


def _device(asked: str | None, quick: bool) -> str:
    """The asked one; else the GPU where there is one. --quick is defined on the CPU."""
    if quick:
        if asked not in (None, "cpu"):
            raise UserError(f"--quick runs on the CPU, got --device {asked}.", "Drop one of them.")
        return "cpu"
    if asked is not None:
        return asked
    from cat_bench.environment import nvml_device

    return "cpu" if nvml_device() is None else "cuda"


def _device_for(gpu: str | None, device: str | None, dry_run: bool, quick: bool) -> str | None:
    """The device that the flags ask for: --gpu means cuda."""
    if gpu is None:
        return device
    if not dry_run:
        raise UserError("--gpu only predicts.", "Add --dry-run, or drop --gpu.")
    if quick or device not in (None, "cuda"):
        other = "--quick" if quick else f"--device {device}"
        raise UserError(f"--gpu {gpu} predicts for cuda, got {other}.", "Drop one of them.")
    return "cuda"


def _assumed_gpu(gpu: str | None) -> dict[str, Any]:
    """What the plan takes from the environment, for a GPU that need not be here."""
    from cat_bench.predict import ASSUMED_MEMORY_BYTES

    if gpu is None:
        return {}
    if gpu not in ASSUMED_MEMORY_BYTES:
        raise UserError(
            f"--gpu '{gpu}' is unknown.", f"It is one of: {', '.join(ASSUMED_MEMORY_BYTES)}."
        )
    return {"gpu_name": gpu, "gpu_memory_bytes": ASSUMED_MEMORY_BYTES[gpu]}


def _memory(device: str, environment: dict[str, Any], gpu: str | None) -> tuple[float | None, str]:
    """Bytes that a plan must fit into, and what has them: "host", "H100, assumed"."""
    if device == "cpu":
        return environment["host_memory_bytes"], "host"
    return environment.get("gpu_memory_bytes"), f"{gpu}, assumed" if gpu else ""


def _environment(device: str) -> dict[str, Any]:
    from cat_bench import environment

    captured = environment.capture(sys.argv)
    return captured | {"machine_line": environment.machine_line(captured, device)}


def _plan(
    suite: str | None, arch: list[str], options: Options, gpu_name: str | None
) -> tuple[list[Case], spec.Spec | None]:
    """The cases, and the spec that sets the budget where --match asks for one."""
    if suite is None:
        raise UserError("run needs a suite.", "Example: cat-bench run efficiency -a dense -a cat-8")
    from cat_bench import suites

    if options.match and options.scale == "smoke":
        raise UserError(
            "--match chooses widths, but --quick sets them all to tiny ones.", "Drop one of them."
        )
    planner = suites.load(suite)
    specs = [spec.parse(text) for text in arch]
    _check_forward_path(specs, options.forward_path)
    if options.scale == "smoke":
        specs = [spec.tiny(one) for one in specs]
    cases = planner.plan(specs, options)
    if options.match is None:
        return cases, None
    return planner.plan(_matched(specs, cases, options.match, gpu_name), options), specs[0]


def _check_forward_path(specs: list[spec.Spec], asked: str | None) -> None:
    """Raises UserError where an architecture's source names no such forward path."""
    for one in specs if asked is not None else ():
        known = spec.describe(one.name).forward_paths
        if asked not in known:
            raise UserError(
                f"{one.text} has no forward path '{asked}'.{spec.did_you_mean(asked, known)}",
                f"Its forward paths: {', '.join(known)}.",
            )


def _with_weights(cases: list[Case], folder: Path) -> list[Case]:
    """The cases with a checkpoint in place of random weights; drift references keep those.

    A case is identified by what the folder holds; where it lies is a setting.
    """
    from cat_bench import checkpoint
    from cat_bench.architecture import make_config

    digest = checkpoint.digest(folder)
    planned = []
    for case in cases:
        if all(name != "reference" for name, _ in case.settings):
            parsed = spec.parse(case.arch)
            checkpoint.check_config(folder, parsed, make_config(parsed))
            settings = tuple(sorted([*case.settings, ("weights", str(folder))]))
            case = replace(case, weights=digest, settings=settings)
        planned.append(case)
    return planned


def _matched(
    specs: list[spec.Spec], cases: list[Case], match: str, gpu_name: str | None
) -> list[spec.Spec]:
    """The specs at equal budgets, at the largest batch and length of the plan."""
    from cat_bench import predict

    largest = max(cases, key=lambda case: (case.batch_size, case.seq_len))
    return predict.matched(
        specs,
        match,
        largest.batch_size,
        largest.seq_len,
        prompt_len=largest.prompt_len,
        dtype=largest.dtype,
        device_name=gpu_name,
    )


def _resolve(
    cases: list[Case],
    gpu_name: str | None,
    match: str | None = None,
    first: spec.Spec | None = None,
) -> dict[str, dict]:
    """What each case will be; a case that is impossible on any machine is refused here."""
    from cat_bench import predict

    resolved = predict.resolve(cases, gpu_name, match, first)
    for warning in dict.fromkeys(text for row in resolved.values() for text in row["warnings"]):
        _say(f"warning: {warning}")
    return resolved


def _print_plan(
    cases: list[Case],
    resolved: dict[str, dict],
    memory: tuple[float | None, str],
    as_json: bool,
) -> None:
    from cat_bench import predict

    if as_json:
        plan = [{"key": case.key, **asdict(case), **resolved[case.key]} for case in cases]
        typer.echo(json.dumps(plan, indent=1))
        return
    table = predict.plan_table(cases, resolved, *memory)
    typer.echo(f"plan: {_plan_line(cases)}")
    typer.echo("\n".join(f"  {line}" for line in table.to_string(index=False).splitlines()))
    typer.echo("Nothing was run.")


def _plan_line(cases: list[Case]) -> str:
    """What the cases share: "6 cases, 2 architectures, bfloat16, cuda, cuda_graph, seed 0".

    Forward paths are told where one of them is not eager, then the suite's settings.
    """
    parts = [
        _plural(len(cases), "case"),
        _plural(len({case.arch for case in cases}), "architecture"),
    ]
    for name in ("dtype", "device", "decode_path"):
        parts.append("/".join(sorted({getattr(case, name) for case in cases})))
    forward_paths = sorted({case.forward_path for case in cases})
    parts += [] if forward_paths == ["eager"] else [f"forward {'/'.join(forward_paths)}"]
    settings = {f"{k} {v}" for case in cases for k, v in case.settings if k != "reference"}
    parts += sorted(settings)
    return ", ".join([*parts, "seed " + "/".join(str(s) for s in sorted({c.seed for c in cases}))])


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _check_machine(cases: list[Case]) -> None:
    """Raises UserError where this machine has no GPU or lacks a package that a case needs."""
    if any(case.device == "cuda" for case in cases):
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"device cuda was asked for, but torch {torch.__version__} sees no CUDA GPU.",
                "Use --device cpu, or look at `cat-bench doctor`.",
            )
    needed = {(case.arch, "decode", case.decode_path) for case in cases}
    needed |= {(case.arch, "forward", case.forward_path) for case in cases}
    for arch, kind, path in sorted(needed):
        package = spec.describe(spec.parse(arch).name).missing(path)
        if package:
            raise UserError(
                f"{arch}: {kind} path '{path}' needs the package {package}, "
                "which is not installed.",
                f"Install it: {install_command(package)}. Or use --{kind}-path eager.",
            )


def _retried(text: str) -> frozenset[str]:
    """{"oom", "failed"} of "oom,failed". Raises UserError for anything but a status to retry."""
    from cat_bench.runner import RETRIABLE

    asked = frozenset(filter(None, text.split(",")))
    if not asked <= RETRIABLE:
        raise UserError(f"--retry '{text}' is unknown.", f"Any of: {','.join(sorted(RETRIABLE))}.")
    return asked


RESUME_TAKES = {"resume", "retry", "timeout", "results", "as_json", "debug"}


def _check_only_resume(context: typer.Context) -> None:
    """Raises UserError where --resume stands beside anything that would plan."""
    typed = [
        parameter.opts[-1] if parameter.param_type_name == "option" else "the suite"
        for parameter in context.command.params
        if parameter.name not in RESUME_TAKES and _was_typed(context, parameter.name)
    ]
    if typed:
        raise UserError(
            f"--resume continues a run as it was planned, but got {', '.join(typed)}.",
            f"Drop {'it' if len(typed) == 1 else 'them'}, or start a new run without --resume.",
        )


def _was_typed(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name) if name else None
    return source is not None and source.name == "COMMANDLINE"


def _resumed(results: Path, name: str) -> store.Run:
    """The run to continue, if this machine may. Nothing is changed before that is clear."""
    from cat_bench import runner

    found = _found(results, name)
    devices = {case.device for case in found.cases().values()}
    environment = _environment("cuda" if "cuda" in devices else "cpu")
    runner.check_resume(found, environment)
    _check_machine(list(found.cases().values()))
    found.resume_under(environment)
    return found


def _found(results: Path, text: str) -> store.Run:
    found = store.find(results, text)
    if found.torn:
        _say(f"warning: the last row of {found.name} was cut short and is left out.")
    return found


def _measure(
    target: store.Run, cases: list[Case], retry: frozenset[str], timeout_s: float
) -> "Summary":
    from cat_bench import runner

    _say(f"measuring {_plural(len(cases), 'case')} into {target.path}")
    with _progress() as progress:
        summary = runner.execute(cases, target, retry=retry, timeout_s=timeout_s, progress=progress)
    if not summary.interrupted:
        _say(f"kept: {target.path}")
    return summary


@contextmanager
def _progress() -> Iterator["Progress"]:
    """One bar on a terminal, else one line per case; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_line
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, case: Case | None, eta_s: float | None) -> None:
            text = _case_text(case, eta_s) if case else "done"
            bar.update(task, completed=done, total=total, description=text)

        yield update


def _progress_line(done: int, total: int, case: Case | None, eta_s: float | None) -> None:
    if case:
        _say(f"[{done + 1}/{total}] {_case_text(case, eta_s)}")


def _case_text(case: Case, eta_s: float | None) -> str:
    left = "" if eta_s is None else f", about {eta_s:.0f} s left"
    return f"{case.arch}, batch {case.batch_size}, length {case.seq_len}{left}"


def _exit_after(target: store.Run, summary: "Summary") -> None:
    """Say how the run ended, on stderr, and leave with its exit code unless all is well."""
    if summary.interrupted:
        num_closed, num_cases = len(target.closed()), len(target.cases())
        _say(
            f"interrupted after {num_closed} of {_plural(num_cases, 'case')}. Kept: {target.path}. "
            f"Continue: cat-bench run --resume {target.name}"
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    num_bad = summary.failed + summary.unsupported
    if num_bad:
        _say(
            f"{_plural(num_bad, 'case')} failed; the rows say why. "
            f"Again: cat-bench run --resume {target.name} --retry failed,unsupported"
        )
        raise typer.Exit(EXIT_FAILED_CASES)


def _print_run(target: store.Run, as_json: bool) -> None:
    from cat_bench import measurements, report, tables

    if as_json:
        typer.echo(report.as_json(tables.full_table(measurements.frame([target]))))
        return
    typer.echo(report.terminal(tables.run_table(target)))
    details = tables.details_table(measurements.frame([target]))
    if details is not None:
        typer.echo(f"\n{report.terminal(details)}")


def _case_document(found: store.Run, key: str) -> dict[str, Any]:
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


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}.", "Give -o a file in a folder that exists."
        ) from error


# --- paper ---------------------------------------------------------------------------------------


def _this_device(scale: str) -> str | None:
    """The GPU or CPU of this machine that cases of `scale` run on; None: it has no such."""
    from cat_bench import environment
    from cat_bench.paper import _settings

    return environment.processor_name(_settings.scale_of(scale).device)


def _exhibit_names(asked: str) -> list[str]:
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


def _chosen(
    exhibits: Sequence[str],
    scale: str,
    only: str | None,
    batch_sizes: tuple[int, ...] | None,
    seq_lens: tuple[int, ...] | None,
) -> Callable[[Case], bool]:
    """Whether a case is one of those that the flags of `paper` ask for.

    An exhibit may export an `arch_text` of its own, where its cases are no models of full size.
    """
    from cat_bench.paper import _build, _settings

    names = None if only is None else only.split(",")
    modules = [_build.exhibit(exhibit) for exhibit in exhibits]
    texts = [getattr(module, "arch_text", _settings.arch_text) for module in modules]

    def is_chosen(case: Case) -> bool:
        archs = {text(name, scale, case.seq_len) for name in names or () for text in texts}
        return (
            (names is None or case.arch in archs)
            and (batch_sizes is None or case.batch_size in batch_sizes)
            and (seq_lens is None or case.seq_len in seq_lens)
        )

    return is_chosen


def _measure_missing(
    results: Path,
    name: str,
    sweeps: "list[tuple[store.Run, Summary]]",
    is_chosen: Callable[[Case], bool],
) -> Callable[[list[Case]], None]:
    """What measures the cases that an exhibit lacks, all in one new run folder."""

    def measure(missing: list[Case]) -> None:
        cases = [case for case in missing if is_chosen(case)]
        if missing and not cases:
            _warn(f"none of the {_plural(len(missing), 'missing case')} was asked for.")
        if not cases:
            return
        _check_machine(cases)
        environment = _environment(cases[0].device)
        order = _in_order(cases)
        resolved = _resolve(order, environment.get("gpu_name"))
        target = store.Run.create(results, name, environment, order, resolved)
        summary = _measure(target, order, frozenset(), 3600.0)
        sweeps.append((target, summary))
        if summary.interrupted:
            _exit_after(target, summary)

    return measure


def _in_order(cases: list[Case]) -> list[Case]:
    """By shape; on a GPU, the drift reference of evaluation_spec.md 4.1 first, last, in between."""
    from cat_bench.suites import efficiency

    like, cases = cases[0], efficiency.by_cell(cases)
    if like.device != "cuda":
        return cases
    options = Options(device=like.device, seeds=(like.seed,), scale=like.scale)
    return efficiency.with_references(cases, options, efficiency.REFERENCE_EVERY)


def _warn(text: str) -> None:
    _say(f"warning: {text}")


def _print_statuses(statuses: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(status) for status in statuses], indent=1))
        return
    widths = [max(len(getattr(s, part)) for s in statuses) for part in ("name", "title")]
    for status in statuses:
        line = f"{status.name:{widths[0]}}  {status.title:{widths[1]}}  {status.status}"
        typer.echo(f"{line}; {status.detail}" if status.detail else line)


def _print_files(files: list[Path], report_html: Path | None) -> None:
    """Where the results are, last and easy to find."""
    for folder in sorted({path.parent for path in files}):
        kinds = sorted({path.suffix for path in files if path.parent == folder})
        typer.echo(f"Tables and figures: {folder} ({' '.join(kinds)})")
    if report_html is not None:
        typer.echo(f"HTML report:        {report_html}")


def _build_document(built: Any) -> dict[str, Any]:
    return {
        "statuses": [asdict(status) for status in built.statuses],
        "files": [str(path) for path in built.files],
        "report_html": str(built.report_html) if built.report_html else None,
    }
