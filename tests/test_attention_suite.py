"""The attention suite: its plan, its counts of pairs, its layouts, its rows on a CPU."""

import pytest
import torch

from cat_bench import mask
from cat_bench.architecture import build
from cat_bench.case import Options
from cat_bench.chunk_attention import chunk_mask
from cat_bench.errors import UserError
from cat_bench.predict import resolve
from cat_bench.spec import parse
from cat_bench.suites.attention import Shape, flex_layout, measure, plan

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


def test_quick_runs_what_a_cpu_can() -> None:
    cases = plan([], Options(scale="smoke"))
    assert {name for *_, name in names(cases)} == {"eager", "two_part", "causal"}


def test_unknown_attention_and_counts_are_refused() -> None:
    with pytest.raises(UserError, match="knows no attention of 'mamba2'"):
        plan([parse("mamba2")], Options())
    with pytest.raises(UserError, match="must be 1 or more"):
        plan([], Options(seq_lens=(0,)))


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
        if dict(case.settings)["implementation"] not in ("eager", "two_part", "causal"):
            with pytest.raises(UserError, match="needs a CUDA GPU"):
                list(measure(case, model))
            continue
        rows = {record.metric: record for record in measure(case, model)}
        assert len(rows["forward_s"].samples) == len(rows["forward_backward_s"].samples) == 2
        pairs, heads = rows["attended_pairs"].value, 2 if arch == CAT else 1  # CAT: D_d = 2 D
        assert rows["forward_flops"].value == 4 * 64 * heads * 2 * pairs
        assert rows["forward_backward_flops"].value == 14 * 64 * heads * 2 * pairs
        rate = rows["forward_flops"].value / rows["forward_s"].value
        assert rows["forward_flops_per_s"].value == pytest.approx(rate)
