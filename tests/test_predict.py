"""The dry run: numbers known before anything runs, and widths that equalise a budget."""

import json
import time
from pathlib import Path

import contract
import pytest
import torch

from cat_bench import predict, profiler, store
from cat_bench.architecture import Cost, build, prefill_costs
from cat_bench.case import Case, Options
from cat_bench.errors import UserError
from cat_bench.generate import new_state
from cat_bench.profiler import Ceilings
from cat_bench.spec import parse
from cat_bench.suites import attention
from cat_bench.suites.efficiency import plan
from cat_bench.window import pairs_before_last

TINY = ["dense:width=64,num_layers=2,vocab_size=96", "cat:chunk_size=4,width=64,num_layers=2"]
ROOT = Path(__file__).parent.parent


def cases(texts: list[str], **options) -> list[Case]:
    return plan([parse(text) for text in texts], Options(**options))


@pytest.mark.parametrize("text", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_predicts_what_a_built_model_has(text: str, dtype: str) -> None:
    (case,) = cases([text], batch_sizes=(3,), seq_lens=(24,), dtype=dtype)
    row = predict.resolve([case])[case.key]
    model = build(parse(text), dtype=dtype)
    state = new_state(model, 3, 24)
    assert row["num_params"] == sum(p.numel() for p in model.parameters())
    assert row["weights_bytes"] == profiler.weights_bytes(model)
    assert row["state_bytes"] == profiler.state_live_bytes(state)
    assert 0 < row["state_float_bytes"] <= row["state_bytes"]
    assert row["label"] == model.config.label
    assert row["config"]["width"] == 64


def test_resolved_rows_survive_json() -> None:
    planned = cases(TINY, device="cuda", seq_lens=(64,))
    resolved = predict.resolve(planned, "NVIDIA H100 80GB HBM3")
    assert json.loads(json.dumps(resolved)) == resolved
    assert set(resolved) == {case.key for case in planned}


def test_a_sequence_longer_than_the_chunk_positions_is_refused() -> None:
    planned = cases(["cat:max_len=4096"], seq_lens=(8192,))
    with pytest.raises(UserError) as error:
        predict.resolve(planned)
    assert error.value.message == (
        "cat:max_len=4096: seq_len=8192 needs 1024 chunk positions; max_len=4096 gives 512."
    )
    assert error.value.hint == (
        "Use -a cat:max_len=8192, or at most 4096 tokens: "
        "--seq-len, or --prompt-len + --new-tokens."
    )


# --- the floor ------------------------------------------------------------------------------------


class Bill:
    """An architecture that only knows its costs: weights bound by reading, state by computing."""

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        return Cost("weights", 1000, batch_size), Cost("state", num_tokens, 100 * num_tokens)


def test_the_floor_adds_the_slower_of_reading_and_computing_part_by_part() -> None:
    # Steps read tokens 3, 4: 2 x 1000 / 10 for the weights, (3 + 4) x 100 / 5 for the state. The
    # prompt of 2 costs as token 2, and its parts may overlap: (1000 + 2) / 10, or (1 + 200) / 5.
    floor_s = predict.generation_floor_s(Bill(), 1, 2, 5, Ceilings(10, 5, "assumed"))
    assert floor_s == pytest.approx(200 + 140 + 100.2)


CEILINGS = Ceilings(2.9e12, 800e12, "assumed")
PROMPT = 32_768


@pytest.mark.parametrize(
    ("text", "tflops"),
    [
        # 2 x 11 blocks of 12.85 M a token, 4 x 11 x 1024 a pair: what a prefill cannot leave out.
        ("dense", (2 * 11 * 12.845e6 * PROMPT + 4 * 11 * 1024 * PROMPT**2 / 2) / 1e12),
        # 4,096 decoder rows of 51.38 M a block; as many chunks of 9 rows and the projection.
        (
            f"cat-8:max_len={PROMPT}",
            4096 * (2 * 11 * 51.38e6 + 2 * (9 * 6 - 1) * 12.845e6 + 2 * 16.78e6) / 1e12
            + (4 * 11 * 2048 * 4096**2 / 2 + 4096 * 4 * 6 * 1024 * 9**2) / 1e12,
        ),
        # Recurrences: the matrices of 23 of 24 layers (158.4 M without head), and no pairs.
        ("mamba2", 2 * 158.4e6 * 23 / 24 * PROMPT / 1e12),
    ],
)
def test_a_long_prompt_counts_all_that_a_prefill_must_compute(text: str, tflops: float) -> None:
    model = build(parse(text), device="meta", dtype="bfloat16")
    floor_s = predict.prompt_floor_s(model, 1, PROMPT, CEILINGS)
    assert floor_s == pytest.approx(tflops / 800, rel=0.005)
    whole_s = predict.generation_floor_s(model, 1, PROMPT, PROMPT + 1, CEILINGS)
    assert whole_s == floor_s  # the first new token is the prefill's own


def test_window_layers_of_a_hybrid_count_their_pairs() -> None:
    short, long = (
        build(parse(f"gdn-h1:window={window}"), device="meta", dtype="bfloat16")
        for window in (512, 16_384)
    )
    floors_s = [predict.prompt_floor_s(model, 1, PROMPT, CEILINGS) for model in (short, long)]
    pairs = 16_384 * (PROMPT - 16_384 / 2) - 512 * (PROMPT - 256)
    delta = 2 * 15_872 * 14.97e6  # below the last layer, a window, one of GDN passes as many tokens
    assert floors_s[1] - floors_s[0] == pytest.approx(
        (4 * 5 * 1024 * pairs + delta) / 800e12, rel=0.01
    )


@pytest.mark.parametrize("text", ["dense", "cat-8", "mamba2", "based", "gdn", "sparse-2d"])
def test_a_prompt_of_8_tokens_costs_about_one_step(text: str) -> None:
    model = build(parse(text), device="meta", dtype="bfloat16")
    step = model.step_costs(1, 8)
    step_s = sum(max(c.num_bytes / 2.9e12, c.flops / 800e12) for c in step)
    assert predict.prompt_floor_s(model, 1, 8, CEILINGS) == pytest.approx(step_s, rel=0.05)


def test_a_case_without_new_tokens_has_no_floor() -> None:
    (case, *_) = attention.plan([], Options(device="cuda", seq_lens=(1024,)))
    assert predict.resolve([case], "NVIDIA H200")[case.key]["floor_s"] is None


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_long_generations_meet_every_phase_of_a_chunk(chunk_size: int) -> None:
    model = build(parse(f"cat:chunk_size={chunk_size},max_len=8193"), device="meta")
    compressions = 8193 // chunk_size
    compressor = model.step_costs(1, chunk_size)[-1]
    without = sum(cost.flops for n in range(1, 8194) for cost in model.step_costs(1, n)[:2])
    expected = (without + compressions * compressor.flops) / 8193
    assert predict.mean_step_flops(model, 1, 1, 8194) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "text, batch_size, seq_len, expected_s",
    [
        ("dense", 256, 4096, 37.0),
        ("dense", 256, 1024, 2.42),
        ("dense", 512, 1024, 4.82),
        ("cat-16:max_len=4096", 256, 4096, 7.1),
        ("cat-8", 256, 1024, 1.18),
        ("cat-8", 512, 1024, 2.28),
    ],
)
def test_floors_agree_with_the_calculated_ones(text, batch_size, seq_len, expected_s) -> None:
    """The table of the performance targets, H100."""
    (case,) = cases([text], device="cuda", batch_sizes=(batch_size,), seq_lens=(seq_len,))
    row = predict.resolve([case], "NVIDIA H100 80GB HBM3")[case.key]
    assert row["floor_s"] == pytest.approx(expected_s, rel=0.02)
    assert row["floor_source"] == "assumed"


