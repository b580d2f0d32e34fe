"""The training suite: its plan, every row of a step, the table and the exhibit made of them."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clipping import check_clipping
from torch import nn

from cat_bench import compare, measurements, predict, spec, store, tables, train_graph
from cat_bench.architecture import build, generation_flops
from cat_bench.case import Case, Options, Record
from cat_bench.errors import UserError
from cat_bench.paper import _build
from cat_bench.paper import training as exhibit
from cat_bench.spec import parse
from cat_bench.suites import training
from cat_bench.suites.training import measure, plan

DENSE = "dense:num_layers=1,vocab_size=96,width=64"
CAT = "cat:chunk_size=4,max_len=64,num_layers=1,vocab_size=96,width=64"
GPU = {"gpu_name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0",
       "command": "cat-bench run training", "cpu_name": "A CPU", "cpu_cores": 2}  # fmt: skip


# --- plan -----------------------------------------------------------------------------------------


def test_defaults_follow_the_device() -> None:
    (on_cpu,) = plan([parse("dense")], Options())
    assert (on_cpu.batch_size, on_cpu.seq_len, on_cpu.prompt_len) == (2, 64, 0)
    assert (on_cpu.dtype, on_cpu.forward_path, on_cpu.settings) == ("float32", "eager", ())
    on_cuda = plan([parse("dense")], Options(device="cuda"))
    assert {(c.batch_size, c.seq_len) for c in on_cuda} == {(16, 1024), (4, 4096)}
    assert {(c.dtype, c.decode_path, c.forward_path, c.settings) for c in on_cuda} == {
        ("float32", "eager", "compile", (("autocast", "bfloat16"), ("step", "cuda_graph")))
    }


@pytest.mark.parametrize(
    ("arch", "asked", "step"),
    [
        ("dense", {}, "cuda_graph"),
        ("mamba2", {}, "cuda_graph"),
        ("dense", {"forward_path": "eager"}, None),  # the specification
        ("dense", {"forward_path": "eager", "step_path": "cuda_graph"}, "cuda_graph"),
        ("mamba2", {"step_path": "eager"}, None),
        ("dense", {"device": "cpu"}, None),
        ("dense", {"device": "cpu", "step_path": "eager"}, None),
    ],
)
def test_a_step_is_captured_where_its_layers_are_fast(arch: str, asked: dict, step: str) -> None:
    """A case without the setting is the case of the runs before it."""
    options = Options(**{"device": "cuda", "seq_lens": (64,), **asked})
    (case,) = plan([parse(arch)], options)
    assert dict(case.settings).get("step") == step


def test_the_plan_is_the_product_and_the_same_every_time() -> None:
    options = Options(batch_sizes=(1, 2), seq_lens=(64, 128), seeds=(0, 1), repeats=5)
    cases = plan([parse("dense"), parse("cat-8")], options)
    assert cases == plan([parse("dense"), parse("cat-8")], options)
    assert len({c.key for c in cases}) == len(cases) == 16
    assert {c.settings for c in cases} == {(("repeats", "5"),)}
    assert [c.batch_size for c in cases] != sorted(c.batch_size for c in cases)  # shuffled


def test_references_watch_the_drift() -> None:
    cases = plan([parse("dense")], Options(device="cuda", reference_every=2, repeats=5))
    assert [c.suite for c in cases] == ["efficiency", "training", "training", "efficiency"]


def test_our_own_lengths_are_too_long_for_nobody() -> None:
    archs = {c.arch for c in plan([parse("cat-16")], Options(device="cuda"))}
    assert archs == {"cat:chunk_size=16,max_len=4096"}
    given = plan([parse("cat-16:max_len=2048")], Options(device="cuda"))
    assert {c.arch for c in given} == {"cat:chunk_size=16,max_len=2048"}
    asked = plan([parse("cat-16")], Options(device="cuda", seq_lens=(4096,)))
    with pytest.raises(UserError, match="needs 256 chunk positions") as error:
        predict.resolve(asked)
    assert error.value.hint.endswith("or at most 1024 tokens: --seq-len.")


def test_the_forward_path_is_the_first_that_the_source_names(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Config:\n    width: int = 64\n\n"
        "class Model:\n    forward_paths = ('eager', 'strange', 'upstream')\n"
    )
    assert training.default_forward_path(str(mine), "cuda") == "upstream"
    assert training.default_forward_path(str(mine), "cpu") == "eager"
    assert training.default_forward_path("dense", "cuda") == "compile"
    (asked,) = plan([parse("dense")], Options(forward_path="compile"))
    assert asked.forward_path == "compile"


@pytest.mark.parametrize(
    "options, said",
    [
        (Options(prompt_lens=(8,)), "--prompt-len means nothing"),
        (Options(new_tokens=1), "--new-tokens means nothing"),
        (Options(decode_path="eager"), "--decode-path means nothing"),
        (Options(implementations=("fused",)), "--implementation means nothing"),
        (Options(step_path="graph"), "--step-path 'graph' is unknown"),
        (Options(step_path="cuda_graph"), "--step-path cuda_graph needs a CUDA GPU, got"),
        (Options(match="latency"), "--match latency matches decoding"),
        (Options(match="state"), "--match state matches decoding"),
        (Options(batch_sizes=(0,)), "--batch-size 0 is impossible"),
        (Options(seq_lens=(-4,)), "--seq-len -4 is impossible"),
        (Options(repeats=0), "--repeats 0 is impossible"),
        (Options(dtype="int8"), "--dtype 'int8' is unknown"),
    ],
)
def test_bad_options_get_a_sentence(options: Options, said: str) -> None:
    with pytest.raises(UserError) as error:
        plan([parse("dense")], options)
    assert said in error.value.message and error.value.hint


@pytest.mark.parametrize(
    ("arch", "path"),
    [
        *((name, "compile") for name in ("cat:chunk_size=16", "sparse", "sliding_window")),
        *((name, "upstream") for name in ("based", "mamba2", "gated_deltanet")),
    ],
)
def test_float64_on_kernels_that_compute_in_float32_is_refused_by_the_plan(
    arch: str, path: str
) -> None:
    """Also where nobody typed the path: on a GPU a training case takes the fast one by itself."""
    options = Options(device="cuda", seq_lens=(1024,), dtype="float64")
    with pytest.raises(UserError, match=f"path '{path}' of {arch} computes in float32") as refused:
        predict.resolve(plan([parse(arch)], options))
    assert refused.value.hint == "Use --forward-path eager, or --dtype float32."
    for change in ({"forward_path": "eager"}, {"dtype": "float32"}):
        predict.resolve(plan([parse(arch)], replace(options, **change)))


def test_a_compiled_path_without_such_kernels_takes_float64() -> None:
    (case,) = plan([parse("dense")], Options(device="cuda", seq_lens=(1024,), dtype="float64"))
    assert (case.forward_path, case.dtype) == ("compile", "float64")
    predict.resolve([case])


def test_loss_and_update_follow_device_path_and_dtype() -> None:
    fast = replace(tiny_case(DENSE), device="cuda", forward_path="compile")
    assert training.implementation(fast) == "triton"  # float32 weights
    for change in ({"device": "cpu"}, {"forward_path": "eager"}, {"dtype": "float64"}):
        assert training.implementation(replace(fast, **change)) == "eager"


def test_the_plan_predicts_gradients_and_moments_not_a_state() -> None:
    cases = plan([parse("dense")], Options(device="cuda"))
    rows = predict.resolve(cases, "NVIDIA H200")
    for case in cases:
        row, model = rows[case.key], build(parse("dense"), device="meta")
        assert row["weights_bytes"] == 4 * model.num_params and row["state_bytes"] == 0
        assert row["training_bytes"] == 3 * row["weights_bytes"]
        flops = 3 * generation_flops(model, case.batch_size, case.seq_len)
        assert row["floor_s"] == pytest.approx(flops / 790e12)
    table = predict.plan_table(cases, rows, 141e9)
    assert set(table["gradients + Adam GiB"]) == {"2.88"}


# --- measure --------------------------------------------------------------------------------------


def tiny_case(arch: str, **changes: object) -> Case:
    fields = {"batch_size": 2, "seq_len": 24, "scale": "smoke"} | changes
    return Case("training", arch, prompt_len=0, dtype="float32", device="cpu", **fields)


def measured(case: Case, model: nn.Module | None = None) -> dict[str, Record]:
    model = model or build(parse(case.arch), dtype=case.dtype)
    return {record.metric: record for record in measure(case, model)}


@pytest.mark.parametrize("arch", [DENSE, CAT])
def test_every_row_of_a_step(arch: str) -> None:
    rows = measured(tiny_case(arch))
    assert set(rows) == {
        *("num_params", "num_params_non_embedding", "weights_bytes", "chunked_loss"),
        *("matmul_flops_per_s", "compile_s", "train_step_s", "host_latency_s", "tokens_per_s"),
        *("peak_rss_bytes", "forward_s", "backward_s", "optimizer_s"),
        *("gradients_bytes", "optimizer_bytes", "loss", "train_flops", "matmul_flops_ratio"),
    }
    step_s = rows["train_step_s"]
    assert len(step_s.samples) == len(rows["forward_s"].samples) == 3  # smoke
    assert rows["tokens_per_s"].samples == pytest.approx([2 * 24 / s for s in step_s.samples])
    assert rows["chunked_loss"].value == 1
    weights = rows["weights_bytes"].value
    assert rows["gradients_bytes"].value == weights
    assert 2 * weights <= rows["optimizer_bytes"].value < 2.01 * weights  # and step counters
    flops = 3 * generation_flops(build(parse(arch)), 2, 24)
    assert rows["train_flops"].value == flops
    rate = flops / statistics.median(step_s.samples)
    ratio = rate / rows["matmul_flops_per_s"].value
    assert rows["matmul_flops_ratio"].value == pytest.approx(ratio)


@pytest.mark.parametrize("arch", [DENSE, CAT])
def test_steps_learn_the_batch(arch: str) -> None:
    step = training.Step(tiny_case(arch), build(parse(arch)))
    losses = []
    for _ in range(12):
        step()
        losses.append(float(step.loss))
    assert losses[0] == pytest.approx(math.log(96), rel=0.15)  # random: as likely as any other
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_inside_the_optimizer_is_clip_grad_norm(factor: float, dtype: str) -> None:
    check_clipping(replace(tiny_case(DENSE), dtype=dtype), factor)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_treats_infinities_as_clip_grad_norm_does(bad: float) -> None:
    """An infinite norm makes every finite gradient 0 and every other one nan; nan, all of them."""
    step = training.Step(tiny_case(DENSE), build(parse(DENSE)))
    known = build(parse(DENSE))
    known.load_state_dict(step.model.state_dict())
    optimizer = torch.optim.AdamW(
        known.parameters(), training.LEARNING_RATE, training.BETAS,
        weight_decay=training.WEIGHT_DECAY, fused=True,
    )  # fmt: skip
    pairs = list(zip(step.model.parameters(), known.parameters(), strict=True))
    for ours, theirs in pairs:
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        ours.grad.view(-1)[3] = theirs.grad.view(-1)[3] = bad
    step._update()
    torch.nn.utils.clip_grad_norm_(known.parameters(), training.CLIP)
    optimizer.step()
    for ours, theirs in pairs:
        assert ours.isnan().sum() == (ours.numel() if math.isnan(bad) else 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_all_architectures_get_the_same_tokens() -> None:
    one, other = (training.random_tokens(tiny_case(arch), 96) for arch in (DENSE, CAT))
    assert torch.equal(one, other) and one.shape == (2, 25) and len(one.unique()) > 30


def test_bfloat16_is_autocast_over_float32_weights() -> None:
    (case,) = plan([parse(DENSE)], Options(dtype="bfloat16", seq_lens=(24,)))
    assert (case.dtype, training.autocast_of(case)) == ("float32", "bfloat16")
    model = build(parse(DENSE))
    seen = []
    model.blocks[0].w2.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    training.Step(case, model)()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Plain(nn.Module):
    """A user's model: `forward` and no `hidden`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.config, self.step_costs = inner, inner.config, inner.step_costs
        self.num_params = self.num_params_non_embedding = 1
        self.forward = inner.forward


