"""The terminal: two consoles to which all text is text."""

import sys

from rich.console import Console
from rich.text import Text

from ptq.reading.printable import printable


class PlainConsole(Console):
    """A console to which every string is text: no markup, no emoji codes, no escape sequences.
    Styles are given as ``style=`` or as :class:`rich.text.Text`."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text), **options)


WIDTH = None if sys.stdout.isatty() else 120  # a pipe has no width of its own
out = PlainConsole(width=WIDTH)
err = PlainConsole(stderr=True)


def note(text: str) -> None:
    """A remark on stderr."""
    err.print(text, style="dim", soft_wrap=True)
