"""The efficiency suite: a pure and orderly plan, every row of a case, rows kept on OOM."""

import itertools
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cat_bench.architecture import build
from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.predict import resolve
from cat_bench.profiler import Call, StepTime, Timing
from cat_bench.spec import parse
from cat_bench.suites import efficiency, load, training
from cat_bench.suites.efficiency import measure, plan

DENSE = "dense:num_layers=1,vocab_size=96,width=64"
CAT = "cat:chunk_size=4,max_len=64,num_layers=1,vocab_size=96,width=64"


# --- plan -----------------------------------------------------------------------------------------


def test_the_plan_is_the_product_and_the_same_every_time() -> None:
    specs = [parse("dense"), parse("cat-8")]
    options = Options(batch_sizes=(1, 2), seq_lens=(64, 128), seeds=(0, 1))
    cases = plan(specs, options)
    assert cases == plan(specs, options)
    shapes = {(c.arch, c.batch_size, c.seq_len, c.seed) for c in cases}
    assert len(cases) == len(shapes) == 16
    assert [c.batch_size for c in cases] != sorted(c.batch_size for c in cases)  # shuffled
    cells = itertools.groupby(cases, lambda c: (c.batch_size, c.seq_len))
    cells = [(shape, [c.arch for c in cell]) for shape, cell in cells]
    assert len(cells) == len({shape for shape, _ in cells})  # what is compared stands together
    assert all(archs[:2] == ["dense", "dense"] for _, archs in cells)  # an interruption leaves it
    assert {c.prompt_len for c in cases} == {8}


def test_defaults_follow_the_device() -> None:
    on_cpu = plan([parse("dense")], Options())
    assert sorted((c.batch_size, c.seq_len) for c in on_cpu) == [(1, 64), (4, 64)]
    assert {(c.dtype, c.decode_path, c.settings) for c in on_cpu} == {("float32", "eager", ())}
    on_cuda = plan([parse("dense")], Options(device="cuda"))
    assert {(c.dtype, c.decode_path) for c in on_cuda} == {("bfloat16", "cuda_graph")}


def test_a_case_is_planned_once() -> None:
    assert len(plan([parse("dense"), parse("dense")], Options(batch_sizes=(2, 2)))) == 1


def test_reference_cases_come_first_last_and_in_between() -> None:
    options = Options(batch_sizes=(1, 2, 3, 4), prompt_lens=(16,), reference_every=2, repeats=5)
    cases = plan([parse("cat-8")], options)
    numbers = [dict(case.settings).get("reference") for case in cases]
    assert numbers == ["0", None, None, "1", None, None, "2"]
    first = cases[0]
    assert (first.arch, first.batch_size, first.seq_len, first.prompt_len) == ("dense", 16, 1024, 8)
    assert first.settings == (("reference", "0"), ("repeats", "5"))
    assert len({case.key for case in cases}) == len(cases)


def test_prompt_lengths_are_a_list_too() -> None:
    options = Options(prompt_lens=(8, 32), seq_lens=(64, 128), batch_sizes=(1,))
    shapes = {(c.prompt_len, c.seq_len) for c in plan([parse("dense")], options)}
    assert shapes == {(8, 64), (8, 128), (32, 64), (32, 128)}
    options = Options(prompt_lens=(1024, 4096), new_tokens=1, batch_sizes=(1,))
    cases = plan([parse("dense")], options)
    assert {(c.prompt_len, c.seq_len, c.new_tokens) for c in cases} == {
        (1024, 1025, 1),
        (4096, 4097, 1),
    }


def test_the_forward_path_is_eager() -> None:
    """Nothing is trained, and references of all runs are comparable."""
    assert {c.forward_path for c in plan([parse("dense")], Options(device="cuda"))} == {"eager"}
    options = Options(device="cuda", forward_path="eager", reference_every=1)
    assert {c.forward_path for c in training.plan([parse("dense")], options)} == {"eager"}
    options = replace(options, forward_path="compile")
    references = [c for c in training.plan([parse("dense")], options) if c.suite == "efficiency"]
    assert {c.forward_path for c in references} == {"eager"} and references


def test_hints_show_sensible_numbers() -> None:
    for options, hint in (
        (Options(repeats=0), "Example: --repeats 10"),
        (Options(reference_every=0), "Example: --reference-every 20"),
        (Options(seq_lens=(0,)), "Example: --seq-len 1024"),
    ):
        with pytest.raises(UserError) as error:
            plan([parse("dense")], options)
        assert error.value.hint == hint


