"""What `ptq analyze` measures of a tensor and of a layer, and the records that it is kept in.

A tensor is a weight, or a sample of what layers read. It is looked at as it is and rotated (in
Hadamard blocks of a format's group, which is best for integers), and both again after balancing
where that changes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from ptq.numerics.errors import relative, sqnr
from ptq.numerics.formats import MICROSCALED, Format
from ptq.numerics.int_vs_fp import (
    Law,
    corrected_qsnr,
    integrated_qsnr,
    predicted_noise,
    printed_qsnr,
)
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import group, ungroup
from ptq.numerics.tensor_statistics import (
    Channels,
    Crest,
    channels,
    crest,
    crest_factors,
    excess_kurtosis,
)

GROUPS = tuple(sorted({fmt.group_size for fmt in MICROSCALED.values()}))
LAWS: dict[str, Law] = {
    "printed": printed_qsnr,
    "corrected": corrected_qsnr,
    "integrated": integrated_qsnr,
}
OUTPUT_TOKENS = 64  # that a layer's output is computed for, in every format
Role = Literal["weight", "input"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A tensor in a format, in dB: what rounding it to nearest leaves, and what three laws of the
    crest factor say; ``printed`` and ``corrected`` of the mean crest factor as the paper takes
    them, ``integrated`` of all blocks by their energy. Laws are None for scales that they are not
    about."""

    qsnr: float
    printed: float | None
    corrected: float | None
    integrated: float | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A tensor in one form.

    Attributes:
        kurtosis: excess, of all numbers; ``of_rows`` and ``of_columns``: along those, the mean
            (rows are tokens or outputs, columns input channels).
        crest: by group size.
        formats: by name; those whose groups divide the columns.
    """

    balanced: bool
    rotated: bool
    kurtosis: float
    kurtosis_of_rows: float
    kurtosis_of_columns: float
    crest: tuple[Crest, ...]
    formats: dict[str, Figures]


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """Inputs at the first position of a sequence: models put outliers of their own there.

    ``amax``: the largest magnitude over that of all other positions; ``kurtosis``: excess, along
    channels, the mean; ``crest``: the mean of blocks of 32 or 16.
    """

    amax: float
    kurtosis: float
    crest: float


@dataclass(frozen=True, kw_only=True)
class TensorAnalysis:
    """A weight, or what the layers named in ``layers`` read."""

    role: Role
    name: str
    layers: tuple[str, ...]
    rows: int
    columns: int
    channels: Channels
    variants: tuple[Variant, ...]
    first_tokens: FirstTokens | None = None


@dataclass(frozen=True, kw_only=True)
class OutputErrors:
    """``‖X Wᵀ - X̂ Ŵᵀ‖² / ‖X Wᵀ‖²`` of a layer in one form, by format: with weights and inputs
    rounded, and with weights alone."""

    balanced: bool
    rotated: bool
    both: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """A linear layer and the error of its outputs; no errors where no token reached it."""

    name: str
    out_features: int
    in_features: int
    errors: tuple[OutputErrors, ...]


@dataclass(frozen=True, kw_only=True)
class BlockAnalysis:
    """A decoder block."""

    name: str
    index: int
    tensors: tuple[TensorAnalysis, ...]
    layers: tuple[LayerAnalysis, ...]


def rounded(x: Float32[Tensor, "rows in"], fmt: Format, rule: str) -> Float32[Tensor, "rows in"]:
    """``x`` rounded to nearest: the numbers that codes would stand for, without the codes."""
    grid = Grid(fmt, fmt.global_scale(x.abs().amax()), rule)
    step = grid.scales(x).step().unsqueeze(-1)
    return ungroup(fmt.element.round(group(x, fmt) / step) * step)


def spread_rows(x: Tensor, values: int) -> Tensor:
    """Evenly spaced rows of ``x`` with so many numbers at most; one row at least."""
    count = max(min(len(x), values // x.shape[1]), 1)
    if count == len(x):
        return x
    return x[torch.arange(count, device=x.device) * len(x) // count]


class Form:
    """A tensor in one form: rotated for every group size, rounded on demand."""

    def __init__(
        self, x: Float32[Tensor, "rows in"], *, balanced: bool, rotated: bool, rule: str
    ) -> None:
        self.balanced, self.rotated, self._rule = balanced, rotated, rule
        sizes = [size for size in GROUPS if x.shape[1] % size == 0]
        self._by_size = {size: Rotation(size if rotated else 1).exact(x) for size in sizes}
        self._rounded: dict[str, Tensor] = {}
        self.formats = [fmt for fmt in MICROSCALED.values() if fmt.group_size in self._by_size]

    def exact(self, fmt: Format) -> Tensor:
        """What a format would round."""
        return self._by_size[fmt.group_size]

    def rounded(self, fmt: Format) -> Tensor:
        """:meth:`exact`, rounded; kept."""
        if fmt.name not in self._rounded:
            self._rounded[fmt.name] = rounded(self.exact(fmt), fmt, self._rule)
        return self._rounded[fmt.name]

    def measured(self) -> Variant:
        """All figures of this form.

        Raises:
            ValueError: all numbers are zero.
        """
        by_size = {size: crest(x, size) for size, x in self._by_size.items()}
        x = self._by_size[max(self._by_size)]
        return Variant(
            balanced=self.balanced,
            rotated=self.rotated,
            kurtosis=excess_kurtosis(x),
            kurtosis_of_rows=excess_kurtosis(x, 1),
            kurtosis_of_columns=excess_kurtosis(x, 0),
            crest=tuple(by_size.values()),
            formats={
                fmt.name: self._figures(fmt, by_size[fmt.group_size].mean) for fmt in self.formats
            },
        )

    def _figures(self, fmt: Format, mean_crest: float) -> Figures:
        x = self.exact(fmt)
        qsnr = float(sqnr(x, self.rounded(fmt)))
        if self._rule != "absmax":
            return Figures(qsnr=qsnr, printed=None, corrected=None, integrated=None)
        return Figures(
            qsnr=qsnr,
            printed=predicted(fmt, mean_crest, "printed"),
            corrected=predicted(fmt, mean_crest, "corrected"),
            integrated=by_blocks(x, fmt),
        )


def predicted(fmt: Format, mean_crest: float, law: str) -> float:
    """The QSNR that a law of :data:`LAWS` gives a crest factor, in dB."""
    noise = predicted_noise(fmt, np.array([mean_crest]), LAWS[law])
    return -10 * math.log10(float(noise[0]))


def by_blocks(x: Float32[Tensor, "rows in"], fmt: Format) -> float:
    """The QSNR of all blocks by the integrated law, each with its energy, in dB."""
    crests = crest_factors(x, fmt.group_size).double().cpu().numpy()
    energy = x.double().reshape(-1, fmt.group_size).square().sum(1)
    energy = energy[energy > 0].cpu().numpy()
    if len(energy) != len(crests):  # an energy that is too small for float32
        energy = np.ones(len(crests))
    noise = (predicted_noise(fmt, crests) * energy).sum()
    return -10 * math.log10(noise / energy.sum())


def forms(
    x: Float32[Tensor, "rows in"], balanced: Float32[Tensor, "rows in"] | None, rule: str
) -> list[Form]:
    """The forms of a tensor; ``balanced`` is what balancing makes of it, None where that changes
    nothing."""
    made = [Form(x, balanced=False, rotated=rotated, rule=rule) for rotated in (False, True)]
    if balanced is not None:
        made += [
            Form(balanced, balanced=True, rotated=rotated, rule=rule) for rotated in (False, True)
        ]
    return made


def first_tokens(
    first: Float32[Tensor, "tokens in"], others: Float32[Tensor, "rows in"]
) -> FirstTokens | None:
    """What is special about the first positions; None where there are none, or only zeros."""
    if not len(first) or not first.abs().amax() or not others.abs().amax():
        return None
    size = max(s for s in GROUPS if first.shape[1] % s == 0)
    return FirstTokens(
        amax=float(first.abs().amax() / others.abs().amax()),
        kurtosis=excess_kurtosis(first, 1),
        crest=crest(first, size).mean,
    )


def tensor_analysis(
    role: Role, names: Sequence[str], made: Sequence[Form], x: Tensor, *, rows: int | None = None
) -> TensorAnalysis:
    """The figures of all forms of a tensor ``x`` (rows, in), a part of one with so many rows."""
    return TensorAnalysis(
        role=role,
        name=names[0],
        layers=tuple(names),
        rows=rows or len(x),
        columns=x.shape[1],
        channels=channels(x),
        variants=tuple(form.measured() for form in made),
    )


def output_errors(weight: Sequence[Form], inputs: Sequence[Form]) -> tuple[OutputErrors, ...]:
    """The errors of a layer's outputs, by form; weights and inputs have the same ones."""
    found = []
    for w, x in zip(weight, inputs, strict=True):
        both: dict[str, float] = {}
        alone: dict[str, float] = {}
        for fmt in w.formats:
            some = spread_rows(x.exact(fmt), OUTPUT_TOKENS * x.exact(fmt).shape[1])
            rough = spread_rows(x.rounded(fmt), OUTPUT_TOKENS * some.shape[1])
            rounded_weight = w.rounded(fmt)
            wanted = some @ w.exact(fmt).T
            signal = wanted.double().square().sum()
            for target, seen in ((both, rough), (alone, some)):
                error = (wanted - seen @ rounded_weight.T).double().square().sum()
                target[fmt.name] = float(relative(error, signal))
        found.append(OutputErrors(balanced=w.balanced, rotated=w.rotated, both=both, weights=alone))
    return tuple(found)
