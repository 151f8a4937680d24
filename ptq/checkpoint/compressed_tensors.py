"""The ``compressed-tensors`` dialect: its ``quantization_config``, and what it stores differently
from ``ptq``.

FP4 tensors are those of checkpoint.py, byte for byte. Different are (spec interop.md, sections 2 to
5)

- NVINT4, which becomes int4 with groups of 16: ``weight_packed`` I32 (out, in / 8) with the codes
  offset by 8, ``weight_scale`` BF16 with the global scale multiplied in (exact: it is a power of
  two), ``weight_shape`` I64 [2];
- rotation, which is a ``transform_config`` with a ±1 matrix stored under the first rotated layer of
  each block size.

The packages read here: compressed-tensors 0.17 to 0.20, transformers 5.16 to 5.23, vLLM 0.33.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ptq.checkpoint.quantization_config import VERSION, JsonDict, LayerInfo, Quantization, patterns
from ptq.numerics.formats import E4M3_LARGEST, FORMATS
from ptq.numerics.rotation import hadamard

FORMAT_NAMES = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvint4": "pack-quantized",
}
_BASE = {"num_bits": 4, "symmetric": True, "dynamic": False}
WEIGHTS: dict[str, JsonDict] = {
    "nvfp4": _BASE
    | {
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": _BASE
    | {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvint4": _BASE | {"type": "int", "strategy": "group", "group_size": 16},
}
DYNAMIC = {"nvfp4": "local", "mxfp4": True}
# Loaders that read config_groups strictly stop at an unknown key and show its text; those that
# would compute a rotated model without rotating its inputs are among them.
GUARD = "rotated_weights"
GUARD_TEXT = "`import ptq.hf` before from_pretrained"


def ct_config(
    quantization: Quantization, layers: Mapping[str, LayerInfo], others: Iterable[str]
) -> JsonDict:
    """The ``quantization_config`` of a model that refusals.py lets through: one format, one way to
    quantize inputs.

    Args:
        others: the linear layers that are not quantized.
    """
    everything = [*layers, *others]
    ((fmt, quantize_inputs),) = {(info.format, info.quantize_inputs) for info in layers.values()}
    inputs = WEIGHTS[fmt] | {"dynamic": DYNAMIC[fmt]} if quantize_inputs else None
    group: JsonDict = {
        "targets": ["Linear"],
        "format": FORMAT_NAMES[fmt],
        "weights": WEIGHTS[fmt],
        "input_activations": inputs,
        "output_activations": None,
    }
    transforms = _transforms(layers, everything)
    if transforms:
        group[GUARD] = GUARD_TEXT
    config: JsonDict = {
        "quant_method": "compressed-tensors",
        "version": "0.17.0",
        "quantization_status": "compressed",
        "format": FORMAT_NAMES[fmt],
        "config_groups": {"group_0": group},
        "ignore": list(quantization.ignore),
        "kv_cache_scheme": None,
    }
    if transforms:
        config["transform_config"] = {"config_groups": transforms}
    config["ptq"] = {
        "version": VERSION,
        "input_rule": quantization.values["input_rule"],
        "recipe": quantization.recipe,
        "provenance": quantization.provenance,
    }
    return config


def _sizes(layers: Mapping[str, LayerInfo]) -> dict[int, list[str]]:
    """{block size: layers rotated by it}, in ascending order of sizes."""
    sizes = sorted({info.rotation for info in layers.values()} - {1})
    return {
        size: [name for name, info in layers.items() if info.rotation == size] for size in sizes
    }


def _transforms(layers: Mapping[str, LayerInfo], everything: list[str]) -> dict[str, JsonDict]:
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


def rotation_tensors(layers: Mapping[str, LayerInfo]) -> dict[str, Tensor]:
    """The ±1 matrix [size, size] of every block size, under the first of ``layers`` that it
    rotates."""
    return {
        f"{names[0]}.h{size}_input.weight": hadamard(size) for size, names in _sizes(layers).items()
    }


def is_rotation_tensor(name: str) -> bool:
    """Whether a tensor of a checkpoint is such a matrix: a reader that knows Hadamard needs none of
    them."""
    return name.endswith("_input.weight")


def parse_ct(config: Mapping[str, object]) -> Quantization:
    """What a ``compressed-tensors`` configuration of ours says.

    Raises:
        ValueError: it says something that ptq does not write, and therefore might read wrongly.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or config.get("kv_cache_scheme"):
        raise ValueError(
            "ptq reads compressed-tensors checkpoints with one config group and no quantized KV "
            "cache"
        )
    (group,) = groups.values()
    names = {ct: name for name, ct in FORMAT_NAMES.items()}
    written = group.get("format") or config.get("format")
    if written not in names:
        raise ValueError(
            f"ptq does not read the compressed-tensors format {written!r}, only {', '.join(names)}"
        )
    fmt = names[str(written)]
    weights, inputs = dict(group["weights"]), group.get("input_activations")
    wrong = {k: weights.get(k) for k, v in WEIGHTS[fmt].items() if weights.get(k, v) != v}
    if (
        wrong
        or weights.get("actorder") not in (None, "weight")
        or group.get("targets") != ["Linear"]
    ):
        raise ValueError(
            f"ptq does not read this variant of {written}: {wrong or group.get('targets')}"
        )
    size, overrides = _parse_transforms(config.get("transform_config"))
    ours = config.get("ptq") or {}
    assert isinstance(ours, dict)
    ignore = config.get("ignore") or []
    assert isinstance(ignore, list)
    values = {
        "format": fmt,
        "hadamard": size,
        "quantize_activations": inputs is not None,
        "static_activations": inputs is not None and FORMATS[fmt].has_global_scale,
        "input_rule": ours.get("input_rule", "default"),
    }
    return Quantization(
        values=values,
        overrides={"hadamard": overrides} if overrides else {},
        ignore=tuple(ignore),
        recipe=ours.get("recipe", {}),
        provenance=ours.get("provenance", {}),
    )


