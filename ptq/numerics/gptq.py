"""GPTQ (arXiv 2210.17323) on block-scaled grids, as MR-GPTQ (arXiv 2509.23202) uses it, with scales
chosen inside the sweep.

Columns are rounded one at a time; each rounding error is paid back by the columns not yet rounded,
in the proportions that the inverse Hessian gives. The weight is held transposed, so that a column
is a contiguous row of memory, and updates are applied at three distances: at once within a group,
after a group within a block, after a block to the rest. Every such blocking gives the same result
up to float32 rounding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

from ptq.numerics.factor import Factor, factorize
from ptq.numerics.scales import Grid, candidates, squared_error
from ptq.numerics.tensor import QuantizedTensor, Scales

# Scale codes tried for a group inside the sweep, around the absmax code of the compensated weights:
# (below, above).
TRIAL_WINDOW = {
    torch.float8_e4m3fn: (6, 7),
    torch.float8_e8m0fnu: (1, 1),
    torch.bfloat16: (12, 2),
}
IN_LOOP = ("mse", "trial")


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    grid: Grid,
    *,
    order: str = "group",
    in_loop: str | None = None,
    weighted: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    factor: Factor | None = None,
) -> QuantizedTensor:
    """Quantize ``weight`` so that ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` is small, for ``hessian = E[x xᵀ]``
    (G24–G26).

    Rows are independent given the Hessian, nothing is modified, and the result keeps the stored
    order of the columns.

    Args:
        grid: format, global scale and rule. The rule chooses all scales before the sweep unless
            ``in_loop`` is given.
        order: ``natural``, ``act`` or ``group`` (:func:`ptq.numerics.factor.column_order`).
        in_loop: choose the scales of a group when the sweep enters it, from the compensated
            weights: ``mse`` by squared error weighted with 1/U², ``trial`` by running the sweep
            inside the group once for every candidate scale.
        weighted: static rules that search weight the columns by the diagonal of the Hessian.
        damping: added to the diagonal, as a share of its mean.
        factor: of this Hessian, order and damping, if it was made before: rows may come in slices.

    Raises:
        IndefiniteHessian: see :func:`ptq.numerics.factor.factorize`.
        ValueError: a Hessian without activity or not finite, an unknown option, or ``in_loop`` with
            an order that tears groups apart.
    """
    if in_loop is not None and (in_loop not in IN_LOOP or order == "act"):
        raise ValueError(
            f"in-loop scales {in_loop!r} with order {order!r}: choose from {', '.join(IN_LOOP)} "
            "and natural or group"
        )
    fmt = grid.format
    weight, size = weight.float(), fmt.size(weight.shape[1])
    factor = factor or factorize(hessian, size, order=order, damping=damping)
    perm = factor.perm
    static = (
        None if in_loop else grid.scales(weight, hessian.diagonal().float() if weighted else None)
    )
    sweep = _Sweep(weight.T[perm].contiguous(), factor.upper, grid)
    groups = weight.shape[1] // size
    bits = torch.zeros(groups, weight.shape[0], dtype=fmt.bits_dtype, device=weight.device)
    steps = None if static is None else static.step().T.contiguous()[perm // size]  # (in, out)

    if static is not None:  # groups are only where scales are chosen
        size = min(size, block_size)
    block_size = max(block_size // size, 1) * size
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        for first in range(start, stop, size):
            last = min(first + size, stop)
            if steps is not None:
                sweep.round(first, last, steps[first:last])
            else:
                bits[perm[first] // size] = sweep.choose(first, last, in_loop == "trial")
            sweep.pay(first, last, last, stop)
        sweep.pay(start, stop, stop, weight.shape[1])

    codes = torch.empty_like(sweep.rungs, dtype=torch.uint8)
    codes[perm] = fmt.element.encode(sweep.rungs)
    scales = static or Scales(bits.T.contiguous(), grid.global_scale, fmt)
    return QuantizedTensor(codes.T.contiguous(), scales)


@dataclass
class _Sweep:
    """The state of one sweep over the columns, everything transposed and permuted."""

    weight: Float32[Tensor, "in out"]  # compensated so far; consumed by the sweep
    factor: Float32[Tensor, "in in"]
    grid: Grid

    def __post_init__(self) -> None:
        self.errors = torch.empty_like(self.weight)
        self.rungs = torch.empty_like(
            self.weight
        )  # values of the element; turned into codes at the end, exactly
        self.diagonal = self.factor.diagonal().tolist()
        # an index is as dear as an operation on a column
        self.columns = list(
            zip(*(t.unbind() for t in (self.weight, self.rungs, self.errors)), strict=True)
        )

    def round(self, first: int, last: int, steps: Float32[Tensor, "size out"]) -> None:
        """Round columns ``first`` … ``last``-1, each error paid back within them."""
        element = self.grid.format.element
        for j in range(first, last):  # in place: a column costs little more than its calls
            step, weight, rungs, error = steps[j - first], *self.columns[j]
            element.round_(torch.div(weight, step, out=rungs))
            torch.sub(weight, torch.mul(rungs, step, out=error), out=error).div_(self.diagonal[j])
            if j + 1 < last:
                self.weight[j + 1 : last].addr_(self.factor[j, j + 1 : last], error, alpha=-1)

    def choose(self, first: int, last: int, trial: bool) -> Integer[Tensor, "out"]:
        """Choose the scales of a group from its compensated weights, round it, and return their
        bits."""
        fmt, t = self.grid.format, self.grid.global_scale
        group = self.weight[first:last]
        tried = candidates(
            group.abs().amax(0), fmt, t, TRIAL_WINDOW[fmt.scale_dtype]
        )  # (count, out)
        steps = fmt.decode_scale(tried) * t
        if not trial:
            weights = 1 / self.factor.diagonal()[first:last].square()
            losses = torch.stack(
                [
                    squared_error(group.T.unsqueeze(1), fmt, s.unsqueeze(1), weights.unsqueeze(0))[
                        :, 0
                    ]
                    for s in steps
                ]
            )
            best = losses.argmin(0, keepdim=True)
            self.round(first, last, steps.gather(0, best).expand(last - first, -1))
            return tried.gather(0, best)[0]
        # every candidate sweeps its own copy of the group; the cheapest copy becomes the result
        copies = group.unsqueeze(1).repeat(1, len(steps), 1)  # (size, count, out)
        rungs, errors = torch.empty_like(copies), torch.empty_like(copies)
        flat = copies.flatten(1)
        for j in range(last - first):
            copy, error = copies[j], errors[j]
            rung = fmt.element.round_(torch.div(copy, steps, out=rungs[j]))
            torch.sub(copy, torch.mul(rung, steps, out=error), out=error)
            error.div_(self.diagonal[first + j])
            if j + 1 < last - first:
                flat[j + 1 :].addr_(
                    self.factor[first + j, first + j + 1 : last], error.flatten(), alpha=-1
                )
        # the copies have been used up: their memory takes the squares
        best = torch.square(errors, out=copies).sum(0).argmin(0, keepdim=True)
        index = best.unsqueeze(0).expand(len(copies), 1, -1)
        self.rungs[first:last] = rungs.gather(1, index)[:, 0]
        self.errors[first:last] = errors.gather(1, index)[:, 0]
        return tried.gather(0, best)[0]

    def pay(self, first: int, last: int, start: int, stop: int) -> None:
        """Charge the errors of columns ``first`` … ``last``-1 to columns ``start`` … ``stop``-1."""
        if start < stop:
            self.weight[start:stop].addmm_(
                self.factor[first:last, start:stop].T, self.errors[first:last], alpha=-1
            )
