"""Block-scaled formats: what a code means, what the bits of a scale mean, and which elements share
a scale.

    value = element[code] * scale[group] * global_scale

Sources: OCP Microscaling Formats v1.0 (MX), NVIDIA NVFP4, arXiv 2509.23202 (MR-GPTQ), arXiv
2510.25602 (INT v.s. FP). Formats with bfloat16 scales are those of compressed-tensors'
``pack-quantized``, as Marlin and its likes read it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

E8M0_BIAS = 127
# 2^-127 (byte 0) is an fp32 subnormal that flush-to-zero devices read as 0; byte 255 is NaN.
# Neither is ever written.
E8M0_MIN, E8M0_MAX = -126, 127
E4M3_SMALLEST, E4M3_LARGEST = 2.0**-9, 448.0
# The bits of the smallest normal bfloat16 and of the largest; subnormals are never written, for the
# reason above.
BF16_FIRST, BF16_LAST = 0x0080, 0x7F7F
# Up to so many, a conversion from E4M3 (3 ns each on a CPU) takes less than the calls of a look-up.
FEW_SCALES = 1 << 11


@dataclass(frozen=True)
class Element:
    """A codebook: ``values[code]`` is the number that a code stands for.

    Encoding picks the nearest value, sends ties to the even code (the even mantissa, the even
    integer) and saturates at ±``max`` (F1). Values beyond ±max (the -8 of INT4) are decoded but
    never written (F3), and zero is always code 0 (F4). Kernels and packing do the same (F5).
    """

    name: str
    values: tuple[float, ...]

    @cached_property
    def bits(self) -> int:
        """Bits of one code: 4, 6 or 8."""
        return (len(self.values) - 1).bit_length()

    @cached_property
    def max(self) -> float:
        """The largest magnitude that is written (Q in the papers)."""
        return max(v for v in self.values if v == v)

    @cached_property
    def written(self) -> tuple[float, ...]:
        """The values that are written, from the smallest; zero once."""
        return tuple(sorted({v for v in self.values if abs(v) <= self.max}))  # false for NaN

    @cached_property
    def nan_codes(self) -> tuple[int, ...]:
        """The codes that stand for no number."""
        return tuple(code for code, value in enumerate(self.values) if value != value)

    @cached_property
    def smallest(self) -> float:
        """The smallest positive value; every value is a multiple of it."""
        return min(v for v in self.values if v > 0)

    @cached_property
    def _bits_and_floor(self) -> tuple[int, float] | None:
        """(mantissa bits, smallest normal number) of a floating-point element; None for integers,
        whose steps are all equal."""
        multiples = sorted({round(v / self.smallest) for v in self.values if 0 <= v <= self.max})
        equal = next(
            (i for i, m in enumerate(multiples) if m != i), None
        )  # the first value after a wider step
        if equal is None:
            return None
        bits = (
            equal - 1
        ).bit_length() - 2  # 2^(bits + 1) equal steps reach the end of the first normal binade
        return bits, self.smallest * 2.0**bits

    @property
    def mantissa_bits(self) -> int | None:
        """Stored mantissa bits of a floating-point element; None for integers."""
        return None if self._bits_and_floor is None else self._bits_and_floor[0]

    @property
    def smallest_normal(self) -> float | None:
        """The smallest normal number of a floating-point element; None for integers."""
        return None if self._bits_and_floor is None else self._bits_and_floor[1]

    def round(self, x: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
        """The value nearest to each of ``x``, float32 numbers; the same as ``decode(encode(x))``. A
        zero is +0.

        Arithmetic, not a search: ten times faster on random data. Adding and subtracting 1.5 · 2^23
        steps rounds to a multiple of the step, ties to even, in the one rounding of the addition.
        """
        return self._rounded(x.clamp(-self.max, self.max))

    def round_(self, x: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
        """:meth:`round` in the memory of ``x``."""
        return self._rounded(x.clamp_(-self.max, self.max))

    def _rounded(self, x: Tensor) -> Tensor:
        if self._bits_and_floor is None:
            return x.round_().add_(0.0)  # -0 + 0 = +0
        bits, floor = self._bits_and_floor
        binade = (x.view(torch.int32) & 0x7F800000).view(
            torch.float32
        )  # the power of two below |x|
        # times a power of two and a half: exact, so that each addition is the only rounding
        binade.clamp_(min=floor)
        magic = 1.5 * 2.0 ** (23 - bits)
        return x.add_(binade, alpha=magic).sub_(binade, alpha=magic)

    def encode(self, x: Float32[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
        """The code of the value nearest to each of ``x``, float32 numbers."""
        codes = _codes(self, x.device)
        multiple = self.round(x).mul_(1 / self.smallest).int().add_(len(codes) // 2)
        return codes.index_select(0, multiple.flatten()).view(x.shape)

    def decode(self, codes: UInt8[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
        """``values[codes]`` in float32."""
        return _values(self, codes.device).index_select(0, codes.int().flatten()).view(codes.shape)


@lru_cache(maxsize=64)
def _values(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _scale_values(e4m3: bool, device: torch.device) -> Tensor:
    """The number of every scale byte: a look-up takes a fifth of a CPU's conversion from E4M3."""
    bits = torch.arange(256, dtype=torch.uint8)
    if e4m3:
        return bits.view(torch.float8_e4m3fn).float().to(device)
    exponent = bits.int()
    subnormal = torch.tensor(1 << 22, dtype=torch.int32)
    return torch.where(exponent == 0, subnormal, exponent << 23).view(torch.float32).to(device)


