"""A checkpoint of nested codes at one of its two widths (:mod:`ptq.numerics.nested`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.numerics.formats import FORMATS
from ptq.numerics.nested import drop, narrower
from ptq.numerics.tensor import QuantizedTensor, Scales, pack, unpack


def at_width(layers: Mapping[str, LayerInfo], bits: int | None, path: Path) -> dict[str, LayerInfo]:
    """What the layers of the checkpoint in ``path`` are at so many bits; None is as stored. Layers
    without nested codes stay as they are.

    Raises:
        ValueError: no layer has nested codes, or one has no such width.
    """
    if bits is None:
        return dict(layers)
    nested = {name: info for name, info in layers.items() if info.nested}
    if not nested:
        raise ValueError(
            f"{path} does not have two widths to choose from with bits={bits}: quantize with "
            "--format mxint8 --nested 4, or leave it out"
        )
    result = dict(layers)
    for name, info in nested.items():
        fmt = FORMATS[info.format]
        if bits not in (info.nested, fmt.element.bits):
            raise ValueError(
                f"{name} in {path} has {info.nested} or {fmt.element.bits} bits, not {bits}"
            )
        if bits == info.nested:
            result[name] = replace(info, format=narrower(fmt, bits).name, nested=0)
    return result


def converted(
    tensors: Mapping[str, Tensor], stored: LayerInfo, wanted: LayerInfo, name: str
) -> dict[str, Tensor]:
    """The tensors of the layer ``name`` at the width of ``wanted``, an info of :func:`at_width`,
    by the names of the buffers of QuantLinear and in memory form.

    Raises:
        ValueError: scales that the narrower format does not have.
    """
    if wanted.format == stored.format:
        return dict(tensors)
    fmt = FORMATS[stored.format]
    bits, t = tensors["weight_scale"], tensors.get("weight_global_scale", torch.ones(()))
    wide = QuantizedTensor(unpack(tensors["weight_packed"], fmt), Scales(bits, t, fmt))
    try:
        narrow = drop(wide, stored.nested)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    packed = pack(narrow.codes, narrow.format)
    return {**tensors, "weight_packed": packed, "weight_scale": narrow.scales.bits}
