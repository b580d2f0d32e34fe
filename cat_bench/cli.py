"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 all ok; 1 internal error; 2 usage; 3 some cases failed or are unsupported, records
kept; 4 `compare` found a regression; 130 interrupted, records kept. Everything heavy is imported
inside the function that needs it, so that `--help` and `list` answer at once, without torch and
pandas.
"""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from cat_bench import exhibit_runs, listing, measuring, planning, printing, spec, store
from cat_bench.case import DEFAULT_TIMEOUT_S, Case, Options
from cat_bench.errors import UserError
from cat_bench.messages import plural, say, warn
from cat_bench.store import DEFAULT_RESULTS, RESULTS_VARIABLE

if TYPE_CHECKING:
    from cat_bench.runner import Summary

EXIT_USAGE, EXIT_REGRESSION = 2, 4

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
        say(f"error: {error}")
        sys.exit(EXIT_USAGE)


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """In place of a traceback; Python then exits with code 1."""
    say(f"internal error: {kind.__name__}: {' '.join(str(error).split())[:300]}")
    say("       Nothing stored was lost. Run it again with --debug for the traceback.")


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
    Path, typer.Option("--results", envvar=RESULTS_VARIABLE, help="The folder of all runs.")
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
    typer.Option(
        "--gpu",
        help="With --dry-run: predict for an H100, H200 or A100 instead.",
        callback=lambda gpu: gpu and gpu.upper(),
    ),
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


# --- commands ------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="architectures, suites, exhibits or runs.")
    ] = None,
    arch: Architectures = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show architectures, suites, exhibits and runs; with -a only those architectures."""
    if what not in (None, *listing.KINDS):
        raise UserError(f"cannot list '{what}'.", f"It is one of: {', '.join(listing.KINDS)}.")
    if arch and what not in (None, "architectures"):
        raise UserError(f"-a chooses architectures, but got '{what}'.", "Drop one of them.")
    store.check_folder(results)
    what = "architectures" if arch else what
    kinds = listing.KINDS if what is None else (what,)
    found = {kind: listing.entries(kind, results, arch or ()) for kind in kinds}
    printing.print_entries(found, as_json)


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
    forward_path: Annotated[
        str | None, typer.Option(help="Suite training: eager, compile, ...")
    ] = None,
    step_path: Annotated[
        str | None, typer.Option(help="Suite training: eager, cuda_graph.")
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Suite training: less memory.")
    ] = False,
    implementation: Annotated[
        str | None, typer.Option(help="Suite attention: fused,causal")
    ] = None,
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
    timeout: Annotated[
        float, typer.Option(help="Seconds that one case may take.")
    ] = DEFAULT_TIMEOUT_S,
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
        retried = measuring.retried(retry)
        _measure(measuring.resumed(results, resume, retried), retried, timeout, as_json)
        return
    if name is not None:
        store.check_name(name)
    options = Options(
        batch_sizes=planning.counts("--batch-size", batch_size),
        seq_lens=planning.counts("--seq-len", seq_len),
        prompt_lens=planning.counts("--prompt-len", prompt_len),
        new_tokens=new_tokens,
        dtype=dtype,
        device=planning.device(device, gpu, dry_run, quick),
        seeds=planning.counts("--seed", seed) or (0,),
        decode_path=decode_path,
        forward_path=forward_path,
        step_path=step_path,
        activation_checkpointing=activation_checkpointing,
        implementations=planning.names(implementation),
        repeats=repeats,
        match=match,
        scale="smoke" if quick else "custom",
        reference_every=reference_every,
    )
    machine = planning.machine(options.device, gpu)
    cases, first = planning.plan(suite, arch or [], options, machine["gpu_name"])
    cases = cases if weights is None else planning.with_weights(cases, weights)
    if not dry_run:
        measuring.check_machine(cases)
    resolved = planning.resolve(cases, machine["gpu_name"], match, first)
    if dry_run:
        memory = planning.memory(options.device, machine, gpu)
        printing.print_plan(cases, resolved, memory, as_json)
        return
    name = name or (f"quick-{suite}" if quick else str(suite))
    target = store.Run.create(results, name, machine, cases, resolved)
    _measure(target, frozenset(), timeout, as_json)


def _measure(target: store.Run, retry: frozenset[str], timeout_s: float, as_json: bool) -> None:
    summary = measuring.measure(target, list(target.cases().values()), retry, timeout_s)
    printing.print_run(target, as_json)
    measuring.exit_after(target, summary, timeout_s)


