"""Options that several commands share, and what a recipe is made of: option strings → values that
the library takes."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # ptq --help must not wait for torch
    import torch

MODEL_HELP = "Directory of a model, id of a model on the hub, or 'demo' for the bundled one."
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU if there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the computation: float32 (usual on a CPU), bfloat16, float16. Else the model's "
        "own."
    ),
]
Field = Annotated[
    str | None, typer.Option(help="Of a .jsonl or .parquet text: the column; 'messages' for chats.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", envvar="PTQ_DEBUG", help="Show tracebacks and the libraries' messages."
    ),
]


DTYPES = ("float32", "bfloat16", "float16")


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of a name of ``DTYPES``; None stays None. Raises ValueError for another name."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_device(name: str | None) -> "torch.device":
    """The device of a name such as ``cpu`` or ``cuda:1``; None is the first GPU, or the CPU where
    there is none.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"unknown device {name!r}; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device(name)


def parse_gigabytes(option: str, value: float | None) -> float | None:
    """Bytes of a number of GB. Raises ValueError unless it is finite and positive."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{option} must be a positive number of GB, not {value:g}")
    return None if value is None else value * 1e9


def parse_rotation(name: str) -> int:
    """The block size of ``none`` (1) or of a number. Raises ValueError for anything else."""
    if name.lower() == "none":
        return 1
    if not name.isdecimal():
        raise ValueError(f"unknown rotation {name!r}; use none, 16, 32, 64, 128 or 256")
    return int(name)


def make_recipe(format: str | None, file: Path | None, options: dict[str, object]):
    """The recipe of a file and of the options, which override it; what neither says is the default
    of the format."""
    from ptq.pipeline.recipe import Recipe, checked_choices

    choices = {} if file is None else checked_choices(read_choices(file), f"--recipe {file}")
    choices |= {name: value for name, value in options.items() if value is not None}
    name = choices.pop("format", None) if format is None else format
    choices.pop("format", None)
    if not isinstance(name, str):
        raise ValueError("say which format: --format mxfp4, nvfp4, nvint4, …")
    return Recipe.default(name.lower(), **choices)


def read_choices(file: Path) -> dict[str, object]:
    """The table of a JSON or TOML file. Raises ValueError if it is neither, or not a table."""
    import tomllib

    from ptq.reading.schema import JsonObject, read_bytes, read_json

    if not file.exists():
        raise FileNotFoundError(f"--recipe {file}: no such file")
    if file.suffix != ".toml":
        return dict(read_json(file, JsonObject, "write a table of choices", f"--recipe {file}"))
    try:
        return tomllib.loads(read_bytes(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # the parser's, and UnicodeDecodeError
        raise ValueError(f"--recipe {file}: {error}") from error
