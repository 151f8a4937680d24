"""Which format and rotation for which layer: what was measured of each, and the choice that loses
least for so many bits, or takes fewest bits for such a loss.

What a layer loses in each of its options is measured (:mod:`ptq.pipeline.damage`), and such losses
add up; so a choice for all layers is a knapsack (:mod:`ptq.numerics.multiple_choice`), and every
point of the front of bits against loss is one. Nothing here looks at a model.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptq.numerics.formats import FORMATS
from ptq.numerics.multiple_choice import choose
from ptq.reading.schema import JsonObject

MEASURES = ("kl", "kl_top25")
POINTS = 24  # of a front
KEPT = "16 bit"  # the label of what stays as it is


@dataclass(frozen=True, kw_only=True)
class Option:
    """What the layers of a unit may become, and what that costs.

    Attributes:
        format: by name; None leaves them as they are.
        rotation: size of the Hadamard blocks, 1 for none.
        bits: of a weight, its share of scales included.
        kl: nats per token that it adds to KL(original ‖ quantized), to second order; ``kl_top25``:
            the same over the original's 25 most likely tokens, renormalised.
    """

    format: str | None
    rotation: int
    bits: float
    kl: float
    kl_top25: float

    @property
    def label(self) -> str:
        """``nvfp4``, ``nvint4 r16``, ``16 bit``."""
        if self.format is None:
            return KEPT
        return self.format if self.rotation == 1 else f"{self.format} r{self.rotation}"

    @property
    def stored_bits(self) -> float:
        """Of a weight as ptq's checkpoints hold it: codes of 6 bits take a byte."""
        if self.format is None:
            return self.bits
        fmt = FORMATS[self.format]
        return self.bits if fmt.packed else self.bits + 8 - fmt.element.bits


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Layers that decide together: they read the same, or engines fuse them."""

    layers: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A choice for all units: bits against quality.

    Attributes:
        label: of a uniform format; "" where layers differ.
        bits, stored_bits: per quantized weight, on average.
        kl, kl_top25: predicted, in nats per token.
        shares: of the weights, by the label of their option.
        best: whether no point of the same list has less of both.
    """

    label: str
    bits: float
    stored_bits: float
    kl: float
    kl_top25: float
    shares: dict[str, float]
    best: bool = True


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was measured.

    Attributes:
        identity: what decides the numbers: model, text, versions, options.
        scheme: ``w4a16`` or ``w4a4``: whether inputs were rounded too.
        seconds: that it took.
    """

    identity: JsonObject
    scheme: str
    seconds: float
    units: tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A choice and its reasons.

    Attributes:
        measure: that the choice minimises or bounds.
        budget: bits per weight that were to be had; None where ``ceiling`` was given, a loss in
            nats per token that was to be kept.
        choice: of every unit of ``damage`` the index of its option; ``point``: what that comes to.
        front: of the best choices, by bits ascending; ``uniform``: every option that all units
            have, for all of them.
    """

    damage: Damage
    measure: str
    budget: float | None
    ceiling: float | None
    choice: tuple[int, ...]
    point: Point
    front: tuple[Point, ...]
    uniform: tuple[Point, ...]


def check_limits(*, budget: float | None, ceiling: float | None, measure: str) -> None:
    """Raise ValueError unless there is one of the two, and a loss that is measured."""
    if (budget is None) == (ceiling is None):
        raise ValueError("give either --budget, in bits per weight, or --max-kl, in nats per token")
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"--max-kl must be more than 0, not {ceiling:g}")
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}")


def advise(
    damage: Damage,
    *,
    budget: float | None = None,
    ceiling: float | None = None,
    measure: str = "kl",
) -> Advice:
    """The best choice for ``budget`` bits per weight, or the smallest below a loss of ``ceiling``.

    Raises:
        ValueError: both or none of the two, or one that no choice meets; another measure.
    """
    check_limits(budget=budget, ceiling=ceiling, measure=measure)
    units = damage.units
    if budget is not None:
        chosen = _within_bits(units, budget, measure)
    else:
        assert ceiling is not None
        chosen = _within_loss(units, ceiling, measure)
    return Advice(
        damage=damage,
        measure=measure,
        budget=budget,
        ceiling=ceiling,
        choice=tuple(chosen),
        point=point(units, chosen),
        front=front(units, measure),
        uniform=uniform(units, measure),
    )


