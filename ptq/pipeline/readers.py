"""Who reads a checkpoint decides how its inputs are scaled, before anything is calibrated.

The scale rule of inputs is no part of the tensors: whoever runs the model applies it to every
token. Readers of some dialects apply the rule that the checkpoint names, those of others always the
format's own. Weights are calibrated with the inputs that their readers will see.
"""

from dataclasses import replace

from ptq.checkpoint.dialect_choice import AUTOMATIC, choose
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.quantization_config import LayerInfo, fused_groups
from ptq.numerics.activations import default_rule
from ptq.pipeline.budget import WIDE
from ptq.pipeline.plan import Described, LayerPlan, Plan
from ptq.pipeline.recipe import Recipe

OURS = AUTOMATIC[-1].name  # which carries everything, and which no other engine reads


def plan_for(
    source: Described,
    recipe: Recipe,
    dialect: str | None,
    *,
    target: str | None = None,
    dtype: str | None,
    device: str = "cpu",
) -> Plan:
    """The plan of a run whose result is written in ``dialect``, the scale rule of inputs settled.

    A rule that the recipe names is taken as it is. Otherwise it is the best one measured, or, where
    the result would be written in a dialect whose readers do not apply it, the format's own.

    Args:
        dialect: as asked for, ``"auto"`` included; None if nothing is written.
        target: see :func:`ptq.checkpoint.dialect_choice.choose`.
        dtype: of the rest of the model, as in config.json.
        device: the type of what calibrates.

    Raises:
        ValueError: see :meth:`ptq.pipeline.plan.Plan.of`; an explicit dialect that cannot express
            the plan.
    """
    plan = Plan.of(source, recipe, device)
    # where it is written if nobody has to apply another rule than the format's own
    likely = plan if recipe.input_rule else _with_own_rules(plan)
    choice = None
    if dialect is not None:
        infos = with_eight_bits(likely)
        choice = choose(
            infos,
            dialect,
            target=target,
            dtype=dtype,
            foreign=plan.foreign,
            kv_cache=plan.recipe.kv_cache,
        )
    written = None if choice is None else choice.dialect
    others = written is not None and not DIALECTS[written].applies_input_rule
    settled = replace(likely if others else plan, written=choice)
    rules = _rules(settled)
    if not rules:
        return settled
    about = f"inputs are scaled by {rules}"
    if others and rules != _rules(plan):
        about += f", as engines do that read {written}"
        about += f"; with --dialect ptq by {_rules(plan)}, which is more accurate"
    elif others and rules != (own := _rules(_with_own_rules(plan))):
        about += f"; engines that read {written} scale them by {own}"
    return replace(_told(settled, rules), about_inputs=about)


def readers_in_words(dialect: str, reason: str) -> str:
    """Who opens a result that is written in ``dialect`` for that ``reason``, and why not everybody
    if it is not."""
    if dialect == OURS:
        reason = reason.removesuffix("; use dialect ptq").removesuffix(", or use dialect ptq")
        only = "ptq, and transformers after `import ptq`; no other engine"
        return f"{only} (dialect {dialect}: {reason})"
    return f"{reason} (dialect {dialect})"


def with_eight_bits(plan: Plan) -> dict[str, LayerInfo]:
    """What a checkpoint will say about every layer. Where some are still to get eight bits one of
    them stands for those: what such a mixture cannot be written in shows before the hours that
    choosing takes."""
    infos = plan.infos
    if plan.allocates:
        first = next(iter(plan.layers))
        fused = next((group for group in fused_groups(infos) if first in group), [first])
        for name in fused:
            layer = plan[name]
            infos[name] = replace(layer, recipe=layer.recipe.in_format(WIDE)).info
    return infos


def _with_own_rules(plan: Plan) -> Plan:
    """The plan with every format's own rule."""

    def own(layer: LayerPlan) -> LayerPlan:
        rule = default_rule(layer.recipe.fmt)
        # rules of the run say nothing more of a layer, and may be of formats without that rule
        return replace(layer, recipe=replace(layer.recipe, rules=(), input_rule=rule))

    return replace(plan, layers={name: own(layer) for name, layer in plan.layers.items()})


def _rules(plan: Plan) -> str:
    """The rules of all layers that quantize their inputs, joined by "or"; empty if none does."""
    layers = [layer for layer in plan.layers.values() if layer.recipe.quantize_inputs]
    used = {layer.recipe.rule_of_inputs(size) for layer in layers for size in layer.rotations}
    return " or ".join(sorted(used))


def _told(plan: Plan, rules: str) -> Plan:
    """The plan, its recipe naming the rule if there is but one format and one rule."""
    alike = len({layer.recipe.format for layer in plan.layers.values()}) == 1
    if not alike or " " in rules:
        return plan
    return replace(plan, recipe=replace(plan.recipe, input_rule=rules))
