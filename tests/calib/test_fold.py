"""What folding makes of parameters: exact values for what stays, nothing rounded for the rest."""

import pytest
import torch
from gated_block import NAMES, SITE, Block
from torch import nn

from ptq.calib.fold import FoldedLinear, fold, remember


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_values_are_exact_in_sixteen_bits_and_weights_are_not_rounded(dtype: torch.dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block, x = Block(dtype).requires_grad_(False), torch.randn(5, 8, dtype=dtype)
        nn.init.normal_(block.norm.weight)
        factor = torch.exp(torch.randn(8))
    gain, weight = block.norm.weight.float(), block.left.weight.float()
    before = block(x)
    changed = fold(block, SITE, factor, NAMES)
    assert list(changed) == ["norm.weight"]
    new = changed["norm.weight"]
    assert torch.equal(new, new.bfloat16().float()) and torch.equal(block.norm.weight.float(), new)
    assert block.left.weight.dtype == torch.float32 and isinstance(block.left, nn.Linear)
    assert isinstance(block.left, FoldedLinear) == (dtype != torch.float32)
    exact = weight.double() / (new.double() / gain.double())
    torch.testing.assert_close(block.left.weight.double(), exact, rtol=3e-7, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(block(x), before, rtol=tolerance, atol=tolerance)


def test_where_biases_stay_factors_are_powers_of_two():
    block = Block(bias=True).requires_grad_(False)
    nn.init.normal_(block.norm.bias)
    old = block.norm.bias.clone()
    changed = fold(block, SITE, torch.full((8,), 3.0), NAMES)
    assert torch.equal(changed["norm.bias"], 4 * old) and set(changed) == {
        "norm.weight",
        "norm.bias",
    }


def test_a_dead_gain_keeps_its_channel():
    block = Block().requires_grad_(False)
    block.norm.weight[3] = 0
    weight = block.left.weight.clone()
    fold(block, SITE, torch.full((8,), 2.5), NAMES)
    assert block.norm.weight[3] == 0 and torch.equal(block.left.weight[:, 3], weight[:, 3])
    assert block.left.weight.isfinite().all()


def test_a_block_is_put_back_as_it_was():
    block = Block(torch.bfloat16).requires_grad_(False)
    before = dict(block.named_parameters())
    restore = remember(block)
    fold(block, SITE, torch.full((8,), 3.0), NAMES)
    assert block.left.weight is not before["left.weight"]
    restore()
    assert all(value is before[name] for name, value in block.named_parameters())
    assert type(block.left) is nn.Linear
