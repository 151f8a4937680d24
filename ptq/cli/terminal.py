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


WIDTH = 120  # of a pipe, which has none of its own
out = PlainConsole(width=None if sys.stdout.isatty() else WIDTH)
err = PlainConsole(stderr=True, width=None if sys.stderr.isatty() else WIDTH)


def note(text: str) -> None:
    """A remark on stderr."""
    err.print(text, style="dim", soft_wrap=True)
