"""Latents: cells, the way back to the codes, and derivatives."""

import pytest
import torch

from ptq.numerics.formats import FORMATS
from ptq.numerics.latents import cells, codes, latent_gradient, latents
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor, Scales


def quantized(fmt, rows: int = 7, features: int = 128) -> tuple[torch.Tensor, QuantizedTensor]:
    """Weights, and codes that are not those nearest to them, as GPTQ's are not."""
    weight = torch.randn(rows, features)
    grid = Grid(fmt, fmt.global_scale(weight.abs().amax()), "absmax")
    return weight, rtn(weight + 0.3 * torch.randn_like(weight), torch.eye(features), grid)


def test_cells_of_e2m1_end_in_the_middles() -> None:
    values = torch.tensor([0.0, -0.0, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0])
    low, high = cells(FORMATS["nvfp4"].element, values)
    assert low.tolist() == [-0.25, -0.25, 0.25, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0]
    assert high.tolist() == [0.25, 0.25, 0.75, 1.75, 2.5, 3.5, 5.0, 6.0, -5.0]


@pytest.mark.parametrize("name", FORMATS)
def test_latents_round_to_the_codes_they_were_made_of(name: str) -> None:
    fmt = FORMATS[name]
    weight, found = quantized(fmt)
    for share in (0.0, 0.5, 0.9):
        u = latents(weight, found, share)
        assert torch.equal(codes(fmt.element, u), found.codes)
        assert torch.equal(codes(fmt.element, u.half().float()), found.codes)  # as files keep it


def test_latents_lie_half_way_to_their_weights() -> None:
    fmt = FORMATS["nvint4"]
    scales = Scales(torch.full((1, 1), 0x38, dtype=torch.uint8), torch.tensor(0.5), fmt)
    found = QuantizedTensor(torch.full((1, 16), 2, dtype=torch.uint8), scales)  # 2 · 1 · 0.5
    weight = torch.ones(1, 16)
    weight[0, :4] = torch.tensor([1.1, 0.9, 5.0, -5.0])  # 2.2, 1.8, beyond the cell 1.5 … 2.5
    assert latents(weight, found)[0, :5].tolist() == pytest.approx([2.1, 1.9, 2.25, 1.75, 2.0])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_derivative_is_that_of_the_linear_part(name: str) -> None:
    """Without the rounding Ŵ = u · step, which float64 differentiates."""
    _, found = quantized(FORMATS[name])
    outer = torch.randn(found.codes.shape)
    step = found.scales.step().double().repeat_interleave(found.format.group_size, dim=1)
    u = torch.randn(found.codes.shape, dtype=torch.float64, requires_grad=True)
    (outer.double() * u * step).sum().backward()
    assert torch.allclose(latent_gradient(outer, found).double(), u.grad, rtol=1e-6)
