"""Group scales refitted to their codes under the Hessian, and codes to them, by turns.

Given codes, the loss ``tr(Δ H Δᵀ)`` of a row is a quadratic function of its group scales: with A
the codes of the row, block-diagonal by groups, the real scales of least loss solve

    (Aᵀ H A) s = Aᵀ H w.

decoupleQ (arXiv 2404.12759) alternates this with codes. Here scales are storable bytes without zero
points, so that the solution is rounded, and bytes are then moved one by one to their exact
minimisers, until none moves. It is not decoupleQ's second stage, which trains norms and scales.
"""

import torch
from jaxtyping import Float, Float32, Float64, Integer
from torch import Tensor

from ptq.numerics.errors import quadratic_form
from ptq.numerics.tensor import QuantizedTensor, Scales, group, ungroup

# Numbers of all normal equations that are solved at a time: 256 MB in float64.
PART = 1 << 25
# Share of the mean diagonal of the normal equations that is added to it: groups whose inputs say
# the same leave their scales undecided.
DAMPING = 1e-6


def exact_scales(
    weight: Float[Tensor, "rows in"],
    values: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    group_size: int,
    *,
    damping: float = DAMPING,
) -> Float64[Tensor, "rows groups"]:
    """The real scales of least ``tr(Δ H Δᵀ)`` for Δ = W - values · scales, in float64.

    They may have any sign. A group whose values are all zero gets 0.

    Args:
        values: what the codes stand for, before scales.
        damping: share of the mean diagonal of ``Aᵀ H A`` that is added to it.
    """
    h, a = hessian.double(), values.double()
    groups = a.shape[1] // group_size
    target = (weight.double() @ h * a).unflatten(1, (groups, -1)).sum(-1)
    scales = torch.zeros(len(a), groups, dtype=torch.float64, device=a.device)
    step = max(1, PART // (groups * groups + 2 * a.shape[1]))
    for start in range(0, len(a), step):
        rows = a[start : start + step]
        normal = torch.empty(len(rows), groups, groups, dtype=torch.float64, device=a.device)
        for g in range(groups):
            columns = slice(g * group_size, (g + 1) * group_size)
            product = rows[:, columns] @ h[columns] * rows  # (rows, in)
            normal[:, g] = product.unflatten(1, (groups, -1)).sum(-1)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        dead = diagonal <= 0
        mean = diagonal.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        diagonal.add_(torch.where(dead, mean, damping * mean))
        wanted = target[start : start + step].unsqueeze(-1)
        scales[start : start + step] = torch.linalg.solve(normal, wanted)[..., 0]
        scales[start : start + step][dead] = 0.0
    return scales


def nearest_bytes(
    wanted: Float[Tensor, "rows groups"], scales: Scales
) -> Integer[Tensor, "rows groups"]:
    """The bits of the scale nearest to each wanted step, which may not be positive; ties go to the
    smaller one."""
    fmt, (first, last) = scales.format, scales.format.legal_scales
    legal = torch.arange(max(first, 1), last + 1, dtype=fmt.bits_dtype, device=wanted.device)
    steps = fmt.decode_scale(legal).double() * scales.global_scale.double().reshape(-1)[0]
    middles = (steps[1:] + steps[:-1]) / 2
    return legal[torch.bucketize(wanted.double(), middles)]


def refit_scales(
    weight: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    quantized: QuantizedTensor,
    *,
    sweeps: int = 4,
) -> QuantizedTensor:
    """The same codes with better scales; a row keeps its own unless its loss under ``hessian``
    falls, in float64.

    The exact real scales, rounded to storable ones, and the old ones both start a descent: byte by
    byte to the storable scale nearest to the minimiser given all others. That is exact, for the
    loss is quadratic in each. Formats of E8M0 scales take part: the nearest power of two.
    """
    fmt = quantized.format
    values = fmt.element.decode(quantized.codes)
    exact = exact_scales(weight, values, hessian, fmt.size(values.shape[1]))
    best, least = quantized, _loss(weight, quantized, hessian)
    for start in (nearest_bytes(exact, quantized.scales), quantized.scales.bits):
        bits = _descend(weight, hessian, values, start, quantized.scales, sweeps)
        trial = _with(quantized, bits)
        loss = _loss(weight, trial, hessian)
        better = loss < least
        bits = torch.where(better.unsqueeze(1), bits, best.scales.bits)
        best, least = _with(quantized, bits), torch.minimum(loss, least)
    return best


def _descend(
    weight: Tensor,
    hessian: Tensor,
    values: Float32[Tensor, "rows in"],
    bits: Integer[Tensor, "rows groups"],
    scales: Scales,
    sweeps: int,
) -> Integer[Tensor, "rows groups"]:
    """Coordinate descent on scale bytes, the codes fixed."""
    fmt, size = scales.format, scales.format.size(values.shape[1])
    bits, h = bits.clone(), hessian.to(torch.float64)
    steps = Scales(bits, scales.global_scale, fmt).step().double()
    a = values.double()
    gradient = (weight.double() - ungroup(group(a, fmt) * steps.unsqueeze(-1))) @ h
    for _ in range(sweeps):
        changed = False
        for g in range(bits.shape[1]):
            columns = slice(g * size, (g + 1) * size)
            part = a[:, columns]
            curvature = (part @ h[columns, columns] * part).sum(1)
            slope = (part * gradient[:, columns]).sum(1)
            wanted = steps[:, g] + torch.where(curvature > 0, slope / curvature, 0.0)
            found = nearest_bytes(wanted.unsqueeze(1), scales)[:, 0]
            moves = (curvature > 0) & (found != bits[:, g])
            if not moves.any():
                continue
            changed = True
            bits[:, g] = torch.where(moves, found, bits[:, g])
            step = Scales(bits[:, g : g + 1], scales.global_scale, fmt).step().double()[:, 0]
            gradient -= (part * (step - steps[:, g]).unsqueeze(1)) @ h[columns]
            steps[:, g] = step
        if not changed:
            break
    return bits


def _with(quantized: QuantizedTensor, bits: Tensor) -> QuantizedTensor:
    scales = quantized.scales
    return QuantizedTensor(quantized.codes, Scales(bits, scales.global_scale, scales.format))


def _loss(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Float64[Tensor, "rows"]:
    delta = weight.double() - quantized.dequantize().double()
    return quadratic_form(delta, hessian.double())


def rows_that_gain(
    weight: Float[Tensor, "rows in"],
    hessian: Float[Tensor, "in in"],
    old: QuantizedTensor,
    new: QuantizedTensor,
) -> tuple[QuantizedTensor, bool]:
    """Rows of ``new`` where their loss is below that of ``old``, and whether there are any."""
    better = _loss(weight, new, hessian) < _loss(weight, old, hessian)
    choose = better.unsqueeze(1)
    codes = torch.where(choose, new.codes, old.codes)
    bits = torch.where(choose, new.scales.bits, old.scales.bits)
    scales = Scales(bits, old.scales.global_scale, old.scales.format)
    return QuantizedTensor(codes, scales), bool(better.any())