def _parse_transforms(config: object) -> tuple[int, dict[str, int]]:
    """(block size of every layer, or 0; overrides by pattern)."""
    size, overrides = 0, {}
    schemes = config.get("config_groups", {}) if isinstance(config, dict) else {}
    for name, scheme in schemes.items():
        inputs = [a for a in scheme["apply"] if a["location"] == "input"]
        if (
            scheme["type"] != "hadamard"
            or scheme.get("randomize")
            or len(inputs) != 1
            or len(scheme["apply"]) != 2
        ):
            raise ValueError(
                f"ptq does not read the transform {name!r} of type {scheme['type']!r}, only "
                "Hadamard on inputs"
            )
        overrides |= dict.fromkeys(inputs[0].get("ignore", ()), 0)
        if inputs[0]["targets"] == ["Linear"]:
            size = scheme["head_dim"]
        else:
            overrides |= dict.fromkeys(inputs[0]["targets"], scheme["head_dim"])
    return size, overrides


def fold_int4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NVINT4 tensors of one layer (keys without its name) → int4 with bf16 scales; other keys are
    passed on.

    Law: ``unfold_int4(fold_int4(x))`` stands for the same numbers.

    Raises:
        ValueError: a scale times the global scale is not a bf16 number, because the latter is no
            power of two.
    """
    packed, divisor = tensors["weight_packed"], tensors["weight_global_scale"]
    exact = tensors["weight_scale"].float() / divisor
    folded = exact.to(torch.bfloat16)
    if int(divisor.view(torch.int32)) & 0x7FFFFF or not torch.equal(folded.float(), exact):
        raise ValueError(
            "its global scale is not a power of two in range, folding it into bf16 scales would "
            "round: requantize"
        )
    kept = {
        k: v
        for k, v in tensors.items()
        if k not in ("weight_packed", "weight_scale", "weight_global_scale")
    }
    shape = torch.tensor([packed.shape[0], 2 * packed.shape[1]], dtype=torch.int64)
    return kept | {
        "weight_packed": (packed ^ 0x88).view(torch.int32),
        "weight_scale": folded,
        "weight_shape": shape,
    }


def unfold_int4(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`fold_int4` up to the split of a scale into E4M3 and a power of two: the
    same steps.

    Raises:
        ValueError: the scales have no such split, so this int4 checkpoint is not an NVINT4 one.
    """
    scale = tensors["weight_scale"].float()
    # The smallest power of two t with max(scale) <= 448 t. One that fits existed (the writer's),
    # and moving scales up inside the range of E4M3 only adds precision to the small ones.
    fraction, exponent = torch.frexp(scale.max() / E4M3_LARGEST)  # fraction in [0.5, 1)
    t = torch.ldexp(torch.ones(()), exponent - (fraction == 0.5).int())
    stored = (scale / t).to(torch.float8_e4m3fn)
    if not torch.equal(stored.float() * t, scale):
        raise ValueError(
            "its bf16 scales are no E4M3 scales times a power of two: this is int4, but not NVINT4"
        )
    kept = {
        k: v
        for k, v in tensors.items()
        if k not in ("weight_packed", "weight_scale", "weight_shape")
    }
    packed = tensors["weight_packed"].view(torch.uint8) ^ 0x88
    return kept | {
        "weight_packed": packed,
        "weight_scale": stored,
        "weight_global_scale": (1 / t).reshape(1),
    }