@lru_cache(maxsize=64)
def _codes(element: Element, device: torch.device) -> Tensor:
    """The code of every multiple of the smallest value from -max to max that is a value."""
    reach = round(element.max / element.smallest)
    table = torch.zeros(2 * reach + 1, dtype=torch.uint8)
    for code, value in reversed(
        list(enumerate(element.values))
    ):  # the lower code of a value wins: zero is code 0
        if abs(value) <= element.max:  # false for NaN
            table[reach + round(value / element.smallest)] = code
    return table.to(device)


def _minifloat(
    exponent_bits: int, mantissa_bits: int, bias: int, *, nan: bool = False
) -> tuple[float, ...]:
    """Values of a sign-exponent-mantissa code without infinities; with ``nan`` the code of all ones
    is NaN (the "fn" rule)."""
    positive = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        positive.append(
            fraction * 2.0 ** (1 - bias)
            if exponent == 0
            else (1 + fraction) * 2.0 ** (exponent - bias)
        )
    if nan:
        positive[-1] = float("nan")
    return (*positive, *(-v for v in positive))


def _integer(bits: int) -> tuple[float, ...]:
    """Two's complement: 0 … 2^(b-1)-1, then -2^(b-1) … -1."""
    half = 1 << (bits - 1)
    return tuple(float(v) for v in (*range(half), *range(-half, 0)))


E2M1 = Element("e2m1", _minifloat(2, 1, 1))
E2M3 = Element("e2m3", _minifloat(2, 3, 1))
E4M3 = Element("e4m3", _minifloat(4, 3, 7, nan=True))
INT4 = Element("int4", _integer(4))
INT6 = Element("int6", _integer(6))
INT8 = Element("int8", _integer(8))


@dataclass(frozen=True, kw_only=True)
class _ScaleType:
    """How scales are stored: what kernels call it, the first and the last legal bits, and the
    numbers that these stand for."""

    name: str
    legal: tuple[int, int]
    range: tuple[float, float]


_SCALES = {
    torch.float8_e8m0fnu: _ScaleType(
        name="e8m0", legal=(0, E8M0_MAX + E8M0_BIAS), range=(2.0**E8M0_MIN, 2.0**E8M0_MAX)
    ),
    torch.float8_e4m3fn: _ScaleType(
        name="e4m3", legal=(1, 0x7E), range=(E4M3_SMALLEST, E4M3_LARGEST)
    ),
    torch.bfloat16: _ScaleType(
        name="bf16",
        legal=(BF16_FIRST, BF16_LAST),
        range=(2.0**-126, torch.finfo(torch.bfloat16).max),
    ),
}


