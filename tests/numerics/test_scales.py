"""Scale rules: worked vectors (F30), the Gaussian oracle (F29), and laws that every row of
``RULES`` keeps."""

import math
from collections.abc import Callable

import pytest
import torch

from ptq.numerics.errors import sqnr
from ptq.numerics.formats import FORMATS, MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.scales import (
    RULES,
    Grid,
    alternate,
    candidates,
    round_to,
    scale_bytes,
    smallest_exponent,
    squared_error,
)
from ptq.numerics.tensor import Scales, group

ONE = torch.ones(())


def exists(fmt: Format, rule: str) -> bool:
    """Whether the scales of the format have this rule."""
    try:
        RULES[rule](torch.ones(1, 1, fmt.size(128)), fmt, ONE, None)
    except ValueError:
        return False
    return True


def weighs(fmt: Format, rule: str) -> bool:
    """Whether importance ever moves a byte of the format."""
    generator = torch.Generator().manual_seed(5)
    groups = torch.randn(200, 1, fmt.size(128), generator=generator)
    importance = torch.exp(5 * torch.randn(1, fmt.size(128), generator=generator))
    t = fmt.global_scale(groups.abs().amax())
    return not torch.equal(*(RULES[rule](groups, fmt, t, w) for w in (None, importance)))


# Rules that weigh errors of numbers; the others look at the largest magnitude alone.
SEARCHES = {
    rule for fmt in FORMATS.values() for rule in RULES if exists(fmt, rule) and weighs(fmt, rule)
}


def pairs(keep: Callable[[Format, str], bool]) -> pytest.MarkDecorator:
    every = [(fmt, rule) for fmt in FORMATS.values() for rule in RULES if keep(fmt, rule)]
    return pytest.mark.parametrize(
        ("fmt", "rule"), [pytest.param(fmt, rule, id=f"{fmt.name}-{rule}") for fmt, rule in every]
    )


rules = pairs(exists)
searching = pairs(lambda fmt, rule: exists(fmt, rule) and rule in SEARCHES)
plain = pairs(lambda fmt, rule: exists(fmt, rule) and rule not in SEARCHES)
missing = pairs(lambda fmt, rule: not exists(fmt, rule))

# amax: (k, resulting code value of amax itself) for MXFP4 ceil, ocp, theta and MXINT4 ceil, ocp,
# theta (F30)
E8M0_VECTORS = {
    0.7: [(-3, 6)] * 6,
    1.0: [(-2, 4), (-2, 4), (-2, 4), (-2, 4), (-2, 4), (-3, 7)],
    1.5: [(-2, 6)] * 6,
    1.501: [(-1, 3), (-2, 6), (-2, 6), (-2, 6), (-2, 6), (-2, 6)],
    1.999: [(-1, 4), (-2, 6), (-1, 4), (-1, 4), (-2, 7), (-2, 7)],
    2.0: [(-1, 4), (-1, 4), (-1, 4), (-1, 4), (-1, 4), (-2, 7)],
    6.0: [(0, 6)] * 6,
    6.001: [(1, 3), (0, 6), (0, 6), (0, 6), (0, 6), (0, 6)],
    7.25: [(1, 4), (0, 6), (0, 6), (1, 4), (0, 7), (0, 7)],
    8.0: [(1, 4), (1, 4), (1, 4), (1, 4), (1, 4), (0, 7)],
    1e-30: [(-102, 6), (-102, 6), (-102, 6), (-102, 5), (-102, 5), (-102, 5)],
    0.0: [(-126, 0)] * 6,
}


@pytest.mark.parametrize("amax", E8M0_VECTORS)
def test_e8m0_vectors(amax: float) -> None:
    cases = [(fmt, rule) for fmt in (MXFP4, MXINT4) for rule in ("ceil", "ocp", "theta")]
    for (fmt, rule), (k, value) in zip(cases, E8M0_VECTORS[amax], strict=True):
        x = torch.zeros(1, 32)
        x[0, 5] = amax
        quantized = round_to(x, Grid(fmt, ONE, rule).scales(x))
        assert int(quantized.scales.bits) == k + 127, (fmt.name, rule)
        assert float(fmt.element.decode(quantized.codes)[0, 5]) == value, (fmt.name, rule)