def test_a_model_without_hidden_trains_on_its_logits() -> None:
    case = tiny_case(DENSE)
    rows, known = measured(case, Plain(build(parse(DENSE)))), measured(case)
    assert rows["chunked_loss"].value == 0
    assert rows["loss"].value == pytest.approx(known["loss"].value, rel=1e-4)


def test_activation_checkpointing_is_the_architectures_to_offer() -> None:
    (case,) = plan([parse(DENSE)], Options(activation_checkpointing=True, seq_lens=(24,)))
    case = replace(case, scale="smoke")
    assert ("checkpoint", "true") in case.settings
    with pytest.raises(UserError, match="offers no activation checkpointing"):
        measured(case, Plain(build(parse(DENSE))))
    deaf = Plain(build(parse(DENSE)))
    deaf.checkpoint_blocks = False  # nothing reads it
    with pytest.raises(UserError, match="ignores activation checkpointing"):
        measured(case, deaf)
    model = build(parse(DENSE))
    measured(case, model)
    assert model.checkpoint_blocks is True and model.num_checkpointed > 0


class Recorded:
    """In place of a CUDA graph: replaying it runs the part."""

    def __init__(self, part, before=lambda: None):
        self.part, self.before = part, before

    def replay(self) -> None:
        self.before()
        self.part()


