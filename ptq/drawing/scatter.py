"""Points: what was foreseen against what was measured, and what is paid against what it buys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.axes import Frame, frame, spanning
from ptq.drawing.style import COUNT, MARKERS
from ptq.drawing.svg import (
    NARROW,
    Element,
    Picture,
    legend,
    marker,
    path,
    text,
    text_width,
)

SIDE = 210.0
LEFT = 34.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place, and what a pointer over it shows."""

    x: float
    y: float
    title: str


def agreement(
    series: Sequence[tuple[str, Sequence[Point]]], *, x_name: str, y_name: str, label: str
) -> Picture:
    """Points about the line on which both coordinates are equal; both axes have the same numbers.
    The few that lie far off are rings at its edge, so that all others are seen apart.

    Args:
        label: what it shows, for those who do not see it.
    """
    made, top = legend([name for name, _ in series], NARROW - LEFT, x=LEFT)
    top += 18
    inner = [value for part in zip(*((p.x, p.y) for _, ps in series for p in ps), strict=True)
             for value in _most(part)]  # fmt: skip
    x = spanning(inner, LEFT, NARROW - 8)
    y = spanning(inner, top + SIDE, top)
    made += frame(x, y, x_name=x_name, y_name=y_name).back
    made.append(path([(x(x.low), y(y.low)), (x(x.high), y(y.high))], class_="axis"))
    for i, (_, points) in enumerate(series):
        for p in points:
            inside = x.low <= p.x <= x.high and y.low <= p.y <= y.high
            shape, size = (MARKERS[i], 2.2) if inside else ("circle", 3.4)
            style = f"m dot f{i}" if inside else f"m far l{i}"
            made.append(marker(shape, x(p.x), y(p.y), size, title=p.title, class_=style))
    return Picture(width=NARROW, height=top + SIDE + 32, label=label, body=tuple(made))


def _most(values: Sequence[float]) -> Sequence[float]:
    """All but a fiftieth at either end."""
    return sorted(values)[len(values) // 50 : len(values) - len(values) // 50]


# ---------------------------------------------------------------- what bits buy


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A way to store a model.

    Attributes:
        bits: per weight, on average.
        quality: what it costs: KL in nats per token, or an error; less is better.
        label: its name.
        group: of which it is one, for colours; "" for none.
    """

    bits: float
    quality: float
    label: str
    group: str = ""


def front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Those than which none is better in bits and quality and worse in neither, by bits."""
    found: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.bits, p.quality)):
        if math.isfinite(point.quality) and (not found or point.quality < found[-1].quality):
            found.append(point)
    return found


def pareto(points: Sequence[ParetoPoint], *, quality: str, label: str) -> Picture:
    """Bits against quality, the front as steps with the names of its points; quality is
    logarithmic.

    Args:
        quality: what it is, with its unit.
        label: what the plot shows, for those who do not see it.
    """
    groups = list(dict.fromkeys(p.group for p in points))
    made, top = legend([g for g in groups if g], NARROW - LEFT, x=LEFT)
    top += 18
    x = spanning([p.bits for p in points], LEFT + 8, NARROW - 8)
    y = spanning([p.quality for p in points], top + SIDE, top, log=True)
    plot = frame(x, y, x_name="bits per weight", y_name=f"{quality}, lower is better")
    made += plot.back
    best = front(points)
    steps: list[tuple[float, float]] = []
    for p in best:
        if steps:
            steps.append((x(p.bits), steps[-1][1]))
        steps.append((x(p.bits), y(p.quality)))
    if steps:
        made.append(path([*steps, (x.end, steps[-1][1])], class_="guide curve"))
    for p in points:
        i = groups.index(p.group) % COUNT
        title = f"{p.label}: {p.bits:.3g} bits, {quality} {p.quality:.4g}"
        made.append(
            marker(MARKERS[i], x(p.bits), y(max(p.quality, y.low)), 3.4, title=title,
                   class_=f"m f{i}")
        )  # fmt: skip
    made += _names(best, plot)
    return Picture(width=NARROW, height=top + SIDE + 32, label=label, body=tuple(made))


def _names(points: Sequence[ParetoPoint], plot: Frame) -> list[Element]:
    """Names beside points, where they cover no other name."""
    made: list[Element] = []
    taken: list[tuple[float, float, float, float]] = []
    for p in points:
        wide, at = text_width(p.label, 9), (plot.x(p.bits), plot.y(p.quality))
        left = at[0] + 6 if at[0] + 6 + wide < NARROW else at[0] - 6 - wide
        for drop in (-5.0, 10.0, -15.0, 20.0):
            box = (left, at[1] + drop - 8, left + wide, at[1] + drop + 2)
            clear = all(
                box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken
            )
            if clear and plot.y.end - 4 < box[1] and box[3] < plot.y.start:
                taken.append(box)
                made.append(text(left, at[1] + drop, p.label, "small halo"))
                break
    return made
