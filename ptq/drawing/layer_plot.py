"""A figure of every layer, in the order of the model: a line for each way it was made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.axes import Axis, frame, short, spanning
from ptq.drawing.style import COUNT, DASHES, MARKERS
from ptq.drawing.svg import (
    NARROW,
    Element,
    Picture,
    draw,
    legend,
    marker,
    path,
    shortened,
    text,
)

HEIGHT = 190.0
LEFT = 44.0
NAMED = 3  # worst layers
ROOM_FOR_NAMES = 11.0  # of a layer, for its name below the axis
ROOM_FOR_BLOCKS = 26.0


@dataclass(frozen=True, kw_only=True)
class LayerSeries:
    """Figures of layers by one way; None where there is none."""

    name: str
    values: tuple[float | None, ...]


def layer_plot(
    names: Sequence[str],
    blocks: Sequence[str],
    series: Sequence[LayerSeries],
    *,
    width: float,
    what: str,
    label: str,
) -> Picture:
    """Lines over layers on a logarithmic scale; less is better, and the worst of the last series
    are named.

    Args:
        names: of the layers, in order; ``blocks``: those that they belong to.
        series: as many as colours; more are refused.
        what: the figure is.
        label: what the plot shows, for those who do not see it.

    Raises:
        ValueError: more series than colours.
    """
    if len(series) > COUNT:
        raise ValueError(f"{len(series)} lines cannot be told apart: give {COUNT} at most")
    made, top = legend([s.name for s in series], width - LEFT, x=LEFT, lines=True)
    top += 18
    x = Axis(low=-0.5, high=max(len(names), 1) - 0.5, start=LEFT, end=width - 6)
    every = [v for s in series for v in s.values if v is not None]
    y = spanning(every, top + HEIGHT, top, log=True)
    made += _bands(blocks, x, y)
    made += frame(x, y, x_name="", y_name=f"{what}, lower is better", x_ticks=()).back
    room = (x.end - x.start) / max(len(names), 1)
    for i, s in enumerate(series):
        made += _line(s, i, names, x, y, size=2.4 if room > 5 else 1.2)
    bottom = y.start + 18  # below the names of blocks, where no line runs
    if room >= ROOM_FOR_NAMES:
        for place, name in enumerate(names):
            word = text(0, 0, shortened(name.rpartition(".")[2], 56), "small soft", anchor="end")
            word.set("transform", f"translate({x(place) + 3:.1f} {bottom + 2:.1f}) rotate(-90)")
            made.append(word)
        bottom += 60
    ranked = _worst(series)
    for rank, (place, value) in enumerate(ranked, 1):
        made.append(draw("circle", class_="ring", cx=x(place), cy=y(value), r=5))
        made.append(text(x(place), y(value) - 8, str(rank), "small bold halo", anchor="middle"))
    if ranked:
        bottom += 16
        made.append(text(0, bottom, f"worst of {series[-1].name}", "small soft"))
        for rank, (place, value) in enumerate(ranked, 1):
            bottom += 14
            room = width - 60
            said = shortened(names[place], room)
            made.append(text(0, bottom, f"{rank}  {said}"))
            made.append(text(width - 2, bottom, short(value), "bold", anchor="end"))
    return Picture(width=width, height=bottom + 8, label=label, body=tuple(made))


def _worst(series: Sequence[LayerSeries]) -> list[tuple[int, float]]:
    """(place, value) of the largest of the last series."""
    if not series:
        return []
    known = [(i, v) for i, v in enumerate(series[-1].values) if v is not None and v > 0]
    return sorted(known, key=lambda item: -item[1])[:NAMED]


def _bands(blocks: Sequence[str], x: Axis, y: Axis) -> list[Element]:
    """A stripe behind every other block, and the names of blocks where there is room."""
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    made: list[Element] = []
    used = -math.inf
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], len(blocks)], strict=True)):
        left, right = x(first - 0.5), x(last - 0.5)
        if number % 2 == 0:
            made.append(
                draw("rect", class_="band", x=left, width=right - left,
                     y=y.end, height=y.start - y.end)
            )  # fmt: skip
        if left >= used:
            made.append(text(left + 2, y.start + 11, blocks[first], "small soft"))
            used = left + max(ROOM_FOR_BLOCKS, 6.0 * len(blocks[first]))
    return made


def _line(
    series: LayerSeries, number: int, names: Sequence[str], x: Axis, y: Axis, *, size: float
) -> list[Element]:
    known = [(i, v) for i, v in enumerate(series.values) if v is not None and math.isfinite(v)]
    if not known:
        return []
    points = [(x(i), y(v)) for i, v in known]
    made = [path(points, class_=f"curve l{number}", stroke_dasharray=DASHES[number])]
    made += [
        marker(MARKERS[number], px, py, size, class_=f"m f{number}",
               title=f"{names[i]}, {series.name}: {value:.4g}")
        for (i, value), (px, py) in zip(known, points, strict=True)
    ]  # fmt: skip
    return made


def wide_and_narrow(
    names: Sequence[str], blocks: Sequence[str], series: Sequence[LayerSeries], **named: str
) -> tuple[Picture, Picture]:
    """:func:`layer_plot` for a screen and for a phone."""
    from ptq.drawing.svg import WIDE

    wide, narrow = (
        layer_plot(names, blocks, series, width=w, what=named["what"], label=named["label"])
        for w in (WIDE, NARROW)
    )
    return wide, narrow