def test_a_floor_is_quick() -> None:
    model = build(parse("cat-8:max_len=32768"), device="meta", dtype="bfloat16")
    start_s = time.process_time()
    predict.generation_floor_s(model, 16, 8, 32768, Ceilings(1e12, 1e14, "assumed"))
    assert time.process_time() - start_s < 1.5  # 32,760 steps; about 0.2 s on an idle core


def test_an_unknown_gpu_gives_no_figure_but_a_warning() -> None:
    (case,) = cases([TINY[0]], device="cuda", batch_sizes=(1,))
    row = predict.resolve([case], "NVIDIA GeForce GTX 1080")[case.key]
    assert row["floor_s"] is None
    (warning,) = row["warnings"]
    assert "No lower bounds: the ceilings of NVIDIA GeForce GTX 1080 are unknown" in warning
    (warning,) = predict.resolve([case], None)[case.key]["warnings"]
    assert "no GPU is seen here" in warning and "--gpu H100" in warning
    (case,) = cases([TINY[0]], batch_sizes=(1,))
    assert predict.resolve([case])[case.key]["warnings"] == []


# --- the table ------------------------------------------------------------------------------------


def test_the_table_says_what_cannot_fit() -> None:
    planned = cases(["dense", "cat-8"], device="cuda", batch_sizes=(512, 2048))
    resolved = predict.resolve(planned, "NVIDIA H100 80GB HBM3")
    table = predict.plan_table(planned, resolved, 79.1 * predict.GIB)
    assert table["architecture"].tolist() == ["CAT-8", "CAT-8", "Dense", "Dense"]
    assert table["batch"].tolist() == ["512", "2048", "512", "2048"]
    assert table["params M"].tolist() == ["968.82"] * 2 + ["257.45"] * 2
    assert table["non-embedding M"].tolist() == ["710.47"] * 2 + ["154.17"] * 2
    assert table["weights GiB"].tolist() == ["1.80"] * 2 + ["0.48"] * 2
    # CAT's ids of the open chunk are below a hundredth of a GiB.
    assert table["state GiB"].tolist() == ["6.38", "25.50", "24.00", "96.00"]
    assert table["needs at least GiB"].tolist()[-1] == "96.48"
    assert table["fits in 79.1 GiB"].tolist() == [*["not ruled out"] * 3, "NO"]
    assert float(table["floor s"].tolist()[2]) == pytest.approx(4.82, rel=0.02)
    assert table["floor s"].tolist()[-1] == "-"


