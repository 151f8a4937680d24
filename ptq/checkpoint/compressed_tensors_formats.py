"""Our formats as compressed-tensors stores them: a record each, with what engines make of it.

FP4 tensors are those of :mod:`ptq.checkpoint`, byte for byte. MXFP8 has its codes in ``weight``
F8_E4M3 (out, in), the same bytes. Integers of 4 bits are one format there, whatever the group and
the scales (:mod:`ptq.checkpoint.compressed_tensors_int4`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.checkpoint.compressed_tensors_int4 import (
    INT4_TYPES,
    as_bfloat16,
    fold_int4,
    fold_mxint4,
    fold_nvint4,
    unfold_int4,
    unfold_mxint4,
    unfold_nvint4,
)
from ptq.checkpoint.dialect import Conversion, Tensors
from ptq.checkpoint.engines import (
    ENGINES,
    SGLANG,
    TENSORRT,
    TRANSFORMERS,
    VLLM,
    Opening,
    Verdict,
)
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, is_expert
from ptq.numerics.formats import (
    FP8_CHANNEL,
    INT4_32,
    INT4_128,
    MXFP4,
    MXFP8,
    MXINT4,
    NVFP4,
    NVINT4,
    Format,
)

# Blocks in which engines rotate.
SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer that is to be written."""

    name: str
    info: LayerInfo
    dtype: str | None

    @property
    def rotated(self) -> bool:
        return self.info.rotation > 1

    @property
    def expert(self) -> bool:
        return is_expert(self.name)


@dataclass(frozen=True)
class Refusal:
    """Layers that have no place in this dialect, or one where no engine looks.

    Attributes:
        reason: with a way out; ``{layer}`` stands for the :class:`Candidate`.
    """

    when: Callable[[Candidate], bool]
    reason: str

    def of(self, layer: Candidate) -> str | None:
        """The reason, if this is such a layer."""
        return self.reason.format(layer=layer, sizes=SIZES) if self.when(layer) else None


@dataclass(frozen=True)
class Rule:
    """What an engine was read (not run) to make of layers like these."""

    engine: str
    when: Callable[[str, LayerInfo], bool]
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class CtFormat:
    """A format of ours in compressed-tensors, and what engines make of it.

    Attributes:
        name: of the format there.
        weights: the arguments of weights in a config group.
        dynamic: ``dynamic`` in those of inputs, which are else the same,
        strategy: but for this, where it differs.
        conversion: None if tensors are stored as in the ``ptq`` dialect.
        refusals: of single layers, besides :data:`REFUSALS`.
        rules: besides :data:`RULES`.
    """

    format: Format
    name: str
    weights: JsonDict
    dynamic: bool | str = True
    strategy: str | None = None
    conversion: Conversion | None = None
    refusals: tuple[Refusal, ...] = ()
    rules: tuple[Rule, ...] = ()

    @property
    def inputs(self) -> JsonDict:
        """The arguments of inputs in a config group."""
        strategy = {} if self.strategy is None else {"strategy": self.strategy}
        return self.weights | strategy | {"dynamic": self.dynamic}

    @property
    def keeps_global_scale(self) -> bool:
        """Whether engines get a global scale, of which layers that they merge can have but one."""
        return self.format.has_global_scale and self.conversion is None


def name_e4m3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an MXFP8 layer with its codes in ``weight``, as the E4M3 numbers that they
    are; other tensors are passed on."""
    rest = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "weight_packed"}
    return rest | {"weight": tensors["weight_packed"].view(torch.float8_e4m3fn)}


def unname_channel(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`name_e4m3` for scales of whole rows, of any dtype.

    Raises:
        ValueError: a scale is no bfloat16 number.
    """
    return unname_e4m3(tensors) | {"weight_scale": as_bfloat16(tensors["weight_scale"])}


