"""Axes: where a number lies in a picture, which numbers are written beside it, and the frame."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq.drawing.svg import CHARACTER, Element, draw, text

Ticks = Sequence[tuple[float, str]]
TOP = 16.0  # above the frame, for the name of the upright axis


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Numbers from ``low`` to ``high`` at places from ``start`` to ``end``, which may lie before
    it; ``log`` is logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-300))
        share = (at - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[tuple[float, str]]:
        """About so many round numbers on it, and how they are written."""
        return _powers(self.low, self.high, count) if self.log else _steps(self, count)


def spanning(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Axis:
    """An axis with room for all finite ``values``, a little more at both ends; of logarithmic ones,
    those above zero."""
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(found), max(found)) if found else (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        spare = max((high / low) ** 0.05, 1.05)
        return Axis(low=low / spare, high=high * spare, start=start, end=end, log=True)
    spare = 0.05 * (high - low) or max(abs(high), 1.0) * 0.1
    return Axis(low=low - spare, high=high + spare, start=start, end=end)


def _steps(axis: Axis, count: int) -> list[tuple[float, str]]:
    raw = (axis.high - axis.low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    digits = max(-math.floor(math.log10(step) + 1e-9), 0)
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def _powers(low: float, high: float, count: int) -> list[tuple[float, str]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [
            factor * 10.0**power
            for power in range(first, last + 1)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(found) >= min(count, 3):
            break
    every = -(-len(found) // count) if len(found) > count else 1
    return [(value, short(value)) for value in found[::every]]


def short(value: float) -> str:
    """A number of two digits, as short as it is written: 0.012, 3.4, 1.2e-5."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The room of a plot between its axes.

    Attributes:
        x, y: places of numbers; ``y`` runs upwards.
        back: what lies under the data.
    """

    x: Axis
    y: Axis
    back: tuple[Element, ...]


def frame(
    x: Axis,
    y: Axis,
    *,
    x_name: str,
    y_name: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
) -> Frame:
    """Lines of a grid, the axes and their words. Below ``y.start`` are 30 units for those of x."""
    made: list[Element] = []
    left, right, bottom = x.start, x.end, y.start
    for value, word in y.ticks() if y_ticks is None else y_ticks:
        at = y(value)
        made.append(draw("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
        made.append(text(left - 5, at + 3, word, "small soft", anchor="end"))
    used = -math.inf
    for value, word in x.ticks() if x_ticks is None else x_ticks:
        at, half = x(value), 9 * CHARACTER * len(word) / 2
        made.append(draw("line", class_="axis", x1=at, x2=at, y1=bottom, y2=bottom + 3))
        if at - half > used:
            made.append(text(at, bottom + 13, word, "small soft", anchor="middle"))
            used = at + half + 3
    made.append(draw("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    made.append(text(0, y.end - 7, y_name, "small soft"))
    made.append(text(right, bottom + 26, x_name, "small soft", anchor="end"))
    return Frame(x=x, y=y, back=tuple(made))
