"""Gradients through quantized layers are those of the dequantized weight, in float64."""

import pytest
import torch
from torch import Tensor, nn

from ptq.runtime.fusion import fuse
from ptq.runtime.gradients import learns
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(layer: QuantLinear, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(seed · (x Wᵀ + b)) for x and b, in float64."""
    wide = x.detach().double().requires_grad_()
    bias = torch.zeros(layer.out_features, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = nn.functional.linear(wide, layer.weight.double(), bias)
    (y * seed.double()).sum().backward()
    assert wide.grad is not None and bias.grad is not None
    return wide.grad, bias.grad


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=["float32", "kernels"]
)
@pytest.mark.parametrize(("name", "rotation"), [("nvfp4", 1), ("mxfp4", 32), ("nvint4", 16)])
def test_they_are_those_of_the_dequantized_weight(
    kernels, quantized, name: str, rotation: int, dtype: torch.dtype, bound: float
) -> None:
    layer = quantized(nn.Linear(128, 64), name, rotation)
    layer.bias = layer.bias.detach().to(dtype).requires_grad_()
    layer.prepare(torch.bfloat16)
    x = torch.randn(2, 5, 128, device=DEVICE).to(dtype).requires_grad_()
    seed = torch.randn(2, 5, 64, device=DEVICE).to(dtype)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y), "training changes what the layer computes"
    (y * seed).sum().backward()
    for measured, exact in zip((x.grad, layer.bias.grad), expected(layer, x, seed), strict=True):
        assert measured is not None and measured.dtype == dtype
        assert float((measured - exact).norm() / exact.norm()) < bound


def test_the_rounding_of_inputs_counts_as_the_identity(quantized) -> None:
    layer = quantized(nn.Linear(64, 16), "nvfp4", 16)
    layer.kernel_dtype, layer.quantize_inputs = None, True
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    seed = torch.randn(3, 16, device=DEVICE)
    (layer(x) * seed).sum().backward()
    torch.testing.assert_close(x.grad, expected(layer, x, seed)[0].float(), atol=1e-5, rtol=1e-4)


def test_a_frozen_input_costs_nothing(quantized) -> None:
    layer = quantized(nn.Linear(64, 16))
    x = torch.randn(3, 64, device=DEVICE)
    assert not learns(x, None) and layer(x).grad_fn is None
    x.requires_grad_()
    assert learns(None, x) and layer(x).grad_fn is not None
    with torch.no_grad():
        assert not learns(x) and layer(x).grad_fn is None


class MLP(nn.Module):
    """Gated, with adapters of low rank beside the quantized layers."""

    def __init__(self, quantized) -> None:
        super().__init__()
        self.gate_proj = quantized(nn.Linear(64, 128, bias=False))
        self.up_proj = quantized(nn.Linear(64, 128, bias=False))
        self.down_proj = quantized(nn.Linear(128, 64, bias=False))
        self.low = nn.Linear(64, 4, bias=False).to(DEVICE)
        self.high = nn.Linear(4, 128, bias=False).to(DEVICE)
        nn.init.zeros_(self.high.weight)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x) + self.high(self.low(x))
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)


def test_adapters_learn_beside_fused_layers(kernels, quantized) -> None:
    torch.manual_seed(0)
    model = MLP(quantized).bfloat16()
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.requires_grad_(False).prepare(torch.bfloat16)
    fuse(model, torch.bfloat16)
    x = torch.randn(32, 64, device=DEVICE).bfloat16()
    target = torch.randn(32, 64, device=DEVICE).bfloat16()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - target).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
