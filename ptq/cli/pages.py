"""The option ``--html``: a page to a file, and nothing of others replaced."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.options import OUTPUT

Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default="none",
        help="Write a page to look at: one file, for a browser or a phone.",
        rich_help_panel=OUTPUT,
    ),
]
SIGN = '<meta name="generator" content="ptq">'  # of ptq/drawing/page.html


def check_page(path: Path, *checkpoints: Path) -> None:
    """Raise ValueError or OSError where :func:`write_page` would, or where the page would become a
    part of a checkpoint."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {path}: give a name that ends in .html")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--html {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--html {path} is a directory: give the name of a file")
    if path.exists() and SIGN not in path.read_text("utf-8", "replace")[:2000]:
        raise FileExistsError(f"--html {path} exists and is no page of ptq: choose another name")
    for folder in checkpoints:
        if folder.resolve() in (path.resolve().parent, *path.resolve().parent.parents):
            raise ValueError(
                f"--html {path} lies in the checkpoint {folder}, which ptq verify would then call "
                "changed: choose another place"
            )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all; one that ptq wrote before is replaced."""
    from ptq.checkpoint.safetensors_files import write_file

    write_file(path, [page.encode()])
