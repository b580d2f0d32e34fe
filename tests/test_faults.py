"""The test of the tests: planted faults, each of which named checks of the contract must report.

The first six are the faults that an implementation of CAT or Dense is most likely to have; the
others make sure that no check of contract.py passes whatever the model does. That the same checks
pass without a fault is what test_contract.py asserts, on the same two subjects among others.
"""

import dataclasses
from collections.abc import Callable
from unittest import mock

import contract
import pytest
import torch
from contract import CHECKS, Subject
from torch import Tensor

from baselines import dense
from cat_bench import blocks, cat, language_model
from cat_bench.architecture import Cost, step_flops

CAT, DENSE = contract.subjects_of("cat")[0], contract.subjects_of("dense")[0]


class CatRopeOfTokensOneTooHigh(cat.Model):
    """Wrong RoPE position, in the cached path only: open tokens stand one too far from slots."""

    decoding = False

    def prefill(self, tokens: Tensor, state: cat.State, lengths: Tensor | None = None):
        self.decoding = True
        result = super().prefill(tokens, state, lengths)
        self.decoding = False
        return result

    def _rope(self, chunk: Tensor, offset: Tensor) -> blocks.Rope:
        return super()._rope(chunk, offset + (offset > 0) * self.decoding)


class CatOtherRopeRuleInPrefill(CatRopeOfTokensOneTooHigh):
    """Forward restarts its positions in every chunk, decoding lets them grow."""

    def _rope(self, chunk: Tensor, offset: Tensor) -> blocks.Rope:
        return cat.Model._rope(self, chunk, offset + chunk * self.decoding)


class DenseRopeRestartsInPrefill(dense.Model):
    """Wrong RoPE position: every call counts from 0 instead of from the tokens read before."""

    def prefill(self, tokens: Tensor, state: dense.State):
        def from_zero(ids: Tensor, base: float) -> blocks.Rope:
            return blocks.rope_table(ids - ids[0], base)

        with mock.patch.object(language_model, "rope_table", from_zero):
            return super().prefill(tokens, state)


class CatChunkNumberOffByOne(cat.Model):
    """A chunk that closes while generating is compressed with its neighbour's position."""

    def _compress(self, chunks: Tensor, first_index: int, *rest) -> Tensor:
        return super()._compress(chunks, first_index + (first_index > 0), *rest)