def test_a_captured_step_has_the_rows_of_a_launched_one_and_goes_on_training(monkeypatch) -> None:
    """Without a GPU, on recorded parts: what is called when, not what a graph does."""
    model, known = build(parse(DENSE)), build(parse(DENSE))
    known.load_state_dict(model.state_dict())
    calls = []

    def captured(step, parts) -> list[Recorded]:
        calls.append([*parts])
        for _ in range(train_graph.WARMUPS):
            step()
        assert all(p.grad is None for p in model.parameters())
        forward, backward, update = parts.values()
        # a graph does not add to gradients, but writes them anew
        return [Recorded(forward), Recorded(backward, model.zero_grad), Recorded(update)]

    monkeypatch.setattr(train_graph, "captured", captured)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [])
    launched = measured(tiny_case(DENSE))
    case = tiny_case(DENSE, settings=(("step", "cuda_graph"),))
    rows = measured(case, model)
    assert calls == [[*training.PARTS]]
    assert set(rows) == set(launched) | {"capture_s", "graph_pool_bytes"}
    for name in ("gradients_bytes", "optimizer_bytes"):
        assert rows[name].value == launched[name].value
    # from Python 1 + 1, on the way 3, replayed 1 + 3, by parts 3, with gradients 1
    step, losses = training.Step(tiny_case(DENSE), known), []
    for _ in range(13):
        step()
        losses.append(float(step.loss))
    assert rows["loss"].value == pytest.approx(losses[-1], rel=1e-5) != losses[-2]


