"""What is measured of a tensor and of a layer, against the plain definitions."""

import pytest
import torch

from ptq.numerics.formats import FORMATS, MICROSCALED, MXFP4, NVFP4, NVINT4
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to
from ptq.pipeline.analysis import (
    by_blocks,
    first_tokens,
    forms,
    output_errors,
    predicted,
    rounded,
    spread_rows,
    tensor_analysis,
)


@pytest.mark.parametrize("name", MICROSCALED)
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_rounded_is_what_codes_stand_for(name: str, rule: str) -> None:
    fmt, x = FORMATS[name], torch.randn(20, 64) * torch.exp(torch.randn(20, 1))
    grid = Grid(fmt, fmt.global_scale(x.abs().amax()), rule)
    assert torch.equal(rounded(x, fmt, rule), round_to(x, grid.scales(x)).dequantize())


def test_rows_are_spread_and_one_is_always_there() -> None:
    x = torch.arange(40.0).reshape(10, 4)
    assert spread_rows(x, 1000) is x
    assert spread_rows(x, 20)[:, 0].tolist() == [0, 8, 16, 24, 32]
    assert len(spread_rows(x, 1)) == 1


def test_four_forms_and_their_figures() -> None:
    x = torch.randn(200, 64)
    made = forms(x, 2 * x, "absmax")
    found = tensor_analysis("input", ["a", "b"], made, x)
    assert [(v.balanced, v.rotated) for v in found.variants] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    plain, rotated, balanced, _ = found.variants
    assert plain.formats.keys() == MICROSCALED.keys()
    assert [c.size for c in plain.crest] == [16, 32]
    # twice as large is the same in every format, but for the phase of E4M3 scales
    for name, figures in plain.formats.items():
        assert figures.qsnr == pytest.approx(balanced.formats[name].qsnr, abs=0.02)
        assert figures.integrated == pytest.approx(figures.qsnr, abs=0.5)
    # NVFP4 is rotated in blocks of 16, MXFP4 in blocks of 32
    for fmt in (NVFP4, MXFP4):
        y = Rotation(fmt.group_size).exact(x)
        wanted = 10 * torch.log10(y.square().sum() / (y - rounded(y, fmt, "absmax")).square().sum())
        assert rotated.formats[fmt.name].qsnr == pytest.approx(float(wanted), abs=1e-4)
    assert (found.name, found.layers, found.rows, found.columns) == ("a", ("a", "b"), 200, 64)


def test_formats_of_32_are_left_out_where_only_16_divide() -> None:
    (plain, _) = forms(torch.randn(8, 48), None, "absmax")
    assert set(plain.measured().formats) == {"nvfp4", "nvint4"}


def test_searched_scales_have_no_laws() -> None:
    (plain, _) = forms(torch.randn(50, 64), None, "mse")
    figures = plain.measured().formats["mxint4"]
    assert figures.printed is figures.corrected is figures.integrated is None
    assert (
        figures.qsnr
        > forms(torch.randn(50, 64), None, "absmax")[0].measured().formats["mxint4"].qsnr
    )


def test_blocks_are_weighted_by_their_energy() -> None:
    loud, quiet = torch.zeros(1, 16), torch.ones(1, 16)
    loud[0, 0], loud[0, 1:] = 100.0, 1.0
    assert by_blocks(torch.cat([loud, quiet]), NVINT4) == pytest.approx(
        by_blocks(loud, NVINT4), abs=0.1
    )
    assert predicted(NVINT4, 2.0, "corrected") == pytest.approx(21.95, abs=0.02)


def test_output_errors_are_those_of_products() -> None:
    w, x = torch.randn(24, 64), torch.randn(40, 64)
    plain, rotated = output_errors(forms(w, None, "absmax"), forms(x, None, "absmax"))
    rough_w, rough_x = (rounded(t, NVFP4, "absmax") for t in (w, x))
    wanted = x @ w.T
    error = (wanted - rough_x @ rough_w.T).square().sum() / wanted.square().sum()
    alone = (wanted - x @ rough_w.T).square().sum() / wanted.square().sum()
    assert plain.both["nvfp4"] == pytest.approx(float(error), rel=1e-4)
    assert plain.weights["nvfp4"] == pytest.approx(float(alone), rel=1e-4)
    assert rotated.rotated and rotated.both["mxint8"] < 1e-3


def test_first_tokens_stand_apart() -> None:
    first, others = torch.ones(2, 32) * 0.5, torch.ones(10, 32)
    first[0, 3] = 50.0
    found = first_tokens(first, others)
    assert found is not None and found.amax == 50 and found.kurtosis > 5
    assert first_tokens(first[:0], others) is None
    assert first_tokens(first * 0, others) is None
