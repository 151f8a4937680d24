"""Nested formats: integer codes whose upper bits are codes of a narrower format, with scales that
are a power of two apart.

    q = (u - r) / 2^d, r the part that is dropped       step of q = 2^d · step of u

Double Rounding (arXiv 2502.01199) trains such codes; here they are made of finished narrow ones. A
wide code u stands for the narrow code to which u / 2^d rounds, ties to even, saturating: all wide
codes of one narrow code lie in an interval (F31). Inside it the wide code is free, so that the
narrow weights are exactly those that an algorithm made for the narrow format alone, and the wide
ones as near as the interval lets them.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ptq.numerics.descent import coordinate_descent
from ptq.numerics.formats import E8M0_BIAS, E8M0_MIN, FORMATS, Format
from ptq.numerics.scales import round_to
from ptq.numerics.tensor import QuantizedTensor, Scales, group


def widths(fmt: Format) -> list[int]:
    """Bits of the formats that codes of ``fmt`` can hold within them, ascending; none if it is no
    format of integers with power-of-two scales."""
    return sorted(f.element.bits for f in FORMATS.values() if _holds(fmt, f))


def narrower(fmt: Format, bits: int) -> Format:
    """The format of so many bits that codes of ``fmt`` can hold within them.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    for other in FORMATS.values():
        if _holds(fmt, other) and other.element.bits == bits:
            return other
    known = ", ".join(map(str, widths(fmt)))
    raise ValueError(
        f"{fmt.name} holds no format of {bits} bits within it: "
        + (f"choose from {known}" if known else "integers with power-of-two scales do, as mxint8")
    )


def _holds(wide: Format, narrow: Format) -> bool:
    integers = wide.element.mantissa_bits is None and narrow.element.mantissa_bits is None
    same = (wide.group_size, wide.scale_dtype) == (narrow.group_size, narrow.scale_dtype)
    smaller = narrow.element.bits < wide.element.bits
    return integers and same and smaller and wide.powers_of_two


def interval(
    values: Float32[Tensor, "*s"], wide: Format, narrow: Format
) -> tuple[Float32[Tensor, "*s"], Float32[Tensor, "*s"]]:
    """The smallest and the largest wide integer that each narrow one of ``values`` stands for."""
    size = 2.0 ** (wide.element.bits - narrow.element.bits)
    # a tie belongs to the even one
    reach = size / 2 - (values.remainder(2) != 0).float()
    low, high = values * size - reach, values * size + reach
    high = torch.where(values == narrow.element.max, wide.element.max, high)
    low = torch.where(values == -narrow.element.max, -wide.element.max, low)
    return low, high


def drop(quantized: QuantizedTensor, bits: int) -> QuantizedTensor:
    """The weights of fewer ``bits`` that nested codes hold: ``round_half_even(u / 2^d)``, at most
    the largest code, with scales ``2^d`` times as large.

    Raises:
        ValueError: as :func:`narrower`, or scales that the narrower format cannot have.
    """
    wide = quantized.format
    narrow = narrower(wide, bits)
    shift = wide.element.bits - bits
    scales = quantized.scales
    if int(scales.bits.max()) + shift > narrow.legal_scales[1]:
        raise ValueError(
            f"its scales are so large that {narrow.name} has none {2**shift} times as large"
        )
    codes = narrow.element.encode(wide.element.decode(quantized.codes) / 2**shift)
    return QuantizedTensor(codes, Scales(scales.bits + shift, scales.global_scale, narrow))


def widen(
    weight: Float[Tensor, "out in"],
    narrow: QuantizedTensor,
    wide: Format,
    *,
    damped_hessian: Float[Tensor, "in in"] | None = None,
    sweeps: int = 0,
) -> QuantizedTensor:
    """Codes of ``wide`` that are near ``weight`` and hold those of ``narrow``:
    ``drop(widen(w, q, wide), bits of q) == q``, but for groups whose weights are below 2^-115,
    which are rounded to a larger scale.

    Args:
        damped_hessian, sweeps: of coordinate descent on the wide codes within their intervals
            (:func:`ptq.numerics.descent.coordinate_descent`); 0 takes the nearest.

    Raises:
        ValueError: as :func:`narrower`.
    """
    small = narrower(wide, narrow.format.element.bits)
    shift = wide.element.bits - small.element.bits
    least = E8M0_MIN + E8M0_BIAS + shift
    bits = narrow.scales.bits.clamp(min=least)
    scales = Scales(bits, narrow.scales.global_scale, small)
    raised = (narrow.scales.bits < least).repeat_interleave(small.group_size, dim=1)
    codes = torch.where(raised, round_to(weight.float(), scales).codes, narrow.codes)
    within = interval(small.element.decode(codes), wide, small)
    wide_scales = Scales(bits - shift, scales.global_scale, wide)
    nearest = group(weight.float(), wide) / wide_scales.step().unsqueeze(-1)
    values = wide.element.round(nearest.flatten(1)).clamp(*within)
    result = QuantizedTensor(wide.element.encode(values), wide_scales)
    if sweeps == 0:
        return result
    assert damped_hessian is not None
    return coordinate_descent(
        weight, damped_hessian, result, sweeps=sweeps, damped_hessian=damped_hessian, within=within
    )