def _print_missing(cases: list[Case], gpu: str | None, as_json: bool) -> None:
    """`paper --dry-run`."""
    if not cases:
        typer.echo("[]" if as_json else "plan: no case. Nothing was run.")
        return
    machine = planning.machine(cases[0].device, gpu)
    resolved = planning.resolve(cases, machine["gpu_name"])
    memory = planning.memory(cases[0].device, machine, gpu)
    printing.print_plan(cases, resolved, memory, as_json)


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

    found = measuring.find_run(results, run)
    if case is None:
        printing.print_run(found, as_json)
    elif as_json:
        typer.echo(json.dumps(printing.case_document(found, case), indent=1))
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
    """Compare two runs; exit code 4 where a case got slower, 2 where none can be compared.

    + worse, - better, ~ within noise, ! newly failing, x not comparable.
    """
    from cat_bench import report
    from cat_bench.compare import compare_table

    made = compare_table(
        measuring.find_run(results, a), measuring.find_run(results, b), across_machines
    )
    typer.echo(report.as_json(made) if as_json else report.terminal(made))
    if made.num_worse:
        raise typer.Exit(EXIT_REGRESSION)


@app.command("report")
def report_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="One or several runs.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="table, json, csv, markdown, latex or html; default: by -o's ending, else table.",
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's ratios beside ours.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a file.")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print one table per suite of one or several runs, in any format."""
    from cat_bench import report
    from cat_bench.paper import _published

    form = report.form_of(output, "json" if as_json else form)
    found = [measuring.find_run(results, text) for text in runs]
    points = _published.load() if published else ()
    text = report.report_text(found, form, points)
    if output is None:
        typer.echo(text)
    else:
        printing.write(output, text)
        say(f"written: {output}")


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
        typer.echo(f"written: {output} ({plural(num_tensors, 'tensor')})")


@app.command()
def doctor(results: Results = DEFAULT_RESULTS, as_json: Json = False, debug: Debug = False) -> None:
    """Check this machine, and say how to repair it."""
    from cat_bench import environment

    checks = environment.doctor(results)
    printing.print_checks(checks, as_json)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(measuring.EXIT_FAILED_CASES)


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
    implementation: Annotated[
        str | None, typer.Option(help="Of attention, measure only these: fused,causal")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Measure so often. Default: by the time one takes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what --run would measure, do nothing.")
    ] = False,
    gpu: Gpu = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Render the paper's tables and figures (fig2,fig3 or all), or list them.

    Without a name: every exhibit with its status.
    """
    from cat_bench.paper import _build

    wanted = exhibit is not None and (run_missing or dry_run or scale == "smoke")
    if gpu and not dry_run:
        raise UserError("--gpu only predicts.", "Add --dry-run, or drop --gpu.")
    for flag, given in (("--dry-run", dry_run), ("--run", run_missing)):
        if given and exhibit is None:
            raise UserError(f"{flag} needs an exhibit.", f"Example: cat-bench paper fig2 {flag}")
    limits = (only, batch_size, seq_len, implementation, repeats)
    if not wanted and any(limit is not None for limit in limits):
        raise UserError(
            "--only, --batch-size, --seq-len, --implementation and --repeats say what is measured; "
            "nothing is.",
            "Add --run to an exhibit's name, or drop them.",
        )
    if exhibit is None:
        printing.print_statuses(_build.statuses(results, scale, warn), as_json)
        return
    sweeps: list[tuple[store.Run, Summary]] = []
    names = exhibit_runs.exhibit_names(exhibit)
    sizes = planning.counts("--batch-size", batch_size), planning.counts("--seq-len", seq_len)
    ways = planning.names(implementation)
    chosen = exhibit_runs.chosen(names, scale, planning.names(only), *sizes, ways)
    if dry_run:
        _print_missing(
            exhibit_runs.missing(results, names, scale, chosen, repeats, gpu), gpu, as_json
        )
        return
    name = scale if exhibit == "all" else f"{exhibit.replace(',', '-')}-{scale}"
    measure = exhibit_runs.measure_missing(results, name, sweeps, chosen, repeats)
    device = exhibit_runs.this_device(scale) if wanted else None
    built = _build.build(names, scale, results, measure if wanted else None, device)
    for text in built.skipped:
        warn(text)
    printing.print_built(built, as_json)
    for target, summary in sweeps:
        measuring.exit_after(target, summary)


# --- run --resume ---------------------------------------------------------------------------------

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
