"""``ptq compare``: checkpoints of one model beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import Debug, Json, Quiet
from ptq.cli.pages import Html, check_page, write_page


@guarded
def compare(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Directories of quantized checkpoints, two or more.", metavar="A B …"),
    ],
    html: Html = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Format, size, bits per weight, errors by kind of layer, and what ptq eval --keep found, of
    checkpoints of one model. Loads no model."""
    from ptq.cli import display
    from ptq.runtime.checkpoint_page import compare_page
    from ptq.runtime.comparison import compare_checkpoints

    if html is not None:
        check_page(html, *checkpoints)
    found = compare_checkpoints(checkpoints)
    if html is not None:
        write_page(html, compare_page(found))
    if json:
        display.print_json(found.to_dict())
    else:
        for table in found.tables():
            display.show(table)
    if html is not None and not quiet:
        display.note(f"written: {html}")