@pytest.mark.parametrize(
    ("fmt", "largest", "groups"),
    [
        (
            NVFP4,
            1.0,
            {
                1.0: (0x7E, 6),
                0.5: (0x76, 6),
                0.25: (0x6E, 6),
                0.1: (0x63, 6),
                3e-6: (1, 4),
                2e-7: (1, 0.5),
                0.0: (1, 0),
            },
        ),
        (NVINT4, 1.0, {1.0: (0x7E, 7), 3e-6: (1, 5), 2e-7: (1, 0)}),
        (NVFP4, 2688.0, {6.0: (0x38, 6), 6.375: (0x38, 6), 12.75: (0x40, 6)}),
        (NVINT4, 3136.0, {7.0: (0x38, 7), 7.4375: (0x38, 7), 8.0: (0x39, 7)}),
    ],
)
def test_e4m3_vectors(fmt: Format, largest: float, groups: dict[float, tuple[int, float]]) -> None:
    """F30, with the unrestricted global scale amax / (448 Q)."""
    t = torch.tensor(largest) / (448 * fmt.element.max)
    for amax, (byte, value) in groups.items():
        x = torch.zeros(1, 16)
        x[0, 3] = amax
        quantized = round_to(x, Grid(fmt, t, "absmax").scales(x))
        assert int(quantized.scales.bits) == byte, amax
        assert float(fmt.element.decode(quantized.codes)[0, 3]) == value, amax


# Gaussian blocks z·2^u, u uniform in [0, 1) (F29): decibels, the mean of 6 seeds of 50 000 blocks
ORACLE = {
    "mxint8": {"ceil": 41.89, "ocp": 41.96, "theta": 41.89, "mse": 42.03},
    "mxfp8": {"ceil": 31.54, "ocp": 30.42, "theta": 31.54, "mse": 31.54},
    "mxint6": {"ceil": 29.63, "ocp": 29.92, "theta": 29.63, "mse": 30.18},
    "mxfp6": {"ceil": 30.97, "ocp": 30.96, "theta": 30.97, "mse": 31.02},
    "mxint4": {"ceil": 16.69, "ocp": 17.84, "theta": 18.61, "mse": 18.68},
    "mxfp4": {"ceil": 18.66, "ocp": 18.71, "theta": 19.01, "mse": 19.02},
    "nvint4": {"absmax": 21.28, "mse": 21.75},
    "nvfp4": {"absmax": 20.44, "mse": 21.80, "four_six": 21.20},
    "int4-g128": {"absmax": 18.61, "mse": 19.51},
    "int4-g32": {"absmax": 20.26, "mse": 20.82},
}


@pytest.mark.parametrize("name", ORACLE)
def test_gaussian_oracle(name: str) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(50_000, fmt.size(128), generator=generator)
    blocks *= torch.exp2(torch.rand(50_000, 1, generator=generator))
    for rule, expected in ORACLE[name].items():
        grid = Grid(fmt, fmt.global_scale(blocks.abs().amax()), rule)
        measured = float(sqnr(blocks, round_to(blocks, grid.scales(blocks)).dequantize()))
        assert abs(measured - expected) <= 0.1, (rule, measured)


