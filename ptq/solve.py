"""One input group: rotation, grid, algorithm, refinement, and the report of what it cost.

Layers that read the same activation share its Hessian, its rotation, their global scale and the factorisation, so their
weights
are solved as one matrix with the rows stacked: rows are independent given the Hessian (G25).
"""

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ptq.algorithms import IndefiniteHessian, coordinate_descent, gptq, rtn
from ptq.inputs import quantize_inputs
from ptq.metrics import output_error
from ptq.recipe import Recipe
from ptq.rotation import Rotation
from ptq.scales import Grid, alternate
from ptq.tensor import QuantizedTensor, Scales

# A sweep with in-loop scales meets compensated weights, which may exceed the original maximum (G20); costs at most 0.01
# dB (F15).
IN_LOOP_MARGIN = 1.5
# A static global scale of activations leaves room for tokens larger than any seen in calibration (G32).
INPUT_MARGIN = 2.0
MAX_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Layers that read the same input, and what calibration knows about that input.

    Attributes:
        names: full module names.
        weights: one (out, in) tensor per layer, any float dtype.
        hessian: E[x xᵀ], not rotated, over the tokens that calibration solves with.
        holdout: the same over tokens kept aside, or None.
        amax: max |x R| per rotation size.
        sample: (tokens, in) some inputs, for the error of quantized activations; may be empty.
        tokens: that reached the layers; ``topped_up`` says that the Hessian has others as well.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    hessian: Tensor
    holdout: Tensor | None
    amax: dict[int, Tensor]
    sample: Tensor
    tokens: int
    recipe: Recipe
    topped_up: bool = False

    @property
    def cost(self) -> int:
        """Work in multiply-adds: the sweep over all rows and the factorisation."""
        features = self.weights[0].shape[1]
        return features * features * (sum(len(w) for w in self.weights) + features)


@dataclass(frozen=True)
class Solved:
    """A quantized layer, on the device where it was solved."""

    name: str
    weight: QuantizedTensor
    rotation: Rotation
    input_scale: Tensor | None
    report: dict[str, object] = field(compare=False)

    def to(self, device: torch.device | str) -> "Solved":
        """The same on another device."""
        scales = self.weight.scales
        moved = Scales(scales.bits.to(device), scales.global_scale.to(device), scales.format)
        scale = None if self.input_scale is None else self.input_scale.to(device)
        return replace(self, weight=QuantizedTensor(self.weight.codes.to(device), moved), input_scale=scale)


@torch.no_grad()
def solve(job: Job) -> list[Solved]:
    """Quantize the layers of a group, with the rotation of least measured loss if the recipe leaves the choice.

    Raises:
        ValueError: naming the layer: features that do not divide, weights or a Hessian that are not finite or stay
        indefinite at
            the largest damping, no tokens.
    """
    first = job.names[0]
    try:
        for name, weight in zip(job.names, job.weights, strict=True):
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"the weight of {name} has entries that are NaN or infinite; the source checkpoint is damaged"
                )
        sizes = job.recipe.rotations(job.weights[0].shape[1])
        attempts = [_attempt(job, size) for size in sizes]
    except ValueError as error:
        raise ValueError(f"{first}: {error}") from error
    return min(attempts, key=lambda attempt: attempt[0])[1]


def _attempt(job: Job, size: int) -> tuple[float, list[Solved]]:
    """(loss to choose by, results) with one rotation."""
    start = time.perf_counter()
    recipe, fmt, rotation = job.recipe, job.recipe.fmt, Rotation(size)
    weight = torch.cat([rotation.exact(w) for w in job.weights])
    hessian = rotation.rotate_hessian(job.hessian)
    holdout = None if job.holdout is None else rotation.rotate_hessian(job.holdout)

    amax = weight.abs().amax()
    static_rule = recipe.scales if recipe.in_loop is None else "mse"
    grid = Grid(fmt, fmt.global_scale(amax, 1.0 if recipe.in_loop is None else IN_LOOP_MARGIN), static_rule)
    if recipe.global_scale == "alternating":
        grid = alternate(weight, grid, hessian.diagonal().float() if recipe.weighted else None)
    nearest = rtn(
        weight, hessian, grid, weighted=recipe.weighted
    )  # on the same global scale: layers may mix (G23, G34)
    quantized, damping = nearest, 0.0
    if recipe.algorithm == "gptq":
        quantized, damping = _with_escalation(weight, hessian, grid, recipe)
    if recipe.descent:
        quantized = coordinate_descent(
            weight, hessian, quantized, sweeps=recipe.descent, damping=damping or recipe.damping
        )

    input_scale, input_error = None, 0.0
    if recipe.quantize_inputs:
        if fmt.has_global_scale and recipe.input_scale == "static":
            input_scale = fmt.global_scale(job.amax[size].float(), INPUT_MARGIN)
        input_error = _input_error(job.sample, weight, recipe, rotation, input_scale)

    seconds = (time.perf_counter() - start) / len(job.names)
    solved, losses, row = [], [], 0
    approximation, rounded = quantized.dequantize(), nearest.dequantize()
    judge = hessian if holdout is None else holdout
    for name, layer in zip(job.names, job.weights, strict=True):
        rows = slice(row, row + len(layer))
        error = float(output_error(weight[rows], approximation[rows], hessian))
        rtn_error = float(output_error(weight[rows], rounded[rows], hessian))
        keep = error < rtn_error or quantized is nearest  # G23
        result = (quantized if keep else nearest).rows(rows.start, rows.stop)
        chosen = (approximation if keep else rounded)[rows]
        losses.append(float(output_error(weight[rows], chosen, judge)))
        report = {
            "layer": name,
            "out": len(layer),
            "in": weight.shape[1],
            "format": fmt.name,
            "rotation": size,
            "algorithm": recipe.algorithm if keep else "rtn",
            "damping": damping,
            "error": error if keep else rtn_error,
            "held_out_error": None if holdout is None else losses[-1],
            "rtn_error": rtn_error,
            "input_error": input_error if recipe.quantize_inputs else None,
            "tokens": job.tokens,
            "topped_up": job.topped_up,
            "seconds": seconds,
        }
        solved.append(Solved(name, result, rotation, input_scale, report))
        row = rows.stop
    return sum(losses) / len(losses) + input_error, solved


def _with_escalation(weight: Tensor, hessian: Tensor, grid: Grid, recipe: Recipe) -> tuple[QuantizedTensor, float]:
    """GPTQ with the damping raised tenfold until the Hessian has a factor (G13); the damping used is part of the
    report."""
    damping = recipe.damping
    while True:
        try:
            quantized = gptq(
                weight,
                hessian,
                grid,
                order=recipe.order,
                in_loop=recipe.in_loop,
                weighted=recipe.weighted,
                damping=damping,
            )
            return quantized, damping
        except IndefiniteHessian:
            if damping >= MAX_DAMPING:
                raise
            damping = min(10 * damping, MAX_DAMPING)


def _input_error(sample: Tensor, weight: Tensor, recipe: Recipe, rotation: Rotation, scale: Tensor | None) -> float:
    """``E‖(Q(xR) - xR) W'ᵀ‖² / E‖x Wᵀ‖²`` on the sample: what quantized activations alone cost."""
    exact = rotation.exact(sample).float()
    noise = quantize_inputs(sample, recipe.fmt, rotation, scale, recipe.input_rule).dequantize() - exact
    signal = (exact @ weight.T).double().square().sum()
    return float((noise @ weight.T).double().square().sum() / signal.clamp(min=1e-300))
