"""The damped Hessian and the triangular factor that tells GPTQ how to pay back rounding errors."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


class IndefiniteHessian(ValueError):
    """The damped Hessian has no Cholesky factor; more damping may help."""


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float64[Tensor, "in in"]:
    """``H + damping · mean(diag H) · I`` in float64, inputs that were never seen getting the mean diagonal (G15).

    A silent input is not a dead one: its column is rounded to nearest and neither gives nor takes compensation.

    Raises:
        ValueError: H has entries that are not finite (no damping repairs that), or no input was ever active.
    """
    h = hessian.double()
    if not torch.isfinite(h).all():
        raise ValueError("the Hessian is not finite: the calibration activations overflowed or contain NaN")
    h = h.clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        raise ValueError("no tokens reached this layer during calibration; use more samples or leave the layer out")
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + damping * mean)
    return h


def inverse_factor(damped_hessian: Float64[Tensor, "in in"]) -> Float64[Tensor, "in in"]:
    """Upper triangular U with ``Uᵀ U = H⁻¹``, by one Cholesky factorisation and one triangular inverse.

    With V the upper triangular factor of ``H = V Vᵀ`` (Cholesky of H with both axes reversed), ``U = V⁻¹``. Half the
    work of the usual Cholesky, inverse, Cholesky, and the same U. In float64 because cond(H) may reach 1 + in/damping
    (G12).

    Raises:
        IndefiniteHessian: the matrix is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(damped_hessian.flip(0, 1))
    if int(info):
        raise IndefiniteHessian(
            "the damped Hessian is not positive definite; raise the damping or calibrate on more tokens"
        )
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def column_order(diagonal: Float[Tensor, "in"], group_size: int, order: str) -> Int64[Tensor, "in"]:
    """The order in which columns are rounded (G18), ties in their stored order.

    ``natural``: as stored. ``act``: by falling mean square of the input. ``group``: groups by their mean, and by input
    inside a group, so that the columns of a group stay together.

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
