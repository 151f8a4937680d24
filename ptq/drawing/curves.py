"""Curves over a number, with their names at their ends; both axes are logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.axes import Axis, Ticks, frame
from ptq.drawing.style import DASHES, MARKERS
from ptq.drawing.svg import Element, Picture, marker, path, text, text_width

HEIGHT = 220.0
LEFT = 36.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y) in the order of x; ``colour`` and ``dash`` are indices of the style, a colour
    of None is that of the axes, without marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int | None
    dash: int = 0


def curves(
    found: Sequence[Curve],
    *,
    width: float,
    x_ticks: Ticks,
    y_ticks: Ticks,
    x_name: str,
    y_name: str,
    title: str,
    label: str,
    unit: str = "",
) -> Picture:
    """A plot of curves; the highest point has its number.

    Args:
        x_ticks, y_ticks: numbers that are written; those of y only within the plot.
        label: what the plot shows, for those who do not see it.
        unit: of y, behind a number.
    """
    top = 40.0
    xs = [px for curve in found for px, _ in curve.points]
    ys = [py for curve in found for _, py in curve.points]
    right = width - 8 - max((text_width(curve.name, 9) for curve in found), default=0.0)
    low, high = min(ys, default=0.5), max(ys, default=2.0)
    x = Axis(low=min(xs), high=max(xs) * 1.0001, start=LEFT + 8, end=right, log=True)
    y = Axis(low=low / 1.08, high=high * 1.12, start=top + HEIGHT, end=top, log=True)
    shown = [(value, word) for value, word in y_ticks if y.low <= value <= y.high]
    made: list[Element] = [text(0, 12, title, "bold")]
    made += frame(x, y, x_name=x_name, y_name=y_name, x_ticks=x_ticks, y_ticks=shown).back
    for curve in found:
        places = [(x(px), y(py)) for px, py in curve.points]
        if curve.colour is None:
            made.append(path(places, class_="axis", fill="none"))
            continue
        dash = DASHES[curve.dash]
        made.append(path(places, class_=f"curve l{curve.colour}", stroke_dasharray=dash))
        made += [
            marker(MARKERS[curve.colour], *place, 2.8, class_=f"m f{curve.colour}",
                   title=f"{curve.name}: {py:.2f}{unit} at {px:g}")
            for place, (px, py) in zip(places, curve.points, strict=True)
        ]  # fmt: skip
    made += _ends(found, x, y)
    drawn = [point for curve in found if curve.colour is not None for point in curve.points]
    if drawn:
        px, py = max(drawn, key=lambda point: point[1])
        anchor = "start" if x(px) < x.start + 20 else "middle"
        made.append(text(x(px), y(py) - 7, f"{py:.2f}{unit}", "small bold halo", anchor=anchor))
    return Picture(width=width, height=top + HEIGHT + 32, label=label, body=tuple(made))


def _ends(found: Sequence[Curve], x: Axis, y: Axis) -> list[Element]:
    """Names beside the last points, from below upwards, moved where they would overlap."""
    made: list[Element] = []
    used = math.inf
    for curve in sorted((c for c in found if c.points), key=lambda c: c.points[-1][1]):
        px, py = curve.points[-1]
        used = min(y(py) + 3, used - 11)
        style = "small soft" if curve.colour is None else f"small f{curve.colour}"
        made.append(text(x(px) + 7, used, curve.name, style))
    return made
