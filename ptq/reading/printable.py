"""Text of others, on a terminal or a page: names and messages are shown as text, whatever is in
them.

The name of a tensor may move the cursor, colour the screen or turn the direction of a line, and
square brackets in it would be markup to rich.
"""

import unicodedata

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
