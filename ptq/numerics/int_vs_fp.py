"""INT against FP at fine granularity: the QSNR that a block's crest factor predicts for a format.

The study is "INT v.s. FP" (https://arxiv.org/abs/2510.25602). A block of g numbers has the crest
factor ``κ = max|x| / rms``, 1 ≤ κ ≤ √g, and

    QSNR = -10 log₁₀(Σ(x - x̂)² / Σx²)   in dB

with scales that never clip: ``ceil`` for E8M0, nearest (``absmax``) for E4M3. Three laws of κ:

- :func:`printed_qsnr`, the closed forms as the paper prints them;
- :func:`corrected_qsnr`, the same with the exact largest integer, with the scale averaged over its
  phase instead of a fixed factor of 1.5, and with E[1/r²] of a mantissa r;
- :func:`integrated_qsnr`, no closed form: the element's own rounding, integrated over a block of
  which only κ is known. It holds where the closed forms of FP fail (κ > 2.6 with E4M3 scales).

Everything is a function of a format's record; nothing here looks at a model.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy import optimize, special

from ptq.numerics.formats import (
    MXFP4,
    MXFP6,
    MXFP8,
    MXINT4,
    MXINT6,
    MXINT8,
    NVFP4,
    NVINT4,
    Format,
)

# Formats of equal width, the integers first.
PAIRS: tuple[tuple[Format, Format], ...] = (
    (MXINT8, MXFP8),
    (MXINT6, MXFP6),
    (MXINT4, MXFP4),
    (NVINT4, NVFP4),
)
PRINTED_OVERHEAD = {True: 1.0, False: 1.5}  # of a stored scale, by whether it is E4M3
# E[ρ²] of a power of two that is rounded up, maxima log-uniform: ∫ 4^u du over [0, 1].
CEIL_OVERHEAD_SQUARED = 3 / (2 * math.log(2))
# E[1/r²] of a mantissa r in [1, 2), log-uniform; the paper takes 1/2.
INVERSE_SQUARE = 3 / (8 * math.log(2))
LARGEST_FOR_FP_E4M3 = 2.6  # κ: beyond, the closed form subtracts the error away
POINTS, PHASES = 1024, 64  # of the integrals: finer ones move 0.005 dB

Law = Callable[[Format, float], float]


def _db(ratio: float) -> float:
    return -10 * math.log10(ratio)


def _root(function: Callable[[float], float], low: float, high: float, within: float) -> float:
    """Where a function that changes its sign between ``low`` and ``high`` is zero."""
    return float(optimize.root_scalar(function, bracket=(low, high), xtol=within).root)


def _normal_energy(t: float) -> float:
    """E[x²; |x| > t] of a standard normal number."""
    return 2 * (t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) + special.ndtr(-t))


def _integer_qsnr(steps: float, crest: float, overhead_squared: float, exact_maximum: int) -> float:
    """Uniform noise of a step of ``crest · ρ / steps``; of ``exact_maximum`` numbers one has
    none."""
    noise = overhead_squared * (crest / steps) ** 2 / 12
    if exact_maximum:
        noise *= (exact_maximum - 1) / exact_maximum
    return _db(noise)


def _float_noise(
    fmt: Format, crest: float, overhead: float, inverse_square: float, exact_maximum: bool
) -> float:
    """Noise over signal: relative in the normal range, uniform below it."""
    element, bits = fmt.element, fmt.element.mantissa_bits
    assert bits is not None and element.smallest_normal is not None
    unit = overhead * crest / element.max
    t = unit * element.smallest_normal
    normal = _normal_energy(t) - (crest**2 / fmt.group_size if exact_maximum else 0.0)
    below = 2 * special.ndtr(t) - 1
    return inverse_square / (12 * 4**bits) * normal + (unit * element.smallest) ** 2 / 12 * below


def printed_qsnr(
    fmt: Format, crest: float, *, overhead: float | None = None, exact_max: bool = False
) -> float:
    """The law as the paper prints it, in dB.

    Args:
        crest: κ of a block.
        overhead: ρ, a stored scale over ``max|x| / Q``; None is the text's 1.5 for E8M0 and 1 for
            E4M3 (its plots use 1.05).
        exact_max: take Q = 2^(b-1) - 1 for integers, where the paper has 2^(b-1).
    """
    e4m3 = fmt.has_global_scale
    rho = PRINTED_OVERHEAD[e4m3] if overhead is None else overhead
    if fmt.element.mantissa_bits is None:
        steps = fmt.element.max + (not exact_max)
        return _integer_qsnr(steps, crest, rho**2, fmt.group_size if e4m3 else 0)
    return _db(_float_noise(fmt, crest, rho, 0.5, e4m3))


def corrected_qsnr(fmt: Format, crest: float) -> float:
    """The closed form with the exact maximum and the scale's phase averaged, in dB.

    Within 0.05 dB of simulated blocks for INT with E8M0 scales and for MXFP8, 0.15 for NVINT4,
    0.3 for FP4 up to κ = 3; not usable for FP with E4M3 scales beyond ``LARGEST_FOR_FP_E4M3``.
    """
    if fmt.element.mantissa_bits is None:
        if fmt.has_global_scale:
            return _integer_qsnr(fmt.element.max, crest, 1.0, fmt.group_size)
        return _integer_qsnr(fmt.element.max, crest, CEIL_OVERHEAD_SQUARED, 0)
    if fmt.has_global_scale:
        return _db(_float_noise(fmt, crest, 1.0, INVERSE_SQUARE, True))
    phases = 2.0 ** ((np.arange(PHASES) + 0.5) / PHASES)
    noise = [_float_noise(fmt, crest, float(rho), INVERSE_SQUARE, False) for rho in phases]
    return _db(sum(noise) / PHASES)


# ---------------------------------------------------------------- by integration


def _steps(fmt: Format, maximum: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """What a unit of the element is worth in blocks with these maxima, where the maxima are
    ``phase`` times as large while scales are stored."""
    stored = fmt.encode_scale(maximum * (phase / fmt.element.max))
    return fmt.decode_scale(stored) / phase


def _phases() -> list[float]:
    """Equally likely phases of a number over an octave."""
    return [2.0 ** ((i + 0.5) / PHASES) for i in range(PHASES)]


def _squared_errors(fmt: Format, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """(x - x̂)² of numbers ``x`` (points, *m), float32, with steps (*m)."""
    return (x - fmt.element.round(x / step) * step).square()


def _block_weights(crest: float, size: int, x: np.ndarray) -> np.ndarray:
    """The density at ``x`` of a block's other numbers, given its rms of 1 and its maximum: that of
    largest entropy, ``exp(-c x²)`` on [-κ, κ]; the chance of ``x``, summing up to 1."""
    wanted = (size - crest**2) / (size - 1)
    squares = x**2

    def weights(c: float) -> np.ndarray:
        logs = -c * squares
        found = np.exp(logs - logs.max())
        return found / found.sum()

    def excess(c: float) -> float:
        return float((weights(c) * squares).sum() - wanted)

    return weights(_root(excess, -1e4 / crest**2, 1e4 / crest**2, 1e-12))


@lru_cache(maxsize=4096)
def integrated_qsnr(fmt: Format, crest: float) -> float:
    """The QSNR of blocks with crest factor κ by integrating the element's rounding, in dB.

    Raises:
        ValueError: a crest factor that no block of the format has.
    """
    size = fmt.group_size
    if not 1 < crest < math.sqrt(size):
        raise ValueError(
            f"a block of {size} numbers has a crest factor between 1 and {math.sqrt(size):.3f}, "
            f"not {crest:g}"
        )
    points = (np.arange(POINTS) + 0.5) / POINTS * crest
    weights = torch.from_numpy(_block_weights(crest, size, points)).float()
    x, maximum = torch.from_numpy(points).float(), torch.tensor(crest, dtype=torch.float32)
    step = _steps(fmt, maximum, torch.tensor(_phases()))
    rest = (weights[:, None] * _squared_errors(fmt, x[:, None], step)).sum(0)
    noise = float(((size - 1) * rest + _squared_errors(fmt, maximum, step)).double().sum())
    return _db(noise / PHASES / size)


def crest_grid(size: int) -> np.ndarray:
    """Crest factors from 1.1 almost to the largest that a block of ``size`` numbers can have."""
    return np.linspace(1.1, 0.995 * math.sqrt(size), 48)


@lru_cache(maxsize=64)
def _noise_table(fmt: Format, law: Law) -> tuple[np.ndarray, np.ndarray]:
    grid = crest_grid(fmt.group_size)
    return grid, np.array([10 ** (-law(fmt, float(k)) / 10) for k in grid])


def predicted_noise(fmt: Format, crest: np.ndarray, law: Law = integrated_qsnr) -> np.ndarray:
    """Noise over signal of blocks by their crest factors, float64; outside :func:`crest_grid` as
    at its ends."""
    grid, noise = _noise_table(fmt, law)
    return np.interp(crest, grid, noise)


# ---------------------------------------------------------------- crossovers, Gaussian blocks


def crossover(pair: tuple[Format, Format], law: Law = corrected_qsnr) -> float | None:
    """The crest factor below which the integers of ``pair`` are better by ``law``; None if they
    are better or worse at every crest factor that a block can have."""
    return crossing(lambda k: law(pair[0], k) - law(pair[1], k), 1.1, math.sqrt(pair[0].group_size))


def crossing(difference: Callable[[float], float], low: float, high: float) -> float | None:
    """The first sign change from plus to minus between ``low`` and ``high``, None without one."""
    grid = np.linspace(low, high * 0.999, 24)
    values = [difference(float(k)) for k in grid]
    for i in range(len(grid) - 1):
        if values[i] > 0 >= values[i + 1]:
            return _root(difference, float(grid[i]), float(grid[i + 1]), 1e-3)
    return None


def _maximum_density(size: int, points: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitudes of ``size`` standard normal numbers, and the chance of each."""
    edges = np.linspace(0.0, 7.0, points + 1)
    chance = np.diff((2 * special.ndtr(edges) - 1) ** size)
    return (edges[1:] + edges[:-1]) / 2, chance