@pytest.mark.parametrize(
    "options, said",
    [
        (Options(batch_sizes=(4, -1)), "--batch-size -1 is impossible"),
        (Options(seq_lens=(0,)), "--seq-len 0 is impossible"),
        (Options(prompt_lens=(0,)), "--prompt-len 0 is impossible"),
        (
            Options(prompt_lens=(64,), seq_lens=(128, 64)),
            "leaves nothing to generate in --seq-len 64",
        ),
        (Options(repeats=0), "--repeats 0 is impossible"),
        (Options(reference_every=-2), "--reference-every -2 is impossible"),
        (Options(dtype="float16"), "--dtype 'float16' is unknown"),
        (Options(device="tpu"), "--device 'tpu' is unknown"),
        (Options(seeds=(-1,)), "--seed -1"),
        (Options(batch_sizes=()), "--batch-size is empty"),
        (Options(prompt_lens=()), "--prompt-len is empty"),
        (Options(prompt_lens=(8, 64)), "--prompt-len 64 leaves nothing to generate"),
        (Options(new_tokens=0), "--new-tokens 0 is impossible"),
        (Options(new_tokens=1, seq_lens=(64,)), "--seq-len and --new-tokens both"),
        (Options(activation_checkpointing=True), "--activation-checkpointing changes training"),
        (Options(step_path="eager"), "--step-path says how a training step is launched"),
        (Options(forward_path="eager"), "--forward-path says how training's forward pass"),
        (Options(implementations=("fused",)), "--implementation says how attention alone"),
    ],
)
def test_bad_options_get_a_sentence(options: Options, said: str) -> None:
    with pytest.raises(UserError) as error:
        plan([parse("dense")], options)
    assert said in error.value.message and error.value.hint


def test_no_architecture_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="no architecture"):
        plan([], Options())


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from cat_bench.suites import load; from cat_bench.case import Options;"
        "from cat_bench.spec import parse;"
        "assert load('efficiency').plan([parse('dense')], Options());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_suites_are_found_by_name() -> None:
    assert load("efficiency") is efficiency
    with pytest.raises(UserError, match="Did you mean: efficiency"):
        load("efficency")


# --- measure --------------------------------------------------------------------------------------


def tiny_case(arch: str, **changes) -> Case:
    fields = {"batch_size": 2, "prompt_len": 5, "seq_len": 29, "scale": "smoke"} | changes
    return Case("efficiency", arch, dtype="float32", device="cpu", **fields)


def measured(case: Case) -> dict[str, Record]:
    records = list(measure(case, build(parse(case.arch), dtype=case.dtype)))
    by_metric = {record.metric: record for record in records}
    assert len(by_metric) == len(records), "a metric came twice"
    assert {record.case for record in records} == {case.key}
    return by_metric


def test_a_case_has_every_row_of_the_specification() -> None:
    rows = measured(tiny_case(DENSE))
    flags = {"clock_difference", "step_sum_difference"}  # only where the clocks disagree
    assert set(rows) - flags == {
        *("num_params", "num_params_non_embedding", "weights_bytes", "step_flops"),
        *("state_bytes", "state_float_bytes", "state_live_bytes", "peak_rss_bytes"),
        *("compile_s", "first_call_s", "latency_s", "host_latency_s", "decode_s", "ttft_s"),
        *("tokens_per_s", "tokens_per_s_user", "tpot_s", "step_s"),
        *("read_bandwidth_bytes_per_s", "matmul_flops_per_s", "floor_s", "latency_floor_ratio"),
    }


def test_rates_follow_their_formulas() -> None:
    rows = measured(tiny_case(DENSE))  # 2 sequences, 24 new tokens each
    decode_s = rows["decode_s"].samples
    assert rows["tokens_per_s"].samples == pytest.approx([2 * 24 / s for s in decode_s])
    assert rows["tokens_per_s_user"].samples == pytest.approx([24 / s for s in decode_s])
    assert rows["tpot_s"].samples == pytest.approx([s / 23 for s in decode_s])
    latency_s = rows["latency_s"]
    assert len(latency_s.samples) == 3  # smoke
    assert latency_s.value == statistics.median(latency_s.samples)
    for whole_s, part_s in zip(latency_s.samples, decode_s, strict=True):
        assert whole_s > part_s > 0
    assert 0 < rows["ttft_s"].value < latency_s.value
    ratio = rows["floor_s"].value / latency_s.value
    assert rows["latency_floor_ratio"].value == pytest.approx(ratio)
    assert 0 < ratio < 1


