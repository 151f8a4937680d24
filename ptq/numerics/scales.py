"""The scale rules (F6, F15): a format says which scales can be stored, a rule says which are.

A rule maps groups of numbers to the bits of scales. Every search runs over storable ones, never
over unrounded scales, and every comparison of exponents is an exact operation on the bits of a
float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int32, Integer, UInt8
from torch import Tensor

from ptq.numerics.formats import E8M0_BIAS, E8M0_MAX, E8M0_MIN, Element, Format
from ptq.numerics.tensor import QuantizedTensor, Scales, group

# (groups of numbers, format, global scale, importance of each column or None) -> bits of scales
ScaleRule = Callable[
    [
        Float32[Tensor, "rows groups size"],
        Format,
        Float32[Tensor, ""],
        Float32[Tensor, "groups size"] | None,
    ],
    Integer[Tensor, "rows groups"],
]

# `theta` clips numbers up to theta/Q, which pays for elements with few values: measured optimum on
# Gaussian blocks (F6, F29).
THETA = {"e2m1": 7.25, "int4": 9.5}
# Scales tried around that of the largest magnitude, (below, above): E4M3 has 6 of its codes either
# way (F10), E8M0 the one below (F7), bfloat16 every fourth of its codes (F32).
WINDOW = {torch.float8_e4m3fn: (6, 6), torch.float8_e8m0fnu: (1, 0), torch.bfloat16: (12, 2)}
STRIDE = {torch.bfloat16: 4}


def smallest_exponent(amax: Float32[Tensor, "*s"], theta: float) -> Int32[Tensor, "*s"]:
    """``min{k : amax <= theta · 2^k}``, exactly, for float32 ``amax >= 0``; not clipped to a
    storable range."""
    fraction, exponent = math.frexp(
        theta
    )  # theta = fraction · 2^exponent with fraction in [0.5, 1)
    threshold = int(torch.tensor(2 * fraction, dtype=torch.float32).view(torch.int32)) & 0x7FFFFF
    bits = amax.view(torch.int32)
    return (bits >> 23) - 127 - (exponent - 1) + ((bits & 0x7FFFFF) > threshold).int()


def _byte(k: Int32[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
    return (k.clamp(E8M0_MIN, E8M0_MAX) + E8M0_BIAS).to(torch.uint8)


def _theta_of(element: Element, rule: str) -> float:
    match rule:
        case "ceil":
            return element.max
        case "theta":
            return THETA.get(element.name, element.max)
        case "round":  # the nearest integer to log2(amax / Q)
            return element.max * math.sqrt(2)
        # floor(log2 amax) - floor(log2 Q): every amax below the next power of two keeps the
        # exponent
        case "ocp":
            return 2 ** (math.floor(math.log2(element.max)) + 1) * (1 - 2.0**-24)
    raise AssertionError(rule)


def scale_bytes(
    amax: Float32[Tensor, "*s"], fmt: Format, global_scale: Float32[Tensor, "*#s"], rule: str
) -> Integer[Tensor, "*s"]:
    """The bits that a rule without a search gives to groups with the largest magnitude ``amax``.

    Args:
        rule: for E8M0 scales ``ceil`` (also called ``absmax``), ``ocp``, ``theta`` or ``round``;
            for others ``absmax`` (nearest, which may clip: F12) or ``up`` (the smallest storable
            scale that clips nothing).

    Raises:
        ValueError: the rule does not exist for the scales of this format.
    """
    if fmt.powers_of_two:
        rule = "ceil" if rule == "absmax" else rule
        if rule not in ("ceil", "ocp", "theta", "round"):
            raise ValueError(
                f"scale rule {rule!r} is for other than E8M0 scales; {fmt.name} has absmax, ceil, "
                "ocp, theta, round, mse"
            )
        return _byte(smallest_exponent(amax, _theta_of(fmt.element, rule)))
    wanted = amax / fmt.element.max / global_scale
    nearest = fmt.encode_scale(wanted)
    if rule == "absmax":
        return nearest
    if rule == "up":
        return (nearest + (fmt.decode_scale(nearest) < wanted)).clamp(max=fmt.legal_scales[1])
    raise ValueError(
        f"scale rule {rule!r} is for E8M0 scales; {fmt.name} has absmax, up, mse, four_six"
    )


def candidates(
    amax: Float32[Tensor, "*s"],
    fmt: Format,
    global_scale: Float32[Tensor, ""],
    window: tuple[int, int],
) -> Integer[Tensor, "count *s"]:
    """The bits of storable scales around the absmax scale, that one first, then by distance, the
    smaller scale first.

    ``window`` = (how many below, how many above), each ``STRIDE`` from the next. What is beyond the
    storable range repeats the last one inside it.
    """
    below, above = window
    steps = [0] + [
        sign * d
        for d in range(1, max(window) + 1)
        for sign in (-1, 1)
        if d <= (below if sign < 0 else above)
    ]
    first = scale_bytes(amax, fmt, global_scale, "absmax").int()
    lowest, highest = fmt.legal_scales
    lowest, stride = max(lowest, 1), STRIDE.get(fmt.scale_dtype, 1)
    tried = [(first + stride * step).clamp(lowest, highest) for step in steps]
    return torch.stack(tried).to(fmt.bits_dtype)


def squared_error(
    groups: Float32[Tensor, "rows groups size"],
    fmt: Format,
    step: Float32[Tensor, "rows groups"],
    importance: Float32[Tensor, "groups size"] | None,
) -> Float32[Tensor, "rows groups"]:
    """``Σ w_j (x_j - x̂_j)²`` of every group when one unit of the element is worth ``step``."""
    step = step.unsqueeze(-1)
    error = (groups - fmt.element.round(groups / step) * step).square_()
    return (error if importance is None else error * importance).sum(-1)


def _search(
    groups: Float32[Tensor, "rows groups size"],
    fmt: Format,
    global_scale: Float32[Tensor, ""],
    importance: Float32[Tensor, "groups size"] | None,
    tried: Integer[Tensor, "count rows groups"],
) -> Integer[Tensor, "rows groups"]:
    """The first of the cheapest scales of every group."""
    best = tried[0]
    least = squared_error(groups, fmt, fmt.decode_scale(best) * global_scale, importance)
    for bits in tried[1:]:
        error = squared_error(groups, fmt, fmt.decode_scale(bits) * global_scale, importance)
        better = error < least
        best, least = torch.where(better, bits, best), torch.where(better, error, least)
    return best


def mse(groups, fmt, global_scale, importance):
    """The storable scale of least squared error; ties go to the absmax scale.

    E8M0: the exponent that clips nothing and the one below; no other was ever best on Gaussian,
    Laplace or Student-t blocks (F7). E4M3: the absmax code and 6 codes either way, which contains
    "absmax on 4 instead of 6" (F10). bfloat16: every fourth code from .69 of the absmax scale to
    1.06 of it (F32).
    """
    tried = candidates(groups.abs().amax(-1), fmt, global_scale, WINDOW[fmt.scale_dtype])
    return _search(groups, fmt, global_scale, importance, tried)


def four_six(groups, fmt, global_scale, importance):
    """The better of two scales: the largest magnitude on the largest element, or on 2/3 of it (on 4
    instead of 6 for E2M1)."""
    amax = groups.abs().amax(-1)
    tried = torch.stack([scale_bytes(a, fmt, global_scale, "absmax") for a in (amax, 1.5 * amax)])
    return _search(groups, fmt, global_scale, importance, tried)


def _plain(rule: str) -> ScaleRule:
    def apply(groups, fmt, global_scale, importance):
        return scale_bytes(groups.abs().amax(-1), fmt, global_scale, rule)

    return apply


RULES: dict[str, ScaleRule] = {
    **{rule: _plain(rule) for rule in ("absmax", "ceil", "ocp", "theta", "round", "up")},
    "mse": mse,
    "four_six": four_six,
}


@dataclass(frozen=True)
class Grid:
    """What the weights of a layer may be rounded to: a format, a fixed global scale and the rule
    that chooses group scales."""

    format: Format
    global_scale: Float32[Tensor, ""]
    rule: str

    def scales(
        self, weight: Float32[Tensor, "out in"], importance: Float32[Tensor, "in"] | None = None
    ) -> Scales:
        """Scales for all groups of ``weight``; ``importance`` weights the columns in a search (the
        diagonal of the Hessian).

        Raises:
            ValueError: unknown rule, or one that the scales of the format do not have, or columns
            that do not form groups.
        """
        size = self.format.size(weight.shape[1])
        weights = None if importance is None else importance.unflatten(0, (-1, size))
        bits = RULES[self.rule](group(weight, self.format), self.format, self.global_scale, weights)
        return Scales(bits, self.global_scale, self.format)


def round_to(weight: Float32[Tensor, "out in"], scales: Scales) -> QuantizedTensor:
    """Every weight to its nearest grid point: one IEEE division and one rounding (F16)."""
    groups = group(weight, scales.format)
    return QuantizedTensor(
        scales.format.element.encode(groups / scales.step().unsqueeze(-1)).flatten(1), scales
    )


def alternate(
    weight: Float32[Tensor, "out in"],
    grid: Grid,
    importance: Float32[Tensor, "in"] | None = None,
    *,
    rounds: int = 8,
) -> Grid:
    """The grid with its global scale refitted by turns with the group scales (MR-GPTQ, ingredient
    1b).

    (a) given t, choose the group scales; (b) given codes q and scales s, ``t = <W, s·q> / <s·q,
    s·q>``. Only a decrease is accepted; stops below a relative gain of 1e-4. Formats without a
    global scale are returned as they are. On Gaussian and Laplace weights (a) over storable codes
    leaves nothing to gain (F15): offered for completeness.
    """
    fmt = grid.format
    if not fmt.has_global_scale:
        return grid
    weights = torch.ones_like(weight[0]) if importance is None else importance
    least = torch.inf
    best = trial = grid
    for _ in range(rounds):
        quantized = round_to(weight, trial.scales(weight, importance))
        approximation = quantized.dequantize()
        error = float(((weight - approximation).double().square() * weights).sum())
        if not error < least * (1 - 1e-4):
            break
        best, least = trial, error
        unit = (approximation / trial.global_scale).double()
        norm = (unit.square() * weights).sum()
        if not norm > 0:
            break
        t = ((weight.double() * unit * weights).sum() / norm).float()
        # global_scale(amax) maps amax to the top of the range; the same function applies the
        # format's own restrictions to t
        trial = Grid(fmt, fmt.global_scale(t * (448.0 * fmt.element.max)), grid.rule)
    return best
