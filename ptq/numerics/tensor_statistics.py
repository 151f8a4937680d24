"""What makes numbers easy or hard to round in blocks: crest factors, tails, loud channels."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 40  # of a histogram of crest factors
LOUD = 6.0  # times the median rms of all channels: what counts as an outlier channel
NAMED = 8  # outlier channels that are listed


@dataclass(frozen=True, kw_only=True)
class Crest:
    """Crest factors max|x| / rms of the blocks of ``size`` numbers that rows are cut into.

    ``histogram``: how many blocks, in ``BINS`` equal bins from 1 to √size, the ends included.
    """

    size: int
    mean: float
    minimum: float
    first_quartile: float
    median: float
    third_quartile: float
    maximum: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Columns by their energy.

    Attributes:
        outliers: how many have an rms above ``LOUD`` times the median.
        loudest: the first of them, by energy.
        over_median: the largest rms over the median.
        top_share: of all energy, in the one per cent of columns that have most (one at least).
    """

    outliers: int
    loudest: tuple[int, ...]
    over_median: float
    top_share: float


def crest_factors(x: Float[Tensor, "rows in"], size: int) -> Float[Tensor, " blocks"]:
    """max|x| / rms of every block that is not all zero; float32."""
    blocks = x.float().reshape(-1, size)
    rms = blocks.square().mean(1).sqrt()
    live = rms > 0
    return blocks.abs().amax(1)[live] / rms[live]


def crest(x: Float[Tensor, "rows in"], size: int) -> Crest:
    """Statistics of :func:`crest_factors`.

    Raises:
        ValueError: there is no block but zeros.
    """
    found = crest_factors(x, size)
    if not len(found):
        raise ValueError("all numbers are zero: there is no crest factor")
    ordered = found.sort().values
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.25, 0.5, 0.75, 1)]
    smallest, first, median, third, largest = map(float, at)
    top = math.sqrt(size)
    counts = torch.histc(found.clamp(1.0, top).cpu(), BINS, 1.0, top)
    return Crest(
        size=size,
        mean=float(found.double().mean()),
        minimum=smallest,
        first_quartile=first,
        median=median,
        third_quartile=third,
        maximum=largest,
        histogram=tuple(int(c) for c in counts),
    )


def excess_kurtosis(x: Float[Tensor, "*s"], dim: int | None = None) -> float:
    """``E[(x - m)⁴] / E[(x - m)²]² - 3``, 0 for Gaussian numbers: of all numbers, or along ``dim``
    and then the mean; what does not vary is left out, and 0 stands for nothing left."""
    values = x.float().flatten() if dim is None else x.float()
    along = 0 if dim is None else dim
    squares = (values - values.mean(along, keepdim=True)).square()
    variance, fourth = squares.mean(along), squares.square().mean(along)
    live = variance > 0
    ratio = fourth[live] / variance[live].square()
    return float(ratio.double().mean()) - 3 if ratio.numel() else 0.0


def channels(x: Float[Tensor, "rows in"]) -> Channels:
    """The columns of ``x`` by energy."""
    energy = x.double().square().mean(0)
    order = energy.argsort(descending=True)
    rms = energy.sqrt()
    median = float(rms.median())
    outliers = int((rms > LOUD * median).sum()) if median > 0 else int((rms > 0).sum())
    first = max(len(energy) // 100, 1)
    total = float(energy.sum())
    return Channels(
        outliers=outliers,
        loudest=tuple(int(i) for i in order[: min(outliers, NAMED)]),
        over_median=float(rms.max()) / median if median > 0 else 0.0,
        top_share=float(energy[order[:first]].sum()) / total if total > 0 else 0.0,
    )
