"""Scales searched by the error of the output, codes rounded to nearest.

LLM-FP4 (arXiv 2310.16836) searches clipping ranges and exponent biases of its floating-point
formats for the least error of a layer's output. Here the search is over the bytes that a format can
store, one group after the other, each by its exact change of ``tr(Δ H Δᵀ)`` given all others.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ptq.numerics.scales import Grid, candidates, round_to
from ptq.numerics.tensor import QuantizedTensor, Scales, group

# Bytes tried around that of the largest magnitude: (below, above).
WINDOW = {
    torch.float8_e4m3fn: (6, 7),
    torch.float8_e8m0fnu: (1, 1),
    torch.bfloat16: (12, 2),
}


def search_by_output(
    weight: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    grid: Grid,
    *,
    sweeps: int = 2,
) -> QuantizedTensor:
    """Every weight to its nearest grid point, with group scales of small ``tr(Δ H Δᵀ)``.

    Starts from the scales of ``grid``'s rule and never raises the loss. Sums are float64.

    Args:
        sweeps: over all groups, at most; ends when no scale changes.
    """
    fmt, size = grid.format, grid.format.size(weight.shape[1])
    weight, h = weight.float(), hessian.to(torch.float64)
    bits = grid.scales(weight).bits
    groups = group(weight, fmt)
    amax = groups.abs().amax(-1)
    tried = candidates(amax, fmt, grid.global_scale, WINDOW[fmt.scale_dtype])
    error = weight.double() - round_to(weight, Scales(bits, grid.global_scale, fmt)).dequantize()
    gradient = error @ h
    for _ in range(sweeps):
        changed = False
        for g in range(bits.shape[1]):
            columns = slice(g * size, (g + 1) * size)
            steps = fmt.decode_scale(tried[:, :, g]) * grid.global_scale  # (count, rows)
            w = groups[:, g]
            rounded = fmt.element.round(w / steps.unsqueeze(-1)) * steps.unsqueeze(-1)
            # what Δ of this group changes by, for every candidate
            change = (w - rounded).double() - error[:, columns]
            gain = (change @ h[columns, columns] + 2 * gradient[:, columns]) * change
            best = gain.sum(-1).min(0)
            moves = best.values < 0
            if not moves.any():
                continue
            changed = True
            index = best.indices.unsqueeze(0)
            bits[:, g] = torch.where(moves, tried[:, :, g].gather(0, index)[0], bits[:, g])
            chosen = change.gather(0, index.unsqueeze(-1).expand(1, -1, size))[0]
            chosen = torch.where(moves.unsqueeze(1), chosen, 0.0)
            error[:, columns] += chosen
            gradient += chosen @ h[columns]
        if not changed:
            break
    return round_to(weight, Scales(bits, grid.global_scale, fmt))