class CatLeakyMask(cat.Model):
    """Tokens see the whole of their own chunk, also what comes after them."""

    def _attend_all(self, device: torch.device) -> blocks.Attend:
        def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows, size = torch.arange(q.shape[2], device=device), self.config.chunk_size
            slots_before = (rows[:, None] >= rows) & (rows % size == 0)
            seen = slots_before | (rows[:, None] // size == rows // size)
            return blocks.attention(q, k, v, mask=seen)

        return leaky


class DenseLeakyMask(dense.Model):
    """A mask off by one: every token sees its successor."""

    def attend_all(self, num_tokens: int, device: torch.device) -> blocks.Attend:
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril(1)
        return lambda q, k, v: blocks.attention(q, k, v, mask=seen)


class CatOversizedCache(cat.Model):
    """One chunk too many, as in a cache that is rounded up."""

    def init_state(self, batch_size: int, max_len: int) -> cat.State:
        with mock.patch.object(self, "config", longer(self.config)):
            return super().init_state(batch_size, max_len + self.config.chunk_size)


def longer(config: cat.Config) -> cat.Config:
    return dataclasses.replace(config, max_len=2 * config.max_len)


class DenseOversizedCache(dense.Model):
    def init_state(self, batch_size: int, max_len: int) -> dense.State:
        return super().init_state(batch_size, max_len + 1)


class CatNoCausalMask(cat.Model):
    def _attend_all(self, device: torch.device) -> blocks.Attend:
        return blocks.attention


class DenseNoCausalMask(dense.Model):
    def attend_all(self, num_tokens: int, device: torch.device) -> blocks.Attend:
        return blocks.attention


class CatOwnChunkLeak(cat.Model):
    """The paper's Listing 1: slot i holds f(c_i), the summary of the chunk that it predicts."""

    def _rows(self, tokens: Tensor) -> Tensor:
        size = self.config.chunk_size
        num_closed = tokens.shape[1] // size
        closed = tokens[:, : num_closed * size].unflatten(1, (-1, size))
        rows = super()._rows(tokens).clone()
        rows[:, : num_closed * size : size] = self._compress(closed, 0)
        return rows


class CatStaleSlots(cat.Model):
    """A new chunk still reads an open token of the chunk before it: the next row of the cache."""

    def prefill(self, tokens: Tensor, state: cat.State, lengths: Tensor | None = None):
        def one_more(rows: Tensor) -> Tensor:
            batch_size, heads, num_rows, width = rows.shape
            return rows.as_strided((batch_size, heads, num_rows + 1, width), rows.stride())

        def with_stale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return blocks.attention(q, one_more(k), one_more(v))

        with mock.patch.object(cat, "causal_attention", with_stale):
            return super().prefill(tokens, state, lengths)


class CatIgnoresLengths(cat.Model):
    """Padding is read as if it were text."""

    def prefill(self, tokens: Tensor, state: cat.State, lengths: Tensor | None = None):
        return super().prefill(tokens, state)


class DenseGrowingState(dense.Model):
    def step(self, token: Tensor, state: dense.State):
        keys = torch.cat([state.keys, state.keys[:, :, :, :1]], dim=3)
        return super().step(token, state._replace(keys=keys))


class DenseSharedState(dense.Model):
    """Every state of one size is the same memory."""

    def init_state(self, batch_size: int, max_len: int) -> dense.State:
        self.shared = getattr(self, "shared", None) or super().init_state(batch_size, max_len)
        return self.shared


class DenseResetForgotten(dense.Model):
    def init_state(self, batch_size: int, max_len: int) -> dense.State:
        return super().init_state(batch_size, 3 * max_len)  # room enough to go on

    def reset(self, state: dense.State) -> dense.State:
        return state


class DenseMixesRows(dense.Model):
    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits + 0.01 * logits.mean(0)


class DenseSeesTheLength(dense.Model):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) / tokens.shape[1] ** 0.5


class DenseIgnoresHalfTheIds(dense.Model):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens // 2)


class DenseNoLimit(dense.Model):
    """Promises at most 24 tokens and refuses nothing."""

    max_len = 24


class DenseForgottenGradient(dense.Model):
    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits.detach() + 0 * logits


