"""Laws of GPTQ and of scales that are chosen inside its sweep (G12–G26)."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.descent import coordinate_descent
from ptq.numerics.errors import output_error
from ptq.numerics.factor import column_order, damped
from ptq.numerics.formats import FORMATS, MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid, round_to

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
every = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=list(FORMATS))


def grid(w: Tensor, fmt: Format, rule: str = "mse", margin: float = 1.0) -> Grid:
    return Grid(fmt, fmt.global_scale(w.abs().amax(), margin), rule)


def loss(w: Tensor, quantized, h: Tensor) -> float:
    return float(output_error(w, quantized.dequantize(), h))


def straightforward(w: Tensor, h: Tensor, scales, order: Tensor, damping: float) -> Tensor:
    """The column loop of the paper in float64, one column at a time over the whole rest: codes."""
    fmt = scales.format
    factor = torch.linalg.cholesky(
        torch.linalg.inv(damped(h, damping)[order][:, order]), upper=True
    )
    w, step = w[:, order].double(), scales.step().double()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for j in range(w.shape[1]):
        s = step[:, order[j] // fmt.size(128)]
        codes[:, order[j]] = fmt.element.encode((w[:, j] / s).float())
        error = (w[:, j] - fmt.element.decode(codes[:, order[j]]).double() * s) / factor[j, j]
        w[:, j:] -= torch.outer(error, factor[j, j:])
    return codes


@every
def test_white_inputs_make_gptq_rtn(fmt: Format, problem) -> None:
    """G24."""
    w, _, _ = problem
    for order in ("natural", "act", "group"):
        assert torch.equal(
            gptq(w, torch.eye(128), grid(w, fmt), order=order).codes,
            rtn(w, torch.eye(128), grid(w, fmt)).codes,
        )


@deployed
@pytest.mark.parametrize("order", ["natural", "act", "group"])
def test_gptq_is_the_straightforward_loop(fmt: Format, order: str, problem) -> None:
    """With scales fixed before it, in every order (G19)."""
    w, _, h = problem
    scales = grid(w, fmt).scales(w)
    expected = straightforward(
        w, h, scales, column_order(damped(h, 0.01).diagonal(), fmt.size(128), order), 0.01
    )
    measured = gptq(w, h, grid(w, fmt), order=order)
    assert torch.equal(measured.scales.bits, scales.bits)
    # float32 rounding may move a code next to a tie, which then moves others of its row
    assert (measured.codes != expected).any(1).float().mean() < 0.1


@deployed
def test_block_size_does_not_matter(fmt: Format, problem) -> None:
    w, _, h = problem
    results = [
        gptq(w, h, grid(w, fmt), in_loop="trial", block_size=size).codes for size in (32, 64, 1000)
    ]
    for other in results[1:]:
        assert (results[0] != other).any(1).float().mean() < 0.1


@deployed
def test_gptq_trades_weight_error_for_output_error(fmt: Format, problem) -> None:
    w, _, h = problem
    nearest, swept = rtn(w, h, grid(w, fmt)), gptq(w, h, grid(w, fmt), order="act")
    assert loss(w, swept, h) < 0.8 * loss(w, nearest, h)
    assert (w - swept.dequantize()).norm() > (w - nearest.dequantize()).norm()


@deployed
def test_scales_chosen_in_the_sweep_beat_fixed_ones_in_the_same_order(fmt: Format, problem) -> None:
    w, _, h = problem
    fixed = loss(w, gptq(w, h, grid(w, fmt), order="group"), h)
    trial = loss(w, gptq(w, h, grid(w, fmt, margin=1.5), in_loop="trial"), h)
    assert trial < fixed


@deployed
def test_scales_of_a_sweep_are_storable_and_codes_never_the_spare_one(fmt: Format, problem) -> None:
    w, _, h = problem
    w = w.clone()
    w[:, 32:64] = 0
    for quantized in (
        gptq(w, h, grid(w, fmt, margin=1.5), in_loop="trial"),
        gptq(w, h, grid(w, fmt), order="act"),
    ):
        assert quantized.scales.bits.min() >= 1
        assert quantized.scales.bits.max() <= (0x7E if fmt.has_global_scale else 254)
        assert not (quantized.codes == 8).any()
        assert torch.isfinite(quantized.dequantize()).all()


@deployed
def test_rows_are_independent(fmt: Format, problem) -> None:
    """G25: a slice of rows gives the same rows."""
    w, _, h = problem
    for options in ({"order": "act"}, {"in_loop": "trial"}):
        whole = gptq(w, h, grid(w, fmt), **options)
        part = gptq(w[8:40], h, Grid(fmt, grid(w, fmt).global_scale, "mse"), **options)
        assert (part.codes != whole.codes[8:40]).any(1).float().mean() < 0.1


@deployed
def test_a_zero_column_is_quantized_in_its_own_place(fmt: Format, problem) -> None:
    """G16: permuting the layer by hand gives the permuted result."""
    w, _, h = problem
    w = w.clone()
    w[:, 5] = 0
    order = column_order(damped(h, 0.01).diagonal(), fmt.size(128), "group")
    by_hand = gptq(w[:, order], h[order][:, order], grid(w, fmt), order="natural")
    assert (gptq(w, h, grid(w, fmt), order="group").codes[:, order] != by_hand.codes).any(
        1
    ).float().mean() < 0.1


def test_silent_inputs_are_rounded_to_nearest(problem) -> None:
    """G15: not zeroed, and they neither give nor take compensation."""
    w, x, _ = problem
    x = x.clone()
    x[:, [3, 77]] = 0
    quantized = gptq(w, x.T @ x / len(x), grid(w, NVFP4), order="act")
    nearest = round_to(w, quantized.scales)
    assert torch.equal(quantized.codes[:, [3, 77]], nearest.codes[:, [3, 77]])
    assert (quantized.codes[:, 3] != 0).any()


@deployed
def test_more_damping_comes_closer_to_rtn(fmt: Format, problem) -> None:
    w, _, h = problem
    nearest = rtn(w, h, grid(w, fmt)).codes
    differing = [
        (gptq(w, h, grid(w, fmt), damping=d).codes != nearest).float().mean()
        for d in (0.01, 1.0, 1e6)
    ]
    assert differing[0] > differing[1] > differing[2]
    assert differing[2] < 1e-2


def test_nothing_is_modified(problem) -> None:
    w, _, h = problem
    before = w.clone(), h.clone()
    for result in (
        rtn(w, h, grid(w, NVFP4)),
        gptq(w, h, grid(w, NVFP4)),
        gptq(w, h, grid(w, NVFP4), in_loop="trial"),
    ):
        coordinate_descent(w, h, result)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


def test_in_loop_scales_need_whole_groups(problem) -> None:
    w, _, h = problem
    with pytest.raises(ValueError, match="order 'act'"):
        gptq(w, h, grid(w, NVFP4), order="act", in_loop="trial")
    with pytest.raises(ValueError, match="nonsense"):
        gptq(w, h, grid(w, NVFP4), in_loop="nonsense")
    with pytest.raises(ValueError, match="unknown column order"):
        gptq(w, h, grid(w, NVFP4), order="nonsense")


def test_rank_one_hessians_succeed(problem) -> None:
    """One token and a little damping are enough for a factor (G13)."""
    w, x, _ = problem
    quantized = gptq(w, x[:1].T @ x[:1], grid(w, MXFP4), damping=0.01)
    assert torch.isfinite(quantized.dequantize()).all()