def test_exponents_are_exact_next_to_every_power_of_two() -> None:
    """A float log2 is off by one there."""
    powers = torch.exp2(torch.arange(-100, 101).double()).float()
    for theta in (6.0, 7.25, 7.0, 9.5, 448.0):
        edges = (theta * powers.double()).float()
        for x in (
            edges,
            torch.nextafter(edges, torch.tensor(0.0)),
            torch.nextafter(edges, torch.tensor(torch.inf)),
        ):
            k = smallest_exponent(x, theta).double()
            assert (x.double() <= theta * torch.exp2(k)).all()
            assert (x.double() > theta * torch.exp2(k - 1)).all()


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)
def test_a_search_is_at_least_as_good_as_every_candidate(fmt: Format) -> None:
    w = torch.randn(64, 128) * torch.exp(torch.randn(64, 1))
    w[3] = 0
    t = fmt.global_scale(w.abs().amax())
    groups, importance = group(w, fmt), torch.rand(128 // fmt.size(128), fmt.size(128))
    for weights in (None, importance):
        bits = RULES["mse"](groups, fmt, t, weights)
        error = squared_error(groups, fmt, fmt.decode_scale(bits) * t, weights)
        for byte in candidates(
            groups.abs().amax(-1), fmt, t, (6, 6) if fmt.has_global_scale else (1, 0)
        ):
            assert (error <= squared_error(groups, fmt, fmt.decode_scale(byte) * t, weights)).all()
    if fmt.has_global_scale:  # "absmax on 4 instead of 6" lies inside the window
        four = RULES["four_six"](groups, fmt, t, None)
        assert (
            RULES["mse"](groups, fmt, t, None).int()
            - scale_bytes(groups.abs().amax(-1), fmt, t, "absmax").int()
        ).abs().max() <= 6
        best = squared_error(
            groups, fmt, fmt.decode_scale(RULES["mse"](groups, fmt, t, None)) * t, None
        )
        assert (
            best <= squared_error(groups, fmt, fmt.decode_scale(four) * t, None) * (1 + 1e-6)
        ).float().mean() > 0.99


def test_up_never_clips_and_is_the_smallest_that_does_not() -> None:
    """Where the nearest scale may clip (F12)."""
    amax = torch.rand(10_000) * 100 + 1e-3
    t = NVFP4.global_scale(amax.amax())
    bits = scale_bytes(amax, NVFP4, t, "up")
    wanted = amax / 6 / t
    assert (NVFP4.decode_scale(bits) >= wanted).logical_or(bits == 0x7E).all()
    lower = bits > 1
    assert (NVFP4.decode_scale(bits[lower] - 1) < wanted[lower]).all()


# ---------------------------------------------------------------- laws of every rule


def layer() -> torch.Tensor:
    """Rows of sizes six orders of magnitude apart, heavy tails within them, some groups zero."""
    w = torch.randn(24, 128) * torch.exp(torch.randn(24, 128)) * torch.logspace(-3, 3, 24)[:, None]
    w[3], w[5, 32:96] = 0, 0
    return w


def errors(w: torch.Tensor, scales: Scales, importance: torch.Tensor | None) -> torch.Tensor:
    """The weighted squared error of every group."""
    size = scales.format.size(w.shape[1])
    weights = None if importance is None else importance.unflatten(0, (-1, size))
    return squared_error(group(w, scales.format), scales.format, scales.step(), weights)


@rules
def test_bytes_are_legal_for_any_finite_numbers(fmt: Format, rule: str) -> None:
    """F11, F13: neither zero nor NaN, at the ends of float32 and between."""
    sizes = (0.0, 1e-45, 1e-38, 1e-20, 1.0, 448.00003, 1e20, 3.4e38)
    whole = torch.cat([torch.rand(2, 128).sub(0.5) * 2 * size for size in sizes])
    lowest, highest = fmt.legal_scales
    for w in (layer(), whole, *whole.split(2)):
        bits = Grid(fmt, fmt.global_scale(w.abs().amax()), rule).scales(w).bits
        assert bits.dtype == fmt.bits_dtype
        assert bits.min() >= max(lowest, 1) and bits.max() <= highest


@rules
def test_numbers_and_importance_are_not_modified(fmt: Format, rule: str) -> None:
    w, importance = layer(), torch.rand(128)
    before = w.clone(), importance.clone()
    Grid(fmt, fmt.global_scale(w.abs().amax()), rule).scales(w, importance)
    assert torch.equal(w, before[0]) and torch.equal(importance, before[1])


@rules
@pytest.mark.parametrize("power", [-20, 3])
def test_powers_of_two_move_exponents_and_no_code(fmt: Format, rule: str, power: int) -> None:
    """They go into the exponents of scales or, where there is one, into the global scale."""
    w = torch.randn(16, 128)
    one, other = (
        round_to(x, Grid(fmt, fmt.global_scale(x.abs().amax()), rule).scales(x))
        for x in (w, w * 2.0**power)
    )
    assert torch.equal(one.codes, other.codes)
    shift = {"e4m3": 0, "e8m0": power, "bf16": power << 7}[fmt.scale_name]
    assert torch.equal(one.scales.bits.int() + shift, other.scales.bits.int())
    assert torch.equal(other.dequantize(), one.dequantize() * 2.0**power)


@rules
def test_signs_do_not_matter(fmt: Format, rule: str) -> None:
    """F3: elements are symmetric."""
    w = layer()
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), rule)
    one, other = (round_to(x, grid.scales(x)) for x in (w, -w))
    assert torch.equal(one.scales.bits, other.scales.bits)
    assert torch.equal(one.dequantize(), -other.dequantize())


@rules
def test_rows_and_groups_are_independent(fmt: Format, rule: str) -> None:
    """G25: a row in another order, or a group alone, has the same byte."""
    w, order = layer(), torch.randperm(24)
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), rule)
    bits = grid.scales(w).bits
    assert torch.equal(grid.scales(w[order]).bits, bits[order])
    assert torch.equal(grid.scales(w[7:9]).bits, bits[7:9])
    alone = [grid.scales(columns).bits for columns in w.split(fmt.size(128), dim=1)]
    assert torch.equal(torch.cat(alone, 1), bits)