def broken(*messages: str) -> RuntimeError:
    """Errors that were raised one while the other was handled; the last one is what is seen."""
    error = None
    for message in messages:
        error, before = RuntimeError(message), error
        error.__context__ = before
    return error


BROKEN_END = "operation failed due to a previous error during capture"


def test_a_part_that_cannot_be_captured_is_one_sentence() -> None:
    first = "CUDA error: operation not permitted when stream is capturing\nSearch for it"
    refused = train_graph.explained(broken(first, BROKEN_END), "backward")
    assert isinstance(refused, UserError) and refused.message == (
        "the backward part of this training step cannot be captured as a CUDA graph: "
        "CUDA error: operation not permitted when stream is capturing"
    )
    assert "--step-path eager" in refused.hint


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory"]
)
def test_lack_of_memory_in_a_capture_is_no_refusal(message: str) -> None:
    short = train_graph.explained(broken(message, BROKEN_END), "forward")
    assert isinstance(short, torch.OutOfMemoryError)
    assert message in str(short) and "--step-path eager may fit" in str(short)


def test_other_errors_of_a_capture_stay_what_they_are() -> None:
    error = broken("Triton Error: an illegal memory access", BROKEN_END)
    assert train_graph.explained(error, "forward") is error.__context__


def test_a_loss_that_is_no_number_fails_the_case() -> None:
    model = build(parse(DENSE))
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        measured(tiny_case(DENSE), model)


@pytest.mark.parametrize(
    "lack",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")],
)
def test_out_of_memory_keeps_the_rows_so_far_and_the_counters(lack: RuntimeError) -> None:
    model = build(parse(DENSE))

    def hidden(*_: object) -> None:
        raise lack

    model.hidden = hidden
    kept = []
    with pytest.raises(type(lack)):
        for record in measure(tiny_case(DENSE), model):
            kept.append(record.metric)
    assert {"num_params", "matmul_flops_per_s"} <= set(kept)
    assert kept[-1] == "peak_rss_bytes" and "train_step_s" not in kept