def unname_e4m3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`name_e4m3`."""
    rest = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "weight"}
    return rest | {"weight_packed": tensors["weight"].view(torch.uint8)}


_FOUR_BITS: JsonDict = {"num_bits": 4, "symmetric": True, "dynamic": False}

# Whatever the format.
REFUSALS = (
    Refusal(
        lambda layer: layer.rotated and layer.expert,
        "no engine rotates the inputs of experts; leave the experts unrotated, or use dialect ptq",
    ),
    Refusal(
        lambda layer: layer.rotated and layer.info.rotation not in SIZES,
        "engines rotate in blocks of {sizes}, not {layer.info.rotation}; choose one of those, or "
        "use dialect ptq",
    ),
)


def _rotated(name: str, info: LayerInfo) -> bool:
    return info.rotation > 1


def _weights_alone(name: str, info: LayerInfo) -> bool:
    return not info.quantize_inputs


def _all(name: str, info: LayerInfo) -> bool:
    return True


NOT_KNOWN_FP8 = "whether it reads FP8 of this dialect is not known; use nvfp4 with w4a4"
NOT_KNOWN = "whether it reads MXFP8 of this dialect is not known; use nvfp4"
SEVERAL = "whether it reads several formats in one checkpoint is not known; use one"
NO_ROTATION = "it does not rotate inputs; use --rotation none, or dialect ptq"
RULES = (
    Rule(TRANSFORMERS, _rotated, Verdict.IMPORT, "which attaches the online rotation"),
    Rule(
        TRANSFORMERS,
        lambda name, info: is_expert(name) and info.quantize_inputs,
        Verdict.NARROW,
        "it decompresses experts when it loads them",
    ),
    Rule(
        VLLM,
        lambda name, info: info.rotation > 1 and info.bias,
        Verdict.STOPS,
        "vLLM asserts that a rotated linear layer has no bias; leave it unrotated, or use dialect "
        "ptq",
    ),
    Rule(VLLM, _rotated, Verdict.RIGHT, "with `tensor_parallel_size=1` only"),
    Rule(SGLANG, _rotated, Verdict.WRONG, NO_ROTATION),
)

_NVFP4 = CtFormat(
    format=NVFP4,
    name="nvfp4-pack-quantized",
    weights=_FOUR_BITS
    | {
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    dynamic="local",
    refusals=(
        Refusal(
            lambda layer: layer.info.quantize_inputs and not layer.info.static_inputs,
            "NVFP4 inputs need a calibrated global scale; calibrate it, or use dialect ptq",
        ),
    ),
    rules=(
        Rule(
            TRANSFORMERS,
            lambda name, info: is_expert(name),
            Verdict.IMPORT,
            "which reads the global scales of experts",
        ),
        Rule(
            VLLM,
            lambda name, info: info.rotation > 1 and not info.quantize_inputs,
            Verdict.WRONG,
            "vLLM computes rotated weight-only NVFP4 wrongly on Blackwell; use w4a4, no rotation, "
            "or dialect ptq",
        ),
        Rule(
            TENSORRT,
            _weights_alone,
            Verdict.STOPS,
            "it loads no weight-only NVFP4; use --scheme w4a4, or mxfp4",
        ),
        Rule(
            TENSORRT,
            lambda name, info: info.rotation > 1 and info.quantize_inputs,
            Verdict.WRONG,
            NO_ROTATION,
        ),
    ),
)
_MXFP4 = CtFormat(
    format=MXFP4,
    name="mxfp4-pack-quantized",
    weights=_FOUR_BITS
    | {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    rules=(
        Rule(
            VLLM,
            _weights_alone,
            Verdict.RIGHT,
            "on Blackwell GPUs it quantizes the inputs too, although this model was made for 16 "
            "bits",
        ),
        Rule(SGLANG, _all, Verdict.STOPS, "it has no MXFP4 of this dialect; use nvfp4"),
        Rule(
            TENSORRT,
            lambda name, info: info.quantize_inputs,
            Verdict.NARROW,
        ),
        Rule(TENSORRT, _rotated, Verdict.WRONG, NO_ROTATION),
    ),
)
_INT4_REFUSALS = (
    Refusal(
        lambda layer: layer.info.quantize_inputs,
        "int4 inputs have no place for scales in 8 bits; quantize weights only, or use dialect ptq",
    ),
    Refusal(
        lambda layer: layer.dtype != "bfloat16",
        "its scales are bf16 numbers there, the dtype of the model is {layer.dtype}; use a bf16 "
        "model, or dialect ptq",
    ),
)


def _int4(
    format: Format,
    write: Callable[[Tensors], dict[str, Tensor]],
    read: Callable[[Tensors], dict[str, Tensor]],
    *rules: Rule,
) -> CtFormat:
    """A format of integers whose scales are exact in bf16."""
    return CtFormat(
        format=format,
        name="pack-quantized",
        weights=_FOUR_BITS | {"type": "int", "strategy": "group", "group_size": format.group_size},
        conversion=Conversion(types=INT4_TYPES, write=write, read=read),
        refusals=_INT4_REFUSALS,
        rules=rules,
    )


_NVINT4 = _int4(
    NVINT4,
    fold_nvint4,
    unfold_nvint4,
    Rule(
        SGLANG,
        _all,
        Verdict.WRONG,
        "its int4 kernel neither takes nor refuses groups of 16; use nvfp4",
    ),
    Rule(TENSORRT, _all, Verdict.STOPS, "it has no int4 of groups of 16; use nvfp4 with w4a4"),
)
_TENSORRT_INT4 = Rule(
    TENSORRT,
    _all,
    Verdict.UNKNOWN,
    "whether it reads int4 of this dialect is not known; use nvfp4 with w4a4",
)
_MXINT4 = _int4(MXINT4, fold_mxint4, unfold_mxint4, _TENSORRT_INT4)
_INT4_128 = _int4(INT4_128, fold_int4, unfold_int4, _TENSORRT_INT4)
_INT4_32 = _int4(INT4_32, fold_int4, unfold_int4, _TENSORRT_INT4)
_MXFP8 = CtFormat(
    format=MXFP8,
    name="mxfp8-quantized",
    weights=_FOUR_BITS
    | {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    conversion=Conversion(
        types={"weight": (torch.float8_e4m3fn,), "weight_scale": (torch.uint8,)},
        packed="weight",
        write=name_e4m3,
        read=unname_e4m3,
    ),
    rules=(
        Rule(
            TRANSFORMERS,
            lambda name, info: is_expert(name),
            Verdict.IMPORT,
            "which reads experts in 8 bits",
        ),
        Rule(
            VLLM,
            _weights_alone,
            Verdict.RIGHT,
            "on Blackwell GPUs it quantizes inputs to MXFP8 too, although this model was made for "
            "16 bits",
        ),
        Rule(SGLANG, _all, Verdict.UNKNOWN, NOT_KNOWN),
        Rule(TENSORRT, _all, Verdict.UNKNOWN, NOT_KNOWN),
    ),
)

_FP8_CHANNEL = CtFormat(
    format=FP8_CHANNEL,
    name="float-quantized",
    weights=_FOUR_BITS | {"num_bits": 8, "type": "float", "strategy": "channel"},
    strategy="token",
    conversion=Conversion(
        types={"weight": (torch.float8_e4m3fn,), "weight_scale": INT4_TYPES["weight_scale"]},
        packed="weight",
        write=name_e4m3,
        read=unname_channel,
    ),
    rules=(Rule(TENSORRT, _all, Verdict.UNKNOWN, NOT_KNOWN_FP8),),
)

# Of records that are the same there, a reader who is told nothing takes the first.
CT_FORMATS = {
    record.format.name: record
    for record in (_NVFP4, _MXFP4, _NVINT4, _INT4_128, _INT4_32, _MXINT4, _MXFP8, _FP8_CHANNEL)
}


def same_there(record: CtFormat) -> list[CtFormat]:
    """The formats of ours that a config group describes in the same words, from the first."""
    return [
        other
        for other in CT_FORMATS.values()
        if (other.name, other.weights) == (record.name, record.weights)
    ]


# From best to worst.
_ORDER = tuple(Verdict)


def ct_opens(layers: Mapping[str, LayerInfo]) -> dict[str, Opening]:
    """What every engine makes of a checkpoint with these layers: the worst that a rule says of one
    of them, which is named where it is a reason not to write it."""
    found = dict.fromkeys(ENGINES, Opening(Verdict.RIGHT))
    if len({(info.format, info.quantize_inputs) for info in layers.values()}) > 1:
        found |= dict.fromkeys((SGLANG, TENSORRT), Opening(Verdict.UNKNOWN, SEVERAL))
    for name, info in layers.items():
        for rule in (*RULES, *CT_FORMATS[info.format].rules):
            if not rule.when(name, info):
                continue
            old, note = found[rule.engine], rule.note
            worse = _ORDER.index(rule.verdict) > _ORDER.index(old.verdict)
            if worse or (rule.verdict == old.verdict and not old.note):
                note = note if rule.verdict.serves else f"{name}: {note}"
                found[rule.engine] = Opening(rule.verdict, note)
    return found
