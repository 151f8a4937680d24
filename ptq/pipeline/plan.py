"""What a run will do, before it does."""

from collections.abc import Mapping

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.pipeline.recipe import Recipe


def plan(recipe: Recipe, biased: Mapping[str, bool]) -> dict[str, LayerInfo]:
    """Descriptions of the layers that ``recipe`` will quantize, before it does.

    A rotation that is chosen by measurement counts as one of the format's group size: what cannot
    be written shows now.

    Args:
        biased: of every linear layer, by full name, whether it has a bias.
    """
    layers = {}
    for name, bias in biased.items():
        own = recipe.for_module(name)
        if own is not None:
            layers[name] = LayerInfo(
                format=own.format,
                rotation=own.fmt.group_size if own.rotation == "auto" else int(own.rotation),
                quantize_inputs=own.quantize_inputs,
                static_inputs=own.quantize_inputs
                and own.input_scale == "static"
                and own.fmt.has_global_scale,
                input_rule=own.input_rule or "default",
                bias=bias,
            )
    return layers
