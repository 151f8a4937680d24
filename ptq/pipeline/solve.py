"""One input group: rotation, grid, algorithm, refinement, and the report of what it cost.

Layers that read the same activation share its Hessian, its rotation, their global scale and the
factorisation, and rows are independent given the Hessian (G25): what is made of the Hessian is made
once, and rows are solved some at a time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import fused_groups
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.algorithms import Prepared, Problem, prepare
from ptq.numerics.both_sides import Costs, cost
from ptq.numerics.errors import quadratic_form, relative
from ptq.numerics.nested import drop
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, alternate
from ptq.numerics.tensor import QuantizedTensor, Scales
from ptq.pipeline.recipe import Recipe

# A sweep with in-loop scales meets compensated weights, which may exceed the original maximum
# (G20); costs at most 0.01 dB (F15).
IN_LOOP_MARGIN = 1.5
# A static global scale of activations leaves room for tokens larger than any seen in calibration
# (G32).
INPUT_MARGIN = 2.0
# Layers smaller than this part of their siblings get a global scale of their own.
APART = 64
# Elements of a weight that are solved at a time: 64 MB in float32, of which about ten copies exist.
PART_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """Layers that read the same input, and what calibration knows about that input.

    Attributes:
        names: full module names.
        weights: one (out, in) tensor per layer, any float dtype.
        hessian: E[x xᵀ], not rotated, over the tokens that calibration solves with; None where it
            was not measured, and then there is no ``holdout`` either.
        holdout: the same over tokens kept aside, or None.
        amax: max |x R| per rotation size.
        sample: (tokens, in) some inputs, for the error of quantized activations; may be empty.
        tokens: that reached the layers; ``topped_up`` says that the Hessian has others as well.
        costs: of every layer's outputs (:mod:`ptq.numerics.both_sides`), None where all count
            alike; empty if that holds for all layers.
    """

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    hessian: Tensor | None
    holdout: Tensor | None
    amax: dict[int, Tensor]
    sample: Tensor
    tokens: int
    recipe: Recipe
    topped_up: bool = False
    costs: tuple[Costs | None, ...] = ()


@dataclass(frozen=True)
class Solved:
    """A quantized layer, on the device where it was solved."""

    name: str
    weight: QuantizedTensor
    rotation: Rotation
    input_scale: Tensor | None
    report: LayerReport = field(compare=False)

    def to(self, device: torch.device | str) -> "Solved":
        """The same on another device."""
        scales = self.weight.scales
        moved = Scales(scales.bits.to(device), scales.global_scale.to(device), scales.format)
        scale = None if self.input_scale is None else self.input_scale.to(device)
        return replace(
            self, weight=QuantizedTensor(self.weight.codes.to(device), moved), input_scale=scale
        )


@torch.no_grad()
def solve(job: Job) -> list[Solved]:
    """Quantize the layers of a group, with the rotation of least measured loss if the recipe leaves
    the choice.

    Raises:
        ValueError: naming the layer: features that do not divide, weights or a Hessian that are not
            finite, a Hessian that stays indefinite at the largest damping, no tokens.
    """
    first = job.names[0]
    try:
        for name, weight in zip(job.names, job.weights, strict=True):
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"the weight of {name} has entries that are NaN or infinite; the source "
                    "checkpoint is damaged"
                )
        if job.tokens and job.hessian is not None and not job.hessian.any():
            job = replace(job, recipe=_nearest(job.recipe))
        solved = [result for part in _by_size(job) for result in _best(part)]
    except ValueError as error:
        raise ValueError(f"{first}: {error}") from error
    order = {name: index for index, name in enumerate(job.names)}
    return sorted(solved, key=lambda result: order[result.name])


def _by_size(job: Job) -> list[Job]:
    """The job in parts that can share a global scale.

    Layers that an engine fuses have to. Others may be so small beside those that read the same
    input that the scales of their groups would be subnormal, or the smallest there is: below 1/64
    of the largest they get a global scale of their own (E4M3 has a normal range of 2^14.8).
    """
    if len(job.names) == 1 or not job.recipe.fmt.has_global_scale:
        return [job]
    fused = fused_groups(job.names)
    together = {name for names in fused for name in names}
    families = [*fused, *([name] for name in job.names if name not in together)]
    largest = dict(zip(job.names, (float(w.abs().amax()) for w in job.weights), strict=True))
    limit = max(largest.values()) / APART
    small = [family for family in families if 0 < max(largest[name] for name in family) < limit]
    alone = {name for family in small for name in family}
    rest = [name for name in job.names if name not in alone]
    return [_part(job, names) for names in ([rest] if rest else []) + small]


def _part(job: Job, names: Sequence[str]) -> Job:
    places = [job.names.index(name) for name in names]
    return replace(
        job,
        names=tuple(names),
        weights=tuple(job.weights[place] for place in places),
        costs=tuple(job.costs[place] for place in places) if job.costs else (),
    )


def _best(job: Job) -> list[Solved]:
    """The results with the rotation of least measured loss."""
    sizes = job.recipe.rotations(job.weights[0].shape[1])
    attempts = [_attempt(job, size) for size in sizes]
    return min(attempts, key=lambda attempt: attempt[0])[1]


def _nearest(recipe: Recipe) -> Recipe:
    """Round to nearest: all that is left where every input is zero, as behind a zeroed layer or a
    norm whose gain is zero. No code is better than another for such inputs."""
    scales = "mse" if recipe.in_loop else recipe.scales
    return replace(recipe, algorithm="rtn", scales=scales, descent=0, weighted=False)


def _attempt(job: Job, size: int) -> tuple[float, list[Solved]]:
    """(loss to choose by, results) with one rotation."""
    start = time.perf_counter()
    recipe, fmt, rotation = job.recipe, job.recipe.fmt, Rotation(size)
    hessian = None if job.hessian is None else rotation.rotate_hessian(job.hessian)
    grid = _grid(job, rotation, hessian)
    solvers = _Solvers.of(recipe, grid, hessian)
    measured = [None if hessian is None else hessian.float()]
    if job.holdout is not None:
        measured.append(rotation.rotate_hessian(job.holdout).float())
    every = job.costs or (None,) * len(job.weights)
    made = _together(job, rotation, solvers)
    layers = [
        _layer(layer, rotation, solvers, measured, costs, result)
        for layer, costs, result in zip(job.weights, every, made, strict=True)
    ]

    input_scale, input_error = None, None
    if recipe.static_inputs:
        input_scale = fmt.global_scale(job.amax[size].float(), INPUT_MARGIN)
    if recipe.quantize_inputs and job.hessian is not None:
        input_error = _input_error(job, rotation, input_scale)

    seconds = (time.perf_counter() - start) / len(job.names)
    solved = []
    for name, layer in zip(job.names, layers, strict=True):
        rows, features = layer.weight.codes.shape
        report = LayerReport(
            name=name,
            out_features=rows,
            in_features=features,
            format=fmt.name,
            rotation=size,
            algorithm=layer.algorithm,
            damping=solvers.chosen.damping,
            error=layer.errors[0],
            held_out_error=layer.errors[1] if len(layer.errors) > 1 else None,
            rtn_error=layer.rtn_error,
            input_error=input_error,
            tokens=job.tokens,
            topped_up=job.topped_up,
            seconds=seconds,
            of_outputs=job.hessian is not None,
            wide_error=layer.wide_error,
        )
        solved.append(Solved(name, layer.weight, rotation, input_scale, report))
    return sum(layer.errors[-1] for layer in layers) / len(layers) + (input_error or 0.0), solved


def _grid(job: Job, rotation: Rotation, hessian: Tensor | None) -> Grid:
    """The grid that all layers of the job share: its global scale covers the largest of their
    weights (G34)."""
    recipe = job.recipe
    amax = torch.stack(
        [part.abs().amax() for layer in job.weights for part in _parts(layer, rotation)]
    ).amax()
    margin = 1.0 if recipe.in_loop is None else IN_LOOP_MARGIN
    grid = Grid(
        recipe.fmt,
        recipe.fmt.global_scale(amax, margin),
        recipe.scales if recipe.in_loop is None else "mse",
    )
    if recipe.global_scale == "alternating":
        whole = torch.cat([rotation.exact(layer).float() for layer in job.weights])
        importance = None
        if recipe.weighted and hessian is not None:
            importance = hessian.diagonal().float()
        grid = alternate(whole, grid, importance)
    return grid


def _parts(layer: Tensor, rotation: Rotation, step: int = 0) -> Iterator[Tensor]:
    """The rotated weight in float32, ``step`` rows at a time or as many as memory is bounded for:
    rows are independent (G25)."""
    step = step or max(1, PART_ELEMENTS // layer.shape[1])
    for start in range(0, len(layer), step):
        yield rotation.exact(layer[start : start + step]).float()


@dataclass(frozen=True)
class _Solvers:
    """The algorithm of a recipe, and round to nearest, which it has to beat; with nested codes at
    the narrow width of so many bits."""

    chosen: Prepared
    nearest: Prepared
    nested: int

    @classmethod
    def of(cls, recipe: Recipe, grid: Grid, hessian: Tensor | None) -> "_Solvers":
        problem = Problem(
            hessian=hessian,
            grid=grid,
            order=recipe.order,
            in_loop=recipe.in_loop,
            weighted=recipe.weighted,
            damping=recipe.damping,
            descent=recipe.descent,
            nested=recipe.nested,
        )
        nearest = prepare("rtn", replace(problem, descent=0))
        return cls(prepare(recipe.algorithm, problem), nearest, recipe.nested)

    def judged(self, result: QuantizedTensor) -> Tensor:
        """The weights that errors are reported of, and results chosen by."""
        return (drop(result, self.nested) if self.nested else result).dequantize()

    def solve(self, part: Tensor, costs: Costs | None) -> QuantizedTensor:
        """Codes and scales of some rows; ``costs`` of their errors if they do not count alike."""
        if costs is None:
            return self.chosen.solve(part)
        assert self.chosen.weighed is not None  # recipes see to that
        return self.chosen.weighed(part, costs)

    @property
    def alike(self) -> bool:
        """Whether the recipe asks for round to nearest and nothing else."""
        return self.chosen.name == self.nearest.name


@dataclass(frozen=True)
class _Layer:
    """A solved layer; ``errors``: on the calibration tokens and, where there are any, on those kept
    aside; of the weights where nothing was measured. ``wide_error``: of nested codes as they are
    stored, where ``errors`` are at the narrow width."""

    weight: QuantizedTensor
    algorithm: str
    errors: list[float]
    rtn_error: float
    wide_error: float | None = None


def _together(
    job: Job, rotation: Rotation, solvers: _Solvers
) -> list[QuantizedTensor] | list[None]:
    """The layers of which every output has its cost, solved in step: blocks of costs do not see
    each other, and an operation on few rows takes as long as on many. None for each where memory
    has no room for all rows, or outputs count alike."""
    rows = [len(layer) for layer in job.weights]
    costs = [of for of in job.costs if of is not None]
    if len(costs) < len(rows) or sum(rows) * job.weights[0].shape[1] > PART_ELEMENTS:
        return [None] * len(rows)
    whole = torch.cat([rotation.exact(layer).float() for layer in job.weights])
    result = solvers.solve(whole, [block for of in costs for block in of])
    ends = list(accumulate(rows))
    return [result.rows(end - count, end) for count, end in zip(rows, ends, strict=True)]


def _layer(
    layer: Tensor,
    rotation: Rotation,
    solvers: _Solvers,
    hessians: list[Tensor | None],
    costs: Costs | None,
    made: QuantizedTensor | None,
) -> _Layer:
    """Solve a layer, unless its result is ``made``; it is kept only if it beats round to nearest on
    the calibration tokens (G23): in the loss that it was made for."""
    step, shares = (len(layer), [costs]) if made is not None else _steps(layer, costs)
    nearest, solved = [], []
    signal, rounded, result = (torch.zeros(len(hessians), dtype=torch.float64) for _ in range(3))
    ahead = 0.0  # of round to nearest, in the loss that is to be small
    for part, share in zip(_parts(layer, rotation, step), shares, strict=True):
        nearest.append(solvers.nearest.solve(part))
        if made is not None:
            solved.append(made)
        else:
            solved.append(nearest[-1] if solvers.alike else solvers.solve(part, share))
        signal += _forms(part, hessians)
        left = part - solvers.judged(solved[-1])
        result += _forms(left, hessians)
        if solvers.alike:
            rounded = result
        else:  # each form costs as much as a sweep: on tokens kept aside only if it is needed
            missed = part - solvers.judged(nearest[-1])
            rounded[0] += _forms(missed, hessians[:1])[0]
            if share is not None and hessians[0] is not None:
                ahead += float(cost(missed, hessians[0], share) - cost(left, hessians[0], share))
    keep = bool(result[0] < rounded[0]) if costs is None else ahead > 0
    if not keep and not solvers.alike:
        parts = zip(_parts(layer, rotation, step), nearest, strict=True)
        rounded[1:] = sum(_forms(part - solvers.judged(q), hessians[1:]) for part, q in parts)
    errors = relative(result if keep else rounded, signal).tolist()
    rtn_error = relative(rounded, signal).tolist()[0]
    name = (solvers.chosen if keep else solvers.nearest).name
    results, wide = solved if keep else nearest, None
    if solvers.nested:
        parts = zip(_parts(layer, rotation, step), results, strict=True)
        forms = [_forms(part - q.dequantize(), hessians[:1])[0] for part, q in parts]
        wide = float(relative(torch.stack(forms).sum(), signal[0]))
    return _Layer(_joined(results), name, errors, rtn_error, wide)


def _steps(layer: Tensor, costs: Costs | None) -> tuple[int, list[Costs | None]]:
    """Rows that are solved at a time, and what their errors cost: whole blocks of costs."""
    rows = max(1, PART_ELEMENTS // layer.shape[1])
    if costs is None:
        return rows, [None] * -(-len(layer) // rows)
    together = max(1, rows // len(costs[0]))  # all are of this size, but for the last
    shares = [costs[start : start + together] for start in range(0, len(costs), together)]
    return together * len(costs[0]), list(shares)


def _forms(delta: Tensor, hessians: list[Tensor | None]) -> Tensor:
    """``tr(Δ H Δᵀ)`` for every Hessian, the identity where there is none, on the CPU."""
    forms = (
        delta.square().sum(1, dtype=torch.float64) if h is None else quadratic_form(delta, h)
        for h in hessians
    )
    return torch.tensor([float(form.sum()) for form in forms], dtype=torch.float64)


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    scales = [part.scales for part in parts]
    bits = torch.cat([s.bits for s in scales])
    return QuantizedTensor(
        torch.cat([p.codes for p in parts]), Scales(bits, scales[0].global_scale, scales[0].format)
    )


def _input_error(job: Job, rotation: Rotation, scale: Tensor | None) -> float:
    """``E‖(Q(xR) - xR) W'ᵀ‖² / E‖x Wᵀ‖²`` on the sample: what quantized activations alone cost; 0
    without a sample."""
    exact = rotation.exact(job.sample).float()
    rule = job.recipe.rule_of_inputs(rotation.size)
    quantized = quantize_inputs(job.sample, job.recipe.fmt, rotation, scale, rule)
    noise = quantized.dequantize() - exact
    sums = torch.zeros(2, dtype=torch.float64)
    for layer in job.weights:
        for part in _parts(layer, rotation):
            sums += torch.stack(
                [(x @ part.T).double().square().sum() for x in (noise, exact)]
            ).cpu()
    return float(relative(sums[0], sums[1]))
