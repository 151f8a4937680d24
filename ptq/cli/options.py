"""Options that several commands share, and what a recipe is made of: option strings → values that
the library takes."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:  # ptq --help must not wait for torch
    import torch

# What options take, for help and completion; a test compares them with the tables that they are in.
MICROSCALED = ("mxfp4", "nvfp4", "nvint4", "mxint4", "mxint6", "mxfp6", "mxint8", "mxfp8")
FORMATS = (*MICROSCALED, "int4-g128", "int4-g32", "fp8-channel")
SCHEMES = ("w4a16", "w4a4")
ALGORITHMS = ("gptq", "rtn", "decoupleq", "llm-fp4")
ROTATIONS = ("none", "16", "32", "64", "128", "256", "auto")
SCALES = (
    *("trial", "in_loop_mse", "mse", "absmax", "ceil", "ocp", "theta", "round", "up", "four_six"),
)
INPUT_RULES = ("absmax", "four_six", "theta", "ceil", "ocp", "round")
KEY_VALUES = ("fp8",)
TUNED_BY = ("latents", "pv")
QUALITIES = ("fast", "default", "best")
DIALECTS = ("auto", "compressed-tensors", "modelopt", "ptq")
TARGETS = ("transformers", "vllm", "sglang", "trtllm", "any")
ACTIVATIONS = ("ram", "device", "disk")
DTYPES = ("float32", "bfloat16", "float16")


class Values(TypedDict):
    """Arguments of ``typer.Option``."""

    metavar: str
    help: str
    autocompletion: Callable[[], list[str]]


def values(names: Sequence[str], help: str) -> Values:
    """How an option that takes one of ``names`` shows them, and completes them in a shell."""
    joined = "|".join(names)
    if len(joined) > METAVAR:
        joined, help = "NAME", f"{help.rstrip('.')}: {', '.join(names)}."
    return {"metavar": joined, "help": help, "autocompletion": lambda: list(names)}


METAVAR = 34  # characters that leave room for the help
RECIPE = "Recipe: what changes the numbers"
RUN = "Run: where and how it computes"
OUTPUT = "Output"
MODEL_HELP = "Directory of a model, id of a model on the hub, or 'demo' for the bundled one."
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        show_default="the first GPU, else cpu",
        help="Where to compute.",
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        **values(DTYPES, "Of the computation."),
        show_default="the model's own; float32 on a CPU",
        rich_help_panel=RUN,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        show_default="as stored",
        help="Width of the weights, of a checkpoint made with --nested.",
        rich_help_panel=RUN,
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="text, messages or conversations, whichever is there",
        help="Column of a .jsonl or .parquet text; 'messages' for chats.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        **values(
            TARGETS,
            "Who must compute the result right, or it is refused; any: all of them.",
        ),
        show_default="none: ptq, and others where they can",
        rich_help_panel=OUTPUT,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="BRANCH|TAG|COMMIT",
        show_default="the hub's main",
        help="Of a model on the hub.",
        rich_help_panel=RUN,
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Nobody else sees the repository, if it is made.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON on stdout, and nothing else there.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress, no messages.", rich_help_panel=OUTPUT),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        envvar="PTQ_DEBUG",
        help="Show tracebacks and the libraries' messages.",
        rich_help_panel=OUTPUT,
    ),
]


def quiet_flags(options: Iterable[Any]) -> None:
    """Let help say what flags are when they are not given, and not that they take a ``<bool>``."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
            if option.default is False and not option.is_eager:
                option.show_default = "no"


class Command(TyperCommand):
    """A command whose flags take no value in its help."""

    def get_params(self, ctx) -> list[Any]:
        found = super().get_params(ctx)
        quiet_flags(found)
        return found


class Commands(TyperGroup):
    """Commands, and flags that take no value in the help."""

    def get_params(self, ctx) -> list[Any]:
        found = super().get_params(ctx)
        quiet_flags(found)
        return found


class ModelFirst(Command):
    """A command whose first argument is a model, which ``--model`` and ``-m`` also name."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, model_first(args))


def model_first(args: Sequence[str]) -> list[str]:
    """``args`` with the value of ``--model`` or ``-m``, if there is one, as the first argument."""
    end = args.index("--") if "--" in args else len(args)
    for i, word in enumerate(args[:end]):
        name, joined, value = word.partition("=")
        if name in ("--model", "-m") and joined:
            return [value, *args[:i], *args[i + 1 :]]
        if word in ("--model", "-m") and i + 1 < end:
            return [args[i + 1], *args[:i], *args[i + 2 :]]
    return list(args)


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of a name of ``DTYPES``; None stays None. Raises ValueError for another name."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_prefill(name: str) -> Literal["16-bit", "fp8"]:
    """What ``--prefill`` names. Raises ValueError for another name."""
    if name == "16-bit" or name == "fp8":
        return name
    raise ValueError(f"unknown --prefill {name!r}; choose 16-bit or fp8")


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


def parse_share(option: str, value: str) -> float:
    """A share from 0 to 1, written so or in percent. Raises ValueError for anything else."""
    number, percent, rest = value.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if rest or not 0 <= share <= 1:
        raise ValueError(f"{option} {value}: give a share from 0% to 100%, as 10% or 0.1")
    return share


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
