"""What rounding costs the whole model, group of layers by group, in formats to choose from.

Measured (:mod:`ptq.calib.sensitivity`) with weights and inputs rounded to nearest, on the balanced
model: to second order the KL divergence that a choice causes, and such divergences add up. Layers
that engines fuse decide together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.sensitivity import ALL, Errors, Layers, sensitivities
from ptq.checkpoint.quantization_config import fused_groups
from ptq.model.source import Source
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Job, solve

# Scores differ by orders of magnitude from site to site, so that few tokens rank them.
SEQUENCES, LENGTH = 4, 512
Together = Callable[[Iterable[str]], list[list[str]]]


@dataclass(frozen=True)
class Damaged:
    """Layers that decide together.

    Attributes:
        weights: how many they have.
        scores: by choice, a loss in nats per token for every measure.
    """

    layers: Layers
    weights: int
    scores: Mapping[str, tuple[float, ...]]


def damages(
    source: Source,
    plan: Plan,
    batches: Sequence[Tensor],
    choices: Mapping[str, Mapping[str, Recipe]],
    *,
    device: torch.device | str,
    activations: str = "ram",
    measures: Sequence[int] = (ALL,),
    on_block: Callable[[int, int], object] = lambda done, total: None,
    together: Together = fused_groups,
) -> list[Damaged]:
    """What each choice costs, of all layers that have some, in the order of the model.

    Args:
        plan: of the run; its strength of balancing counts.
        batches: token ids; some of them are read.
        choices: by layer, the recipes to choose from, by name; the same names for layers that read
            the same input.
        measures: as :func:`ptq.calib.sensitivity.sensitivities` takes them.
        together: the groups of layers that decide together, by their names, besides those that
            read the same input.
    """
    scores = sensitivities(
        source,
        first_windows(batches, SEQUENCES),
        [name for name in plan.layers if name != plan.head],
        lambda block, groups: _errors(block, choices),
        device=device,
        activations=activations,
        prepare=Balancing(plan) if plan.balances else None,
        seed=plan.recipe.seed,
        measures=measures,
        on_block=on_block,
    )
    decided = {
        tuple(name for name in group if name in choices): score for group, score in scores.items()
    }
    return _joined(decided, {name: plan[name].weights for name in choices}, together)


def first_windows(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first ``LENGTH`` tokens of the first windows of ``batches``, each (1, tokens)."""
    return list(torch.cat([batch[:, :LENGTH] for batch in batches])[:count].split(1))


def _joined(
    scores: Mapping[Layers, Mapping[str, tuple[float, ...]]],
    weights: Mapping[str, int],
    together: Together = fused_groups,
) -> list[Damaged]:
    """Groups that read the same, joined where layers of several decide together."""
    home = {name: index for index, group in enumerate(scores) for name in group}
    joined = list(range(len(scores)))
    for family in together(home):
        first = joined[home[family[0]]]
        others = {joined[home[name]] for name in family}
        joined = [first if index in others else index for index in joined]
    units: dict[int, Damaged] = {}
    for index, (group, score) in enumerate(scores.items()):
        count = sum(weights[name] for name in group)
        old = units.get(joined[index])
        if old is None:
            units[joined[index]] = Damaged(group, count, score)
            continue
        both = {
            choice: tuple(a + b for a, b in zip(old.scores[choice], score[choice], strict=True))
            for choice in old.scores
            if choice in score
        }
        units[joined[index]] = Damaged((*old.layers, *group), old.weights + count, both)
    return list(units.values())


def _errors(block: CalibratedBlock, choices: Mapping[str, Mapping[str, Recipe]]) -> Errors:
    """The errors of outputs with weights and inputs rounded to nearest, by choice."""

    def errors(
        group: Layers, inputs: Sequence[Tensor]
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        names = tuple(name for name in group if name in choices)
        if not names:  # they have rules of their own
            return
        exact = {
            name: block.module.get_parameter(f"{name.removeprefix(block.prefix)}.weight").detach()
            for name in names
        }
        joined = torch.cat(list(inputs)).float()
        wanted = {name: joined @ weight.float().T for name, weight in exact.items()}
        for choice, recipe in choices[names[0]].items():
            read = torch.cat([emulated(x, recipe) for x in inputs]).float()
            rounded = nearest(names, list(exact.values()), recipe)
            yield choice, {name: read @ rounded[name].T - wanted[name] for name in names}

    return errors


def nearest(names: Layers, weights: Sequence[Tensor], recipe: Recipe) -> dict[str, Tensor]:
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
