"""Which layers get eight bits, where a recipe has room for some: those whose errors cost most.

What errors cost is measured (:mod:`ptq.pipeline.damage`), and what fits is chosen by the solver
that also advises on formats (:mod:`ptq.numerics.multiple_choice`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.quantization_config import decided_together, fused_groups
from ptq.model.source import Source
from ptq.numerics.formats import FORMATS
from ptq.numerics.multiple_choice import choose
from ptq.pipeline.damage import damages
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import from_first
from ptq.pipeline.recipe import Recipe

# What layers with eight bits are quantized to: engines run it beside NVFP4 and MXFP4.
WIDE = "mxfp8"
USUAL = "usual"  # the choice of what the recipe says by itself
CHOICES = (USUAL, WIDE)


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

    Only layers that are quantized as the run's recipe says take part, not those with a rule. Layers
    that engines want in one format decide together, unless the result is none for engines.
    """
    names = [name for name in plan.layers if name != plan.head]
    choices = {
        name: {USUAL: plan[name].recipe, WIDE: plan[name].recipe.in_format(WIDE)}
        for name in names
        if _alike(plan[name].recipe, plan.recipe)
    }
    # what only ptq reads may have experts of several formats in a block
    alone = plan.written is not None and plan.written.dialect == PTQ.name
    units = damages(
        source,
        plan,
        batches,
        choices,
        device=device,
        activations=activations,
        together=fused_groups if alone else decided_together,
    )
    total = sum(layer.weights for layer in plan.layers.values())
    losses = [[unit.scores[choice][0] for choice in CHOICES] for unit in units]
    costs = [[0.0, float(unit.weights)] for unit in units]
    chosen = choose(losses, costs, room(plan) * total)
    picked = [unit for unit, option in zip(units, chosen, strict=True) if option]
    inside = {name for unit in picked for name in unit.layers}
    return from_first(
        Allocation(
            layers=tuple(name for name in names if name in inside),
            share=sum(unit.weights for unit in picked) / total,
            before=sum(loss[0] for loss in losses),
            after=sum(loss[option] for loss, option in zip(losses, chosen, strict=True)),
        )
    )


def _alike(layer: Recipe, run: Recipe) -> bool:
    """Whether no rule changes what a layer is quantized to."""
    return (layer.format, layer.scheme, layer.algorithm) == (run.format, run.scheme, run.algorithm)