def test_mfu_needs_a_known_gpu() -> None:
    assert predict.datasheet_flops_per_s("NVIDIA H200") == 989.4e12
    assert predict.datasheet_flops_per_s("NVIDIA H100 80GB HBM3") == 989.4e12
    assert predict.datasheet_flops_per_s("NVIDIA H100 PCIe") is None  # a slower card
    assert predict.datasheet_flops_per_s("") is None


# --- tables ---------------------------------------------------------------------------------------


def made_up(
    results: Path,
    cases: list[Case],
    factor: float = 1.0,
    cat_parts: float = 1.0,
    launch_share: float = 0.5,
    chunked_loss: float = 1.0,
) -> store.Run:
    """A run in which CAT takes 3 s a step, Dense-2D 2 s and Dense 1 s, times `factor`.

    `cat_parts`: what the parts of CAT's step sum to, over the step; the others' to 0.96 of theirs.
    """
    labels = {"cat": "CAT-8", "dense:width=2048": "Dense-2D", "dense": "Dense"}
    known = {c.key: labels.get(c.arch, labels[c.arch.split(":")[0]]) for c in cases}
    seconds = {"CAT-8": 3 * factor, "Dense-2D": 2 * factor, "Dense": factor}
    resolved = {key: {"label": label, "config": {}} for key, label in known.items()}
    run = store.Run.create(results, "made-up", GPU, cases, resolved)
    for case in cases:
        s = seconds[known[case.key]]
        parts_s = s * (cat_parts if case.arch.startswith("cat") else 0.96)
        rows = [
            Record(case.key, "train_step_s", s, "s", [s] * 5),
            Record(case.key, "tokens_per_s", 16_384 / s, "tokens/s", [16_384 / s] * 5),
            Record(case.key, "peak_allocated_bytes", s * 2**30, "bytes"),
            Record(case.key, "peak_reserved_bytes", s * 2**31, "bytes"),
            Record(case.key, "train_flops", s * 1e12, "FLOP"),
            Record(case.key, "mfu", 0.5, "1"),
            Record(case.key, "forward_s", 0.4 * parts_s, "s"),
            Record(case.key, "backward_s", 0.5 * parts_s, "s"),
            Record(case.key, "optimizer_s", 0.1 * parts_s, "s"),
            Record(case.key, "launch_s", launch_share * s, "s"),
            Record(case.key, "chunked_loss", chunked_loss, "1"),
        ]
        run.append([*rows, Record(case.key, "case", 1.0, "s")])
    return run


def three_cases() -> list[Case]:
    specs = [parse(name) for name in ("cat-8", "dense", "dense-2d")]
    return plan(specs, Options(device="cuda", seq_lens=(1024,), forward_path="eager"))


def test_the_table_of_a_run_has_ratios_and_the_forward_path(tmp_path: Path) -> None:
    made = tables.run_table(made_up(tmp_path, three_cases()))
    assert "forward eager" in made.heading and "autocast bfloat16" in made.heading
    assert "prompt" not in made.heading
    text = made.text.set_index("architecture")
    assert text.loc["CAT-8", "vs Dense"] == "3.00x slower [3.00, 3.00]"
    assert text.loc["CAT-8", "vs Dense-2D"] == "1.50x slower [1.50, 1.50]"
    assert text.loc["Dense", "MFU"] == "50 %"
    assert tables.details_table(measurements.frame([made_up(tmp_path, three_cases())])) is None


@pytest.mark.parametrize("share", [0.94, 1.06])
def test_parts_that_do_not_sum_to_the_step_are_said(tmp_path: Path, share: float) -> None:
    run = made_up(tmp_path, three_cases(), cat_parts=share)
    said = [note for note in tables.run_table(run).notes if "disturbance" in note]
    assert said == [
        "warning: CAT-8, batch 16, length 1024: measured under disturbance: parts sum to "
        f"{3000 * share:,.0f} of 3,000 ms."
    ]


def test_a_step_that_waits_for_its_launches_is_said(tmp_path: Path) -> None:
    (dense,) = plan([parse("dense")], Options(device="cuda", seq_lens=(1024,)))
    for share, expected in ((0.9, []), (0.99, ["launching its kernels takes 990 of 1,000 ms"])):
        notes = tables.run_table(made_up(tmp_path, [dense], launch_share=share)).notes
        said = [note for note in notes if "bound by the host" in note]
        assert len(said) == len(expected) and all(text in said[0] for text in expected)


