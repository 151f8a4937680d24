"""The discrete step of PV-Tuning (arXiv 2405.14852) for codes on a scalar grid.

The loss is linearised at the weights as they are, with a square term that keeps a value near where
it is. In units of √v, Adam's root of the derivative by the value, a move by δ changes it by

    (m / √v) δ + δ² / (2 reach),      m: Adam's mean of the derivative

A value may go to its neighbour in the element against the sign of m, and gains by that where the
middle between both lies less than reach · |m| / √v away. To round all that would gain is further
than a linearisation holds; so only the few of largest gain move, and together no further than a
share of the weight's norm. In units of √v, because what is large in nats is often only a noisy
derivative. A jump is whole: nothing is carried to the next step but the moments, unlike with
latents (:mod:`ptq.numerics.latents`), which drift through their cells.

The paper moves vectors of a learned codebook to the nearest of all of them; here the grid is fixed
and a value moves by one place at most.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from ptq.numerics.tensor import QuantizedTensor, group


def jumps(
    weight: QuantizedTensor,
    mean: Float32[Tensor, "rows in"],
    root: Float32[Tensor, "rows in"],
    *,
    reach: float,
    share: float,
    trust: float,
) -> UInt8[Tensor, "rows in"]:
    """The codes of ``weight``, of which some have moved to a neighbour.

    Args:
        mean, root: Adam's, of the derivative by the values (:func:`ptq.numerics.adam.moments`).
        reach: how far the linearisation is believed, in units of the element.
        share: of all codes, at most so many move; those that gain most.
        trust: the weight moves by at most this share of its norm (Frobenius).
    """
    element = weight.format.element
    values = element.decode(weight.codes)
    grid = torch.tensor(element.written, dtype=torch.float32, device=values.device)
    index = torch.searchsorted(grid, values) - mean.sign().long()
    others = grid[index.clamp_(0, len(grid) - 1)]
    gap = (others - values).abs()
    gain = gap * (mean.abs() / root - gap / (2 * reach))
    moving = (gain > 0).flatten().nonzero().squeeze(1)  # at the end of the grid there is no gap
    order = gain.flatten()[moving].argsort(descending=True, stable=True)
    chosen = moving[order[: int(share * values.numel())]]
    steps = weight.scales.step().double().unsqueeze(-1)
    squares = (group(gap.double(), weight.format) * steps).square().flatten()
    norm = (group(values.double(), weight.format) * steps).square().sum()
    chosen = chosen[squares[chosen].cumsum(0) <= trust * trust * norm]
    result = weight.codes.flatten().clone()
    result[chosen] = element.encode(others.flatten()[chosen])
    return result.view(values.shape)