@dataclass(frozen=True)
class Format:
    """An element, the number of consecutive inputs that share a scale, and how that scale is
    stored.

    Attributes:
        group_size: inputs that share a scale; 0 is all of a row, an output or a token (F33).
        scale_dtype: ``float8_e8m0fnu`` (powers of two, no global scale), ``float8_e4m3fn`` (with an
            fp32 global scale) or ``bfloat16`` (whose range needs none).
        power_of_two_global: restrict the global scale to powers of two, so that scale * global
            scale is exact in bf16; for NVINT4, whose only exact route into other engines is int4
            with bf16 scales. Costs at most 0.02 dB.
        rotation: inputs to a block of the rotation that is best for it; None is the group size.
        weights_only: inputs are never quantized to it.
    """

    name: str
    element: Element
    group_size: int
    scale_dtype: torch.dtype
    power_of_two_global: bool = False
    rotation: int | None = None
    weights_only: bool = False

    @property
    def has_global_scale(self) -> bool:
        """Whether the range of the stored scales has to be moved by a factor for the whole
        tensor."""
        return self.scale_dtype == torch.float8_e4m3fn

    @property
    def powers_of_two(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale_dtype == torch.float8_e8m0fnu

    @property
    def scale_name(self) -> str:
        """What kernels call the type of the scales: ``e4m3``, ``e8m0`` or ``bf16``."""
        return _SCALES[self.scale_dtype].name

    @property
    def bits_dtype(self) -> torch.dtype:
        """The dtype of the bits of a scale: ``uint8``, of those in bfloat16 ``int16``."""
        return torch.uint8 if self.scale_dtype.itemsize == 1 else torch.int16

    @property
    def legal_scales(self) -> tuple[int, int]:
        """The first and the last bits that stand for a positive, finite scale: all those between
        do, in ascending order (byte 0 of E8M0 is read, and never written)."""
        return _SCALES[self.scale_dtype].legal

    def size(self, columns: int) -> int:
        """How many of so many columns share a scale."""
        return self.group_size or columns

    @property
    def default_rotation(self) -> int:
        """Inputs to a block of the Hadamard rotation that measured best, 1 for none."""
        return self.group_size if self.rotation is None else self.rotation

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte in storage; wider codes take a byte each."""
        return self.element.bits == 4

    @property
    def per_byte(self) -> int:
        """How many codes a byte holds in storage."""
        return 2 if self.packed else 1

    @property
    def bits_per_weight(self) -> float:
        """Bits of an element plus its share of the scale; the one global scale of a tensor and the
        scales of whole rows are not counted."""
        share = 8 * self.scale_dtype.itemsize / self.group_size if self.group_size else 0.0
        return self.element.bits + share

    def encode_scale(self, scale: Float32[Tensor, "*s"]) -> Integer[Tensor, "*s"]:
        """The bits of the nearest storable scale: never zero, never NaN. E8M0 rounds up, so that
        nothing is clipped.

        ``scale`` is finite and not negative; it is clamped before the cast, because casts of
        out-of-range numbers to fp8 saturate in some library versions and give NaN in others (F11).
        """
        if not self.powers_of_two:
            return self._storable(scale).view(self.bits_dtype)
        bits = scale.clamp(min=2.0**E8M0_MIN).view(torch.int32)
        k = (bits >> 23) - 127 + ((bits & 0x7FFFFF) > 0)
        return (k.clamp(E8M0_MIN, E8M0_MAX) + E8M0_BIAS).to(torch.uint8)

    def _storable(self, scale: Tensor) -> Tensor:
        """The nearest storable scale, in ``scale_dtype``; not of E8M0."""
        return scale.clamp(*_SCALES[self.scale_dtype].range).to(self.scale_dtype)

    def decode_scale(self, bits: Integer[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
        """The number that the bits of a scale stand for, in float32 (byte 0 of E8M0 is the
        subnormal 2^-127)."""
        if bits.dtype != torch.uint8:
            return bits.view(self.scale_dtype).float()
        return self.scale_values(bits.device).index_select(0, bits.int().flatten()).view(bits.shape)

    def nearest_scale(self, scale: Float32[Tensor, "*s"]) -> Float32[Tensor, "*s"]:
        """``decode_scale(encode_scale(scale))``, in fewer steps for few numbers."""
        if self.powers_of_two or (self.has_global_scale and scale.numel() > FEW_SCALES):
            return self.decode_scale(self.encode_scale(scale))
        return self._storable(scale).float()

    def scale_values(self, device: torch.device) -> Float32[Tensor, "256"]:
        """The numbers that all scale bytes stand for; of formats whose scales are bytes."""
        return _scale_values(self.has_global_scale, device)

    def global_scale(self, amax: Float32[Tensor, ""], margin: float = 1.0) -> Float32[Tensor, ""]:
        """The factor that maps ``margin * amax`` to the top of the scale range; 1 for formats
        that have none and for a tensor of zeros.

        It is passed through a double reciprocal: checkpoints store the divisor 1/t, and 1/(1/t) ==
        t then holds exactly (F24).
        """
        if not self.has_global_scale:
            return torch.ones_like(amax)
        t = (margin * amax / (E4M3_LARGEST * self.element.max)).clamp(min=2.0**-126)
        if self.power_of_two_global:
            bits = t.view(torch.int32)
            t = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # up to the next power of two
        return torch.where(amax > 0, 1 / (1 / t), torch.ones_like(amax))


MXFP4 = Format("mxfp4", E2M1, 32, torch.float8_e8m0fnu)
NVFP4 = Format("nvfp4", E2M1, 16, torch.float8_e4m3fn, rotation=1)
NVINT4 = Format("nvint4", INT4, 16, torch.float8_e4m3fn, power_of_two_global=True)
MXINT4 = Format("mxint4", INT4, 32, torch.float8_e8m0fnu)
MXINT6 = Format("mxint6", INT6, 32, torch.float8_e8m0fnu)
MXFP6 = Format("mxfp6", E2M3, 32, torch.float8_e8m0fnu)
MXINT8 = Format("mxint8", INT8, 32, torch.float8_e8m0fnu)
MXFP8 = Format("mxfp8", E4M3, 32, torch.float8_e8m0fnu, rotation=1)
# What engines had before block scales: scales of 16 bits, and so larger groups. Not rotated, for
# most who read them rotate nothing.
INT4_128 = Format("int4-g128", INT4, 128, torch.bfloat16, rotation=1, weights_only=True)
INT4_32 = Format("int4-g32", INT4, 32, torch.bfloat16, rotation=1, weights_only=True)
FP8_CHANNEL = Format("fp8-channel", E4M3, 0, torch.bfloat16, rotation=1)

MICROSCALED = {f.name: f for f in (MXFP4, NVFP4, NVINT4, MXINT4, MXINT6, MXFP6, MXINT8, MXFP8)}
"""Formats whose scales are bytes: those that hardware and papers compare, of weights and inputs."""
FORMATS = MICROSCALED | {f.name: f for f in (INT4_128, INT4_32, FP8_CHANNEL)}
