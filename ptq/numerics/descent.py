"""Coordinate descent on codes: a refinement after any algorithm, with the scales fixed."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ptq.numerics.factor import damped
from ptq.numerics.tensor import QuantizedTensor


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    quantized: QuantizedTensor,
    *,
    sweeps: int = 4,
    damping: float = 0.01,
    block_size: int = 128,
    damped_hessian: Float[Tensor, "in in"] | None = None,
    within: tuple[Float32[Tensor, "out in"], Float32[Tensor, "out in"]] | None = None,
) -> QuantizedTensor:
    """Move one code after the other to the exact minimiser of ``tr(Δ H̃ Δᵀ)`` given all others,
    until nothing changes.

    The loss under the damped Hessian never rises. A code moves only if its own minimiser lies on
    another grid point. Blocks of columns keep their gradient up to date among themselves; the rest
    is updated by one product per block. ``damped_hessian`` hands in what was made before of the
    Hessian and the damping. ``within``, the smallest and the largest value of the element that
    each code may stand for, bounds the moves.

    Raises:
        ValueError: see :func:`ptq.numerics.factor.damped`.
    """
    fmt = quantized.format
    h = damped(hessian, damping).float() if damped_hessian is None else damped_hessian.float()
    steps = quantized.scales.step().T.repeat_interleave(fmt.size(len(h)), dim=0)  # (in, out)
    values = fmt.element.decode(quantized.codes).T.contiguous()
    gradient = h @ (weight.float().T - values * steps)  # H̃ Δᵀ with Δ = W - Ŵ
    diagonal = h.diagonal().tolist()
    now, best = torch.empty_like(values[0]), torch.empty_like(values[0])  # of one column
    bounds = None if within is None else [bound.T.contiguous() for bound in within]
    for _ in range(sweeps):
        changed = False
        for start in range(0, len(h), block_size):
            stop = min(start + block_size, len(h))
            moves = torch.empty_like(values[start:stop])
            block = h[start:stop, start:stop]
            for j in range(start, stop):
                step, value, move = steps[j], values[j], moves[j - start]
                torch.mul(value, step, out=now)
                torch.div(gradient[j], diagonal[j], out=best).add_(now).div_(step)
                fmt.element.round_(best)
                if bounds is not None:
                    best.clamp_(bounds[0][j], bounds[1][j])
                torch.sub(best, value, out=move).mul_(step)
                value.copy_(best)
                gradient[start:stop].addr_(block[:, j - start], move, alpha=-1)
            if moves.count_nonzero():
                changed = True
                gradient[:start].addmm_(h[:start, start:stop], moves, alpha=-1)
                gradient[stop:].addmm_(h[stop:, start:stop], moves, alpha=-1)
        if not changed:
            break
    return QuantizedTensor(fmt.element.encode(values.T.contiguous()), quantized.scales)
