"""The dialect of NVIDIA's ModelOpt, which vLLM, SGLang and TensorRT-LLM read: NVFP4 without
rotation.

Under a quantized layer (out, in) lie ``weight`` U8 [out, in/2], ``weight_scale`` F8_E4M3
[out, in/16], ``weight_scale_2`` F32 [] and, with quantized inputs, ``input_scale`` F32 []; the
last two multiply, where other dialects divide by their reciprocals. Scales of an FP8 cache,
``k_scale`` and ``v_scale`` F32 [], lie under ``self_attn.k_proj`` and ``self_attn.v_proj``. What is
quantized is said twice: in config.json, and for readers that look for it there in
``hf_quant_config.json``, which some checkpoints have alone. Patterns of layers that are left alone
are those of a shell.

Read in ModelOpt 0.47 and vLLM 0.32.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq.checkpoint.dialect import Conversion, Dialect, Export, Layers
from ptq.checkpoint.engines import (
    ENGINES,
    TRANSFORMERS,
    VLLM,
    Opening,
    Verdict,
)
from ptq.checkpoint.quantization_config import (
    KEY_VALUES,
    PER_LAYER,
    JsonDict,
    LayerInfo,
    Quantization,
    Section,
    fused_groups,
)
from ptq.numerics.formats import NVFP4
from ptq.reading.schema import JsonObject, check

logger = logging.getLogger(__name__)

# Whether inputs are quantized → the name of the scheme.
ALGORITHMS = {True: "NVFP4", False: "W4A16_NVFP4"}
# Readers refuse a hf_quant_config.json of another producer.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
FILE = "hf_quant_config.json"
FP8_CACHE: JsonDict = {"dynamic": False, "num_bits": 8, "type": "float"}
# Where readers look for scales of keys and values, and what the ptq dialect calls them.
STORED_SCALE = re.compile(r"^(.*\.self_attn)\.([kv])_proj\.\2_scale$")
CACHE_SCALE = re.compile(r"^(.*\.self_attn)\.([kv])_scale$")
NOTHING_ELSE = "use dialect ptq"


def modelopt_config(quantization: Quantization, layers: Layers, others: Iterable[str]) -> JsonDict:
    """The ``quantization_config`` of a model that :func:`_refusal` lets through.

    Args:
        others: the linear layers that are not quantized, which are listed by their full names:
            engines also look for parts of names.
    """
    (inputs,) = {info.quantize_inputs for info in layers.values()}
    arguments: JsonDict = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_method": MODELOPT.name,
        "quant_algo": ALGORITHMS[inputs],
        "config_groups": {
            "group_0": {
                "weights": arguments,
                "input_activations": dict(arguments) if inputs else None,
                "targets": ["Linear"],
            }
        },
        "group_size": NVFP4.group_size,
        "ignore": list(others),
        "kv_cache_scheme": FP8_CACHE if quantization.kv_cache else None,
        "producer": PRODUCER,
        "ptq": Section.of(quantization),
    }


def hf_quant_config(config: JsonDict) -> dict[str, JsonDict]:
    """The other file that says the same."""
    said = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": "FP8" if config["kv_cache_scheme"] else None,
        "group_size": NVFP4.group_size,
        "exclude_modules": config["ignore"],
    }
    return {FILE: {"producer": PRODUCER, "quantization": said}}


@dataclass(frozen=True)
class _Said:
    """As config.json has it; in the other file it lies in ``quantization``, under other names."""

    quant_algo: str
    group_size: int | None = None
    ignore: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    kv_cache_scheme: JsonObject | None = None
    kv_cache_quant_algo: str | None = None
    ptq: Section | None = None


def parse_modelopt(config: Mapping[str, object]) -> Quantization:
    """What a configuration of this dialect says, in config.json or in hf_quant_config.json.

    Raises:
        ValueError: another scheme than NVFP4, or another size of its groups.
    """
    inner = config.get("quantization")
    said = check(inner if isinstance(inner, dict) else config, _Said, "quantization_config", "")
    schemes = {name: inputs for inputs, name in ALGORITHMS.items()}
    name = said.quant_algo.upper()
    if name not in schemes:
        raise ValueError(
            f"ptq does not read the ModelOpt scheme {said.quant_algo!r}, only {', '.join(schemes)}"
        )
    if said.group_size not in (None, NVFP4.group_size):
        raise ValueError(
            f"ptq does not read NVFP4 with groups of {said.group_size}, only {NVFP4.group_size}"
        )
    cache = _parse_cache(said)
    unread = None
    if cache not in (None, *KEY_VALUES):
        unread = f"its keys and values in {cache} are not read"
        logger.warning("%s: they stay in 16 bits", unread)
    ours, inputs = said.ptq or Section(), schemes[name]
    groups = config.get("config_groups")
    if inputs and isinstance(groups, dict) and groups:
        # it may say NVFP4, and leave the inputs alone
        inputs = any(isinstance(g, dict) and g.get("input_activations") for g in groups.values())
    return Quantization(
        values=PER_LAYER
        | {
            "format": NVFP4.name,
            "quantize_activations": inputs,
            "static_activations": inputs,
            "input_rule": ours.input_rule,
        },
        ignore=tuple(_pattern(p) for p in (*said.ignore, *said.exclude_modules)),
        kv_cache=None if unread else cache,
        unread=unread,
        recipe=dict(ours.recipe),
        provenance=dict(ours.provenance),
    )


def _parse_cache(said: _Said) -> str | None:
    """How keys and values are kept: a name of KEY_VALUES, None, or what it says else."""
    algorithm, scheme = said.kv_cache_quant_algo, said.kv_cache_scheme
    if algorithm and algorithm.upper() != "FP8":
        return algorithm
    if scheme and any(scheme.get(key) != value for key, value in FP8_CACHE.items()):
        return str(scheme)
    return "fp8" if algorithm or scheme else None


def store_key_value(name: str, scale: Tensor) -> tuple[str, Tensor]:
    """A scale of keys or values ``….self_attn.k_scale`` float32 [1] as it lies here."""
    return CACHE_SCALE.sub(r"\1.\2_proj.\2_scale", name), scale.reshape(())


def key_value_name(name: str) -> str:
    """The inverse of :func:`store_key_value`, for names."""
    return STORED_SCALE.sub(r"\1.\2_scale", name)


def _pattern(glob: str) -> str:
    """A pattern of a shell in our words."""
    if not set(glob) & set("*?["):
        return glob
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in glob)
    return f"re:{''.join(parts)}$"


def write_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an NVFP4 layer under their names here; others are passed on."""
    renamed = {"weight_packed": "weight"}
    result = {
        renamed.get(leaf, leaf): tensor for leaf, tensor in tensors.items() if leaf not in _FACTORS
    }
    for leaf, factor in _FACTORS.items():
        if leaf in tensors:
            result[factor] = (1 / tensors[leaf]).float().reshape(())
    return result


