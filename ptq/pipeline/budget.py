"""Which layers get eight bits, where a recipe has room for some: those whose errors cost most.

What errors cost is measured (:mod:`ptq.calib.sensitivity`) with weights and inputs rounded to
nearest, on the balanced model. Layers that engines fuse decide together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.sensitivity import Errors, Layers, sensitivities
from ptq.checkpoint.quantization_config import fused_groups
from ptq.model.source import Source
from ptq.numerics.formats import FORMATS
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import from_first
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Job, solve

# What layers with eight bits are quantized to: engines run it beside NVFP4 and MXFP4.
WIDE = "mxfp8"
# Scores differ by orders of magnitude from site to site, so that few tokens rank them.
SEQUENCES, LENGTH = 4, 512
USUAL = "usual"  # the choice of what the recipe says by itself


@dataclass(frozen=True)
class Allocation:
    """Layers with eight bits.

    Attributes:
        layers: full names, in the order of the model.
        share: of the weights of all quantized layers.
        before, after: predicted KL in nats per token of the balanced model, rounded to nearest.
    """

    layers: tuple[str, ...]
    share: float
    before: float
    after: float

    def applied_to(self, recipe: Recipe, plan: Plan) -> Recipe:
        """The recipe with rules for these layers, and the same text as ``plan`` made of it."""
        return replace(
            recipe,
            rules=(*((name, WIDE) for name in self.layers), *recipe.rules),
            eight_bit=0.0,
            budget=None,
            samples=plan.samples,
            seq_len=plan.recipe.seq_len,
        )

    def __str__(self) -> str:
        return (
            f"{WIDE} for {len(self.layers)} layers with {self.share:.1%} of the weights: loss "
            f"predicted {self.before:.4f} -> {self.after:.4f} nats per token, balanced and rounded "
            "to nearest"
        )


def room(plan: Plan) -> float:
    """The share of the weights that may have eight bits: what the recipe says of their share or of
    the bits per weight; 0 where it says nothing.

    Raises:
        ValueError: fewer bits per weight than the format has.
    """
    recipe = plan.recipe
    if recipe.budget is None:
        return recipe.eight_bit
    total = sum(layer.weights for layer in plan.layers.values())
    bits = sum(layer.weights * layer.recipe.fmt.bits_per_weight for layer in plan.layers.values())
    least, wide = bits / total, FORMATS[WIDE].bits_per_weight
    if recipe.budget < least:
        raise ValueError(
            f"a budget of {recipe.budget:g} bits per weight is less than the {least:.4g} that the "
            "recipe takes without it"
        )
    share = (recipe.budget - least) / (wide - recipe.fmt.bits_per_weight)
    return min(share, recipe.eight_bit or 1.0)


def more_bits(plan: Plan) -> float:
    """What the layers with eight bits take more than they would otherwise, at most."""
    weights = sum(layer.weights for layer in plan.layers.values())
    return room(plan) * weights * (FORMATS[WIDE].bits_per_weight - plan.recipe.fmt.bits_per_weight)


def allocate(
    source: Source,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    device: torch.device | str,
    activations: str = "ram",
) -> Allocation:
    """Choose the layers of ``plan`` that get eight bits, by what that gains on some of ``batches``;
    the same on every rank.

    Only layers that are quantized as the run's recipe says take part, not those with a rule.
    """
    windows = torch.cat([batch[:, :LENGTH] for batch in batches])[:SEQUENCES]
    names = [name for name in plan.layers if name != plan.head]
    choices = {
        name: {USUAL: layer.recipe, WIDE: layer.recipe.in_format(WIDE)}
        for name, layer in plan.layers.items()
        if name != plan.head and _alike(layer.recipe, plan.recipe)
    }
    scores = sensitivities(
        source,
        list(windows.split(1)),
        names,
        lambda block, groups: _errors(block, groups, choices),
        device=device,
        activations=activations,
        prepare=Balancing(plan) if plan.balances else None,
        seed=plan.recipe.seed,
    )
    scores = {
        tuple(name for name in group if name in choices): score
        for group, score in scores.items()
        if any(name in choices for name in group)
    }
    units = _units(scores, {name: plan[name].weights for name in choices})
    total = sum(layer.weights for layer in plan.layers.values())
    gains, weights = [unit.gain for unit in units], [float(unit.weights) for unit in units]
    chosen = knapsack(gains, weights, room(plan) * total)
    picked = [unit for unit, taken in zip(units, chosen, strict=True) if taken]
    inside = {name for unit in picked for name in unit.layers}
    before = sum(score[USUAL] for score in scores.values())
    return from_first(
        Allocation(
            layers=tuple(name for name in names if name in inside),
            share=sum(unit.weights for unit in picked) / total,
            before=before,
            after=before - sum(unit.gain for unit in picked),
        )
    )


def _alike(layer: Recipe, run: Recipe) -> bool:
    """Whether no rule changes what a layer is quantized to."""
    return (layer.format, layer.scheme, layer.algorithm) == (run.format, run.scheme, run.algorithm)


def knapsack(gains: Sequence[float], costs: Sequence[float], limit: float) -> list[bool]:
    """Which items to take for the largest sum of gains whose costs sum up to ``limit`` at most."""
    if not gains:
        return []
    scale = max(max(gains), 1e-300)
    found = milp(
        c=-np.asarray(gains) / scale,
        constraints=LinearConstraint(np.asarray(costs)[None] / max(limit, 1.0), ub=min(limit, 1.0)),
        integrality=np.ones(len(gains)),
        bounds=Bounds(0, 1),
    )
    assert found.x is not None, found.message  # taking nothing is always possible
    return [bool(taken > 0.5) and gain > 0 for taken, gain in zip(found.x, gains, strict=True)]


@dataclass(frozen=True)
class _Unit:
    """Layers that decide together, what eight bits gain there, and how many weights they have."""

    layers: Layers
    gain: float
    weights: int


def _units(scores: Mapping[Layers, Mapping[str, float]], weights: Mapping[str, int]) -> list[_Unit]:
    """Groups that read the same, joined where an engine fuses layers of several."""
    home = {name: index for index, group in enumerate(scores) for name in group}
    joined = list(range(len(scores)))
    for family in fused_groups(home):
        first = joined[home[family[0]]]
        others = {joined[home[name]] for name in family}
        joined = [first if index in others else index for index in joined]
    units: dict[int, _Unit] = {}
    for index, (group, score) in enumerate(scores.items()):
        old = units.get(joined[index], _Unit((), 0.0, 0))
        units[joined[index]] = _Unit(
            (*old.layers, *group),
            old.gain + score[USUAL] - score[WIDE],
            old.weights + sum(weights[name] for name in group),
        )
    return list(units.values())


def _errors(
    block: CalibratedBlock,
    groups: Iterable[Layers],
    choices: Mapping[str, Mapping[str, Recipe]],
) -> Errors:
    """The errors of outputs with weights and inputs rounded to nearest, by choice."""
    exact: dict[str, Tensor] = {}
    rounded: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        group = tuple(name for name in group if name in choices)
        if not group:
            continue
        for name in group:
            layer = block.module.get_submodule(name.removeprefix(block.prefix))
            exact[name] = layer.weight.detach()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        for choice in (USUAL, WIDE):
            recipe = choices[group[0]][choice]
            for name, weight in _nearest(group, [exact[n] for n in group], recipe).items():
                rounded.setdefault(name, {})[choice] = weight

    def errors(name: str, x: Tensor) -> dict[str, Tensor]:
        if name not in exact:  # it has a rule of its own
            return {}
        wanted = x.float() @ exact[name].float().T
        return {
            choice: emulated(x, choices[name][choice]).float() @ weight.T - wanted
            for choice, weight in rounded[name].items()
        }

    return errors


def _nearest(names: Layers, weights: Sequence[Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Weights rounded to nearest as the layers of a group are, float32, not rotated."""
    size = recipe.fmt.default_rotation if recipe.rotation == "auto" else int(recipe.rotation)
    size = size if weights[0].shape[1] % size == 0 else 1
    scales = "mse" if recipe.in_loop else recipe.scales
    job = Job(
        names=names,
        weights=tuple(weights),
        hessian=None,
        holdout=None,
        amax={size: weights[0].new_ones(())},
        sample=weights[0].new_empty(0, weights[0].shape[1]),
        tokens=0,
        recipe=replace(
            recipe, algorithm="rtn", scales=scales, rotation=size, descent=0, balance=0.0,
            weighted=False,
        ),
    )  # fmt: skip
    return {s.name: s.rotation.exact(s.weight.dequantize()).float() for s in solve(job)}