def gaussian_crest(size: int) -> float:
    """The mean crest factor of blocks of ``size`` Gaussian numbers.

    The direction of a Gaussian vector is independent of its length: ``E[κ] = E[max] / E[rms]``.
    """
    maximum, chance = _maximum_density(size, 4096)
    rms = math.sqrt(2 / size) * math.exp(
        special.gammaln((size + 1) / 2) - special.gammaln(size / 2)
    )
    return float((maximum * chance).sum() / rms)


@lru_cache(maxsize=64)
def gaussian_qsnr(fmt: Format) -> float:
    """The QSNR of Gaussian blocks times 2^u, u uniform on [0, 1], all energies summed, in dB. By
    integration: given the maximum, the others are independent normal numbers below it."""
    maximum, chance = _maximum_density(fmt.group_size)
    position = (torch.arange(POINTS) + 0.5) / POINTS
    top = torch.from_numpy(maximum).float()
    x = position[:, None] * top
    weights = torch.exp(-x.square() / 2)
    weights = weights / weights.sum(0)
    noise, signal = 0.0, 0.0
    for phase in _phases()[2::4]:
        step = _steps(fmt, top, torch.tensor(phase))
        rest = (weights * _squared_errors(fmt, x, step)).sum(0)
        block = (fmt.group_size - 1) * rest + _squared_errors(fmt, top, step)
        noise += phase**2 * float((block.double() * torch.from_numpy(chance)).sum())
        signal += phase**2 * fmt.group_size
    return _db(noise / signal)
