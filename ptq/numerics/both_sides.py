"""Rounding errors paid back on both sides of a weight: by later columns, and by later rows.

GPTQ makes ``tr(Δ H Δᵀ)`` small, in which rows are independent: every output of a layer counts
alike. What the whole model loses is, to second order and with a Kronecker product for its Fisher
matrix, ``tr(G Δ H Δᵀ)`` with ``G = E[g gᵀ]`` of the gradient g by the layer's output (K-FAC, arXiv
1503.05671; rounding by it: YAQA, arXiv 2505.22988). Then errors of rows whose gradients go together
can cancel: given those of earlier rows, the best real-valued ones of later rows are known, and H
drops out of them (``-G₂₂⁻¹ G₂₁ Δ₁``). So blocks of rows are solved by any algorithm of columns, one
block after the other, each for a target that makes up for the blocks before it; then sweeps of
descent, each block for a target that makes up for all others. Errors within a block do not see each
other.

G is block diagonal (A5), of at most ``WIDEST`` rows a block, so that it takes no more memory than
the weights of a model; its blocks are independent and go in step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ptq.numerics.tensor import QuantizedTensor

WIDEST = 2048
# Rows solved at a time, of every block of G: the first ``TOGETHER`` alone, and later, where less is
# to be gained, this part of those before. Bundled model, NVFP4 W4A16 (.0072 without): KL .0054 with
# 32 everywhere, .0053 with 16 and a quarter, .0054 with 16 and a half in 2/3 of the time.
TOGETHER, GROWTH = 16, 0.5
# Share of the mean diagonal that is added to G.
DAMPING = 0.01
# Of descent afterwards: .0052 with one, .0053 with four.
SWEEPS = 1

# the blocks of G, each (rows, rows) of its rows, in their order
Costs = Sequence[Tensor]
Rows = Float[Tensor, "out in"]


def parts(rows: int) -> list[slice]:
    """The rows of every block of G, equally many but for the last."""
    count = max(-(-rows // WIDEST), 1)
    size = max(-(-rows // count), 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def cost(delta: Rows, hessian: Float[Tensor, "in in"], costs: Costs) -> Float[Tensor, ""]:
    """``tr(G Δ H Δᵀ)`` in float64, products in the dtype of the Hessian."""
    total = delta.new_zeros((), dtype=torch.float64)
    for rows, g in zip(_slices(costs), costs, strict=True):
        own = delta[rows].to(hessian.dtype)
        total += ((g.to(hessian.dtype) @ own).double() * (own @ hessian)).sum()
    return total


def _slices(costs: Costs) -> list[slice]:
    ends = list(accumulate(map(len, costs)))
    return [slice(end - len(g), end) for end, g in zip(ends, costs, strict=True)]


def both_sides(
    weight: Rows,
    costs: Costs,
    solve: Callable[[Rows], QuantizedTensor],
    descend: Callable[[Rows, QuantizedTensor], QuantizedTensor],
    *,
    sweeps: int = SWEEPS,
    together: int = TOGETHER,
    damping: float = DAMPING,
) -> QuantizedTensor:
    """Quantize ``weight`` so that ``tr(G Δ H Δᵀ)`` is small, for the H that ``solve`` and
    ``descend`` know.

    Rows that cost most go first. Nothing is modified.

    Args:
        costs: the blocks of G, symmetric, of the rows that :func:`parts` says, any float dtype. A
            block of zeros (rows that nothing depends on) counts as the identity.
        solve: (rows, in) → codes and scales.
        descend: better codes for a target, starting from what there is; scales stay.
        together: rows of every block of G that are solved at a time.
        damping: added to the diagonal of G, as a share of its mean.

    Raises:
        ValueError: a G that is not finite, or what ``solve`` raises.
    """
    weight = weight.float()
    blocks = [
        _Block.of(rows, g.to(weight.device), damping)
        for rows, g in zip(_slices(costs), costs, strict=True)
    ]
    longest = max(len(block.rows) for block in blocks)
    steps = [
        [(block, part) for block in blocks if part.start < len(block.rows)]
        for part in growing(longest, together)
    ]
    rows = [torch.cat([block.rows[part] for block, part in step]) for step in steps]
    target, delta = weight.clone(), torch.zeros_like(weight)
    found: list[QuantizedTensor] = []
    for step, taken in zip(steps, rows, strict=True):
        found.append(solve(target[taken]))
        rounded = found[-1].dequantize()
        delta[taken] = rounded - weight[taken]
        missed = (rounded - target[taken]).split([len(block.rows[part]) for block, part in step])
        for (block, part), error in zip(step, missed, strict=True):
            target[block.rows[part.stop :]] += block.paid(part, error)
    for _ in range(sweeps):
        moved = False
        for index, (step, taken) in enumerate(zip(steps, rows, strict=True)):
            best = torch.cat([block.best(part, delta[block.rows]) for block, part in step])
            better = descend(weight[taken] + best, found[index])
            moved = moved or not torch.equal(better.codes, found[index].codes)
            found[index] = better
            delta[taken] = better.dequantize() - weight[taken]
        if not moved:
            break
    return _in_order(found, torch.cat(rows).argsort())


def growing(rows: int, together: int = TOGETHER) -> list[slice]:
    """Which rows of a block of G are solved together, in their order; the last may end beyond."""
    parts, start = list[slice](), 0
    while start < rows:
        stop = start + max(together, int(start * GROWTH))
        parts.append(slice(start, stop))
        start = stop
    return parts


@dataclass(frozen=True)
class _Block:
    """Rows that G connects, those that cost most first; G of them, damped, and U with ``Uᵀ U =
    G⁻¹``."""

    rows: Int64[Tensor, " rows"]
    g: Float32[Tensor, "rows rows"]
    upper: Float32[Tensor, "rows rows"]

    @classmethod
    def of(cls, rows: slice, g: Tensor, damping: float) -> "_Block":
        if not g.isfinite().all():
            raise ValueError("gradients of its outputs are not finite")
        g = g.double()
        mean = g.diagonal().mean()
        if not mean > 0:
            g, mean = torch.eye(len(g), dtype=g.dtype, device=g.device), 1.0
        order = g.diagonal().argsort(descending=True, stable=True)
        g = g[order][:, order]
        g.diagonal().add_(damping * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(g))
        upper = torch.linalg.cholesky(inverse, upper=True)
        return cls(rows.start + order, g.float(), upper.float())

    def paid(self, part: slice, error: Float32[Tensor, "part in"]) -> Float32[Tensor, "later in"]:
        """What rows after ``part`` should be more, for errors of ``part`` beyond what earlier rows
        asked of it: ``-G₂₂⁻¹ G₂₁ E``, of the rows from its start on."""
        own = self.upper[part, part]
        scaled = torch.linalg.solve_triangular(own.T, error, upper=False)
        return self.upper[part, part.stop :].T @ scaled

    def best(self, part: slice, delta: Float32[Tensor, "rows in"]) -> Float32[Tensor, "part in"]:
        """The errors of ``part`` that would cost least, given those of all other rows."""
        own = self.g[part, part]
        others = self.g[part] @ delta - own @ delta[part]
        return -torch.cholesky_solve(others, torch.linalg.cholesky(own))


def _in_order(found: Sequence[QuantizedTensor], order: Int64[Tensor, " rows"]) -> QuantizedTensor:
    """All rows of some results, in another order."""
    first = found[0].scales
    bits = torch.cat([result.scales.bits for result in found])[order]
    codes = torch.cat([result.codes for result in found])[order]
    return QuantizedTensor(codes, replace(first, bits=bits))
