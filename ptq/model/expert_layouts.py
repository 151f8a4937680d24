"""Where a parameter lies in a stored tensor: one expert of a stack, every other row, transposed, or
packed as MXFP4."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

FUSED = ("gate_up_proj", "down_proj")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Part:
    """A piece of a stored tensor: of ``expert`` (None: there is one matrix only), ``transposed`` or
    not, these rows."""

    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None  # start, stop, step; after transposing

    def take(self, stored: Tensor) -> Tensor:
        """The piece, as a view."""
        value = stored if self.expert is None else stored[self.expert]
        value = value.T if self.transposed else value
        return value if self.rows is None else value[slice(*self.rows)]


@dataclass(frozen=True)
class ExpertNames:
    """What the three projections of an expert are called in checkpoints."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the experts of a layer are stacked: [experts, 2·intermediate, hidden] and [experts,
    hidden, intermediate].

    ``transposed`` swaps the last two dimensions, ``interleaved`` puts up rows between gate rows
    instead of after them, ``biased`` adds ``<parameter>_bias`` [experts, rows].
    """

    names: ExpertNames
    count: int
    hidden: int
    intermediate: int
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    def parts(self) -> Iterator[tuple[str, str, int, Part]]:
        """(parameter of the split experts, stacked parameter, its position in a gate/up pair,
        piece) of everything."""
        i = self.intermediate
        gate, up = (
            ((0, 2 * i, 2), (1, 2 * i, 2)) if self.interleaved else ((0, i, 1), (i, 2 * i, 1))
        )
        gate_up, down = FUSED
        projections = [(self.names.gate, gate_up, 0, gate), (self.names.up, gate_up, 1, up)]
        for e in range(self.count):
            for leaf, fused, position, rows in [*projections, (self.names.down, down, 0, None)]:
                yield f"{e}.{leaf}.weight", fused, position, Part(e, self.transposed, rows)
                if self.biased:
                    yield f"{e}.{leaf}.bias", f"{fused}_bias", position, Part(e, False, rows)


def fused_layout(module: nn.Module, names: ExpertNames) -> Layout:
    """The layout of a module of fused experts; transformers notes it in attributes of the
    module."""
    transposed = bool(getattr(module, "is_transposed", False))
    count, *matrix = cast(Tensor, module.get_parameter(FUSED[1])).shape
    hidden, intermediate = reversed(matrix) if transposed else matrix
    return Layout(
        names=names,
        count=count,
        hidden=hidden,
        intermediate=intermediate,
        transposed=transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        biased=bool(getattr(module, "has_bias", False)),
    )


def unpack_mxfp4(
    blocks: UInt8[Tensor, "*rows groups half"], scales: UInt8[Tensor, "*rows groups"]
) -> Float[Tensor, "*rows in"]:
    """The bfloat16 values of gpt-oss's ``*_blocks`` and ``*_scales``: exact, E2M1 times a power of
    two.

    The even element of a byte is the low nibble; the scale byte is the exponent, biased by 127; 255
    makes infinities.
    """
    values = torch.tensor(E2M1, dtype=torch.bfloat16)
    bits = torch.where(
        scales == 0, 1 << 22, scales.int() << 23
    ).int()  # 2^-127 is subnormal in float32
    factor = bits.view(torch.float32).to(torch.bfloat16)[..., None]
    result = torch.empty(*blocks.shape[:-1], 2 * blocks.shape[-1], dtype=torch.bfloat16)
    for codes, scale, out in zip(
        blocks, factor, result, strict=True
    ):  # one expert after the other: little memory
        torch.mul(values[(codes & 0x0F).int()], scale, out=out[..., 0::2])
        torch.mul(values[(codes >> 4).int()], scale, out=out[..., 1::2])
    return result.flatten(-2)
