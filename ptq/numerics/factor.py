"""The damped Hessian and the triangular factor that tells GPTQ how to pay back rounding errors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor


class IndefiniteHessian(ValueError):
    """The damped Hessian has no Cholesky factor; more damping may help."""


@dataclass(frozen=True)
class Factor:
    """The order in which columns are rounded, and U with ``Uᵀ U = H̃⁻¹`` for the damped Hessian in
    that order."""

    perm: Int64[Tensor, "in"]
    upper: Float32[Tensor, "in in"]


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float64[Tensor, "in in"]:
    """``H + damping · mean(diag H) · I`` in float64, inputs that were never seen getting the mean
    diagonal (G15).

    A silent input is not a dead one: its column is rounded to nearest and neither gives nor takes
    compensation.

    Raises:
        ValueError: H has entries that are not finite (no damping repairs that), or no input was
            ever active.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(
            "the Hessian is not finite: the calibration activations overflowed or contain NaN"
        )
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        raise ValueError(
            "no tokens reached this layer during calibration; use more samples or leave the layer "
            "out"
        )
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + damping * mean)
    return h


def factorize(
    hessian: Float[Tensor, "in in"], group_size: int, *, order: str, damping: float
) -> Factor:
    """The factor that all rows of all layers with this input share.

    Besides the argument, at most two float64 matrices of this size and the float32 result are
    alive.

    Raises:
        IndefiniteHessian: the damped Hessian is not positive definite.
        ValueError: see :func:`damped` and :func:`column_order`.
    """
    h = damped(hessian, damping)
    perm = column_order(h.diagonal(), group_size, order)
    backwards = perm.flip(0)
    lower = _cholesky(h[backwards.unsqueeze(1), backwards])
    del h
    return Factor(perm, _inverse(lower).flip(0, 1))


def _cholesky(matrix: Float64[Tensor, "in in"]) -> Float64[Tensor, "in in"]:
    """Lower triangular L with ``L Lᵀ = matrix``, in the memory of ``matrix``."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if int(info):
        raise IndefiniteHessian(
            "the damped Hessian is not positive definite; raise the damping or calibrate on more "
            "tokens"
        )
    return matrix


def _inverse(lower: Float64[Tensor, "in in"], block: int = 1024) -> Float32[Tensor, "in in"]:
    """``L⁻¹`` rounded to float32, some columns at a time: what lies above the diagonal is neither
    computed nor held in float64."""
    size = len(lower)
    inverse = torch.zeros(size, size, dtype=torch.float32, device=lower.device)
    for start in range(0, size, block):
        stop = min(start + block, size)
        columns = torch.zeros(size - start, stop - start, dtype=lower.dtype, device=lower.device)
        columns.fill_diagonal_(1)
        inverse[start:, start:stop] = torch.linalg.solve_triangular(
            lower[start:, start:], columns, upper=False
        )
    return inverse


def column_order(diagonal: Float[Tensor, "in"], group_size: int, order: str) -> Int64[Tensor, "in"]:
    """The order in which columns are rounded (G18), ties in their stored order.

    ``natural``: as stored. ``act``: by falling mean square of the input. ``group``: groups by their
    mean, and by input inside a group, so that the columns of a group stay together.

    Raises:
        ValueError: unknown order.
    """
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    if order == "group":
        groups = diagonal.unflatten(0, (-1, group_size))
        first = torch.argsort(groups.mean(1), descending=True, stable=True)
        inside = torch.argsort(groups, dim=1, descending=True, stable=True)
        return (first.unsqueeze(1) * group_size + inside[first]).flatten()
    raise ValueError(f"unknown column order {order!r}; choose from natural, act, group")
