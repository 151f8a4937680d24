"""Plan: what a run will do to every layer, decided once, before any weight is read.

Everything that asks "which layers, and how" asks the plan: the walk what to look at, the solver
which recipe, balancing how strong, the forecast how much, the choice of a dialect what will be
written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq.calib.walk import Watch
from ptq.checkpoint.dialect import HEAD_NOT_FOUND
from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.model.attention import check_key_values
from ptq.model.parameter_names import dtype_plan
from ptq.model.structure import is_router, positions
from ptq.numerics.rotation import Rotation
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.quality import windows
from ptq.pipeline.recipe import Recipe, check_patterns
from ptq.reading.name_patterns import matches


class Described(Protocol):
    """What a plan is made from: the modules of a model, with or without weights."""

    @property
    def config(self) -> PretrainedConfig: ...

    def skeleton(self) -> nn.Module: ...

    def checkpoint_name(self, name: str) -> str: ...

    def blocks(self) -> list[tuple[str, nn.Module]]: ...

    def head(self) -> tuple[str, nn.Module]: ...

    def foreign(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A linear layer that will be quantized, by its full name in the model, and its own recipe."""

    name: str
    recipe: Recipe
    in_features: int
    out_features: int
    bias: bool

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.in_features * self.out_features

    @property
    def tunable(self) -> bool:
        """Whether tuning moves its codes: wider ones are so close that there is nothing to gain."""
        return self.recipe.fmt.element.bits == 4

    @property
    def rotations(self) -> list[int]:
        """The block sizes to choose from."""
        return self.recipe.rotations(self.in_features)

    @property
    def info(self) -> LayerInfo:
        """What a checkpoint will say about it. A rotation that is chosen by measurement counts as
        one of the format's group size: what cannot be written shows now."""
        recipe = self.recipe
        measured = recipe.fmt.group_size or 128
        rotation = measured if recipe.rotation == "auto" else int(recipe.rotation)
        return LayerInfo(
            format=recipe.format,
            rotation=rotation,
            quantize_inputs=recipe.quantize_inputs,
            static_inputs=recipe.static_inputs,
            input_rule=recipe.stored_input_rule(rotation),
            bias=self.bias,
            nested=recipe.nested,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All layers that will be quantized, in the order of the model, and what holds for the run.

    Attributes:
        layers: by full name.
        recipe: of the run; single layers have their own.
        head: name of the output head if that is one of them.
        samples: calibration windows.
        seq_len: tokens in a calibration sequence: the recipe's, but no more than the model's
            positions.
        foreign: why other engines would not find the layers of the result under their names, or
            None.
        about_inputs: what there is to say of how quantized inputs are scaled, and who scales them
            otherwise; empty where they stay in 16 bits.
        about_budget: which layers were given eight bits for what they gain, if any.
        written: the dialect of the result and why it was taken, as far as that is known; None if
            nothing is written.
    """

    layers: Mapping[str, LayerPlan]
    recipe: Recipe
    head: str | None
    samples: int
    seq_len: int
    foreign: str | None
    about_inputs: str = ""
    about_budget: str = ""
    written: Choice | None = None

    @classmethod
    def of(cls, source: Described, recipe: Recipe, device: str = "cpu") -> "Plan":
        """What ``recipe`` means for the model of ``source``, calibrated on a ``device`` of that
        type.

        Raises:
            ValueError: a pattern that matches nothing, inputs that do not form groups or rotation
                blocks (all such layers are named), a recipe that leaves nothing to quantize, an
                output head that cannot be quantized, or no keys and values where their scales are
                wanted.
        """
        blocks = source.blocks()
        if recipe.kv_cache is not None:
            check_key_values(blocks)
        head = source.head() if recipe.lm_head else None
        limit = positions(source.config)
        layers = _layers(source, blocks, head, recipe)
        parameters = sum(p.numel() for _, block in blocks for p in block.parameters())
        samples, length = _windows(recipe, layers, parameters, device, limit)
        return cls(
            layers=layers,
            recipe=replace(recipe, samples=samples, seq_len=length),
            samples=samples,
            head=head[0] if head else None,
            seq_len=length if limit is None else min(length, limit),
            foreign=HEAD_NOT_FOUND if head else source.foreign(),
        )

    def __getitem__(self, name: str) -> LayerPlan:
        return self.layers[name]

    @cached_property
    def measures(self) -> bool:
        """Whether second moments of inputs are needed; if not, one pass of the original model says
        all there is to know."""
        return any(layer.recipe.measures for layer in self.layers.values())

    @property
    def allocates(self) -> bool:
        """Whether layers with eight bits are still to be chosen."""
        return self.recipe.eight_bit > 0 or self.recipe.budget is not None

    @cached_property
    def reads_text(self) -> bool:
        """Whether anything depends on the calibration text: moments, the ranges of inputs or of
        keys and values, or which layers get more bits."""
        return (
            self.measures
            or self.allocates
            or self.recipe.kv_cache is not None
            or any(layer.recipe.static_inputs for layer in self.layers.values())
        )

    @property
    def tokens(self) -> int:
        """Tokens of text that all ranks read together."""
        return self.samples * self.seq_len if self.reads_text else 0

    @property
    def levers(self) -> str:
        """What is done for accuracy, and with how much text."""
        if not self.reads_text:
            before = " before tuning" if self.recipe.tune else ""
            return f"{self.recipe.levers}; reads no text{before}"
        text = f"{self.samples} x {self.seq_len} tokens of {self.recipe.calibration}"
        return f"{self.recipe.levers}; {text}"

    @cached_property
    def balances(self) -> bool:
        """Whether the inputs of any layer are to be balanced against its weights."""
        return any(layer.recipe.balance > 0 for layer in self.layers.values())

    @cached_property
    def rotations(self) -> list[int]:
        """The block sizes that any layer may be rotated by, ascending."""
        return sorted({size for layer in self.layers.values() for size in layer.rotations})

    @property
    def infos(self) -> dict[str, LayerInfo]:
        """What a checkpoint will say about every layer."""
        return {name: layer.info for name, layer in self.layers.items()}

    def watch(self) -> Watch:
        """What calibration has to look at: the largest rotated inputs for static scales, and what
        layers get that read quantized inputs."""
        quantized = any(layer.recipe.quantize_inputs for layer in self.layers.values())
        return Watch(
            layers=self.layers,
            probes={size: Rotation(size).exact for size in self.rotations if self.reads_text},
            feed=partial(_feed, self.layers) if quantized and self.measures else None,
            route_all=self.recipe.route_all_experts,
            moments=self.measures,
            head=self.head is not None,
            key_values=self.recipe.kv_cache is not None,
        )


def _windows(
    recipe: Recipe, layers: Mapping[str, LayerPlan], parameters: int, device: str, limit: int | None
) -> tuple[int, int]:
    """Calibration windows and their length: those that the recipe names, else what its quality
    means here."""
    measures = any(layer.recipe.measures for layer in layers.values())
    samples, length = windows(recipe.quality, parameters, device, limit, measures=measures)
    if recipe.seq_len is not None:
        samples, length = max(samples * length // recipe.seq_len, 1), recipe.seq_len
    return recipe.samples or samples, length


def _feed(layers: Mapping[str, LayerPlan], name: str, x: Tensor) -> Tensor:
    return emulated(x, layers[name].recipe)


def _layers(
    source: Described,
    blocks: list[tuple[str, nn.Module]],
    head: tuple[str, nn.Module] | None,
    recipe: Recipe,
) -> dict[str, LayerPlan]:
    """The layers to quantize. Routers, and what its authors keep in float32 even where the rest of
    a model is in 16 bits, are left alone but for rules that name only such."""
    linears = {
        f"{name}.{inner}": module
        for name, block in blocks
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    kept = dtype_plan(cast(PreTrainedModel, source.skeleton()), torch.float16)
    delicate = {
        f"{name}.{inner}"
        for name, block in blocks
        for inner, _ in block.named_modules()
        if is_router(block, inner) or kept(f"{name}.{inner}.weight") == torch.float32
    }
    if head is not None and isinstance(head[1], nn.Linear):
        linears[head[0]] = head[1]
    # patterns may use the names of the model or those of its checkpoints (block_sparse_moe)
    aliases = {name: _aliases(source, name) for name in linears}
    modules = [n for name, _ in source.skeleton().named_modules() for n in _aliases(source, name)]
    check_patterns(recipe.ignore, modules, "module")
    by_rule = [pattern for pattern, _ in recipe.rules]
    check_patterns(by_rule, [n for names in aliases.values() for n in names], "linear layer")
    for_delicate = [
        pattern
        for pattern in by_rule
        if all(name in delicate for name in linears if matches(pattern, *aliases[name]))
    ]
    layers: dict[str, LayerPlan] = {}
    for name, linear in linears.items():
        layer_recipe = recipe.for_module(*aliases[name])
        asked = any(matches(pattern, *aliases[name]) for pattern in for_delicate)
        spared = name in delicate and not asked
        if layer_recipe is not None and not spared:
            layers[name] = LayerPlan(
                name=name,
                recipe=layer_recipe,
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=linear.bias is not None,
            )
    _refuse_ragged(layers)
    if not layers:
        raise ValueError(
            "the recipe ignores every linear layer of the model; nothing would be quantized"
        )
    return layers


def _aliases(source: Described, module: str) -> tuple[str, ...]:
    """The name of a module in the model and, if that is another one, in its checkpoints."""
    stored = source.checkpoint_name(f"{module}.weight").removesuffix(".weight")
    return (module,) if stored == module else (module, stored)


def _refuse_ragged(layers: Mapping[str, LayerPlan]) -> None:
    """Raise ValueError for layers whose inputs do not form groups or rotation blocks."""
    ragged: dict[str, list[str]] = {}
    for name, layer in layers.items():
        fmt = layer.recipe.fmt
        if layer.in_features % fmt.size(layer.in_features):
            size = f"the group size {fmt.group_size} of {fmt.name}"
            reason = f"{layer.in_features} input features are not divisible by {size}"
            ragged.setdefault(reason, []).append(name)
            continue
        try:
            _ = layer.rotations
        except ValueError as error:
            ragged.setdefault(str(error), []).append(name)
    for reason, names in ragged.items():
        leaves = sorted({name.rpartition(".")[2] for name in names})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        remedy = " ".join(f"--ignore {leaf}" for leaf in leaves)
        raise ValueError(
            f"{names[0]}{more}: {reason}; leave them out with {remedy}, or change the format or "
            "rotation"
        )
