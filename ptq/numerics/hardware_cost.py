"""What a format costs in gates: the arithmetic of one block in a tensor core.

"INT v.s. FP" (arXiv 2510.25602) compares formats by a model of gates and no synthesis: k lanes
multiply and add, a dequantizer brings in the scales of the block, a float32 accumulator adds up
blocks. What each part consists of is in the paper, and is :func:`mac` here; what a cell counts is
not, so that its energy and area (:data:`PUBLISHED`) can be quoted and not recomputed. Ours counts
NAND2 equivalents of generic standard cells, every cell toggling alike: one figure, for area, and
for energy to the extent that all gates toggle equally often. It confirms the direction: INT takes
fewer gates than FP of the same width.

Dequantizer and accumulator are counted by us from what the scales are (:func:`scales`,
:func:`accumulator`); the paper has them and does not say how they are built.

In an element of x exponent and y mantissa bits (integers: x + y + 1 bits in all, the sign counted)

    multiplier            INT (x + y + 1)², FP (y + 1)²    AND and full adder
    adder                 INT 2 (x + y + 1), FP n          full adder
    exponent adder        FP x                             full adder
    exponent subtractor   FP x                             XOR and full adder
    comparator            FP x                             XOR, AND, OR
    aligner               FP n log₂ n                      multiplexer
    normaliser            FP n log₂ n, one for all lanes   multiplexer and OR

with n = min(2^(x+1) + 2y, 24) bits that products are aligned to.
"""

import math
from dataclasses import dataclass

from ptq.numerics.formats import MXFP8, Element, Format

# NAND2 equivalents of cells in generic standard-cell libraries: 4 transistors each; libraries
# differ by ±20 %.
AND = OR = 4 / 3
XOR = MULTIPLEXER = 2.0
FULL_ADDER = 5.0
ROW = 4096  # inputs that a scale of a whole row counts for
LARGEST_ALIGNER = 24  # bits: the significand of float32


@dataclass(frozen=True)
class Published:
    """The paper's figures of a unit, MXFP8 being 1: model-based, not synthesised.

    Attributes:
        energy, area: multiply-accumulate, dequantizer and accumulator together.
    """

    energy: float
    area: float


# Formats that the paper gives figures of, by name.
PUBLISHED = {
    "mxfp8": Published(1.0, 1.0),
    "mxint8": Published(0.63, 0.79),
    "nvfp4": Published(0.55, 0.54),
    "nvint4": Published(0.34, 0.38),
}
# One unit for 8 and 4 bits, the integers over floats (1).
PUBLISHED_COMBINED = Published(0.75, 0.66)
# Multiplications a second of Blackwell's tensor cores over those in bfloat16 (data sheets of B200,
# dense); formats that it has no block-scaled instruction for are not there.
TENSOR_CORES = {"nvfp4": 4.0, "mxfp4": 4.0, "mxfp6": 2.0, "mxfp8": 2.0, "fp8-channel": 2.0}


def shape(element: Element) -> tuple[int, int]:
    """(x, y): exponent and mantissa bits of an element; of integers 0 and all but the sign."""
    mantissa = element.mantissa_bits
    if mantissa is None:
        return 0, element.bits - 1
    return element.bits - 1 - mantissa, mantissa


def aligner_bits(element: Element) -> int:
    """n: what products of a floating-point element are aligned to."""
    x, y = shape(element)
    return min(2 ** (x + 1) + 2 * y, LARGEST_ALIGNER)


def mac(element: Element, lanes: int) -> dict[str, float]:
    """The gates of one lane of ``lanes`` that multiply and add, by part, in NAND2 equivalents."""
    x, y = shape(element)
    if element.mantissa_bits is None:
        return {
            "multiplier": (x + y + 1) ** 2 * (AND + FULL_ADDER),
            "adder": 2 * (x + y + 1) * FULL_ADDER,
        }
    n = aligner_bits(element)
    shifts = n * math.log2(n)
    return {
        "multiplier": (y + 1) ** 2 * (AND + FULL_ADDER),
        "adder": n * FULL_ADDER,
        "exponent adder": x * FULL_ADDER,
        "exponent subtractor": x * (XOR + FULL_ADDER),
        "comparator": x * (XOR + AND + OR),
        "aligner": shifts * MULTIPLEXER,
        "normaliser": shifts * (MULTIPLEXER + OR) / lanes,
    }


def sum_bits(fmt: Format) -> int:
    """The width of the sum of a block's products: of integers 2 b and what the block adds, of
    floats what products are aligned to and that; no more than float32 keeps."""
    element, carries = fmt.element, math.ceil(math.log2(fmt.size(ROW)))
    integers = element.mantissa_bits is None
    width = 2 * element.bits if integers else aligner_bits(element)
    return min(width + carries, LARGEST_ALIGNER)


def scales(fmt: Format) -> float:
    """The gates that bring the scales of both operands into a block's sum, in NAND2 equivalents;
    our count.

    E8M0: two additions of 8-bit exponents. E4M3: the product of two significands of 4 bits, two
    additions of 4-bit exponents, and that product of 8 bits times the sum. bfloat16: the same with
    significands and exponents of 8 bits.
    """
    if fmt.powers_of_two:
        return 2 * 8 * FULL_ADDER
    bits = 4 if fmt.has_global_scale else 8
    product = bits * bits * (AND + FULL_ADDER)
    return product + 2 * bits * FULL_ADDER + 2 * bits * sum_bits(fmt) * (AND + FULL_ADDER)


def accumulator() -> float:
    """The gates of a float32 adder, in NAND2 equivalents, our count: comparison and subtraction of
    8-bit exponents, an aligner, an adder and a normaliser of 24 bits."""
    shifts = LARGEST_ALIGNER * math.log2(LARGEST_ALIGNER)
    return (
        8 * (XOR + FULL_ADDER)
        + 8 * (XOR + AND + OR)
        + shifts * MULTIPLEXER
        + LARGEST_ALIGNER * FULL_ADDER
        + shifts * (MULTIPLEXER + OR)
    )


def gates(fmt: Format) -> float:
    """The gates of a unit of ``fmt`` for one multiplication, in NAND2 equivalents: a lane, and its
    share of scales and accumulator, which a block of the group size has one of."""
    size = fmt.size(ROW)
    lane = sum(mac(fmt.element, size).values())
    return lane + (scales(fmt) + accumulator()) / size


def relative_area(fmt: Format, base: Format = MXFP8) -> float:
    """:func:`gates` over that of ``base``: the area of a unit, and its energy if all gates toggle
    equally often; the throughput of an equal area is the inverse."""
    return gates(fmt) / gates(base)


def relative_traffic(fmt: Format) -> float:
    """Bits of a weight over the 16 that it had: the inverse of the throughput where memory is the
    limit, as at a few tokens."""
    return fmt.bits_per_weight / 16
