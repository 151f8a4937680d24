"""The terminal: two consoles, and text of others shown as text, whatever it holds.

The name of a tensor may move the cursor, colour the screen or turn the direction of a line, and
square brackets in it would be markup to rich.
"""

import sys
import unicodedata

from rich.console import Console
from rich.text import Text

# Control characters, marks without a shape (direction, zero width), halves of characters, and
# separators of lines and paragraphs.
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def printable(text: str) -> str:
    """``text`` with everything that would not be seen as a character written out, ``\\x1b``; lines
    and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text
    )


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
