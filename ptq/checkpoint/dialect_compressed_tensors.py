"""The ``compressed-tensors`` dialect, which transformers and several engines read.

Its ``quantization_config`` is theirs; what only ptq needs stands under ``ptq`` in it. Rotation is a
``transform_config``, with a ±1 matrix stored under the first rotated layer of each block size. How
each format is stored: :mod:`ptq.checkpoint.compressed_tensors_formats`.

What is said here about other programs was read in compressed-tensors 0.17 to 0.20, transformers
5.16 to 5.23 and vLLM 0.33.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq.checkpoint.compressed_tensors_formats import CT_FORMATS, REFUSALS, Candidate, ct_opens
from ptq.checkpoint.dialect import Conversion, Dialect, Export, Layers, Tensors
from ptq.checkpoint.engines import VLLM
from ptq.checkpoint.quantization_config import (
    JsonDict,
    LayerInfo,
    Quantization,
    Section,
    fused_groups,
    is_expert,
    patterns,
)
from ptq.numerics.activations import default_rule
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import hadamard
from ptq.reading.schema import JsonObject, check

EVERY = "Linear"  # a target: all of them
# Loaders that read config_groups strictly stop at an unknown key and show its text; transformers is
# among them, which would not rotate inputs, and drop the global scales of experts.
GUARDS = ("rotated_weights", "expert_global_scales")
# Keys and values in E4M3 with a calibrated scale a tensor, by the names of quantization_config.
KV_CACHES: dict[str, JsonDict] = {
    "fp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
}
GUARD_TEXT = "`import ptq.hf` before from_pretrained"


def ct_config(quantization: Quantization, layers: Layers, others: Iterable[str]) -> JsonDict:
    """The ``quantization_config`` of a model that :func:`ct_refusal` lets through: of one format,
    with inputs quantized everywhere or nowhere.

    Args:
        others: the linear layers that are not quantized.
    """
    everything = [*layers, *others]
    ((name, quantize_inputs),) = {(info.format, info.quantize_inputs) for info in layers.values()}
    fmt = CT_FORMATS[name]
    group: JsonDict = {
        "targets": ["Linear"],
        "format": fmt.name,
        "weights": fmt.weights,
        "input_activations": fmt.weights | {"dynamic": fmt.dynamic} if quantize_inputs else None,
        "output_activations": None,
    }
    transforms = _transforms(layers, everything)
    for guard, needed in zip(GUARDS, (transforms, _scaled_experts(layers)), strict=True):
        if needed:
            group[guard] = GUARD_TEXT
    config: JsonDict = {
        "quant_method": COMPRESSED_TENSORS.name,
        "version": "0.17.0",
        "quantization_status": "compressed",
        "format": fmt.name,
        "config_groups": {"group_0": group},
        "ignore": list(quantization.ignore),
        "kv_cache_scheme": KV_CACHES[quantization.kv_cache] if quantization.kv_cache else None,
    }
    if transforms:
        config["transform_config"] = {"config_groups": transforms}
    config["ptq"] = Section.of(quantization)
    return config


def _scaled_experts(layers: Layers) -> bool:
    """Whether there are experts that have a global scale in this dialect."""
    return any(
        is_expert(name) and CT_FORMATS[info.format].keeps_global_scale
        for name, info in layers.items()
    )


def _sizes(layers: Layers) -> dict[int, list[str]]:
    """The names of the layers that each block size rotates, by ascending size."""
    sizes = sorted({info.rotation for info in layers.values()} - {1})
    return {
        size: [name for name, info in layers.items() if info.rotation == size] for size in sizes
    }


def _transforms(layers: Layers, everything: list[str]) -> dict[str, JsonDict]:
    sizes, schemes = _sizes(layers), {}
    rotated = {name for names in sizes.values() for name in names}
    ignore = patterns([name for name in everything if name not in rotated], everything)
    for size, names in sizes.items():
        targets = ["Linear"] if len(sizes) == 1 else patterns(names, everything)
        apply = [
            {"targets": targets, "location": "input", "inverse": False, "ignore": ignore},
            {"targets": targets, "location": "weight_input", "inverse": True, "ignore": ignore},
        ]
        schemes[f"h{size}"] = {
            "type": "hadamard",
            "head_dim": size,
            "precision": "torch.float32",
            "randomize": False,
            "requires_grad": False,
            "apply": apply,
        }
    return schemes


def rotation_tensors(layers: Layers) -> dict[str, Tensor]:
    """The ±1 matrix [size, size] of every block size, under the first of ``layers`` that it
    rotates."""
    return {
        f"{names[0]}.h{size}_input.weight": hadamard(size) for size, names in _sizes(layers).items()
    }


def is_rotation_tensor(name: str) -> bool:
    """Whether a tensor is one of :func:`rotation_tensors`, which a reader that knows Hadamard
    matrices does not need."""
    return name.endswith("_input.weight")


@dataclass(frozen=True)
class _Group:
    """A scheme of quantization, as far as ptq reads it; so are those below."""

    targets: list[str] | None = None
    weights: JsonObject = field(default_factory=dict)
    input_activations: JsonObject | None = None
    format: str | None = None


@dataclass(frozen=True)
class _Place:
    targets: list[str]
    location: str
    ignore: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Transform:
    type: str
    apply: list[_Place]
    head_dim: int = 0
    randomize: bool = False


@dataclass(frozen=True)
class _Transforms:
    config_groups: dict[str, _Transform] = field(default_factory=dict)


@dataclass(frozen=True)
class _Config:
    config_groups: dict[str, _Group]
    format: str | None = None
    ignore: list[str] | None = None
    kv_cache_scheme: JsonObject | None = None
    transform_config: _Transforms | None = None
    ptq: Section | None = None


def parse_ct(config: Mapping[str, object]) -> Quantization:
    """What a ``compressed-tensors`` configuration says, of ours or of llm-compressor: of groups
    that name layers the first that matches holds.

    Raises:
        ValueError: it says something that ptq does not know, and therefore might read wrongly.
    """
    said = check(config, _Config, "quantization_config", "ptq writes it otherwise")
    if not said.config_groups:
        raise ValueError("quantization_config has no config group: the checkpoint is damaged")
    ours = said.ptq or Section()
    size, rotated = _parse_transforms(said.transform_config)
    groups = [
        (group.targets or [], _parse_group(group, said.format))
        for group in said.config_groups.values()
    ]
    # what names layers goes before what means all of them
    every = [facts for targets, facts in groups if targets == [EVERY]]
    base = (every or [facts for _, facts in groups])[0]
    overrides: dict[str, Mapping[str, object]] = {"hadamard": rotated} if rotated else {}
    for key, value in base.items():
        said_of = {
            pattern: facts[key]
            for targets, facts in groups
            for pattern in targets
            if targets != [EVERY]
        }
        if any(other != value for other in said_of.values()):
            overrides[key] = said_of
    values = base | {"hadamard": size, "input_rule": ours.input_rule, "nested": 0}
    return Quantization(
        values=values,
        overrides=overrides,
        ignore=tuple(said.ignore or ()),
        kv_cache=_parse_kv_cache(said.kv_cache_scheme),
        recipe=dict(ours.recipe),
        provenance=dict(ours.provenance),
    )


def _parse_group(group: _Group, format: str | None) -> dict[str, object]:
    """What a group says of its layers, by keys of PER_LAYER.

    Raises:
        ValueError: a format, or a variant of one, that ptq does not read.
    """
    formats = {record.name: record for record in CT_FORMATS.values()}
    name = group.format or format
    if name not in formats:
        raise ValueError(
            f"ptq does not read the compressed-tensors format {name!r}, only {', '.join(formats)}"
        )
    fmt, weights = formats[name], group.weights
    wrong = {k: weights.get(k) for k, v in fmt.weights.items() if weights.get(k, v) != v}
    # columns that were quantized in another order lie in their own
    if weights.get("actorder") not in (None, "weight", "static"):
        wrong["actorder"] = weights.get("actorder")
    classes = [t for t in group.targets or [] if t != EVERY and re.fullmatch(r"[A-Z]\w*", t)]
    if wrong or classes or not group.targets or (EVERY in group.targets and group.targets[1:]):
        raise ValueError(f"ptq does not read this variant of {name}: {wrong or group.targets}")
    inputs = group.input_activations is not None
    return {
        "format": fmt.format.name,
        "quantize_activations": inputs,
        "static_activations": inputs and fmt.format.has_global_scale,
    }


def _parse_kv_cache(scheme: JsonDict | None) -> str | None:
    """The name of a scheme for keys and values; other programs write fields that say nothing more
    as well."""
    if not scheme:
        return None
    for name, wanted in KV_CACHES.items():
        if all(scheme.get(key) == value for key, value in wanted.items()):
            return name
    raise ValueError(
        f"ptq does not read this kv_cache_scheme: {scheme}; it knows E4M3 with one calibrated "
        "scale a tensor"
    )


def _parse_transforms(config: _Transforms | None) -> tuple[int, dict[str, int]]:
    """The block size of all layers (0 for none), and that of some by pattern."""
    size, overrides = 0, {}
    for name, scheme in config.config_groups.items() if config else ():
        inputs = [place for place in scheme.apply if place.location == "input"]
        if (
            scheme.type != "hadamard"
            or scheme.randomize
            or len(inputs) != 1
            or len(scheme.apply) != 2
        ):
            raise ValueError(
                f"ptq does not read the transform {name!r} of type {scheme.type!r}, only "
                "Hadamard on inputs"
            )
        overrides |= dict.fromkeys(inputs[0].ignore, 0)
        if inputs[0].targets == ["Linear"]:
            size = scheme.head_dim
        else:
            overrides |= dict.fromkeys(inputs[0].targets, scheme.head_dim)
    return size, overrides


def ct_refusal(export: Export) -> str | None:
    """Why compressed-tensors is wrong for an export, and what to do; None if it is right."""
    layers = export.layers
    if export.foreign:
        return f"{export.foreign}; use dialect ptq"
    formats = {info.format for info in layers.values()}
    if unknown := sorted(formats - CT_FORMATS.keys()):
        return f"it has no format for {', '.join(unknown)}; use dialect ptq"
    if len(formats) > 1:
        return (
            f"one checkpoint would mix {', '.join(sorted(formats))}; use one format, or dialect ptq"
        )
    if len({(info.quantize_inputs, info.input_rule) for info in layers.values()}) > 1:
        return "layers quantize their inputs in different ways; use one scheme, or dialect ptq"
    for name, info in layers.items():
        layer = Candidate(name=name, info=info, dtype=export.dtype)
        for refusal in (*REFUSALS, *CT_FORMATS[info.format].refusals):
            if reason := refusal.of(layer):
                return f"{name}: {reason}"
    if reason := _fused_refusal(layers, export.scales) or _scale_refusal(layers, export.scales):
        return reason
    if export.dtype != "bfloat16":
        return (
            f"the dtype of the model is {export.dtype}, and other engines compute these "
            "checkpoints in bfloat16, or fail; convert the model to bfloat16 first, or use "
            "dialect ptq"
        )
    return None


def _fused_refusal(layers: Layers, scales: Tensors) -> str | None:
    """Of layers that engines merge into one matmul, with one rotation and one global scale."""
    for group in fused_groups(layers):
        first, *rest = group
        if any(layers[name].rotation != layers[first].rotation for name in rest):
            return (
                f"{', '.join(group)} are one matmul in engines and have different rotations; use "
                "one, or dialect ptq"
            )
        known = [scales[name] for name in group if name in scales]
        shared = CT_FORMATS[layers[first].format].keeps_global_scale
        if shared and any(not torch.equal(known[0], scale) for scale in known[1:]):
            return (
                f"{', '.join(group)} are one matmul in engines, with two global scales; "
                "requantize, or use dialect ptq"
            )
    return None


def _scale_refusal(layers: Layers, scales: Tensors) -> str | None:
    """Of layers with a global scale for which there is no place."""
    for name, info in layers.items():
        if (
            not FORMATS[info.format].has_global_scale
            and name in scales
            and scales[name].item() != 1
        ):
            return (
                f"{name} has a global scale besides its E8M0 scales; requantize, or use dialect ptq"
            )
    return None


def _caveats(layers: Layers) -> list[str]:
    """Of layers that :func:`ct_refusal` lets through; what engines do was read, not run (C2)."""
    if any(info.quantize_inputs for info in layers.values()):
        return [f"{_about_input_rules(layers)} GPUs without FP4 units keep activations in 16 bit."]
    return []


def _about_input_rules(layers: Layers) -> str:
    """Who scales activations how."""
    (rule,), own = {info.input_rule for info in layers.values()}, default_rule(_format(layers))
    if rule in ("default", own):
        return (
            "Engines choose the scales of activations themselves; ptq calibrates and evaluates "
            f"with `{own}`."
        )
    return (
        f"**Engines scale activations by `{own}`, not by `{rule}`**, with which this checkpoint "
        "was calibrated and which ptq computes: what `ptq eval` says does not hold for them."
    )


def _format(layers: Layers) -> Format:
    return FORMATS[next(iter(layers.values())).format]


def _why_import(layers: Layers) -> str | None:
    if _sizes(layers):
        return "attaches the online rotation"
    return "reads the global scales of experts" if _scaled_experts(layers) else None


def _conversion(info: LayerInfo) -> Conversion | None:
    return CT_FORMATS[info.format].conversion


COMPRESSED_TENSORS = Dialect(
    name="compressed-tensors",
    config=ct_config,
    parse=parse_ct,
    refusal=ct_refusal,
    opens=ct_opens,
    caveats=_caveats,
    held_to=(VLLM,),
    why_import=_why_import,
    conversion=_conversion,
    extra_tensors=rotation_tensors,
    is_extra=is_rotation_tensor,
    applies_input_rule=False,
    needs=("compressed_tensors",),
)
