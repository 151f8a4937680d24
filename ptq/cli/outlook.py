"""What is said before a run: what will be done, to how much text, how long it takes, who opens the
result."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptq.cli.terminal import err
from ptq.pipeline.readers import OURS, readers_in_words
from ptq.reading.printable import printable

if TYPE_CHECKING:
    from ptq.pipeline.forecast import Forecast
    from ptq.pipeline.plan import Plan

ALARM = "yellow"
LABEL = len("opens in")  # the longest: lines below each other are aligned


def print_outlook(model: str, forecast: "Forecast", console: Console = err) -> None:
    """A few lines: model, recipe, text, who opens the result, time and memory."""
    grid = labelled()
    for label, text in forecast.overview:
        alarming = (label == "opens in" and forecast.dialect == OURS) or (
            label == "needs" and not forecast.fits
        )
        text = f"{model}: {text}" if label == "model" else text
        grid.add_row(label, plain(text, ALARM if alarming else ""))
    console.print(grid)


def print_choice(plan: "Plan") -> None:
    """Which layers were given eight bits, when that is settled, and who opens such a mixture."""
    grid = labelled()
    grid.add_row("8 bits", plain(plan.about_budget))
    if plan.written is not None:
        written = plan.written
        words = readers_in_words(written.dialect, written.reason)
        grid.add_row("opens in", plain(words, ALARM if written.dialect == OURS else ""))
    err.print(grid)


def labelled() -> Table:
    """A grid of lines with dim labels."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=LABEL)
    grid.add_column()
    return grid


def plain(text: str, style: str = "") -> Text:
    """Text of others, in a style of ours."""
    return Text(printable(text), style)