def test_logits_that_exist_in_full_are_said(tmp_path: Path) -> None:
    (dense,) = plan([parse("dense")], Options(device="cuda", seq_lens=(1024,)))
    for chunked, expected in ((1.0, 0), (0.0, 1)):
        notes = tables.run_table(made_up(tmp_path, [dense], chunked_loss=chunked)).notes
        said = [note for note in notes if note.startswith("Dense: its logits exist in full")]
        assert len(said) == expected


def test_the_exhibit_says_so_too(tmp_path: Path) -> None:
    cases = [case for case in exhibit.plan("h100") if case.arch == "dense"]
    records = measurements.frame([made_up(tmp_path, cases, chunked_loss=0.0)])
    (table,) = exhibit.render(_build.find(records, cases).records, [], "h100").tables
    assert any(note.startswith("Dense: its logits exist in full") for note in table.notes)


def test_a_drift_reference_adds_no_table_of_steps(tmp_path: Path) -> None:
    cases = three_cases()
    run = made_up(tmp_path, cases)
    (reference, *_) = plan([parse("dense")], Options(device="cuda", reference_every=1))
    run.extend_plan([reference], {reference.key: {"label": "Dense", "config": {}}})
    steps = Record(reference.key, "step_s", 0.1, "s", [0.1] * 9)
    latency = Record(reference.key, "latency_s", 1.0, "s", [1.0] * 5)
    run.append([steps, latency, Record(reference.key, "case", 1.0, "s")])
    assert tables.details_table(measurements.frame([run])) is None
    assert len(tables.run_table(run).text) == 3
    assert len(tables.full_table(measurements.frame([run])).text) == 3


def test_a_slower_step_is_a_regression(tmp_path: Path) -> None:
    runs = [made_up(tmp_path, three_cases(), factor) for factor in (1.0, 1.2)]
    assert compare.compare_table(*runs).num_worse == 3


def test_other_autocast_is_no_reference(tmp_path: Path) -> None:
    cases = three_cases()
    exact = [replace(c, settings=()) if c.arch == "dense" else c for c in cases]
    made = tables.run_table(made_up(tmp_path, exact))
    assert made.text.set_index("architecture").loc["CAT-8", "vs Dense"] == "-"


# --- the exhibit ----------------------------------------------------------------------------------


def test_the_exhibit_follows_the_rules_of_the_suite() -> None:
    assert (*exhibit.FAST_PATHS, "eager") == training.FORWARD_PATHS["cuda"]
    assert exhibit.TOKENS_PER_STEP == training.TOKENS_PER_STEP
    assert exhibit.SEQ_LENS == training.SEQ_LENS["cuda"]
    ours = {c for c in exhibit.plan("h100") if c.arch.startswith("dense")}
    specs = [parse("dense"), parse("dense-2d")]
    assert ours == set(plan(specs, Options(device="cuda", scale="h100")))
    assert len(exhibit.plan("smoke")) == 2
    assert "training" in [name for name, _ in spec.exhibits()]


def test_the_exhibit_puts_the_claims_beside_the_ratios(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exhibit, "TRAINED", ("dense", "dense-2d", "cat-8"))
    monkeypatch.setattr(exhibit, "fast_path", lambda name: "compile")
    made_up(tmp_path, exhibit.plan("h100"), cat_parts=0.8)
    records = _build.find(_build.all_records(tmp_path)[0], exhibit.plan("h100")).records
    (table,) = exhibit.render(records, (), "h100").tables
    assert sum("parts sum to 2,400 of 3,000 ms" in note for note in table.notes) == 2
    text = table.text.set_index(["length", "architecture"])
    cat = text.loc["1024", "CAT-8"]
    assert cat["time / Dense"] == "3.00x" and cat["time / Dense-2D"] == "1.50x"
    assert cat["memory / Dense"] == "3.00x" and cat["allocated GiB"] == "3.00"
    assert (cat["paper"], cat["paper (memory)"]) == ("<= 2x", "<= 2x")
    assert text.loc["4096", "CAT-8"]["paper"] == "<= 1.5x"
    assert text.loc["4096", "Dense"]["paper"] == "-"


