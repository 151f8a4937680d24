"""Latents: real numbers that round to codes, so that a gradient can move codes.

    u = r + share · (clamp(w / step, cell(r)) - r),     Ŵ = round(u) · step,     step = s · t

r is the value of a code, its cell all numbers that round to r, w the weight that was quantized. The
derivative of the rounding counts as 1 (straight-through), so that ∂u = ∂Ŵ · step; scales stay as
they are. A latent starts half of the way from its value to where its weight lies (A4): those that
were nearly another code flip first, and none in the first steps, which would undo what GPTQ has
balanced.
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from ptq.numerics.formats import Element
from ptq.numerics.tensor import QuantizedTensor, group, ungroup

SHARE = 0.5


def cells(
    element: Element, values: Float32[Tensor, "*s"]
) -> tuple[Float32[Tensor, "*s"], Float32[Tensor, "*s"]]:
    """The lowest and the highest number in the cells of ``values``, which are values of
    ``element``: the middles between neighbours, on which ties fall to one or the other. The outer
    cells end at the outer values."""
    table = torch.tensor(element.written, dtype=torch.float32, device=values.device)
    middles = (table[1:] + table[:-1]) / 2
    index = torch.searchsorted(table, values.contiguous())
    low = torch.cat([table[:1], middles]).index_select(0, index.flatten())
    high = torch.cat([middles, table[-1:]]).index_select(0, index.flatten())
    return low.view(values.shape), high.view(values.shape)


def latents(
    weight: Float[Tensor, "rows in"], quantized: QuantizedTensor, share: float = SHARE
) -> Float32[Tensor, "rows in"]:
    """The latents of codes that were found for ``weight``, which is rotated as they are; for a
    ``share`` below 1 all round to these codes."""
    element, fmt = quantized.format.element, quantized.format
    values = element.decode(quantized.codes)
    low, high = cells(element, values)
    wanted = ungroup(group(weight.float(), fmt) / quantized.scales.step().unsqueeze(-1))
    return values + share * (torch.clamp(wanted, low, high) - values)


def codes(element: Element, latent: Float32[Tensor, "rows in"]) -> UInt8[Tensor, "rows in"]:
    """What latents round to."""
    return element.encode(latent)


def latent_gradient(
    gradient: Float32[Tensor, "rows in"], quantized: QuantizedTensor
) -> Float32[Tensor, "rows in"]:
    """The derivative by latents or by the values of codes, of that by the dequantized weight."""
    steps = quantized.scales.step().unsqueeze(-1)
    return ungroup(group(gradient, quantized.format) * steps)
