"""``ptq push``: a finished checkpoint on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import Debug, Private, Quiet


@guarded
def push(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="MODEL")
    ],
    repository: Annotated[str, typer.Argument(help="Where to.", metavar="OWNER/NAME")],
    private: Private = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub.

    The token is that of hf auth login, or HF_TOKEN. What is incomplete, or has changed since it was
    written, is not uploaded.
    """
    from ptq.checkpoint.hub import check_push
    from ptq.checkpoint.hub import push as upload
    from ptq.cli.terminal import out

    check_push(repository)
    address = upload(checkpoint, repository, private=private)
    if not quiet:
        out.print(address, markup=False)
