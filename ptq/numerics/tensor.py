"""A quantized tensor: codes, the scales that give them size, and the packing of codes into
bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float32, Integer, UInt8
from torch import Tensor

from ptq.numerics.formats import Format


@dataclass(frozen=True)
class Scales:
    """The stored bits of a scale per group of a row (uint8, of bfloat16 scales int16), and one
    float32 factor for the whole tensor (or one per row).

    Both multiply: what one unit of the element is worth is ``decode_scale(bits) * global_scale``.
    The factor is never rounded to 16 bits (F18).
    """

    bits: Integer[Tensor, "rows groups"]
    global_scale: Float32[Tensor, ""] | Float32[Tensor, "rows 1"]
    format: Format

    def step(self) -> Float32[Tensor, "rows groups"]:
        """What one unit of the element is worth in each group: one float32 product (exact for
        scales without a factor)."""
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
    numbers = _numbers(fmt, packed.device).index_select(0, packed.flatten().int())
    columns = packed.shape[1] * fmt.per_byte
    values = numbers.view(torch.float32).view(*scales.bits.shape, fmt.size(columns))
    return ungroup(values.mul_(scales.step().unsqueeze(-1)))


class Unpacker:
    """Dequantizes rows, a chunk after the other, in memory that it keeps: what is written and read
    again at once then stays in a cache, and no chunk costs an allocation.

    Not for two threads at a time.
    """

    def __init__(self, fmt: Format, device: torch.device) -> None:
        self.format, self.table = fmt, _numbers(fmt, device)
        self.index = torch.empty(0, dtype=torch.int32, device=device)
        self.looked_up = torch.empty(0, dtype=self.table.dtype, device=device)
        # by the shape of packed rows: (index, the same flat, what is looked up, as groups, as rows)
        self.views: dict[torch.Size, tuple[Tensor, ...]] = {}

    def chunks(
        self, packed: UInt8[Tensor, "out bytes"], scales: Scales, rows: int
    ) -> Iterator[Float32[Tensor, "rows in"]]:
        """:func:`dequantize_packed`, so many rows at a time, the same bits; each chunk is valid
        until the next is asked for."""
        bits, t = scales.bits, scales.global_scale
        if bits.dtype == torch.uint8:
            worth = (self.format.scale_values(bits.device) * t).view(-1)  # of every byte
            steps = worth.index_select(0, bits.view(-1).int()).view(*bits.shape, 1)
        else:
            steps = scales.step().unsqueeze(-1)
        for codes, step in zip(packed.split(rows), steps.split(rows), strict=True):
            index, flat, looked_up, groups, chunk = self._shaped(codes.shape)
            index.copy_(codes)
            torch.index_select(self.table, 0, flat, out=looked_up)
            groups.mul_(step)
            yield chunk

    def _shaped(self, shape: torch.Size) -> tuple[Tensor, ...]:
        if (views := self.views.get(shape)) is not None:
            return views
        if (size := shape.numel()) > self.index.shape[0]:
            self.index = self.index.new_empty(size)
            self.looked_up = self.looked_up.new_empty(size)
            self.views.clear()  # they hold what was too small
        flat, looked_up = self.index[:size], self.looked_up[:size]
        rows = looked_up.view(torch.float32).view(shape[0], -1)
        self.views[shape] = flat.view(shape), flat, looked_up, group(rows, self.format), rows
        return self.views[shape]


@lru_cache(maxsize=16)
def _numbers(fmt: Format, device: torch.device) -> Tensor:
    """The float32 numbers of every byte: of two 4-bit codes both, as int64 (256,); else of the code
    (256,), those beyond the last being NaN."""
    byte = torch.arange(256, dtype=torch.uint8)
    if not fmt.packed:
        values = torch.full((256,), torch.nan, dtype=torch.float32)
        values[: 1 << fmt.element.bits] = torch.tensor(fmt.element.values, dtype=torch.float32)
        return values.to(device)
    both = fmt.element.decode(torch.stack((byte & 0xF, byte >> 4), dim=-1))
    return both.to(device).view(torch.int64).flatten()


def group(x: Float[Tensor, "rows in"], fmt: Format) -> Float[Tensor, "rows groups size"]:
    """The same numbers, the columns split into the groups that share a scale.

    Raises:
        ValueError: the number of columns is not a multiple of the group size.
    """
    size = fmt.size(x.shape[1])
    if x.shape[1] % size:
        raise ValueError(
            f"{x.shape[1]} input features are not divisible by the group size {fmt.group_size} of "
            f"{fmt.name}; "
            "leave the layer out with --ignore or choose a format with smaller groups"
        )
    return x.unflatten(1, (x.shape[1] // size, size))


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
