"""Nothing that a terminal would obey reaches it."""

import pytest

from ptq.reading.printable import printable


@pytest.mark.parametrize("text", ["", "model.layers.0 [bold]", "Größe 量化 🙂", "a\tb\nc"])
def test_what_is_seen_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\rb", r"a\rb"),
        ("\u202eabc", r"\u202eabc"),
        ("a\u200bb", r"a\u200bb"),
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
    ],
)
def test_what_acts_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
