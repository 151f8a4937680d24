"""Points, and the front of those that nothing beats."""

import math

from hypothesis import given
from hypothesis import strategies as st

from ptq.drawing.scatter import ParetoPoint, Point, agreement, front, pareto

numbers = st.floats(0.1, 100)


def point(bits: float, quality: float, label: str = "p") -> ParetoPoint:
    return ParetoPoint(bits=bits, quality=quality, label=label)


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_nothing_beats_the_front(pairs: list[tuple[float, float]]) -> None:
    points = [point(b, q) for b, q in pairs]
    best = front(points)
    for p in points:
        beaten = any(
            o.bits <= p.bits
            and o.quality <= p.quality
            and (o.bits, o.quality) != (p.bits, p.quality)
            for o in points
        )
        assert (not beaten) == any((p.bits, p.quality) == (o.bits, o.quality) for o in best)
    assert [p.bits for p in best] == sorted({p.bits for p in best})


def test_what_is_not_finite_is_not_on_the_front() -> None:
    assert front([point(4, math.nan), point(5, math.inf), point(6, 0.1)]) == [point(6, 0.1)]


def test_points_have_marks_titles_and_names() -> None:
    points = [point(4.25, 0.3, "mxfp4"), point(4.5, 0.1, "nvfp4"), point(8.25, 0.2, "worse")]
    made = pareto(points, quality="KL in nats per token", label="bits")
    assert made.marks == 3
    titles = [e.findtext("title") for e in made.body if "m" in (e.get("class") or "").split()]
    assert titles[0] == "mxfp4: 4.25 bits, KL in nats per token 0.3"
    named = {e.text for e in made.body if e.tag == "text"}
    assert {"mxfp4", "nvfp4"} <= named and "worse" not in named


def test_one_point_and_a_quality_of_zero_are_drawn() -> None:
    assert pareto([point(16, 0.0, "16 bit")], quality="KL", label="one").marks == 1


def test_agreement_draws_every_point_and_rings_what_lies_far() -> None:
    near = [Point(x=i / 10, y=i / 10 + 0.01, title=str(i)) for i in range(200)]
    far = [Point(x=5.0, y=500.0, title="far")]
    made = agreement([("a", near), ("b", far)], x_name="x", y_name="y", label="both")
    assert made.marks == 201
    rings = [e for e in made.body if "far" in (e.get("class") or "").split()]
    assert "far" in [e.findtext("title") for e in rings] and len(rings) < 20


def test_no_points_are_no_error() -> None:
    assert agreement([("a", [])], x_name="x", y_name="y", label="none").marks == 0
