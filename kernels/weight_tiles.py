"""Weights as kernels stream them: units of 64 rows × 128 columns, each in one piece of memory.

In the rows of a checkpoint a program that reads 64 rows × 128 columns touches 64 pieces of 64
bytes; in units it reads one piece of 4 KiB and one of scale bytes. On an H200 the product of one
token with a 28672 × 4096 weight then takes 25.5 µs instead of 31.6 (NVFP4, best tiles of each; its
weight alone can be read in 16). Inside a word of eight codes the bits are arranged so that 11
operations unpack them, into columns in their own order (13 for the word of a checkpoint). Bytes are
moved, and bits inside words; nothing is rounded, and :func:`untiled` is the inverse of
:func:`tiled`.

The low half of a word has the codes of its even columns, the high half those of the odd ones:

    e2m1    bit 15 14 13 12 11–9 8–6 5–3 2–0: signs of columns 0 4 6 2, then exponent and mantissa
            of columns 6 0 2 4
    int4    columns 0 2 4 6 in nibbles from the right, 8 added to each (its sign bit flipped)
"""

from dataclasses import replace

import torch
from torch import Tensor

from ptq.kernels.operands import UNIT_COLUMNS, UNIT_ROWS, PackedWeight

# Where the code of column 2i (of 2i + 1, 16 higher) has its sign and the three bits below it.
SIGN, MAGNITUDE = (15, 12, 14, 13), (6, 3, 0, 9)


def tileable(weight: PackedWeight) -> bool:
    """Whether the weight, or that of each expert, consists of whole units."""
    return weight.out_features % UNIT_ROWS == 0 and weight.in_features % UNIT_COLUMNS == 0


def tiled(weight: PackedWeight) -> PackedWeight:
    """The weight in units: packed uint8 (…, out/64, in/128, 64, 64) and scale bytes (…, out/64,
    in/128, 64, 128/group).

    Raises:
        ValueError: sizes that are not multiples of 64 rows and 128 columns.
    """
    if not tileable(weight):
        raise ValueError(
            f"a weight of {weight.out_features} × {weight.in_features} does not consist of units "
            f"of {UNIT_ROWS} × {UNIT_COLUMNS}"
        )
    blocks = weight.in_features // UNIT_COLUMNS

    def units(rows: Tensor) -> Tensor:
        parts = rows.unflatten(-2, (-1, UNIT_ROWS)).unflatten(-1, (blocks, -1))
        return parts.transpose(-2, -3).contiguous()

    words = _moved(weight.packed.contiguous().view(torch.int32), weight.element, back=False)
    return replace(
        weight, packed=units(words.view(torch.uint8)), scale_bits=units(weight.scale_bits)
    )


def untiled(weight: PackedWeight) -> PackedWeight:
    """The weight in rows, as checkpoints have it."""

    def rows(units: Tensor) -> Tensor:
        return units.transpose(-2, -3).flatten(-2).flatten(-3, -2).contiguous()

    words = _moved(rows(weight.packed).view(torch.int32), weight.element, back=True)
    return replace(weight, packed=words.view(torch.uint8), scale_bits=rows(weight.scale_bits))


def _moved(words: Tensor, element: str, *, back: bool) -> Tensor:
    """int32 words of a checkpoint's rows with their bits as in units, or ``back`` again."""
    unsigned = words.long() & 0xFFFFFFFF
    result = torch.zeros_like(unsigned)
    for column in range(8):
        pair, half = divmod(column, 2)
        if element == "int4":
            parts = [(4 * column, 4 * pair + 16 * half, 15)]
        else:
            parts = [
                (4 * column + 3, SIGN[pair] + 16 * half, 1),
                (4 * column, MAGNITUDE[pair] + 16 * half, 7),
            ]
        for here, there, mask in parts:
            source, target = (there, here) if back else (here, there)
            result |= ((unsigned >> source) & mask) << target
    result ^= 0x88888888 if element == "int4" else 0
    return result.to(torch.int32)  # takes the low 32 bits