def test_the_table_without_a_gpu_says_what_is_needed() -> None:
    planned = cases(["dense"], device="cuda", batch_sizes=(512,))
    table = predict.plan_table(planned, predict.resolve(planned))
    assert table["needs at least GiB"].tolist() == ["24.48"]
    assert table["floor s"].tolist() == ["-"]
    assert not [column for column in table if column.startswith("fits")]


@pytest.mark.parametrize(
    ("gpu", "run"), [("H100", "0042-training-h100"), ("H200", "h200/0001-fig3-h100")]
)
def test_the_assumed_memory_is_what_a_measured_gpu_has(gpu: str, run: str) -> None:
    environment = store.Run.open(ROOT / "results" / run).environment
    assert gpu in environment["gpu_name"]
    assert predict.ASSUMED_MEMORY_BYTES[gpu] == environment["gpu_memory_bytes"]


def test_no_measured_case_reserved_less_than_its_least() -> None:
    for run in map(store.Run.open, sorted((ROOT / "results").glob("004[23]-*"))):
        records, resolved = run.records(), run.resolved()
        peaks = records[records["metric"] == "peak_reserved_bytes"]
        assert len(peaks)
        for case, peak in zip(peaks["case"], peaks["value"], strict=True):
            assert predict.least_bytes(resolved[case]) <= peak


def test_the_table_of_a_match_shows_every_width_and_ratio() -> None:
    first = parse("dense:num_layers=4")
    specs = predict.matched([first, parse("cat-8:num_layers=4")], "params", 16, 1024)
    options = Options(device="cuda", batch_sizes=(16,), reference_every=9)
    planned = plan(specs, options)
    resolved = predict.resolve(planned, None, "params", first)
    table = predict.plan_table(planned, resolved, 23 * predict.GIB, "host").set_index("width")
    assert "fits in 23.0 GiB (host)" in table
    ratios = [row["match_ratio"] for row in resolved.values() if "match_ratio" in row]
    width = str(specs[1].overrides["width"])
    assert table.loc[width, "budget ratio"] in {f"{ratio:.3f}" for ratio in ratios}
    # Of the default Dense there is only the reference case, which has no part in the match.
    assert sorted(table.loc["1024", "budget ratio"]) == ["-", "1.000"]
    own = predict.plan_table(
        dense := plan([parse("dense")], options), predict.resolve(dense, None, "params", first)
    )
    assert len(own) == 1 and own["budget ratio"].tolist() != ["-"]  # not hidden by the reference


# --- equal budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", predict.BUDGETS)
def test_matched_widths_are_the_nearest(budget: str) -> None:
    texts = ["dense:num_layers=4", "cat-8:num_layers=4"]
    if budget == "state":  # the other way round, CAT would become 21 times as large as Dense
        texts.reverse()
    first, other = map(parse, texts)
    specs = predict.matched([first, other], budget, 64, 256)
    assert specs[0] == first
    width = specs[1].overrides["width"]
    assert width % 64 == 0

    def distance(width: int) -> float:
        (case,) = cases(
            [f"{texts[1]},width={width}"],
            device="cuda",
            batch_sizes=(64,),
            seq_lens=(256,),
        )
        return abs(predict.resolve([case], None, budget, first)[case.key]["match_ratio"] - 1)

    assert distance(width) <= distance(width - 64)
    assert distance(width) <= distance(width + 64)


