"""Nothing that a terminal would obey, and no markup, is printed."""

import io

import pytest
from rich.table import Table

from ptq.cli.terminal import PlainConsole

NASTY = "[bold]a[/bold] :smile: \x1b[2J\u202e"


@pytest.mark.parametrize("inside", [False, True])
def test_strings_are_text(inside: bool) -> None:
    console = PlainConsole(width=80)
    console.file = io.StringIO()
    table = Table("name")
    table.add_row(NASTY)
    console.print(table if inside else NASTY)
    shown = console.file.getvalue()
    assert r"[bold]a[/bold] :smile: \x1b[2J\u202e" in shown and "\x1b" not in shown
