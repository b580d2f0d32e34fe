"""The attention suite: its plan, counts of pairs, layouts and rows; the table and the exhibit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cat_bench import compare, mask, spec, store, tables
from cat_bench.architecture import build
from cat_bench.case import Case, Options, Record
from cat_bench.chunk_attention import chunk_mask
from cat_bench.errors import UserError
from cat_bench.paper import _build
from cat_bench.paper import attention as exhibit
from cat_bench.predict import plan_table, resolve
from cat_bench.spec import parse
from cat_bench.suites import attention
from cat_bench.suites.attention import Shape, flex_layout, measure, plan

GPU = {"gpu_name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0",
       "command": "cat-bench run attention", "cpu_name": "A CPU", "cpu_cores": 2}  # fmt: skip
CAT = "cat:chunk_size=4,width=64"


def names(cases: list) -> list[tuple[str, int, str]]:
    return [(parse(c.arch).name, c.seq_len, dict(c.settings)["implementation"]) for c in cases]


def test_the_plan_covers_implementations_and_lengths() -> None:
    options = Options(device="cuda", seq_lens=(1024, 8192))
    cases = plan([], options)
    assert cases == plan([], options) and len({case.key for case in cases}) == len(cases)
    assert {(c.seq_len, c.batch_size) for c in cases} == {(1024, 16), (8192, 2)}
    of_cat = [(n, name) for arch, n, name in names(cases) if arch == "cat"]
    assert (1024, "eager") in of_cat and (8192, "eager") not in of_cat  # its mask has no room
    assert {name for _, name in of_cat} == {
        "eager", "two_part", "fused", "flex_interleaved", "flex_permuted",
    }  # fmt: skip
    assert len([arch for arch, *_ in names(cases) if arch == "dense"]) == 4  # two widths
    assert all("num_layers=1" in c.arch and "vocab_size=256" in c.arch for c in cases)
    assert resolve(cases)  # long enough models, by their own account


@pytest.mark.parametrize("scale", ["smoke", "custom"])
def test_a_cpu_is_asked_for_what_it_can(scale: str) -> None:
    cases = plan([], Options(scale=scale))
    assert {name for *_, name in names(cases)} == {"eager", "two_part", "causal"}


def test_float64_is_asked_of_no_kernel_that_computes_in_float32() -> None:
    cases = plan([], Options(device="cuda", seq_lens=(1024, 8192), dtype="float64"))
    assert {name for *_, name in names(cases)} == {"eager", "two_part", "causal"}


def test_a_gpus_implementation_on_a_cpu_says_so() -> None:
    case = next(
        case
        for case in plan([parse(CAT)], Options(device="cuda", seq_lens=(16,), dtype="float32"))
        if dict(case.settings)["implementation"] == "fused"
    )
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        list(measure(replace(case, device="cpu"), build(parse(case.arch))))


@pytest.mark.parametrize("setting", ["cat:chunk_size", "sparse:stride"])
def test_fused_is_asked_of_no_chunk_that_is_too_long_for_it(setting: str) -> None:
    options = Options(device="cuda", seq_lens=(1024,))
    at_most, above, default = (
        {name for *_, name in names(plan([parse(text)], options))}
        for text in (f"{setting}=128", f"{setting}=129", setting.partition(":")[0])
    )
    assert at_most == default == {"fused", *above} and "fused" not in above
    assert "two_part" in above


def test_only_the_implementations_asked_for() -> None:
    options = Options(device="cuda", seq_lens=(1024, 16_384), implementations=("eager", "causal"))
    found = {(case.seq_len, name) for case, name in asked(options)}
    assert found == {(1024, "eager"), (1024, "causal"), (16_384, "causal")}
    with pytest.raises(UserError, match=r"unknown implementation 'fuse'. Did you mean: fused\?"):
        plan([], Options(implementations=("fuse",)))
    for one in (
        Options(device="cpu", implementations=("fused",)),
        Options(device="cuda", seq_lens=(16_384,), implementations=("eager",)),
    ):
        with pytest.raises(UserError, match="--implementation (fused|eager): none of these"):
            plan([parse(CAT)], one)


def asked(options: Options) -> list[tuple[Case, str]]:
    return [(case, dict(case.settings)["implementation"]) for case in plan([], options)]


def test_unknown_attention_and_counts_are_refused() -> None:
    with pytest.raises(UserError, match="knows no attention of 'mamba2'"):
        plan([parse("mamba2")], Options())
    with pytest.raises(UserError, match="must be 1 or more"):
        plan([], Options(seq_lens=(0,)))
    with pytest.raises(UserError, match="--dtype 'float8' is unknown"):
        plan([], Options(dtype="float8"))


@pytest.mark.parametrize(
    "flag, option",
    [
        ("--prompt-len", {"prompt_lens": (8,)}),
        ("--new-tokens", {"new_tokens": 8}),
        ("--decode-path", {"decode_path": "eager"}),
        ("--forward-path", {"forward_path": "eager"}),
        ("--step-path", {"step_path": "eager"}),
        ("--activation-checkpointing", {"activation_checkpointing": True}),
        ("--match", {"match": "params"}),
        ("--reference-every", {"reference_every": 4}),
    ],
)
def test_flags_without_a_meaning_are_refused(flag: str, option: dict) -> None:
    with pytest.raises(UserError, match=f"{flag} means nothing"):
        plan([], Options(**option))


@pytest.mark.parametrize("rows, size", [(1, 4), (8, 4), (9, 4), (11, 4), (7, 1), (3, 5)])
def test_pairs_are_those_of_the_mask(rows: int, size: int) -> None:
    for summary, offset in (("first", 0), ("last", size - 1)):
        seen = chunk_mask(rows, size, offset, torch.device("cpu"))
        assert Shape(rows, 1, 1, size, summary).pairs == seen.sum()
    assert Shape(rows, 1, 1, rows, "last").pairs == rows * (rows + 1) // 2


@pytest.mark.parametrize("chunks, size", [(1, 4), (5, 4), (4, 1)])
def test_flex_layouts_are_the_mask_of_cat(chunks: int, size: int) -> None:
    num_tokens = chunks * size
    shape = Shape(num_tokens + 1, 1, 1, size, "first")
    seen, num_rows = flex_layout("flex_interleaved", shape)
    at = torch.arange(num_rows)
    published = torch.from_numpy(mask.published_allowed(num_tokens, size))
    assert torch.equal(seen(0, 0, at[:, None], at), published)
    seen, num_rows = flex_layout("flex_permuted", shape)
    at = torch.arange(num_rows)
    order = torch.cat([at[at % size == 0], at[at % size != 0]])  # slots, then tokens
    compact = torch.from_numpy(mask.allowed(num_rows, size))
    assert torch.equal(seen(0, 0, at[:, None], at), compact[order][:, order])


@pytest.mark.parametrize("arch", [CAT, "sparse:stride=4,width=64", "dense:width=64"])
def test_rows_of_a_case(arch: str) -> None:
    options = Options(seq_lens=(16,), batch_sizes=(2,), repeats=2)
    for case in plan([parse(arch)], options):
        model = build(parse(case.arch))
        rows = {record.metric: record for record in measure(case, model)}
        assert len(rows["forward_s"].samples) == len(rows["forward_backward_s"].samples) == 2
        pairs, heads = rows["attended_pairs"].value, 2 if arch == CAT else 1  # CAT: D_d = 2 D
        assert rows["forward_flops"].value == 4 * 64 * heads * 2 * pairs
        assert rows["forward_backward_flops"].value == 14 * 64 * heads * 2 * pairs
        rate = rows["forward_flops"].value / rows["forward_s"].value
        assert rows["forward_flops_per_s"].value == pytest.approx(rate)


def test_the_dry_run_names_implementations_not_models() -> None:
    cases = plan([], Options(device="cuda", seq_lens=(1024, 8192)))
    table = plan_table(cases, resolve(cases), 80e9).set_index(["attention of", "seq len tokens"])
    assert table.loc[("Dense-2D", "1024"), "implementations"] == "causal"
    of_cat = table.loc[("CAT-16", "8192"), "implementations"].split(", ")
    assert set(of_cat) == {"two_part", "fused", "flex_interleaved", "flex_permuted"}
    assert len(table) == 6 and "params M" not in table
    specs = [parse("dense"), parse("dense:width=512")]
    cases = plan(specs, Options(device="cuda", seq_lens=(1024,), seeds=(0, 1)))
    table = plan_table(cases, resolve(cases), 80e9)
    assert len(set(table["attention of"])) == len(table) == 2  # two attentions, two lines
    assert set(table["implementations"]) == {"causal"}


# --- the table and the exhibit --------------------------------------------------------------------

MADE_UP_MS = {"eager": 9.0, "two_part": 3.0, "fused": 1.5, "flex_interleaved": 6.0,
              "flex_permuted": 2.0}  # fmt: skip


def made_up(results: Path, cases: Sequence[Case], without: str = "") -> store.Run:
    """Forward + backward of 1 ms (Dense), 2 ms (Dense-2D) and MADE_UP_MS at length 1024, growing
    with the length; forward takes a quarter. `without`: an implementation that ran out of memory.
    """
    run = store.Run.create(results, "made-up", GPU, cases, resolve(list(cases)))
    for case in cases:
        name = dict(case.settings)["implementation"]
        ms = MADE_UP_MS.get(name, 2.0 if "width=2048" in case.arch or "128" in case.arch else 1.0)
        s = 1e-3 * ms * case.seq_len / 1024
        rows = [
            Record(case.key, "forward_s", s / 4, "s", [s / 4] * 5),
            Record(case.key, "forward_flops_per_s", 1e14, "FLOP/s"),
            Record(case.key, "forward_backward_s", s, "s", [s] * 5),
            Record(case.key, "forward_backward_flops_per_s", 2e14, "FLOP/s"),
            Record(case.key, "peak_allocated_bytes", s * 2**40, "bytes"),
        ]
        status = "oom" if name == without else "ok"
        end = Record(case.key, "case", 1.0, "s", status=status)
        run.append([*(rows if status == "ok" else []), end])
    return run


def test_show_names_implementations_heads_and_ratios_to_both_dense(tmp_path: Path) -> None:
    cases = plan([], Options(device="cuda", seq_lens=(1024, 4096)))
    run = made_up(tmp_path, cases, without="eager")
    made = tables.run_table(run)
    assert made.heading.endswith("bfloat16")  # no prompt, no decode path
    assert list(made.text["length"]) == ["1024"] * 7 + ["4096"] * 7
    text = made.text.set_index(["length", "architecture", "implementation"])
    fused = text.loc["4096", "CAT-16", "fused"]
    assert (fused["heads"], fused["batch"]) == ("32", "4")
    assert (fused["forward ms"], fused["TFLOP/s"]) == ("1.50", "100 / 200")
    assert fused["forward + backward ms [95 % CI]"] == "6.00 [6.00, 6.00]"
    assert fused["vs Dense"] == "1.50x slower [1.50, 1.50]"
    assert fused["vs Dense-2D"] == "1.33x faster [1.33, 1.33]"
    assert text.loc["1024", "Dense-2D", "causal"]["vs Dense"] == "2.00x slower [2.00, 2.00]"
    assert text.loc["1024", "Dense", "causal"]["heads"] == "16"
    assert text.loc["1024", "CAT-16", "eager"]["forward ms"] == "oom"
    best = made.best["forward + backward ms [95 % CI]"]
    assert set(made.text.loc[best, "implementation"]) == {"fused"}  # of CAT's; Dense has one each


def test_labels_keep_what_attention_depends_on(tmp_path: Path) -> None:
    specs = [parse("cat:chunk_size=16,num_kv_heads=4"), parse("dense:width=512")]
    run = made_up(tmp_path, plan(specs, Options(device="cuda", seq_lens=(1024,))))
    text = tables.run_table(run).text
    assert set(text["architecture"]) == {"CAT-16 (num_kv_heads=4)", "Dense (width=512)"}


def test_tiny_rows_go_by_their_roles(tmp_path: Path) -> None:
    run = made_up(tmp_path, plan([], Options(scale="smoke")))
    text = tables.run_table(run).text.set_index(["architecture", "implementation"])
    assert text.loc["Dense-2D", "causal"]["heads"] == "2"
    assert text.loc["CAT-16", "two_part"]["vs Dense-2D"] == "1.50x slower [1.50, 1.50]"


def test_two_runs_can_be_compared(tmp_path: Path) -> None:
    cases = plan([parse("cat")], Options(device="cuda", seq_lens=(1024,)))
    made = compare.compare_table(*(made_up(tmp_path, cases) for _ in range(2)))
    assert set(made.text["mark"]) == {"~"} and "CAT-8 fused" in set(made.text["architecture"])


def test_the_exhibit_plans_the_suites_own_cases() -> None:
    cases = plan([], Options(device="cuda", scale="h100"))
    assert {case.key for case in exhibit.plan("h100")} == {case.key for case in cases}
    assert exhibit.TOKENS == attention.TOKENS["cuda"] and len(exhibit.plan("smoke")) == 3
    assert {parse(name).name for name in exhibit.IMPLEMENTATIONS} <= set(attention.IMPLEMENTATIONS)
    assert "attention" in [name for name, _ in spec.exhibits()]


def test_the_exhibit_draws_a_line_per_implementation(tmp_path: Path) -> None:
    cases = exhibit.plan("h100")
    made_up(tmp_path, cases, without="eager")
    built = _build.build(["attention"], "h100", tmp_path)
    assert built.statuses[0].status == "done"
    records = _build.find(_build.all_records(tmp_path)[0], cases).records
    content = exhibit.render(records, (), "h100")
    lines = {"Dense", "Dense-2D", *MADE_UP_MS} - {"eager"}
    for axes in content.figure.axes:
        assert {text.get_text() for text in axes.texts} == lines
        assert axes.get_xscale() == "log"
    assert content.figure.axes[0].get_yscale() == "log"
    (table,) = content.tables
    assert len(table.text) == len(cases) and "1.33x faster [1.33, 1.33]" in set(
        table.text["vs Dense-2D"]
    )
    longest = content.plotted[content.plotted["seq_len"] == 65_536]
    fused = longest[longest["implementation"] == "fused"].iloc[0]
    assert fused["time_s"] == pytest.approx(fused["latency_s"] / 4)  # a call of 65,536 tokens


def test_the_exhibit_of_a_failed_run_renders(tmp_path: Path) -> None:
    cases = exhibit.plan("smoke")
    run = store.Run.create(tmp_path, "failed", GPU, cases, resolve(cases))
    for case in cases:
        run.append([Record(case.key, "case", 1.0, "s", status="failed", error="no")])
    _build.build(["attention"], "smoke", tmp_path)
    records = _build.find(_build.all_records(tmp_path)[0], cases).records
    (table,) = exhibit.render(records, (), "smoke").tables
    assert any("CAT-16 two_part" in note for note in table.notes)
