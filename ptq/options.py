"""Options that several commands share, and what a recipe is made of: option strings → values that the library takes."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "Directory of a model, id of a model on the hub, or 'demo' for the bundled one."
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the computation: float32 (usual on a CPU), bfloat16, float16. Else the model's own."),
]
Field = Annotated[str | None, typer.Option(help="Of a .jsonl or .parquet text: the column; 'messages' for chats.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")]
Debug = Annotated[
    bool, typer.Option("--debug", envvar="PTQ_DEBUG", help="Show tracebacks and the libraries' messages.")
]


def parse_rotation(name: str) -> int:
    """The block size of ``none`` (1) or of a number. Raises ValueError for anything else."""
    if name.lower() == "none":
        return 1
    if not name.isdecimal():
        raise ValueError(f"unknown rotation {name!r}; use none, 16, 32, 64, 128 or 256")
    return int(name)


def make_recipe(format: str | None, file: Path | None, given: dict[str, object]):
    """The recipe of a file and of the options, which override it; what neither says is the default of the format."""
    from ptq.recipe import Recipe

    choices = {} if file is None else read_choices(file)
    choices |= {name: value for name, value in given.items() if value is not None}
    name = choices.pop("format", None) if format is None else format
    choices.pop("format", None)
    if not isinstance(name, str):
        raise ValueError("say which format: --format mxfp4, nvfp4, nvint4, …")
    return Recipe.default(name.lower(), **choices)


def read_choices(file: Path) -> dict[str, object]:
    """The table of a JSON or TOML file. Raises ValueError if it is neither, or not a table."""
    import json
    import tomllib

    if not file.is_file():
        raise FileNotFoundError(f"--recipe {file}: no such file")
    try:
        choices = (
            tomllib.loads(file.read_text("utf-8")) if file.suffix == ".toml" else json.loads(file.read_text("utf-8"))
        )
    except ValueError as error:  # both parsers' errors, and UnicodeDecodeError
        raise ValueError(f"--recipe {file}: {error}") from error
    if not isinstance(choices, dict):
        raise ValueError(f"--recipe {file}: expected a table of choices, found {type(choices).__name__}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in choices.items()}
