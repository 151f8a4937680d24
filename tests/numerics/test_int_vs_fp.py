"""The laws of INT against FP: literal values, crossovers, and simulated blocks."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.numerics.formats import FORMATS, MXFP4, MXFP8, MXINT4, MXINT6, NVFP4, NVINT4, Format
from ptq.numerics.int_vs_fp import (
    LARGEST_FOR_FP_E4M3,
    PAIRS,
    corrected_qsnr,
    crossing,
    crossover,
    gaussian_crest,
    gaussian_qsnr,
    integrated_qsnr,
    predicted_noise,
    printed_qsnr,
)
from ptq.numerics.scales import Grid, round_to


def simulated(fmt: Format, count: int, rule: str = "absmax") -> tuple[Tensor, Tensor, Tensor]:
    """Crest factor, energy and energy of the error of Gaussian blocks times 2^u."""
    draw = np.random.default_rng(5)
    x = draw.standard_normal((count, fmt.group_size)) * 2 ** draw.random((count, 1))
    blocks = torch.from_numpy(x).float()
    grid = Grid(fmt, fmt.global_scale(blocks.abs().amax()), rule)
    error = blocks - round_to(blocks, grid.scales(blocks)).dequantize()
    signal = blocks.square().sum(1)
    crest = blocks.abs().amax(1) / (signal / fmt.group_size).sqrt()
    return crest, signal, error.square().sum(1)


def decibels(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.double().sum() / noise.double().sum()))


@pytest.mark.parametrize(
    ("name", "printed", "corrected"),
    [
        ("mxint8", 43.39, 43.49),
        ("mxfp8", 31.86, 31.52),
        ("mxint6", 31.35, 31.25),
        ("mxfp6", 31.52, 31.21),
        ("mxint4", 19.31, 18.32),
        ("mxfp4", 19.18, 18.89),
    ],
)
def test_closed_forms_at_two(name: str, printed: float, corrected: float) -> None:
    assert printed_qsnr(FORMATS[name], 2.0) == pytest.approx(printed, abs=0.006)
    assert corrected_qsnr(FORMATS[name], 2.0) == pytest.approx(corrected, abs=0.006)


def test_a_bit_more_is_six_decibels_and_scales_with_the_crest_factor() -> None:
    eight, six = FORMATS["mxint8"], MXINT6
    gain = printed_qsnr(eight, 2.0) - printed_qsnr(six, 2.0)
    assert gain == pytest.approx(2 * 20 * math.log10(2))
    loss = corrected_qsnr(six, 2.0) - corrected_qsnr(six, 4.0)
    assert loss == pytest.approx(20 * math.log10(2))


def test_crossovers() -> None:
    printed, corrected, blocks = (
        [crossover(pair, law) for pair in PAIRS]
        for law in (printed_qsnr, corrected_qsnr, integrated_qsnr)
    )
    assert printed == [None, *(pytest.approx(k, abs=0.002) for k in (1.958, 2.040, 2.463))]
    assert corrected == [None, *(pytest.approx(k, abs=0.006) for k in (2.01, 1.85, 2.29))]
    # simulated: 2.00, 1.78, 2.28
    assert blocks == [None, *(pytest.approx(k, abs=0.03) for k in (2.00, 1.78, 2.28))]


def test_a_crossing_goes_from_plus_to_minus() -> None:
    assert crossing(lambda k: 2 - k, 1.0, 3.0) == pytest.approx(2)
    assert crossing(lambda k: k - 2, 1.0, 3.0) is None


@pytest.mark.parametrize(
    ("size", "mean"), [(8, 1.840), (16, 2.110), (32, 2.365), (128, 2.833), (4096, 3.806)]
)
def test_mean_crest_factor_of_gaussian_blocks(size: int, mean: float) -> None:
    assert gaussian_crest(size) == pytest.approx(mean, abs=0.005)


# measured with six seeds of 50,000 blocks
ORACLE = {
    "mxint8": 41.89,
    "mxfp8": 31.54,
    "mxint6": 29.63,
    "mxfp6": 30.97,
    "mxint4": 16.69,
    "mxfp4": 18.66,
    "nvint4": 21.28,
    "nvfp4": 20.44,
}


@pytest.mark.parametrize("name", ORACLE)
def test_gaussian_oracle(name: str) -> None:
    fmt = FORMATS[name]
    assert gaussian_qsnr(fmt) == pytest.approx(ORACLE[name], abs=0.02)
    _, signal, noise = simulated(fmt, 20_000)
    assert decibels(signal, noise) == pytest.approx(ORACLE[name], abs=0.1)


@pytest.mark.parametrize("fmt", [MXINT6, MXFP8, MXINT4, MXFP4, NVINT4, NVFP4], ids=lambda f: f.name)
def test_laws_hold_for_simulated_blocks(fmt: Format) -> None:
    crest, signal, noise = simulated(fmt, 60_000)
    for low, high in ((1.9, 2.1), (2.2, 2.4), (2.5, 2.7), (2.8, 3.2)):
        inside = (crest > low) & (crest < high)
        # block by block: within a bin, energies and the phases of scales go together
        wanted = -10 * math.log10((noise / signal)[inside].double().mean())
        kappa = float(crest[inside].mean())
        assert integrated_qsnr(fmt, kappa) == pytest.approx(wanted, abs=0.1)
        closed = fmt.element.mantissa_bits is None or kappa < LARGEST_FOR_FP_E4M3
        if closed:
            assert corrected_qsnr(fmt, kappa) == pytest.approx(wanted, abs=0.3)


def test_the_closed_form_of_nvfp4_fails_where_most_energy_is_in_the_maximum() -> None:
    assert corrected_qsnr(NVFP4, 3.95) > 23.5
    assert integrated_qsnr(NVFP4, 3.95) == pytest.approx(20.4, abs=0.1)


def test_noise_is_predicted_block_by_block() -> None:
    crest, signal, noise = (t.double().numpy() for t in simulated(MXINT4, 20_000))
    predicted = predicted_noise(MXINT4, crest)
    assert 10 * np.log10(signal.sum() / (predicted * signal).sum()) == pytest.approx(
        10 * np.log10(signal.sum() / noise.sum()), abs=0.1
    )
    # beyond what a block can have, as at the end
    ends = predicted_noise(MXINT4, np.array([0.0, 1.0, 1.1, 5.63, 9.0]))
    assert ends[0] == ends[1] == ends[2] and ends[3] == ends[4] > ends[0]


def test_crest_factors_that_no_block_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"16 numbers has a crest factor between 1 and 4\.000"):
        integrated_qsnr(NVFP4, 4.5)


def test_wider_formats_are_better_and_mxfp8_does_not_care() -> None:
    assert integrated_qsnr(MXFP8, 1.5) == pytest.approx(integrated_qsnr(MXFP8, 4.0), abs=0.02)
    assert integrated_qsnr(MXINT6, 2.0) > integrated_qsnr(MXINT4, 2.0) + 12
