"""Histograms that lie over each other, against lines that mean something."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.axes import Axis, frame
from ptq.drawing.style import DASHES
from ptq.drawing.svg import NARROW, Element, Picture, draw, legend, path, text

HEIGHT = 150.0
LINE_HEIGHT = 13.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """An upright line at a number; a dashed one is of less weight and has no name in the plot."""

    at: float
    name: str
    dashed: bool = False


def histogram(
    edges: Sequence[float],
    series: Sequence[tuple[str, Sequence[int]]],
    lines: Sequence[Line],
    *,
    x_name: str,
    label: str,
) -> Picture:
    """Shares of all counts by bin, a shape for every series.

    Args:
        edges: of the bins, one more than there are counts in each of ``series``.
        lines: named above the plot, in a row each.
        label: what it shows, for those who do not see it.
    """
    named = [line for line in lines if not line.dashed]
    made, top = legend([name for name, _ in series], NARROW - 34, x=34)
    top += 18 + LINE_HEIGHT * len(named)
    shares = [[count / max(sum(counts), 1) for count in counts] for _, counts in series]
    highest = max((max(share, default=0.0) for share in shares), default=0.0) or 1.0
    x = Axis(low=edges[0], high=edges[-1], start=34, end=NARROW - 8)
    y = Axis(low=0, high=highest * 1.05, start=top + HEIGHT, end=top)
    y_ticks = [(value, f"{100 * value:g} %") for value, _ in y.ticks(4)]
    made += frame(x, y, x_name=x_name, y_name="of all blocks", y_ticks=y_ticks).back
    for i, share in enumerate(shares):
        points = [(x(edges[0]), y(0))]
        for j, value in enumerate(share):
            points += [(x(edges[j]), y(value)), (x(edges[j + 1]), y(value))]
        points.append((x(edges[-1]), y(0)))
        made.append(path(points, class_=f"area f{i}"))
        made.append(path(points, class_=f"curve l{i}", stroke_dasharray=DASHES[i]))
    for j in range(len(edges) - 1):
        told = ", ".join(
            f"{name} {100 * of[j]:.2f} %" for (name, _), of in zip(series, shares, strict=True)
        )
        made.append(
            draw(
                "rect", title=f"{edges[j]:.2f} to {edges[j + 1]:.2f}: {told}", class_="m sense",
                x=x(edges[j]), width=x(edges[j + 1]) - x(edges[j]), y=top, height=HEIGHT,
            )
        )  # fmt: skip
    return Picture(
        width=NARROW,
        height=top + HEIGHT + 32,
        label=label,
        body=(*made, *_lines(lines, x, y)),
    )


def _lines(lines: Sequence[Line], x: Axis, y: Axis) -> list[Element]:
    """The names of lines further to the left are higher, so that no line crosses a name."""
    made: list[Element] = []
    row = 0
    for line in sorted(lines, key=lambda line: -line.at):
        at = x(line.at)
        rise = 0.0
        if not line.dashed:
            row += 1
            rise = LINE_HEIGHT * row
        made.append(
            draw(
                "line", title=f"{line.name}: {line.at:.2f}", class_="guide",
                x1=at, x2=at, y1=y.end - max(rise - 8, 0), y2=y.start,
                stroke_dasharray="2 3" if line.dashed else "none",
            )
        )  # fmt: skip
        if not line.dashed:
            made.append(text(at + 4, y.end - rise + 14, line.name, "small halo"))
    return made
