"""Task vectors and how they are merged: δ = fine-tuned - base, one matrix of every task.

Task arithmetic (arXiv 2212.04089) adds them. TSV-Merge (arXiv 2412.00081) keeps the largest
singular values of each and turns the singular vectors of all tasks until they are orthogonal, so
that no task changes what another wrote. R-TSVM (arXiv 2502.06876) weights tasks by the outliers of
their changes and gives them ranks by their sparsity; its weights are not those of here, which only
share the idea: see :func:`outlier_weights` and :func:`rank_shares`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Of the largest singular value, and of the largest eigenvalue of a Gram matrix: what is below is
# rounding of the products, not a direction.
NOISE, NEARLY_DEPENDENT = 1e-7, 1e-9
OUTLIER = 3.0  # standard deviations of |δ| above its mean


def outlier_weights(deltas: Sequence[Float[Tensor, "*s"]]) -> list[float]:
    """A weight for each task, of mean 1: in proportion to the share of ``Σ|δ|`` that lies in
    outliers, ``|δ| > mean + 3 standard deviations``.

    What a task changed on purpose is heavy-tailed, drift is not. 1 for all where no task has any.
    """
    shares = []
    for delta in deltas:
        size = delta.double().abs()
        limit = size.mean() + OUTLIER * size.std(unbiased=False)
        total = float(size.sum())
        shares.append(float(size[size > limit].sum()) / total if total else 0.0)
    total = sum(shares)
    return [len(shares) * share / total if total else 1.0 for share in shares]


def rank_shares(deltas: Sequence[Float[Tensor, "*s"]]) -> list[float]:
    """The share of all ranks that each task gets, of sum 1: in proportion to the density of its
    change, ``(Σ|δ|)² / (n Σδ²)``, which is 1 if all entries are equally large and 1/n if only one
    is not zero."""
    densities = []
    for delta in deltas:
        size = delta.double().abs()
        energy = float(size.square().sum())
        densities.append(float(size.sum()) ** 2 / (size.numel() * energy) if energy else 0.0)
    total = sum(densities)
    return [d / total if total else 1 / len(densities) for d in densities]


def arithmetic(deltas: Sequence[Float[Tensor, "*s"]]) -> Float64[Tensor, "*s"]:
    """``Σ δ``, in float64."""
    return torch.stack([delta.double() for delta in deltas]).sum(0)


def singular(
    deltas: Sequence[Float[Tensor, "out in"]],
    *,
    shares: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Float64[Tensor, "out in"]:
    """``U Σ Vᵀ`` of the kept singular vectors of all tasks, made orthonormal (TSV-Merge).

    The nearest orthonormal vectors to U are ``U (UᵀU)^-½``. Vectors that tasks share make UᵀU
    singular; its pseudo-inverse then counts them once: equal tasks merge to what each of them is.

    Args:
        shares: of the ranks of a matrix, by task; equal ones if None.
        weights: of the singular values, by task; 1 if None.

    Law: the singular values of the result are the weighted ones that were kept, if no two tasks
    share a direction.
    """
    count, full = len(deltas), min(deltas[0].shape)
    shares = shares or [1 / count] * count
    weights = weights or [1.0] * count
    lefts, values, rights = [], [], []
    for delta, share, weight in zip(deltas, shares, weights, strict=True):
        left, value, right = _largest(delta, max(1, round(share * full)))
        lefts.append(left)
        values.append(weight * value)
        rights.append(right)
    left, right = _orthonormal(torch.cat(lefts, 1)), _orthonormal(torch.cat(rights, 1))
    return (left * torch.cat(values)) @ right.T


def _largest(
    delta: Float[Tensor, "out in"], rank: int
) -> tuple[Float64[Tensor, "out size"], Float64[Tensor, "size"], Float64[Tensor, "in size"]]:
    """The largest singular values, at most ``rank``, and their vectors; those that rounding hides
    are left out. By the Gram matrix of the shorter side: several times as fast as a decomposition
    of the whole."""
    wide = delta.double()
    if wide.shape[0] < wide.shape[1]:
        right, values, left = _largest(wide.T, rank)
        return left, values, right
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    values = squares.clamp(min=0).sqrt().flip(0)[:rank]
    live = values > NOISE * values[:1]
    values, right = values[live], vectors.flip(1)[:, :rank][:, live]
    return wide @ right / values, values, right


def _orthonormal(vectors: Float64[Tensor, "rows size"]) -> Float64[Tensor, "rows size"]:
    """``U (UᵀU)^-½``, the pseudo-inverse where vectors depend on each other."""
    squares, basis = torch.linalg.eigh(vectors.T @ vectors)
    live = squares > NEARLY_DEPENDENT * squares[-1:]
    basis = basis[:, live]
    return vectors @ (basis / squares[live].sqrt()) @ basis.T