def read_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`write_layer`. A factor that is no reciprocal of a float32 number gets a
    divisor in float64, whose reciprocal rounds to it."""
    result = {
        "weight_packed" if leaf == "weight" else leaf: tensor
        for leaf, tensor in tensors.items()
        if leaf not in _FACTORS.values()
    }
    for leaf, factor in _FACTORS.items():
        if factor not in tensors:
            continue
        t = tensors[factor]
        if t.numel() != 1:
            raise ValueError(f"{factor} has shape {tuple(t.shape)} and should be one number")
        divisor = 1 / t.reshape(1)
        back = torch.equal(1 / divisor, t.reshape(1))
        result[leaf] = divisor if back else 1 / t.double().reshape(1)
    return result


# Global scales: the divisor of other dialects → the factor of this one.
_FACTORS = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


def _conversion(info: LayerInfo) -> Conversion:
    types: dict[str, tuple[torch.dtype, ...]] = {
        "weight": (torch.uint8,),
        "weight_scale": (torch.float8_e4m3fn,),
        "weight_scale_2": (torch.float32,),
    }
    if info.static_inputs:
        types["input_scale"] = (torch.float32,)
    return Conversion(types=types, packed="weight", write=write_layer, read=read_layer)


def _refusal(export: Export) -> str | None:
    if export.foreign:
        return f"{export.foreign}; {NOTHING_ELSE}"
    if export.kv_cache is not None and not any(".self_attn." in name for name in export.layers):
        return (
            "its readers look for scales of keys and values under self_attn, which this model does "
            "not have; leave out --kv-cache, or use dialect compressed-tensors"
        )
    infos = export.layers.values()
    if others := sorted({info.format for info in infos} - {NVFP4.name}):
        return f"it has no format for {', '.join(others)}; use nvfp4, or dialect ptq"
    if any(info.rotation > 1 for info in infos):
        return "no engine that reads it rotates inputs; use --rotation none, or dialect ptq"
    if len({(info.quantize_inputs, info.input_rule) for info in infos}) > 1:
        return "layers quantize their inputs in different ways; use one scheme, or dialect ptq"
    if any(info.quantize_inputs and not info.static_inputs for info in infos):
        return "NVFP4 inputs need a calibrated global scale; calibrate it, or use dialect ptq"
    for group in fused_groups(export.layers):
        known = [export.scales[name] for name in group if name in export.scales]
        if any(not torch.equal(known[0], scale) for scale in known[1:]):
            return (
                f"{', '.join(group)} are one matmul in engines, with two global scales; "
                "requantize, or use dialect ptq"
            )
    if export.dtype not in ("bfloat16", "float16"):
        return (
            f"the dtype of the model is {export.dtype}, and engines compute these checkpoints in "
            "16 bits; convert the model to bfloat16 first, or use dialect ptq"
        )
    return None


def _opens(layers: Layers) -> dict[str, Opening]:
    inputs = any(info.quantize_inputs for info in layers.values())
    found = dict.fromkeys(ENGINES, Opening(Verdict.RIGHT))
    unknown = "it does not know ModelOpt; use --dialect compressed-tensors, or ptq.load"
    found[TRANSFORMERS] = Opening(Verdict.STOPS, unknown)
    if not inputs:
        alone = "whether it loads weight-only NVFP4 of ModelOpt is not known; use --scheme w4a4"
        found |= {
            engine: Opening(Verdict.UNKNOWN, alone)
            for engine in ENGINES
            if engine not in (TRANSFORMERS, VLLM)
        }
    return found


MODELOPT = Dialect(
    name="modelopt",
    config=modelopt_config,
    parse=parse_modelopt,
    refusal=_refusal,
    opens=_opens,
    held_to=(VLLM,),
    conversion=_conversion,
    extra_files=hf_quant_config,
    store_key_value=store_key_value,
    key_value_name=key_value_name,
    config_file=FILE,
    applies_input_rule=False,
)
