"""The parts of the graphed decode path that need no GPU: the reference and the packed weights."""

import pytest
import torch
from torch import nn

from cat_bench.architecture import build
from cat_bench.blocks import Block
from cat_bench.errors import UserError
from cat_bench.graph import Rows, decode_attention_reference, packed
from cat_bench.spec import parse


def test_packing_keeps_values_names_and_trainability() -> None:
    block = Block(64)
    gate, up = block.w1.weight.detach().clone(), block.w3.weight.detach().clone()
    with torch.inference_mode():  # as a captured state does it
        both = packed([block.w1.weight, block.w3.weight])
    assert torch.equal(both, torch.cat([gate, up]))
    assert packed([block.w1.weight, block.w3.weight]).data_ptr() == both.data_ptr()
    assert torch.equal(block.state_dict()["w3.weight"], up)
    block.w3(torch.ones(1, 64)).sum().backward()
    assert block.w3.weight.grad is not None


def test_packing_does_not_trust_neighbours_in_one_buffer_of_another_order() -> None:
    block = Block(64)
    gate, up = block.w1.weight.detach().clone(), block.w3.weight.detach().clone()
    block.w3.weight.data, block.w1.weight.data = torch.cat([up, gate]).chunk(2)
    both = packed([block.w1.weight, block.w3.weight])
    assert torch.equal(both, torch.cat([gate, up]))


def test_the_reference_reads_both_ranges_and_its_own_row_only() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 1, 64, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 1, 9, 64, dtype=torch.float64)
    rows = Rows(*(torch.tensor([number]) for number in (7, 0, 2, 4, 6)))
    live = [0, 1, 4, 5, 7]
    got = decode_attention_reference(q, k, v, keys, values, rows)
    assert torch.equal(keys[:, :, 7], k[:, :, 0]) and torch.equal(values[:, :, 7], v[:, :, 0])
    weights = torch.softmax(q @ keys[:, :, live].mT / 8, dim=-1)
    assert torch.allclose(got, weights @ values[:, :, live], atol=1e-12)


def test_a_fast_path_in_float64_is_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        build(parse("dense"), "cuda_graph", "meta", "float64")


def test_what_lies_behind_weights_is_not_taken_for_their_zeros() -> None:
    """Two weights in a row of a larger buffer, 8 rows together: packed asks for 8 of zeros."""
    flat = torch.ones(80)
    weights = [nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:32].view(5, 4))]
    both = packed(weights)
    assert both.shape == (16, 4) and both[:8].eq(1).all() and both[8:].eq(0).all()
    assert packed(weights).data_ptr() == both.data_ptr()  # and they stay where they are now