class DenseRoughArithmetic(dense.Model):
    """Float32 that passes through bfloat16 on its way."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits if logits.dtype == torch.float64 else logits.bfloat16().to(logits.dtype)


class DenseMiscountedParameters(dense.Model):
    @property
    def num_params(self) -> int:
        return super().num_params - self.head.weight.numel()  # as if the head were tied


class DenseCostsOfOneRow(dense.Model):
    def step_costs(self, batch_size: int, num_tokens: int):
        return super().step_costs(1, num_tokens)


class DenseStepFlopsTenfold(dense.Model):
    flops, num_bytes = 10.0, 1.0

    def step_costs(self, batch_size: int, num_tokens: int):
        return tuple(
            Cost(cost.part, self.num_bytes * cost.num_bytes, self.flops * cost.flops)
            for cost in super().step_costs(batch_size, num_tokens)
        )


class DenseStepFlopsATenth(DenseStepFlopsTenfold):
    flops = 0.1


class DenseStepBytesTenfold(DenseStepFlopsTenfold):
    flops, num_bytes = 1.0, 10.0


class DenseStepBytesATenth(DenseStepBytesTenfold):
    num_bytes = 0.1


class DensePromptAsTraining(dense.Model):
    """Counts the logits and the last block of every token, which a prefill may leave out."""

    def prefill_costs(self, batch_size: int, num_tokens: int):
        flops = sum(step_flops(self, batch_size, n) for n in range(1, num_tokens + 1))
        return (Cost("prompt", 0, flops),)


class DenseOtherPath(dense.Model):
    """Runs something else than it was asked for."""

    def __init__(self, config: dense.Config, decode_path: str = "eager"):
        super().__init__(config)
        self.decode_path = "fast"


class DenseOtherHidden(dense.Model):
    """Training would take another loss than that of `forward`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(super().hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        return 7 * super().hidden(tokens)


LATER, STEPS = "later_tokens_change_no_earlier_logits", "prefill_and_steps_equal_forward"
ALLOCATION, SEGMENTS = "state_bytes_equal_the_allocation", "segments_equal_one_prefill"
COSTS = "step_costs_are_those_of_a_step"

# fault -> checks that must report it
FAULTS: dict[type, tuple[str, ...]] = {
    CatRopeOfTokensOneTooHigh: (STEPS,),
    CatOtherRopeRuleInPrefill: (STEPS,),
    DenseRopeRestartsInPrefill: (STEPS, SEGMENTS, "prefill_after_steps"),
    CatChunkNumberOffByOne: (STEPS, SEGMENTS),
    CatLeakyMask: (LATER, STEPS),
    DenseLeakyMask: (LATER, STEPS),
    CatOversizedCache: (ALLOCATION,),
    DenseOversizedCache: (ALLOCATION,),
    CatNoCausalMask: (LATER, STEPS),
    DenseNoCausalMask: (LATER, STEPS),
    CatOwnChunkLeak: (LATER, STEPS),
    CatStaleSlots: (STEPS,),
    CatIgnoresLengths: ("ragged_batch_equals_rows_alone",),
    DenseGrowingState: ("state_does_not_grow",),
    DenseSharedState: ("states_share_no_memory",),
    DenseResetForgotten: ("reset_empties_the_state",),
    DenseMixesRows: ("row_alone_equals_row_in_batch",),
    DenseSeesTheLength: ("prefix_lengths_agree",),
    DenseIgnoresHalfTheIds: ("every_token_changes_later_logits",),
    DenseNoLimit: ("too_long_is_refused",),
    DenseForgottenGradient: ("gradients_reach_every_parameter",),
    DenseRoughArithmetic: ("low_precision",),
    DenseMiscountedParameters: ("parameter_counts",),
    DenseCostsOfOneRow: ("step_costs",),
    DenseStepFlopsTenfold: (COSTS,),
    DenseStepFlopsATenth: (COSTS,),
    DenseStepBytesTenfold: (COSTS,),
    DenseStepBytesATenth: (COSTS,),
    DensePromptAsTraining: ("prefill_costs",),
    DenseOtherHidden: ("head_of_hidden_equals_forward",),
    DenseOtherPath: ("declared_paths_and_label",),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_reported(fault: type) -> None:
    clean = CAT if issubclass(fault, cat.Model) else DENSE
    faulty = dataclasses.replace(clean, model_class=fault)
    for name in FAULTS[fault]:
        assert reports(CHECKS[name], faulty), f"{name} does not see {fault.__name__}"


class DenseNormWithoutEps(dense.Model):
    """PyTorch then takes the eps of the dtype: another model in bfloat16."""

    def __init__(self, config: dense.Config, decode_path: str = "eager"):
        super().__init__(config, decode_path)
        for module in self.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.eps = None


def test_a_norm_without_eps_is_told_as_the_reason() -> None:
    with pytest.raises(AssertionError, match="RMSNorm without eps takes that of its dtype"):
        CHECKS["low_precision"](dataclasses.replace(DENSE, model_class=DenseNormWithoutEps))
    with pytest.raises(AssertionError) as error:
        CHECKS["low_precision"](dataclasses.replace(DENSE, model_class=DenseRoughArithmetic))
    assert "eps" not in str(error.value)


def test_the_subjects_without_a_fault_are_those_of_the_contract() -> None:
    assert {CAT, DENSE} <= set(contract.subjects())


def test_every_check_reports_some_fault() -> None:
    assert {name for names in FAULTS.values() for name in names} == set(CHECKS)


def reports(check: Callable[[Subject], None], subject: Subject) -> bool:
    try:
        check(subject)
    except AssertionError:
        return True
    return False