def test_steps_of_cat_are_kept_by_class() -> None:
    rows = measured(tiny_case(CAT))  # steps read tokens 6 to 28; 8, 12, ..., 28 close a chunk
    assert len(rows["step_s"].samples) == 23
    assert len(rows["step_boundary_s"].samples) == 6
    assert len(rows["step_inner_s"].samples) == 17


@pytest.mark.parametrize(("share", "told"), [(0.98, False), (0.96, True), (1.04, True)])
def test_instrumented_steps_that_add_up_to_another_time_are_told(share: float, told: bool) -> None:
    """Sums of 3 steps against the 100 s of a decode: told beyond 3 %."""
    steps = [StepTime("step", n, share * seconds) for n, seconds in enumerate((20, 30, 50))]
    timing = Timing([], [Call(101.0, 101.0, 100.0, None)])
    rows = {row.metric: row for row in efficiency._step_rows(tiny_case(DENSE), steps, timing)}
    assert ("step_sum_difference" in rows) == told
    if told:
        assert rows["step_sum_difference"].value == pytest.approx(share - 1)


@pytest.mark.parametrize("arch", [DENSE, CAT])
def test_the_dry_run_predicts_the_measured_sizes(arch: str) -> None:
    case = tiny_case(arch)
    predicted, rows = resolve([case])[case.key], measured(case)
    for metric in ("num_params", "num_params_non_embedding", "weights_bytes", "state_bytes"):
        assert rows[metric].value == predicted[metric]
    assert rows["state_live_bytes"].value == predicted["state_bytes"]


def test_repeats_can_be_asked_for() -> None:
    rows = measured(tiny_case(DENSE, settings=(("repeats", "2"),)))
    assert len(rows["latency_s"].samples) == len(rows["ttft_s"].samples) == 2


def test_one_new_token_has_no_decode_rows() -> None:
    rows = measured(tiny_case(DENSE, seq_len=6))
    assert rows["ttft_s"].samples == rows["latency_s"].samples  # the same thing, timed once
    assert not {"decode_s", "tokens_per_s", "tpot_s", "step_s"} & set(rows)
    assert 0 < rows["latency_floor_ratio"].value < 1  # the floor of its prompt


def test_two_new_tokens_have_one_step_and_no_rate() -> None:
    rows = measured(tiny_case(CAT, seq_len=7))
    assert len(rows["step_s"].samples) == 1
    assert rows["tpot_s"].samples == rows["decode_s"].samples
    assert not {"tokens_per_s", "tokens_per_s_user"} & set(rows)  # half of them were no step


def test_out_of_memory_keeps_the_rows_so_far_and_the_counters() -> None:
    case = tiny_case(DENSE)
    model = build(parse(DENSE))

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.step = step
    kept = []
    with pytest.raises(torch.OutOfMemoryError):
        for record in measure(case, model):
            kept.append(record.metric)
    assert {"num_params", "state_bytes", "compile_s"} <= set(kept)
    assert kept[-1] == "peak_rss_bytes"
    assert "latency_s" not in kept


@pytest.mark.parametrize("method", ["prefill", "step"])
def test_logits_of_another_shape_fail_the_case_before_anything_is_timed(method: str) -> None:
    case, model = tiny_case(DENSE), build(parse(DENSE))
    right = getattr(model, method)

    def of_all_tokens(tokens: torch.Tensor, state: object) -> tuple:
        logits, state = right(tokens, state)
        return logits[:, None].expand(-1, 5, -1), state

    setattr(model, method, of_all_tokens)
    kept = []
    with pytest.raises(ValueError, match=r"returned logits of shape \(2, 5, 96\), exp"):
        for record in measure(case, model):
            kept.append(record.metric)
    assert "latency_s" not in kept
    if method == "step":  # one new token needs no step
        measured_alone = list(measure(replace(case, seq_len=6), model))
        assert "ttft_s" in {record.metric for record in measured_alone}