def point(units: Sequence[Unit], chosen: Sequence[int], label: str = "") -> Point:
    """What a choice comes to."""
    total = sum(unit.weights for unit in units)
    picked = [(u, u.options[o]) for u, o in zip(units, chosen, strict=True)]
    shares: dict[str, float] = {}
    for unit, option in picked:
        shares[option.label] = shares.get(option.label, 0.0) + unit.weights / total
    return Point(
        label=label,
        bits=sum(unit.weights * option.bits for unit, option in picked) / total,
        stored_bits=sum(unit.weights * option.stored_bits for unit, option in picked) / total,
        kl=sum(option.kl for _, option in picked),
        kl_top25=sum(option.kl_top25 for _, option in picked),
        shares=dict(sorted(shares.items(), key=lambda item: -item[1])),
    )


def front(units: Sequence[Unit], measure: str, count: int = POINTS) -> tuple[Point, ...]:
    """The best choices from the fewest bits per weight to the most, closer together where they are
    few; those that lose no less than one of fewer bits are left out."""
    total = sum(unit.weights for unit in units)
    least, most = (
        sum(unit.weights * end(o.bits for o in unit.options) for unit in units) / total
        for end in (min, max)
    )
    found: list[Point] = []
    for index in range(count):
        bits = least + (most - least) * (index / (count - 1)) ** 2
        made = point(units, _within_bits(units, bits, measure))
        if not found or getattr(made, measure) < getattr(found[-1], measure):
            found.append(made)
    return tuple(found)


def uniform(units: Sequence[Unit], measure: str) -> tuple[Point, ...]:
    """A point for every option that all units have; ``best`` marks those that no other beats in
    bits and in loss."""
    names = {option.label for option in units[0].options}
    for unit in units:
        names &= {option.label for option in unit.options}
    made = []
    for label in (option.label for option in units[0].options if option.label in names):
        chosen = [[o.label for o in unit.options].index(label) for unit in units]
        made.append(point(units, chosen, label))
    return tuple(replace(p, best=not any(_beats(q, p, measure) for q in made)) for p in made)


def _beats(a: Point, b: Point, measure: str) -> bool:
    """Whether ``a`` has less of one, and not more of the other."""
    first, second = (a.bits, getattr(a, measure)), (b.bits, getattr(b, measure))
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def _tables(units: Sequence[Unit], measure: str) -> tuple[list[list[float]], list[list[float]]]:
    losses = [[getattr(option, measure) for option in unit.options] for unit in units]
    bits = [[unit.weights * option.bits for option in unit.options] for unit in units]
    return losses, bits


def _within_bits(units: Sequence[Unit], budget: float, measure: str) -> list[int]:
    losses, bits = _tables(units, measure)
    total = sum(unit.weights for unit in units)
    least = sum(min(row) for row in bits) / total
    if budget < least * (1 - 1e-9):
        raise ValueError(
            f"a budget of {budget:g} bits per weight is less than the {least:.4g} of the smallest "
            "formats to choose from; raise it, or name smaller ones in --formats"
        )
    return choose(losses, bits, max(budget, least) * total)


def _within_loss(units: Sequence[Unit], ceiling: float, measure: str) -> list[int]:
    losses, bits = _tables(units, measure)
    least = sum(min(row) for row in losses)
    if ceiling < least:
        raise ValueError(
            f"a ceiling of {ceiling:g} nats per token is less than the {least:.4g} that the best "
            "formats to choose from lose; raise it, or add wider ones to --formats"
        )
    return choose(bits, losses, ceiling)


def table(advice: Advice) -> str:
    """The points of an advice as CSV with a head: what was chosen, the front, uniform formats."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ("kind", "label", "bits", "stored_bits", "kl", "kl_top25", "kl_top25_printed", "shares")
    )
    kinds = (("chosen", (advice.point,)), ("front", advice.front), ("uniform", advice.uniform))
    for kind, points in kinds:
        for p in points:
            shares = "; ".join(f"{label} {share:.4f}" for label, share in p.shares.items())
            numbers = (p.bits, p.stored_bits, p.kl, p.kl_top25, p.kl_top25 * 1e6 / 25)
            rows.writerow((kind, p.label, *(f"{n:.6g}" for n in numbers), shares))
    return text.getvalue()
