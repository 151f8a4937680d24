"""What is to be solved in a block: one task per input group and recipe, on one of the ranks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.calib.observer import InputGroup
from ptq.calib.output_costs import OutputCosts
from ptq.calib.walk import CalibratedBlock
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import together, world
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Job, Solved, solve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A job before its Hessian is made, which happens on the rank that solves it, one group's at a
    time.

    Attributes:
        layers: of ``group``, by their names within the block, all with the same ``recipe``.
        costs: of the outputs of layers, if the recipe wants them.
    """

    block: CalibratedBlock
    group: InputGroup
    layers: tuple[str, ...]
    recipe: Recipe
    costs: OutputCosts | None = None

    @property
    def cost(self) -> int:
        """Work in multiply-adds: the sweep over all rows and the factorisation."""
        features = self.group.hessian.features
        rows = sum(self.group.layers[name].out_features for name in self.layers)
        return features * features * (rows + features)

    def solve(self) -> list[Solved]:
        """The quantized layers; with several ranks in host memory, through which they travel."""
        block, group = self.block, self.group
        topped_up = group.moments and block.borrows(group)
        names = tuple(f"{block.prefix}{name}" for name in self.layers)
        costs = self.costs if self.recipe.fisher else None
        job = Job(
            names=names,
            weights=tuple(group.layers[name].weight for name in self.layers),
            hessian=block.hessian(group) if group.moments else None,
            holdout=group.holdout.mean() if group.holdout.tokens and not topped_up else None,
            amax=group.amax,
            sample=group.sample,
            tokens=group.hessian.tokens if group.moments else group.seen if group.amax else 0,
            topped_up=topped_up,
            recipe=self.recipe,
            costs=tuple(None if costs is None else costs.of(name) for name in names),
        )
        results = solve(job)
        return results if world()[1] == 1 else [result.to("cpu") for result in results]


def reduce(groups: Sequence[InputGroup]) -> None:
    """Statistics of all ranks, on every rank."""
    with together():
        for group in groups:
            group.reduce()


def _unused(block: CalibratedBlock, group: InputGroup) -> bool:
    """Whether the layers of a group are never called. An expert that no token chose is not meant:
    its kind is called, and others lend it their statistics."""
    return not group.seen and block.pool(group) is None


def tasks(
    block: CalibratedBlock,
    groups: Sequence[InputGroup],
    plan: Plan,
    costs: OutputCosts | None = None,
) -> list[Task]:
    """The layers of some of the block's input groups, split where their recipes differ."""
    result = []
    for group in groups:
        if _unused(block, group):
            logger.warning(
                "%s: never called during calibration (its weight may be used directly); it stays "
                "in high precision",
                ", ".join(f"{block.prefix}{name}" for name in group.layers),
            )
            continue
        by_recipe: list[tuple[Recipe, list[str]]] = []  # recipes are no keys: rules hold mappings
        for name in group.layers:
            recipe = plan[f"{block.prefix}{name}"].recipe
            alike = next((names for known, names in by_recipe if known == recipe), None)
            if alike is None:
                by_recipe.append((recipe, [name]))
            else:
                alike.append(name)
        result += [
            Task(block=block, group=group, layers=tuple(names), recipe=recipe, costs=costs)
            for recipe, names in by_recipe
        ]
    return result