def exhibit_of(results: Path) -> tuple[_build.Found, tables.Table]:
    planned = exhibit.plan("h100")
    found = _build.find(_build.all_records(results)[0], planned, earlier=exhibit.earlier)
    (table,) = exhibit.render(found.records, (), "h100").tables
    return found, table


def test_rows_of_steps_launched_from_python_stand_in_and_are_said(
    tmp_path: Path, monkeypatch
) -> None:
    """Until the captured step is measured: then it is the one shown, and no ratio mixes the two."""
    monkeypatch.setattr(exhibit, "TRAINED", ("dense", "dense-2d", "cat-8"))
    planned = exhibit.plan("h100")
    made_up(tmp_path, [exhibit.earlier(case) for case in planned])
    found, table = exhibit_of(tmp_path)
    assert len(found.stand_ins) == len(table.text) == 6
    said = [note for note in table.notes if note.startswith("Step launched from Python")]
    assert len(said) == 1 and said[0].endswith("all rows.")
    assert not any(note.startswith("Not measured") for note in table.notes)
    records, _, _ = _build.all_records(tmp_path)
    assert _build.missing_cases(["training"], "h100", records) == planned  # --run measures them
    assert set(table.text["time / Dense"]) == {"1.00x", "2.00x", "3.00x"}

    dense = [case for case in planned if case.arch == "dense"]
    made_up(tmp_path, dense, factor=0.5)
    found, table = exhibit_of(tmp_path)
    assert len(found.stand_ins) == 4 and len(table.text) == 6
    text = table.text.set_index(["length", "architecture"])
    assert text.loc["1024", "Dense"]["step s [95 % CI]"].startswith("0.500")
    assert text.loc["1024", "CAT-8"]["time / Dense"] == "3.00x"  # of its own run
    (said,) = [note for note in table.notes if note.startswith("Step launched from Python")]
    assert "CAT-8 (length 1024, 4096)" in said and "Dense (" not in said
    assert said.endswith("No ratio is taken between the two.")

    made_up(tmp_path, planned, factor=0.5)
    found, table = exhibit_of(tmp_path)
    assert not found.stand_ins and not any("from Python" in note for note in table.notes)
    assert table.heading.endswith("bfloat16 autocast. Steps are CUDA graphs.")
    made_up(tmp_path, [exhibit.earlier(case) for case in planned])  # a later run of the old kind
    found, _ = exhibit_of(tmp_path)
    assert not found.stand_ins


@pytest.mark.parametrize("status", ["failed", "unsupported"])
def test_a_captured_case_that_ended_badly_does_not_hide_the_earlier_row(
    tmp_path: Path, status: str
) -> None:
    planned = [case for case in exhibit.plan("h100") if case.arch == "dense"]
    made_up(tmp_path, [exhibit.earlier(case) for case in planned])
    resolved = {case.key: {"label": "Dense", "config": {}} for case in planned}
    run = store.Run.create(tmp_path, "bad", GPU, planned, resolved)
    run.append([Record(case.key, "case", None, "s", status=status, error="x") for case in planned])
    found, table = exhibit_of(tmp_path)
    assert len(found.stand_ins) == len(table.text) == 2
    assert not table.text["step s [95 % CI]"].isin([status]).any()


def test_compare_says_that_only_the_step_path_differs(tmp_path: Path) -> None:
    planned = [case for case in exhibit.plan("h100") if case.arch == "dense"]
    earlier = made_up(tmp_path, [exhibit.earlier(c) for c in planned])
    with pytest.raises(UserError, match="share no case: they differ in step."):
        compare.compare_table(made_up(tmp_path, planned), earlier)
    mixed = made_up(tmp_path, [planned[0], *(exhibit.earlier(c) for c in planned)])
    (verdict, *_) = compare.compare_table(made_up(tmp_path, planned), mixed).notes
    assert "3 cases are in one of the runs only" in verdict
    assert verdict.endswith("1 pair of them differ in --step-path.")


def test_the_status_of_an_exhibit_says_what_stands_in(tmp_path: Path) -> None:
    made_up(tmp_path, [exhibit.earlier(c) for c in exhibit.plan("h100") if c.arch == "dense"])
    (status,) = [s for s in _build.statuses(tmp_path, "h100") if s.name == "training"]
    assert status.status.startswith("partial 0/")
    assert "2 of an earlier plan, to be measured anew" in status.detail
