"""The discrete step: what moves, where to, and how much of it, against a plain one in float64."""

import itertools

import pytest
import torch

from ptq.numerics.discrete_step import jumps
from ptq.numerics.formats import FORMATS
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor, Scales

NARROW = [name for name, fmt in FORMATS.items() if fmt.element.bits == 4]


def quantized(name: str, rows: int = 6, features: int = 64) -> QuantizedTensor:
    fmt = FORMATS[name]
    features = max(features, fmt.size(128))
    weight = torch.randn(rows, features)
    return rtn(
        weight, torch.eye(features), Grid(fmt, fmt.global_scale(weight.abs().amax()), "absmax")
    )


def derivatives(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    root = torch.rand(weight.codes.shape) + 0.1
    return root * (2 * torch.rand(root.shape) - 1), root


def plain(weight, mean, root, *, reach: float, share: float, trust: float):
    """The same, a value after the other in float64: (codes, [(gain, move of the weight)])."""
    element, size = weight.format.element, weight.format.group_size
    grid = sorted({v for v in element.values if abs(v) <= element.max})
    values = element.decode(weight.codes).double()
    steps = weight.scales.step().double()
    found = []
    for row, column in itertools.product(*map(range, values.shape)):
        value, m = float(values[row, column]), float(mean[row, column])
        place = grid.index(value) + (m < 0) - (m > 0)
        if not 0 <= place < len(grid):
            continue
        gap = abs(grid[place] - value)
        change = -abs(m) * gap / float(root[row, column]) + gap**2 / (2 * reach)
        if change < 0:
            found.append(
                (change, row, column, grid[place], gap * float(steps[row, column // size]))
            )
    room = (trust * weight.dequantize().double().norm()) ** 2
    codes, used = weight.codes.clone(), 0.0
    moved = []
    for change, row, column, value, move in sorted(found)[: int(share * values.numel())]:
        used += move**2
        if used > room:
            break
        codes[row, column] = element.encode(torch.tensor([[value]])).item()
        moved.append((change, move))
    return codes, moved


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize(("share", "trust"), [(1.0, 10.0), (0.05, 10.0), (1.0, 0.05), (0.03, 0.06)])
def test_it_is_the_plain_one(name: str, share: float, trust: float) -> None:
    weight = quantized(name)
    mean, root = derivatives(weight)
    limits = {"reach": 1.0, "share": share, "trust": trust}
    found = jumps(weight, mean, root, **limits)
    expected, moved = plain(weight, mean, root, **limits)
    assert moved and torch.equal(found, expected)
    assert found.dtype == torch.uint8 and int((found != weight.codes).sum()) == len(moved)


@pytest.mark.parametrize("name", NARROW)
def test_a_move_is_to_a_neighbour_and_lowers_what_is_expected(name: str) -> None:
    weight = quantized(name)
    mean, root = derivatives(weight)
    element = weight.format.element
    after = element.decode(jumps(weight, mean, root, reach=1.0, share=1.0, trust=10.0))
    change = after - element.decode(weight.codes)
    assert change.any() and (change * mean <= 0).all()
    expected = mean / root * change + change**2 / 2
    assert (expected[change != 0] < 0).all()
    assert change.abs().max() <= max(b - a for a, b in itertools.pairwise(sorted(element.values)))


@pytest.mark.parametrize("nothing", [{"share": 0.0}, {"trust": 0.0}, {"reach": 1e-3}])
def test_where_nothing_may_move_nothing_changes(nothing: dict[str, float]) -> None:
    weight = quantized("nvfp4")
    mean, root = derivatives(weight)
    limits = {"reach": 1.0, "share": 1.0, "trust": 1.0} | nothing
    assert torch.equal(jumps(weight, mean, root, **limits), weight.codes)


def test_no_derivative_no_move() -> None:
    weight = quantized("mxfp4")
    zero = torch.zeros(weight.codes.shape)
    found = jumps(weight, zero, zero + 1e-16, reach=1.0, share=1.0, trust=1.0)
    assert torch.equal(found, weight.codes)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3])
def test_no_more_than_the_share_moves_and_no_further_than_is_trusted(share: float) -> None:
    weight = quantized("nvfp4", 16, 128)
    mean, root = derivatives(weight)
    for trust in (0.01, 1.0):
        codes = jumps(weight, mean, root, reach=1.0, share=share, trust=trust)
        assert int((codes != weight.codes).sum()) <= share * weight.codes.numel()
        moved = QuantizedTensor(codes, weight.scales).dequantize() - weight.dequantize()
        assert moved.norm() <= trust * weight.dequantize().norm() * (1 + 1e-6)


def test_the_end_of_the_grid_stays_and_zero_has_one_code() -> None:
    fmt = FORMATS["nvint4"]
    scales = Scales(torch.full((1, 1), 0x38, dtype=torch.uint8), torch.tensor(1.0), fmt)
    element = fmt.element
    values = torch.tensor([[7.0, -7.0, 1.0, -1.0, *[0.0] * 12]])
    weight = QuantizedTensor(element.encode(values), scales)
    mean = torch.tensor([[-1.0, 1.0, 1.0, -1.0, *[0.0] * 12]])
    found = jumps(weight, mean, torch.full((1, 16), 0.1), reach=1.0, share=1.0, trust=10.0)
    assert element.decode(found)[0, :4].tolist() == [7.0, -7.0, 0.0, 0.0]
    assert found[0, 2:].tolist() == [0] * 14
