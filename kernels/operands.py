"""The records that operators take, instead of loose tensors.

torch knows operators by flat lists of arguments: ``record.flat`` are the fields of a record in
order, and ``operator.define`` puts them together again on the other side. Elements and scale types
are named as in ``ptq.kernels.coverage.FORMATS``; groups have 16 columns with ``e4m3`` scales and 32
with ``e8m0``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.kernels import coverage

PROLOGUES = ("none", "rms_norm", "silu_mul")
# Of a weight in units (``kernels/weight_tiles.py``).
UNIT_ROWS, UNIT_COLUMNS = 64, 128


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A 4-bit weight, or one for each of several experts: w ≈ element[codes] · scale ·
    global_scale.

    Attributes:
        packed: uint8 (…, out, in/2), two codes a byte, the even column in the low nibble; for
            experts (experts, out, in/2). With 16-bit inputs also in units, (…, out/64, in/128, 64,
            64), what ``weight_tiles.tiled`` makes of it.
        scale_bits: uint8 (…, out, groups), as checkpoints store them, or in units like ``packed``;
            for ``w4a4_matmul`` also (blocks, blocks, 32, 4, 4), what ``swizzle_scales`` makes of
            them.
        global_scale: fp32 on the same device, a scalar; for experts (experts,).
        element: e2m1 or int4.
        scale: e4m3 or e8m0.
    """

    packed: Tensor
    scale_bits: Tensor
    global_scale: Tensor
    element: str
    scale: str

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor, str, str]:
        """The fields, in order."""
        return self.packed, self.scale_bits, self.global_scale, self.element, self.scale

    @property
    def tiled(self) -> bool:
        """Whether it lies in units, not in rows."""
        return self.packed.ndim > 3

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return 2 * self.packed.shape[-1] * (self.packed.shape[-3] if self.tiled else 1)

    @property
    def out_features(self) -> int:
        """Rows of the weight, of each expert."""
        shape = self.packed.shape
        return shape[-2] * shape[-4] if self.tiled else shape[-2]

    @property
    def experts(self) -> int:
        """How many matrices there are; 0 if it is one that belongs to no list."""
        matrix = 4 if self.tiled else 2
        return self.packed.shape[0] if self.packed.ndim > matrix else 0

    @property
    def blocked(self) -> bool:
        """Whether its scale bytes lie in the 128 × 4 blocks of Blackwell."""
        return self.scale_bits.ndim == 5 and not self.tiled

    def check(self, operator: str, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Raise ValueError where no kernel multiplies it with ``k`` input features of ``dtype``."""
        coverage.require(operator, self.element, self.scale, k, dtype=dtype)
        columns = UNIT_COLUMNS if self.tiled else k
        rows = (*self.packed.shape[:-1], columns // coverage.GROUP_SIZE[self.scale])
        if self.in_features != k or (not self.blocked and tuple(self.scale_bits.shape) != rows):
            raise ValueError(
                f"{operator}: packed {tuple(self.packed.shape)} and scale bytes "
                f"{tuple(self.scale_bits.shape)} do not fit {k} inputs"
            )


@dataclass(frozen=True)
class QuantizedInputs:
    """Quantized activations: x ≈ element[codes] · scale · global_scale.

    Attributes:
        packed: uint8 (tokens, in/2), the even column in the low nibble.
        scale_bits: uint8 (tokens, groups), or (blocks, blocks, 32, 4, 4) in the 128 × 4 blocks of
            Blackwell.
        global_scale: fp32, a scalar, or (tokens, 1) if each token has its own; None with e8m0
            scales, which have none.
    """

    packed: Tensor
    scale_bits: Tensor
    global_scale: Tensor | None

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fields, in order."""
        return self.packed, self.scale_bits, self.global_scale


@dataclass(frozen=True)
class Fp8Inputs:
    """Activations in fp8: x ≈ values · factors.

    Attributes:
        values: E4M3 (tokens, in).
        factors: fp32 (tokens, 1).
    """

    values: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """A weight in fp8: w ≈ values · factors.

    Attributes:
        values: E4M3 (out, in).
        factors: fp32 (1, out), the global scale in them.
        exact: whether these are the numbers of the 4-bit weight.
    """

    values: Tensor
    factors: Tensor
    exact: bool


@dataclass(frozen=True)
class Encoding:
    """What inputs are quantized to.

    Attributes:
        element: e2m1 or int4.
        scale: e4m3 or e8m0.
        rule: of e8m0 scales theta, ocp or ceil; of e4m3 scales absmax, and with e2m1 elements
            four_six; default is the first of them.
    """

    element: str
    scale: str
    rule: str = "default"

    @property
    def flat(self) -> tuple[str, str, str]:
        """The fields, in order."""
        return self.element, self.scale, self.rule


@dataclass(frozen=True)
class Prologue:
    """What happens to inputs before they are rotated, in the same launch.

    Attributes:
        kind: none; rms_norm, with a gain; or silu_mul, whose inputs are gate and up side by side.
        gain: (in,), for rms_norm.
        epsilon: for rms_norm, what is added to the mean of the squares.
        keep: also store what the prologue makes, before it is rotated, for others that read it.
    """

    kind: str = "none"
    gain: Tensor | None = None
    epsilon: float = 0.0
    keep: bool = False

    @property
    def flat(self) -> tuple[str, Tensor | None, float, bool]:
        """The fields, in order."""
        return self.kind, self.gain, self.epsilon, self.keep

    def features(self, x: Tensor) -> int:
        """How many features of ``x`` are left to be rotated."""
        return x.shape[-1] // 2 if self.kind == "silu_mul" else x.shape[-1]

    def check(self, operator: str) -> None:
        """Raise ValueError where there is no such prologue, or a gain too many or too few."""
        if self.kind not in PROLOGUES:
            raise ValueError(
                f"{operator}: prologue {self.kind!r} does not exist; choose none, rms_norm or "
                "silu_mul"
            )
        if (self.gain is None) == (self.kind == "rms_norm"):
            raise ValueError(f"{operator}: a gain belongs to the prologue rms_norm and to no other")
        if self.keep and self.kind == "none":
            raise ValueError(f"{operator}: without a prologue there is nothing to keep")


NO_PROLOGUE = Prologue()
