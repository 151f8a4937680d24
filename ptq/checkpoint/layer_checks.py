"""What the tensors of a quantized layer may be, whoever wrote them: types, shapes and scales.

Everything here is asked at every load. Codes are looked at only where a code may stand for no
number; the rest is one pass over the scale bytes, 1/16 or 1/32 as many as weights. A wrong but
legal number is not seen: that takes the sums of :mod:`ptq.checkpoint.checksums`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.model.extremes import LARGEST, extremes
from ptq.numerics.formats import FORMATS, Format

REMEDY = "the checkpoint is damaged, copy or quantize it again"
GLOBALS = ("weight_global_scale", "input_global_scale")
# float64 where no float32 divisor stands for the factor that a file holds
DIVISORS = (torch.float32, torch.float64)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Of a global scale and of its reciprocal: normal float32 numbers, so that neither is 0 or infinite.
NORMAL = (2.0**-126, 2.0**126)


def check_layer(tensors: Mapping[str, Tensor], info: LayerInfo, name: str) -> None:
    """Raise ValueError unless ``tensors`` are those of a quantized layer as the ``ptq`` dialect
    stores it (C4).

    Args:
        tensors: by names that do not repeat that of the layer; others than those of a layer are not
            looked at.
        name: of the layer, for messages.

    Raises:
        ValueError: naming the tensor: it is missing, has another type or shape than the others
            call for, or holds what stands for no number, or for numbers whose products overflow.
    """
    fmt = FORMATS[info.format]
    check_types(layer_types(info), tensors, name, fmt.name)
    optional = {leaf: DIVISORS for leaf in GLOBALS if leaf in tensors}
    check_types(optional, tensors, name, fmt.name)
    _check_shapes(tensors, fmt, name)
    for leaf in GLOBALS:
        if leaf in tensors:
            _check_divisor(tensors[leaf], f"{name}.{leaf}")
    _check_scales(tensors, fmt, name)
    if not fmt.packed:  # every nibble is a code
        _check_codes(tensors["weight_packed"], fmt, f"{name}.weight_packed")
    if "bias" in tensors:
        check_types({"bias": FLOATS}, tensors, name, "a bias")
        check_numbers(tensors["bias"], f"{name}.bias")


def check_types(
    expected: Mapping[str, Sequence[torch.dtype]],
    tensors: Mapping[str, Tensor],
    name: str,
    purpose: str,
) -> None:
    """Raise ValueError unless a layer has every tensor of ``expected``, in one of the types that
    are given for it; ``purpose`` says for what."""
    for leaf, dtypes in expected.items():
        if leaf not in tensors:
            raise ValueError(
                f"the tensor {name}.{leaf} is missing: the checkpoint is incomplete, copy or "
                "quantize it again"
            )
        if tensors[leaf].dtype not in dtypes:
            raise ValueError(
                f"{name}.{leaf} is {tensors[leaf].dtype} and should be "
                f"{' or '.join(str(dtype) for dtype in dtypes)} for {purpose}: a foreign checkpoint"
            )


def check_numbers(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a floating-point ``tensor`` holds NaN, infinity, or numbers whose squares
    overflow."""
    low, high = extremes(tensor)
    if not (low > -LARGEST and high < LARGEST):
        raise ValueError(f"{name} holds NaN, infinity or numbers beyond {LARGEST:.0e}: {REMEDY}")


def layer_types(info: LayerInfo) -> dict[str, tuple[torch.dtype, ...]]:
    """What the ``ptq`` dialect stores of a layer in any case, without its bias, and the types that
    each may have."""
    fmt = FORMATS[info.format]
    scale = torch.uint8 if fmt.powers_of_two else fmt.scale_dtype
    types = {"weight_packed": (torch.uint8,), "weight_scale": (scale,)}
    types |= {"weight_global_scale": DIVISORS} if fmt.has_global_scale else {}
    return types | ({"input_global_scale": DIVISORS} if info.static_inputs else {})


def _check_shapes(tensors: Mapping[str, Tensor], fmt: Format, name: str) -> None:
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
    packed, scale = shapes["weight_packed"], shapes["weight_scale"]
    width = fmt.size(fmt.per_byte * packed[-1]) // fmt.per_byte if packed else 0  # bytes of a group
    if len(packed) != 2 or len(scale) != 2 or packed != (scale[0], scale[1] * width):
        raise ValueError(
            f"{name}.weight_packed has shape {packed} and weight_scale {scale}, which do not "
            f"belong together in {fmt.name}: {REMEDY}"
        )
    for leaf in GLOBALS:
        if leaf in tensors and shapes[leaf] not in ((), (1,)):
            raise ValueError(
                f"{name}.{leaf} has shape {shapes[leaf]} and should be one number: {REMEDY}"
            )
    if "bias" in tensors and shapes["bias"] != packed[:1]:
        raise ValueError(
            f"{name}.bias has shape {shapes['bias']} for {packed[0]} outputs: {REMEDY}"
        )


def _check_divisor(stored: Tensor, name: str) -> None:
    value = stored.item()
    if not NORMAL[0] <= value <= NORMAL[1]:  # nor NaN
        raise ValueError(
            f"{name} is {value:g} and must be positive, finite and no subnormal number: {REMEDY}"
        )


def _check_scales(tensors: Mapping[str, Tensor], fmt: Format, name: str) -> None:
    """Of the bits, and of the largest weight that they allow: as numbers, legal ones grow with what
    they stand for, so that the extremes tell of all."""
    bits = tensors["weight_scale"].view(fmt.bits_dtype)
    if not bits.numel():
        return
    low, high = (int(extreme) for extreme in torch.aminmax(bits))
    smallest, largest = fmt.legal_scales
    if low < smallest or high > largest:
        wrong = (bits < smallest) | (bits > largest)
        row, group = (int(i) for i in wrong.nonzero()[0])
        number = fmt.decode_scale(bits[row : row + 1, group : group + 1]).item()
        width = 2 * fmt.scale_dtype.itemsize
        stored = int(bits[row, group]) & ((1 << 4 * width) - 1)
        # 255 of E8M0 has no float32 of its own, F8_E4M3 says NaN itself
        what = "NaN" if math.isnan(number) or math.isinf(number) else f"{number:g}"
        raise ValueError(
            f"{name}.weight_scale holds {what} ({'byte' if width == 2 else 'bits'} "
            f"0x{stored:0{width}X}, row {row}, group {group}), "
            f"which is no scale of {fmt.name}: {REMEDY}"
        )
    top = fmt.decode_scale(torch.tensor([high], dtype=fmt.bits_dtype)).double().item()
    divisor = tensors["weight_global_scale"].item() if "weight_global_scale" in tensors else 1.0
    if top * fmt.element.max / divisor >= LARGEST:
        raise ValueError(
            f"{name} has weights of {top * fmt.element.max / divisor:.0e}, whose products "
            f"overflow: {REMEDY}"
        )


def _check_codes(codes: Tensor, fmt: Format, name: str) -> None:
    """Of elements that do not fill a byte, or have codes that are no numbers."""
    last, nan = len(fmt.element.values) - 1, fmt.element.nan_codes
    if (last == 255 and not nan) or not codes.numel():
        return
    wrong = codes > last
    for code in nan:
        wrong |= codes == code
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{name} holds 0x{int(codes[row, column]):02X} (row {row}, column {column}), which is "
            f"no code of {fmt.element.name}: {REMEDY}"
        )
