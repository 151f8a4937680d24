"""``ptq serve``: the server of vLLM or of transformers, with the command that starts it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import MODEL_HELP, Debug, Quiet


@guarded
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="After --: arguments for the server, as it knows them."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And at which port.")] = 8000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the command that starts the server.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model or checkpoint over HTTP, as OpenAI's API: by vLLM where it is installed and
    computes this checkpoint rightly, else by transformers.

    The command that starts the server is printed and run. ptq has no server of its own.
    """
    import shlex

    from ptq.cli import display
    from ptq.runtime.loaded_model import resolve_model
    from ptq.runtime.serving import choose_server

    server = choose_server(Path(resolve_model(model)), host=host, port=port, more=more or ())
    if server.reason and not quiet:
        display.note(f"served by transformers, slowly: {server.reason}")
    print(shlex.join(server.command), flush=True)
    if not dry_run:
        os.execv(server.command[0], server.command)