SHALLOW = "dense:width=256,num_layers=2,vocab_size=99"
WINDOW = "sliding_window:window=16"


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        ("dense", WINDOW, "no width of .* comes near dense; the nearest, 16384, gives 0.06"),
        (WINDOW, "dense", "no width of dense comes near .*; the nearest, 64, gives 16.00"),
    ],
)
def test_a_budget_that_no_width_reaches_is_refused(first: str, other: str, said: str) -> None:
    """The state of Dense has 4096 rows, that of the window 16."""
    with pytest.raises(UserError, match=f"--match state: {said} times its state") as caught:
        predict.matched([parse(first), parse(other)], "state", 1, 4096)
    assert "Put another -a first" in caught.value.hint


def test_a_match_out_of_all_proportion_is_refused() -> None:
    """An eighth of the rows needs eight times the width."""
    first, other = parse("dense"), parse("sliding_window:window=128")
    said = r"only at width 8192, with 10,\d\d\d M parameters, 41 times as many"
    with pytest.raises(UserError, match=said) as caught:
        predict.matched([first, other], "state", 1, 1024)
    assert "drop --match and give -a sliding_window:width=8192,window=128" in caught.value.hint


@pytest.mark.parametrize(
    ("first", "other", "budget", "off_by"),
    [
        ("dense", "cat-8", "latency", 0.05),  # 4.2 times Dense's parameters, but CAT's usual size
        ("dense:width=4096", "mamba2", "params", 0.05),  # 13 times its default; the first has so
        (SHALLOW, "dense:num_layers=3,vocab_size=99", "params", 0.25),  # widths are 64 apart
    ],
)
def test_large_and_small_models_at_equal_budgets_are_matched(
    first: str, other: str, budget: str, off_by: float
) -> None:
    specs = predict.matched([parse(first), parse(other)], budget, 64, 1024)
    (case, *_) = cases([specs[1].text], device="cuda", batch_sizes=(64,), seq_lens=(1024,))
    row = predict.resolve([case], None, budget, specs[0])[case.key]
    assert row["match_ratio"] == pytest.approx(1, abs=off_by)
    assert any("off by more than 5 %" in text for text in row["warnings"]) == (off_by > 0.05)


def test_a_match_needs_no_valid_default_width() -> None:
    """Three key-value heads divide no width of 1024."""
    specs = predict.matched([parse("dense"), parse("dense:num_kv_heads=3")], "params", 1, 64)
    assert specs[1].overrides["width"] % 192 == 0


def test_a_match_at_the_default_width_has_the_default_text() -> None:
    assert [s.text for s in predict.matched([parse("dense"), parse("dense")], "params", 1, 64)] == [
        "dense",
        "dense",
    ]


def test_the_reached_ratio_is_reported_and_warned_about() -> None:
    first = parse("dense:num_layers=4")
    planned = cases(["dense:num_layers=4", "dense:num_layers=5"], batch_sizes=(1,))
    resolved = predict.resolve(planned, None, "state", first)
    near, far = sorted(resolved.values(), key=lambda row: row["match_ratio"])
    assert near["match_ratio"] == 1 and near["warnings"] == []
    assert far["match_ratio"] == 1.25
    assert "state is 1.250 times that of dense:num_layers=4" in far["warnings"][0]


def test_reference_cases_take_no_part_in_a_match() -> None:
    planned = cases([TINY[0]], batch_sizes=(1,), reference_every=5)
    resolved = predict.resolve(planned, None, "params", parse(TINY[0]))
    for case in planned:
        assert ("match_ratio" in resolved[case.key]) == (not case.settings)


def test_a_given_width_cannot_be_chosen() -> None:
    for typed, said in (
        ("dense-2d", r"^dense-2d: --match chooses the width, but its width is set by the preset"),
        ("dense:width=2048", r"^dense:width=2048: .* but one is given"),
        ("dense:width=1024", r"^dense:width=1024: .* but one is given"),  # also the default
    ):
        with pytest.raises(UserError, match=said):
            predict.matched([parse("dense"), parse(typed)], "params", 1, 64)


def test_an_architecture_without_width_cannot_be_matched(tmp_path) -> None:
    path = tmp_path / "odd.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Config:\n    size: int = 4\n"
        "class Model:\n    decode_paths = ('eager',)\n"
    )
    with pytest.raises(UserError, match="'width', which .*odd.py does not have"):
        predict.matched([parse("dense"), parse(str(path))], "params", 1, 64)


def test_an_unknown_budget_is_named() -> None:
    with pytest.raises(UserError, match="--match 'speed' is unknown"):
        predict.matched([parse("dense")], "speed", 1, 64)


def test_planning_allocates_no_weights() -> None:
    model = predict._meta_model("dense-2d", "eager", "eager", "bfloat16")
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


