"""Choices for layers: the front, uniform formats, budgets and ceilings, on damage made by hand."""

import csv
import io
from itertools import pairwise

import pytest

from ptq.pipeline.advice import Damage, Option, Unit, advise, front, table, uniform
from ptq.reading.schema import check, plain


def option(format: str | None, rotation: int, bits: float, kl: float, top: float = 0) -> Option:
    return Option(format=format, rotation=rotation, bits=bits, kl=kl, kl_top25=top)


def unit(name: str, weights: int, scale: float) -> Unit:
    """A unit that loses ``scale`` times as much; at 8 bits a fiftieth."""
    return Unit(
        layers=(name,), weights=weights,
        options=(
            option("nvfp4", 1, 4.5, 1.0 * scale, 0.1 * scale),
            option("nvint4", 16, 4.5, 0.9 * scale, 0.2 * scale),
            option("mxfp6", 1, 6.25, 0.1 * scale, 0.01 * scale),
            option("mxint8", 1, 8.25, 0.02 * scale, 0.002 * scale),
            option(None, 1, 16.0, 0.0, 0.0),
        ),
    )  # fmt: skip


@pytest.fixture
def damage() -> Damage:
    return Damage(
        identity={}, scheme="w4a4", seconds=1.0,
        units=(unit("a", 1000, 1.0), unit("b", 1000, 0.08), unit("c", 2000, 0.01)),
    )  # fmt: skip


def test_more_bits_go_to_what_loses_most(damage: Damage) -> None:
    found = advise(damage, budget=5.5)
    labels = [u.options[o].label for u, o in zip(damage.units, found.choice, strict=True)]
    assert labels == ["mxint8", "nvint4 r16", "nvint4 r16"]
    assert found.point.bits == pytest.approx((8.25 + 4.5 + 2 * 4.5) / 4)
    assert found.point.kl == pytest.approx(0.02 + 0.072 + 0.009)
    assert found.point.shares == {"nvint4 r16": 0.75, "mxint8": 0.25}


def test_the_measure_decides(damage: Damage) -> None:
    by_top = advise(damage, budget=4.5, measure="kl_top25")
    assert by_top.point.shares == {"nvfp4": 1.0}
    assert advise(damage, budget=4.5).point.shares == {"nvint4 r16": 1.0}


def test_a_ceiling_takes_the_fewest_bits_below_it(damage: Damage) -> None:
    found = advise(damage, ceiling=0.2)
    assert found.point.kl <= 0.2 and found.budget is None
    assert advise(damage, budget=found.point.bits - 0.01).point.kl > 0.2


def test_the_front_falls_and_no_uniform_format_is_better(damage: Damage) -> None:
    points = front(damage.units, "kl")
    assert len(points) > 5 and points[0].bits == 4.5 and points[-1].kl == 0
    for a, b in pairwise(points):
        assert a.bits < b.bits and a.kl > b.kl
    for same in uniform(damage.units, "kl"):
        assert advise(damage, budget=same.bits).point.kl <= same.kl * (1 + 1e-6)


def test_uniform_formats_and_which_of_them_are_beaten(damage: Damage) -> None:
    found = {p.label: p for p in uniform(damage.units, "kl")}
    assert list(found) == ["nvfp4", "nvint4 r16", "mxfp6", "mxint8", "16 bit"]
    assert not found["nvfp4"].best and found["nvint4 r16"].best and found["16 bit"].best
    assert (found["mxfp6"].bits, found["mxfp6"].stored_bits) == (6.25, 8.25)


def test_what_no_choice_meets_is_refused(damage: Damage) -> None:
    with pytest.raises(ValueError, match=r"budget of 4 bits per weight is less than the 4\.5"):
        advise(damage, budget=4.0)
    without = Damage(
        identity={}, scheme="w4a4", seconds=1.0,
        units=tuple(
            Unit(layers=u.layers, weights=u.weights, options=u.options[:4]) for u in damage.units
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"ceiling of 0\.001 nats per token is less than"):
        advise(without, ceiling=0.001)
    for both in ({}, {"budget": 5.0, "ceiling": 1.0}):
        with pytest.raises(ValueError, match="give either --budget"):
            advise(damage, **both)


def test_json_and_a_table(damage: Damage) -> None:
    found = advise(damage, budget=5.0)
    assert check(plain(found), type(found), "it") == found
    rows = list(csv.DictReader(io.StringIO(table(found))))
    assert [row["kind"] for row in rows].count("uniform") == 5
    assert rows[0]["kind"] == "chosen" and float(rows[0]["bits"]) <= 5.0
