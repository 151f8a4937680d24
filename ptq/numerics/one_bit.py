"""Weights of about one bit, as a study: no format of :mod:`ptq.numerics.formats` carries them.

PTQ1.61 (arXiv 2502.13179) keeps the input channels with the largest activations in 4 bits, a fifth
of them, and the rest as signs with scales that are optimised: 0.2 · 4 + 0.8 · 1 = 1.6 bits and the
mask. iFairy (arXiv 2508.05571) rounds pairs of weights, taken as complex numbers, to {±1, ±i}. Both
are trained or preprocessed by their authors; here they are only rounded.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ptq.numerics.formats import INT4
from ptq.numerics.scale_refit import exact_scales


def salient_channels(
    diagonal: Float[Tensor, "in"], share: float, multiple: int = 1
) -> Bool[Tensor, "in"]:
    """The ``share`` of input channels with the largest mean square, a whole number of
    ``multiple``; the mask is structured: one for all rows."""
    count = round(share * len(diagonal) / multiple) * multiple
    mask = torch.zeros(len(diagonal), dtype=torch.bool, device=diagonal.device)
    mask[torch.argsort(diagonal, descending=True, stable=True)[:count]] = True
    return mask


def masked_binary(
    weight: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    *,
    share: float = 0.2,
    rounds: int = 4,
) -> Float64[Tensor, "rows in"]:
    """The weight that PTQ1.61's mask and scales leave: salient channels in INT4 with a scale for
    every row, the others ``±α``, one α for every row.

    Both scales of a row are the exact minimisers of ``tr(Δ H Δᵀ)`` given codes, taken in turns with
    the codes: signs, and INT4 codes nearest to the weights. Rounds that raise the loss of a row are
    not kept.
    """
    w, h = weight.double(), hessian.double()
    mask = salient_channels(h.diagonal(), share)
    order = torch.argsort((~mask).int(), stable=True)  # salient channels first
    split = int(mask.sum())
    w, h = w[:, order], h[order][:, order]
    wide, thin = w[:, :split], w[:, split:]
    amax = wide.abs().amax(1, keepdim=True) if split else torch.ones_like(w[:, :1])
    steps = (amax / INT4.max).clamp(min=torch.finfo(torch.float64).tiny)
    signs = torch.where(thin < 0, -1.0, 1.0).double()
    best = torch.zeros_like(w)
    least = torch.full((len(w),), torch.inf, dtype=torch.float64, device=w.device)
    for _ in range(rounds):
        codes = (wide / steps).round().clamp(-INT4.max, INT4.max)
        scales = _two_scales(w, codes, signs, h)
        result = torch.cat((codes * scales[:, :1], signs * scales[:, 1:]), 1)
        delta = w - result
        loss = (delta @ h * delta).sum(1)
        better = (loss < least).unsqueeze(1)
        best, least = torch.where(better, result, best), torch.minimum(loss, least)
        steps = scales[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    restored = torch.empty_like(best)
    restored[:, order] = best
    return restored


def _two_scales(w: Tensor, codes: Tensor, signs: Tensor, h: Tensor) -> Tensor:
    """The two scales (rows, 2) of the two parts of every row: exact_scales of groups that are
    padded to the same size."""
    size = max(codes.shape[1], signs.shape[1])
    pads = [size - codes.shape[1], size - signs.shape[1]]

    def padded(left: Tensor, right: Tensor) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat((pad(left, (0, pads[0])), pad(right, (0, pads[1]))), -1)

    split = codes.shape[1]
    columns = padded(h[:, :split], h[:, split:])
    wide = padded(columns.T[:, :split], columns.T[:, split:]).T
    values = padded(codes, signs)
    return exact_scales(padded(w[:, :split], w[:, split:]), values, wide, size, damping=0.0)


def bits_of_mask(share: float, features: int) -> float:
    """Bits per weight of :func:`masked_binary`: codes, two 16-bit scales a row, and a mask of one
    bit a channel shared by many rows (not counted)."""
    return 4 * share + (1 - share) + 32 / features


def sign_mean(weight: Float[Tensor, "rows in"]) -> Float64[Tensor, "rows in"]:
    """``sign(w) · mean |w|`` of every row: one bit, the least squares of signs."""
    w = weight.double()
    return torch.where(w < 0, -1.0, 1.0).double() * w.abs().mean(1, keepdim=True)


def phases(weight: Float[Tensor, "rows in"]) -> Float64[Tensor, "rows in"]:
    """iFairy's rounding: neighbours (a, b) as a + ib, to the nearest of ±1 and ±i times a scale of
    the row, the one of least squares. One bit a weight: of each pair the larger is kept as its
    sign, the other is zero."""
    w = weight.double()
    pairs = w.unflatten(1, (-1, 2))
    real = pairs[..., :1].abs() >= pairs[..., 1:].abs()
    kept = torch.cat((real, ~real), -1)
    units = torch.where(kept, torch.where(pairs < 0, -1.0, 1.0).double(), 0.0)
    scale = (units * pairs).sum((1, 2)) / units.square().sum((1, 2))
    return (units * scale.view(-1, 1, 1)).flatten(1)
