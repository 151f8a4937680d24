"""A quantized tensor: codes, the scales that give them size, and the packing of codes into
bytes."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from ptq.numerics.formats import Element, Format


@dataclass(frozen=True)
class Scales:
    """One stored byte per group of a row, and one float32 factor for the whole tensor (or one per
    row).

    Both multiply: what one unit of the element is worth is ``decode_scale(bits) * global_scale``.
    The factor is never rounded to 16 bits (F18).
    """

    bits: UInt8[Tensor, "rows groups"]
    global_scale: Float32[Tensor, ""] | Float32[Tensor, "rows 1"]
    format: Format

    def step(self) -> Float32[Tensor, "rows groups"]:
        """What one unit of the element is worth in each group: one float32 product (exact for
        E8M0)."""
        return self.format.decode_scale(self.bits) * self.global_scale


@dataclass(frozen=True)
class QuantizedTensor:
    """``dequantize() == element[codes] * step``, each step spread over its group of columns."""

    codes: UInt8[Tensor, "rows in"]
    scales: Scales

    @property
    def format(self) -> Format:
        return self.scales.format

    def dequantize(self) -> Float32[Tensor, "rows in"]:
        """The numbers that the codes stand for, in float32."""
        values = self.format.element.decode(self.codes)
        return ungroup(group(values, self.format) * self.scales.step().unsqueeze(-1))

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Rows start … stop-1: rows are independent but for the shared global scale."""
        whole = self.scales.global_scale
        scales = Scales(
            self.scales.bits[start:stop],
            whole if whole.ndim == 0 else whole[start:stop],
            self.format,
        )
        return QuantizedTensor(self.codes[start:stop], scales)


def dequantize_packed(
    packed: UInt8[Tensor, "rows bytes"], scales: Scales
) -> Float32[Tensor, "rows in"]:
    """``QuantizedTensor(unpack(packed), scales).dequantize()``, the same bits in less time: both
    numbers of a byte come out of one table, as one element of 64 bits (on a CPU 0.3 ns a weight
    instead of 2)."""
    fmt = scales.format
    if not fmt.packed:
        return QuantizedTensor(packed, scales).dequantize()
    pairs = _pairs(fmt.element, packed.device).index_select(0, packed.flatten().int())
    values = pairs.view(torch.float32).view(*scales.bits.shape, fmt.group_size)
    return ungroup(values.mul_(scales.step().unsqueeze(-1)))


@lru_cache(maxsize=16)
def _pairs(element: Element, device: torch.device) -> Tensor:
    """The two float32 numbers of every byte, as int64 (256,)."""
    byte = torch.arange(256, dtype=torch.uint8)
    both = element.decode(torch.stack((byte & 0xF, byte >> 4), dim=-1))
    return both.to(device).view(torch.int64).flatten()


def group(x: Float[Tensor, "rows in"], fmt: Format) -> Float[Tensor, "rows groups size"]:
    """The same numbers, the columns split into the groups that share a scale.

    Raises:
        ValueError: the number of columns is not a multiple of the group size.
    """
    if x.shape[1] % fmt.group_size:
        raise ValueError(
            f"{x.shape[1]} input features are not divisible by the group size {fmt.group_size} of "
            f"{fmt.name}; "
            "leave the layer out with --ignore or choose a format with smaller groups"
        )
    return x.unflatten(1, (-1, fmt.group_size))


def ungroup(x: Float[Tensor, "rows groups size"]) -> Float[Tensor, "rows in"]:
    return x.flatten(1)


def pack(codes: UInt8[Tensor, "rows in"], fmt: Format) -> UInt8[Tensor, "rows bytes"]:
    """Two 4-bit codes to a byte, the even column in the low nibble (F22); wider codes stay one to
    a byte."""
    if not fmt.packed:
        return codes
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: UInt8[Tensor, "rows bytes"], fmt: Format) -> UInt8[Tensor, "rows in"]:
    """The inverse of :func:`pack`."""
    if not fmt.packed:
        return packed
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
