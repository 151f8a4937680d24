"""What kernels multiply with is what the layer says, stacked or not."""

import pytest
import torch
from torch import nn

from ptq.kernels import gpu
from ptq.kernels.operands import Prologue, QuantizedInputs
from ptq.runtime.kernel_weight import stacked
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_tensors_become_views_of_their_stack() -> None:
    first = [torch.full((2, 3), 1.0), torch.full((1, 3), 2.0)]
    parts = [first, [torch.zeros(2, 3), torch.ones(1, 3)]]
    whole = stacked(parts)
    assert whole.shape == (2, 3, 3) and torch.equal(whole[0, :, 0], torch.tensor([1.0, 1.0, 2.0]))
    parts[1][1].fill_(7)
    assert whole[1, 2].eq(7).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_layers_under_each_other_give_their_outputs_beside_each_other(
    kernels, quantized, name
) -> None:
    layers = [quantized(nn.Linear(64, rows), name, 32) for rows in (16, 48)]
    x = torch.randn(5, 64, device=DEVICE).bfloat16()
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    before = [layer.weight_packed.clone() for layer in layers]
    weight = QuantLinear.stack(layers)
    inputs, kept = weight.inputs(x)
    assert kept is x
    y = weight.multiply(inputs, x.shape[:-1], x.dtype)
    assert float((y - expected).float().norm() / expected.float().norm()) < 4e-3
    assert torch.equal(weight.weight.packed, torch.cat(before))
    assert torch.equal(layers[1].weight_packed, before[1])
    layers[1].weight_scale.fill_(3)
    assert weight.weight.scale_bits[16:].eq(3).all()


def test_inputs_are_quantized_where_the_layer_says(kernels, quantized) -> None:
    layer = quantized(nn.Linear(64, 16), "nvfp4", 16)
    layer.quantize_inputs = True
    x, gain = torch.randn(2, 3, 64, device=DEVICE).bfloat16(), torch.ones(64, device=DEVICE)
    norm = Prologue("rms_norm", gain.bfloat16(), 1e-6, keep=True)
    inputs, normed = layer.kernel_weight().inputs(x, norm)
    assert isinstance(inputs, QuantizedInputs) and inputs.packed.shape == (6, 32)
    again, _ = layer.kernel_weight().inputs(normed)
    assert isinstance(again, QuantizedInputs) and normed.shape == x.shape
    assert torch.equal(again.packed, inputs.packed)
    layer.quantize_inputs = False
    assert isinstance(layer.kernel_weight().inputs(x)[0], torch.Tensor)


def test_what_is_made_in_a_recording_is_not_kept(kernels, quantized, monkeypatch) -> None:
    """Until the graph replays, nothing has filled it. A layer that was prepared has it already."""
    layer = quantized(nn.Linear(64, 16), "mxfp4", 16)
    assert layer.prepare(torch.bfloat16) is None
    kept = layer.kernel_weight()
    monkeypatch.setattr(gpu, "capturing", lambda device: True)
    assert layer.kernel_weight() is kept
    layer._kernel_weight = None
    recorded = layer.kernel_weight()
    assert layer.kernel_weight() is not recorded
    assert kept.blocked is not kept.blocked
    monkeypatch.setattr(gpu, "capturing", lambda device: False)
    assert kept.blocked is kept.blocked
