"""``ptq convert``: a checkpoint in another dialect."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import DIALECTS, Debug, Quiet, Target, values


@guarded
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the result.", metavar="OUT")],
    to: Annotated[
        str, typer.Option(**values(DIALECTS, "How the result lies on disk, and so who opens it."))
    ] = "auto",
    target: Target = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in another dialect: no number changes, or it is refused.

    Nothing is quantized again, and no model is loaded. An interrupted conversion is continued by
    the same command.
    """
    from ptq.checkpoint.convert import convert as convert_checkpoint
    from ptq.cli import display

    choice = convert_checkpoint(checkpoint, out, to, target=target, overwrite=overwrite)
    if not quiet:
        display.out.print(f"{out}: {choice.dialect} ({choice.reason})", markup=False)