@rules
def test_only_ratios_of_importance_count(fmt: Format, rule: str) -> None:
    w = layer()
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), rule)
    assert torch.equal(grid.scales(w, torch.ones(128)).bits, grid.scales(w).bits)
    importance = torch.exp(3 * torch.randn(128))
    weighted = grid.scales(w, importance).bits
    assert torch.equal(grid.scales(w, 16 * importance).bits, weighted)


@searching
@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_is_never_worse_than_absmax(fmt: Format, rule: str, weighted: bool) -> None:
    """In no group, by the error that it was told to weigh."""
    w, importance = layer(), torch.exp(3 * torch.randn(128)) if weighted else None
    t = fmt.global_scale(w.abs().amax())
    searched, absmax = (
        errors(w, Grid(fmt, t, which).scales(w, importance), importance)
        for which in (rule, "absmax")
    )
    assert (searched <= absmax).all()


def test_the_table_is_sorted_as_these_laws_need_it() -> None:
    """A rule that raised for another reason, or lost its weights, would drop out of them."""
    assert {"mse", "four_six"} <= SEARCHES
    assert SEARCHES.isdisjoint({"absmax", "ceil", "ocp", "theta", "round", "up"})
    for fmt in FORMATS.values():
        own = {"ceil", "ocp", "theta", "round"} if fmt.powers_of_two else {"up"}
        assert {r for r in RULES if exists(fmt, r)} >= {"absmax", "mse", "four_six"} | own


@plain
def test_larger_numbers_never_have_a_smaller_scale(fmt: Format, rule: str) -> None:
    """Where there is no search, which may put a larger number on a lower code."""
    amax = torch.logspace(-30, 30, 10_001).sort().values
    groups = torch.zeros(len(amax), 1, fmt.size(128))
    groups[:, 0, 3] = amax
    bits = RULES[rule](groups, fmt, fmt.global_scale(torch.tensor(1.0)), None)
    assert (bits[:, 0].int().diff() >= 0).all()


@rules
def test_groups_and_tensors_of_zeros_are_zeros(fmt: Format, rule: str) -> None:
    """F19."""
    for w in (torch.zeros(2, 128), torch.cat((torch.zeros(1, 128), torch.randn(1, 128)))):
        grid = Grid(fmt, fmt.global_scale(w.abs().amax()), rule)
        quantized = round_to(w, grid.scales(w))
        assert (quantized.codes[0] == 0).all()
        assert (quantized.scales.bits[0] == max(1, fmt.legal_scales[0])).all()


@missing
def test_a_rule_that_the_scales_do_not_have_is_refused(fmt: Format, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{rule}.*{fmt.name} has"):
        Grid(fmt, ONE, rule).scales(torch.randn(2, 128))


# ---------------------------------------------------------------- rounding, and the rest


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4], ids=lambda f: f.name)
def test_rounding_errs_by_at_most_half_a_local_gap(fmt: Format) -> None:
    w = torch.randn(32, 64)
    quantized = round_to(
        w, Grid(fmt, fmt.global_scale(w.abs().amax()), "ceil" if fmt is MXFP4 else "up").scales(w)
    )
    z = (group(w, fmt) / quantized.scales.step().unsqueeze(-1)).flatten(1)
    gap = (
        torch.where(z.abs() < 2, 0.5, torch.where(z.abs() < 4, 1.0, 2.0))
        if fmt.element.name == "e2m1"
        else torch.ones_like(z)
    )
    assert ((z - fmt.element.decode(quantized.codes)).abs() <= gap / 2 * (1 + 1e-6)).all()


def test_alternating_scales_never_raise_the_error() -> None:
    w = torch.randn(64, 128) * torch.exp(torch.randn(64, 128))
    for fmt in (NVFP4, NVINT4):
        grid = Grid(fmt, fmt.global_scale(w.abs().amax(), 1.3), "absmax")
        refitted = alternate(w, grid)
        before, after = (
            (w - round_to(w, g.scales(w)).dequantize()).square().sum() for g in (grid, refitted)
        )
        assert after <= before
        assert torch.equal(1 / (1 / refitted.global_scale), refitted.global_scale)
    assert math.isclose(float(alternate(w, Grid(MXFP4, ONE, "mse")).global_scale), 1)


def test_ragged_columns_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"172 input features .* group size 32 .*--ignore"):
        Grid(MXFP4, ONE, "mse").scales(torch.randn(2, 172))
