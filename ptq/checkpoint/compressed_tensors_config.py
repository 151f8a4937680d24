"""What a ``compressed-tensors`` configuration says, ours or that of llm-compressor, as far as ptq
reads it; written by :mod:`ptq.checkpoint.dialect_compressed_tensors`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ptq.checkpoint.compressed_tensors_formats import CT_FORMATS, same_there
from ptq.checkpoint.quantization_config import PER_LAYER, JsonDict, Quantization, Section
from ptq.reading.schema import JsonObject, check

EVERY = "Linear"  # a target: all of them
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
        (group.targets or [], _parse_group(group, said.format, ours.formats.get(name)))
        for name, group in said.config_groups.items()
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
    if ours.input_rule_overrides:
        overrides["input_rule"] = ours.input_rule_overrides
    values = PER_LAYER | base | {"hadamard": size, "input_rule": ours.input_rule}
    return Quantization(
        values=values,
        overrides=overrides,
        ignore=tuple(said.ignore or ()),
        kv_cache=_parse_kv_cache(said.kv_cache_scheme),
        recipe=dict(ours.recipe),
        provenance=dict(ours.provenance),
    )


def _parse_group(group: _Group, format: str | None, own: str | None) -> dict[str, object]:
    """What a group says of its layers, by keys of PER_LAYER.

    Args:
        format: of the configuration, for groups that do not say theirs.
        own: which of our formats it is, where it could be several.

    Raises:
        ValueError: a format, or a variant of one, that ptq does not read.
    """
    name, weights = group.format or format, group.weights
    records = [record for record in CT_FORMATS.values() if record.name == name]
    if not records:
        known = dict.fromkeys(record.name for record in CT_FORMATS.values())
        raise ValueError(
            f"ptq does not read the compressed-tensors format {name!r}, only {', '.join(known)}"
        )
    size = weights.get("group_size")
    fmt = next((r for r in records if r.weights.get("group_size") == size), records[0])
    wrong = {k: weights.get(k) for k, v in fmt.weights.items() if weights.get(k, v) != v}
    # columns that were quantized in another order lie in their own
    if weights.get("actorder") not in (None, "weight", "static"):
        wrong["actorder"] = weights.get("actorder")
    classes = [t for t in group.targets or [] if t != EVERY and re.fullmatch(r"[A-Z]\w*", t)]
    # inputs are quantized to the format of the weights, or not at all
    inputs = group.input_activations or {}
    asked = {key: inputs[key] for key in ("num_bits", "type", "group_size") if key in inputs}
    if inputs and fmt.strategy is not None:
        asked |= {key: inputs.get(key) for key in ("strategy", "dynamic")}
    differ = {key: value for key, value in asked.items() if value != fmt.inputs.get(key)}
    wrong |= {f"{key} of inputs": value for key, value in differ.items()}
    if group.input_activations is not None and fmt.format.weights_only:
        wrong["input_activations"] = group.input_activations
    if wrong or classes or not group.targets or (EVERY in group.targets and group.targets[1:]):
        raise ValueError(f"ptq does not read this variant of {name}: {wrong or group.targets}")
    if own is not None:
        same = {record.format.name: record for record in same_there(fmt)}
        if own not in same:
            raise ValueError(
                f"ptq.formats in quantization_config says {own!r} of a group that is "
                f"{' or '.join(same)}: the checkpoint is damaged, copy it again"
            )
        fmt = same[own]
    quantized = group.input_activations is not None
    return {
        "format": fmt.format.name,
        "quantize_activations": quantized,
        "static_activations": quantized and fmt.format.has_global_scale,
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
