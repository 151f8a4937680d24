"""The ``compressed-tensors`` dialect, which transformers and several engines read.

Its ``quantization_config`` is theirs; what only ptq needs stands under ``ptq`` in it. Rotation is a
``transform_config``, with a ±1 matrix stored under the first rotated layer of each block size. How
each format is stored: :mod:`ptq.checkpoint.compressed_tensors_formats`.

What is said here about other programs was read in compressed-tensors 0.17 to 0.20, transformers
5.16 to 5.23 and vLLM 0.33.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ptq.checkpoint.compressed_tensors_config import EVERY, KV_CACHES, parse_ct
from ptq.checkpoint.compressed_tensors_formats import (
    CT_FORMATS,
    REFUSALS,
    Candidate,
    ct_opens,
    same_there,
)
from ptq.checkpoint.dialect import Conversion, Dialect, Export, Layers, Tensors
from ptq.checkpoint.engines import VLLM
from ptq.checkpoint.quantization_config import (
    JsonDict,
    LayerInfo,
    Quantization,
    Section,
    expert_groups,
    fused_groups,
    is_expert,
    patterns,
)
from ptq.numerics.activations import default_rule
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import hadamard

# Loaders that read config_groups strictly stop at an unknown key and show its text; transformers is
# among them, which would not rotate inputs, and drop the global scales of experts.
GUARDS = ("rotated_weights", "expert_global_scales")
MIXED = "mixed-precision"  # the format of a configuration with several
GUARD_TEXT = "`import ptq.hf` before from_pretrained"


def ct_config(quantization: Quantization, layers: Layers, others: Iterable[str]) -> JsonDict:
    """The ``quantization_config`` of a model that :func:`ct_refusal` lets through: a group for
    every format, and for inputs that are quantized or not.

    Several groups name all their layers: a reader that looks for classes first would find that of
    layers that it merged in a group of all others.

    Args:
        others: the linear layers that are not quantized.
    """
    everything = [*layers, *others]
    kinds: dict[tuple[str, bool], dict[str, LayerInfo]] = {}
    for name, info in layers.items():
        kinds.setdefault((info.format, info.quantize_inputs), {})[name] = info
    ordered = {
        f"group_{i}": inside
        for i, inside in enumerate(sorted(kinds.values(), key=len, reverse=True))
    }
    groups = {
        name: _group(inside, _targets(inside, everything) if len(kinds) > 1 else [EVERY])
        for name, inside in ordered.items()
    }
    formats = {group["format"] for group in groups.values()}
    config: JsonDict = {
        "quant_method": COMPRESSED_TENSORS.name,
        "version": "0.17.0",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "config_groups": groups,
        "ignore": list(quantization.ignore),
        "kv_cache_scheme": KV_CACHES[quantization.kv_cache] if quantization.kv_cache else None,
    }
    if transforms := _transforms(layers, everything):
        config["transform_config"] = {"config_groups": transforms}
    ours = {name: next(iter(inside.values())).format for name, inside in ordered.items()}
    told = {
        name: fmt for name, fmt in ours.items() if same_there(CT_FORMATS[fmt])[0].format.name != fmt
    }
    config["ptq"] = Section.of(quantization) | ({"formats": told} if told else {})
    return config


def _targets(layers: Layers, everything: list[str]) -> list[str]:
    """Patterns of the layers of one of several groups. Experts are all those of a block, whatever
    their projections are called: vLLM asks for names of its own."""
    experts, every = expert_groups(layers), expert_groups(everything)
    others = patterns([name for name in layers if not is_expert(name)], everything)
    if experts.keys() == every.keys():
        return [*others, *([r"re:.*\.experts\.\d+\..*"] if experts else [])]
    return [*others, *(rf"re:{re.escape(block)}\.experts\.\d+\..*" for block in experts)]


def _group(layers: Layers, targets: list[str]) -> JsonDict:
    """The config group of layers that are quantized alike, but for their rotation."""
    info = next(iter(layers.values()))
    fmt = CT_FORMATS[info.format]
    inputs = fmt.inputs if info.quantize_inputs else None
    guards = (bool(_sizes(layers)), _scaled_experts(layers))
    return {
        "targets": targets,
        "format": fmt.name,
        "weights": fmt.weights,
        "input_activations": inputs,
        "output_activations": None,
        **{guard: GUARD_TEXT for guard, needed in zip(GUARDS, guards, strict=True) if needed},
    }


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


def ct_refusal(export: Export) -> str | None:
    """Why compressed-tensors is wrong for an export, and what to do; None if it is right."""
    layers = export.layers
    if export.foreign:
        return f"{export.foreign}; use dialect ptq"
    formats = {info.format for info in layers.values()}
    if unknown := sorted(formats - CT_FORMATS.keys()):
        return f"it has no format for {', '.join(unknown)}; use dialect ptq"
    for name, info in layers.items():
        layer = Candidate(name=name, info=info, dtype=export.dtype)
        for refusal in (*REFUSALS, *CT_FORMATS[info.format].refusals):
            if reason := refusal.of(layer):
                return f"{name}: {reason}"
    if reason := (
        _expert_refusal(layers)
        or _fused_refusal(layers, export.scales)
        or _scale_refusal(layers, export.scales)
    ):
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
        kinds = {(layers[name].format, layers[name].quantize_inputs) for name in group}
        if len(kinds) > 1:
            return (
                f"{', '.join(group)} are one matmul in engines and are quantized in different "
                "ways; use one format and scheme for them, or dialect ptq"
            )
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


def _expert_refusal(layers: Layers) -> str | None:
    """Of experts of one block that are quantized in several ways."""
    for block, names in expert_groups(layers).items():
        kinds = {(layers[name].format, layers[name].quantize_inputs) for name in names}
        if len(kinds) > 1:
            said = ", ".join(sorted({fmt for fmt, _ in kinds}))
            return (
                f"the experts of {block} are quantized in several ways ({said}), and engines run "
                "those of a block in one; use one format and scheme for them, or dialect ptq"
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
    inputs = [info for info in layers.values() if info.quantize_inputs]
    own = _in_words(default_rule(FORMATS[info.format]) for info in inputs)
    others = [
        info.input_rule
        for info in inputs
        if info.input_rule not in ("default", default_rule(FORMATS[info.format]))
    ]
    if not others:
        return (
            "Engines choose the scales of activations themselves; ptq calibrates and evaluates "
            f"with {own}."
        )
    return (
        f"**Engines scale activations by {own}, not by {_in_words(others)}**, with which this "
        "checkpoint was calibrated and which ptq computes: what `ptq eval` says does not hold for "
        "them."
    )


def _in_words(rules: Iterable[str]) -> str:
    return " or ".join(f"`{rule}`" for rule in sorted(set(rules)))


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