# --- the floor of a prompt ------------------------------------------------------------------------

DEEP = [
    "dense:num_layers=3,width=64,vocab_size=97",
    "sparse:num_layers=4,stride=4,width=64,vocab_size=97",
    "sliding_window:num_layers=3,window=6,width=64,vocab_size=97",
    "sliding_window:num_layers=3,window=64,width=64,vocab_size=97",
    "based:pattern=clscl,window=5,width=64,feature_dim=4,num_heads=2,vocab_size=97",
    "based:pattern=clcs,window=5,width=64,feature_dim=4,num_heads=2,vocab_size=97",
    "gated_deltanet:num_layers=3,num_heads=2,key_width=16,value_width=32,width=64,vocab_size=97",
    "gated_deltanet:num_layers=4,hybrid=true,window=6,num_heads=2,key_width=16,value_width=32,"
    "width=64,vocab_size=97",
    "mamba2:num_layers=3,headdim=16,d_state=16,width=64,vocab_size=97",
]


@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_every_token_must_pass_the_blocks_that_a_prompts_floor_counts(text: str) -> None:
    """The last logits depend on what each token is after those blocks: none could be skipped."""
    model = contract.randomise(build(parse(text), dtype="float64"))
    num_tokens, seen = 40, {}
    for index, block in enumerate(model.blocks):
        norm = next(module for module in block.modules() if isinstance(module, torch.nn.RMSNorm))
        norm.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.update({index: inputs[0]})
        )
    tokens = torch.randint(0, 97, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)[0, -1]
    inputs = [seen[index] for index in range(1, len(model.blocks))]  # (1, t, d), of the one below
    gradients = torch.autograd.grad(logits.sum(), inputs)
    passing = model.tokens_passing(num_tokens)
    assert passing[-1] == 1 < max(passing)
    for gradient, count in zip(gradients, passing, strict=False):
        needed = gradient[0].any(-1)
        assert needed[num_tokens - count :].all()
        if parse(text).name != "sparse":  # whose last blocks skip tokens in between
            assert needed.sum() == count


def test_tokens_that_a_window_reaches() -> None:
    """Block l from the top: itself and l (window - 1) tokens back, of no more than there are."""
    passing = {
        text: build(parse(text), device="meta").tokens_passing(PROMPT)
        for text in ("swa-512", "gdn-h1", "based", "sparse-2d", "dense")
    }
    assert passing["swa-512"] == [511 * above + 1 for above in range(11, -1, -1)]
    assert passing["gdn-h1"] == [PROMPT] * 10 + [512, 1]
    assert passing["based"] == [PROMPT] * 8 + [2 + 127 + 2 + 1, 2 + 127 + 1, 2 + 1, 1]
    assert passing["sparse-2d"] == [PROMPT] * 10 + [1, 1]
    assert passing["dense"] == [PROMPT] * 11 + [1]
    assert build(parse("swa-512"), device="meta").tokens_passing(600) == [600] * 10 + [512, 1]


def test_pairs_of_a_prompts_last_tokens_without_the_last() -> None:
    """Of 10 tokens the last 4: numbers 7, 8 and 9, which see as many, or the window."""
    assert pairs_before_last(10, 4, window=100) == 7 + 8 + 9
    assert pairs_before_last(10, 4, window=8) == 7 + 8 + 8
    assert pairs_before_last(10, 1, window=8) == 0
    assert pairs_before_last(3, 3, window=8) == 1 + 2


def test_matrices_of_a_prompt_are_passed_by_all_tokens_but_the_last() -> None:
    """2 sequences, 2 FLOP a weight, 5 tokens before the last: the last block needs none of them."""
    model = build(parse(DEEP[-1]), device="meta")  # 3 layers, no pairs
    weights = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() > 1)
    before = prefill_costs(model, 2, 6)[-1]
    assert before == Cost("tokens before", 0, 2 * 2 * (5 + 5) * weights)
    assert prefill_costs(model, 2, 1)[-1] == Cost("tokens before", 0, 0)


def test_a_windows_prompt_counts_the_tokens_in_reach() -> None:
    """Matrices of 12.85 M, and 512 pairs of 4 D FLOP, for each token that passes a block."""
    model = build(parse("swa-512"), device="meta", dtype="bfloat16")
    tokens = 511 * 11 * 12 / 2
    flops = tokens * (2 * 12_845_056 + 4 * 1024 * 512) + model.step_costs(1, PROMPT)[0].flops
    assert predict.prompt_floor_s(model, 1, PROMPT, CEILINGS) == pytest.approx(
        flops / 800e12, rel=1e-3
    )
