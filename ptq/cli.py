"""The command line: argv → recipe and paths → one call → exit code. Heavy imports happen inside the commands.

Exit codes: 0 done; 1 an error in the program; 2 what the user can put right, in one line on stderr; 130 interrupted.
Numbers go to stdout, progress and messages to stderr. Without ``--debug`` the libraries' own chatter is off.
"""

import functools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer

app = typer.Typer(
    name="ptq",
    help="Quantize language models to 4 bits (MXFP4, NVFP4, NVINT4), measure and run them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

MODEL_HELP = "Directory of a model, id of a model on the hub, or 'demo' for the bundled one."
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the computation: float32 (usual on a CPU), bfloat16, float16. Else the model's own."),
]
Field = Annotated[str | None, typer.Option(help="Of a .jsonl or .parquet text: the column; 'messages' for chats.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")]
# What every error is for which the command line's own parser is to blame, in whichever parser typer brings along.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
Debug = Annotated[
    bool, typer.Option("--debug", envvar="PTQ_DEBUG", help="Show tracebacks and the libraries' messages.")
]


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, red if that is a terminal, and the end of the program."""
    line = f"error: {' '.join(message.split())}"
    print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else line, file=sys.stderr)
    sys.exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with what users can put right told in one line: ValueError, OSError, memory, Ctrl-C."""

    @functools.wraps(command)
    def run(*args, **options) -> None:
        debug = bool(options.get("debug"))
        with listening() as interrupts:
            try:
                settle(quiet=bool(options.get("quiet")), debug=debug)
                command(*args, **options)
            except BrokenPipeError:  # ptq inspect … | head
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (KeyboardInterrupt, Exception) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    kept = options.get("out") and Path(f"{options['out']}.partial").is_dir()
                    then = "; the same command continues after the finished blocks" if kept else ""
                    fail("interrupted" + then, 130)
                if not isinstance(error, (ValueError, OSError, MemoryError)) and not out_of_memory(error):
                    raise
                if debug:
                    traceback.print_exc()
                fail(describe(error), 2)

    return run


@contextmanager
def listening() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt, as always, and is noted: libraries turn some into errors of their own."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # ignored, or somebody else's
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or torch's allocator on the CPU, has run out of memory."""
    torch = sys.modules.get("torch")
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error).lower()
    )


def describe(error: BaseException) -> str:
    """The message of an error; those of the file system say which file."""
    if isinstance(error, MemoryError) or out_of_memory(error):
        return "out of memory; lower --batch-size or --samples, or use --device cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def settle(*, quiet: bool, debug: bool) -> None:
    """Decide what is told on stderr besides progress: everything, our own warnings, or with ``quiet`` nothing."""
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        return
    for name, value in {  # read by the libraries when they are imported
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logger = logging.getLogger("ptq")
    logger.propagate = False
    if quiet:
        logger.addHandler(logging.NullHandler())
    else:
        from ptq.display import Messages

        logger.addHandler(Messages(logging.WARNING))


def version(wanted: bool) -> None:
    if wanted:
        from ptq import __version__

        print(f"ptq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@guarded
def quantize(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the result; new or empty.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help="mxfp4, nvfp4, nvint4, mxint4, mxfp8, …")] = None,
    scheme: Annotated[str | None, typer.Option(help="w4a16: weights only. w4a4: activations too.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="gptq, or rtn: round to nearest.")] = None,
    rotation: Annotated[
        str | None, typer.Option(help="Size of the Hadamard blocks: none, 16, 32, 64, 128, 256.")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Rule that chooses scales: absmax, mse, …")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text: a .txt, .jsonl or .parquet file, a data set of the hub, or 'builtin'.")
    ] = None,
    field: Field = None,
    samples: Annotated[int | None, typer.Option(help="Sequences of calibration text.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in each.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences that run at the same time.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON or TOML file of choices; options override it.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are: a name or a pattern with *; repeatable.")
    ] = None,
    lm_head: Annotated[
        bool | None, typer.Option("--lm-head", help="Quantize the output head too (not a tied one).")
    ] = None,
    route_all_experts: Annotated[
        bool | None, typer.Option("--route-all-experts", help="Calibrate every expert on every token.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of calibration text.")] = None,
    dialect: Annotated[
        str, typer.Option(help="compressed-tensors, ptq, or auto: the former where other engines compute it exactly.")
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="Where activations wait between blocks: ram, device or disk.")
    ] = "ram",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only predict memory, time and size; needs config.json, no weights.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write the checkpoint. What is left out is the best known recipe of the format.

    Run again after an interruption, the same command continues where it stopped. Several processes share the work:
    torchrun --nproc-per-node N -m ptq quantize …
    """
    from ptq import display, forecast, models, pipeline, report
    from ptq.distributed import launched
    from ptq.refusals import Choice

    given = {
        "scheme": scheme,
        "algorithm": algorithm,
        "rotation": parse_rotation(rotation),
        "scales": scales,
        "calibration": calibration,
        "field": field,
        "samples": samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "ignore": tuple(ignore) if ignore else None,
        "lm_head": lm_head,
        "route_all_experts": route_all_experts,
        "seed": seed,
    }
    choices = make_recipe(format, recipe, given)
    source = models.resolve_model(model)
    place, kind = models.parse_device(device), models.parse_dtype(dtype)
    lead = int(os.environ.get("RANK", "0")) == 0  # under torchrun one process speaks
    if dry_run:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        expected = forecast.forecast(source, choices, device=place, dtype=kind, activations=activations, ranks=ranks)
        if lead:
            display.print_json(expected.to_dict()) if json else display.print_forecast(str(source), expected)
        return
    with display.quantizing(quiet=quiet or not lead) as on_block, launched(place) as place:
        written = pipeline.quantize_model(
            source,
            out,
            recipe=choices,
            device=place,
            dtype=kind,
            overwrite=overwrite,
            dialect=dialect,
            activations=activations,
            on_block=on_block,
        )
    if lead and not quiet and isinstance(written, Choice):
        display.note(f"written as {written.dialect}: {written.reason}")
    if lead and json:
        display.print_json(report.inspect(out).to_dict())
    elif lead and not quiet:
        display.print_report(report.inspect(out), layers=False)


@app.command("eval")
@guarded
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    reference: Annotated[str | None, typer.Option(help="The original, to compare with. " + MODEL_HELP)] = None,
    text: Annotated[
        str, typer.Option(help="A .txt, .jsonl or .parquet file, or 'builtin' for held-out Python source.")
    ] = "builtin",
    field: Field = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most so many tokens of the text.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window; 2048, or fewer if the model has fewer positions.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model or checkpoint, and its KL divergence from a reference.

    The text is cut into windows that do not overlap and are fed without a start token. KL is in nats per token, over
    the full vocabulary; 'KL top 25' is over the reference's 25 most likely tokens, both sides renormalised over them.
    """
    from ptq import display, models
    from ptq.evaluate import evaluate as measure

    place, kind = models.parse_device(device), models.parse_dtype(dtype)
    subject = models.load_model(model, device=place, dtype=kind)
    against = None if reference is None else models.load_model(reference, device=place, dtype=kind)
    tokens = models.tokenize(subject, text, against, field)
    with display.evaluating(quiet=quiet) as on_window:
        result = measure(
            subject.module,
            tokens,
            reference=None if against is None else against.module,
            seq_len=subject.window(seq_len),
            max_tokens=max_tokens,
            on_window=on_window,
        )
    if json:
        display.print_json({"model": model, "reference": reference, "text": text, **result.to_dict()})
    else:
        display.print_evaluation(model, reference, text, result)


@app.command()
@guarded
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a quantized checkpoint.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint holds: format, recipe, size, bits per weight, error of each layer. Loads no model."""
    from ptq import display, report

    found = report.inspect(checkpoint)
    if json:
        display.print_json(found.to_dict())
    else:
        display.print_report(found, layers=True)


@app.command()
@guarded
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, 1 samples from the model.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a model or checkpoint, and say how many tokens a second that made."""
    import time

    from ptq import display, models
    from ptq.generate import generate as tokens_after
    from ptq.generate import record, stream_text

    subject = models.load_model(model, device=models.parse_device(device), dtype=models.parse_dtype(dtype))
    encoded = subject.encode(prompt)
    made: list[int] = []
    pieces: list[str] = []
    start = time.perf_counter()
    tokens = tokens_after(
        subject.module,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=subject.ends,
    )
    for piece in stream_text(subject.decode, encoded, record(tokens, made)):
        if not json:
            print(piece if pieces else prompt + piece, end="", flush=True)
        pieces.append(piece)
    seconds = time.perf_counter() - start
    if json:
        display.print_json(
            {"prompt": prompt, "text": "".join(pieces), "tokens": len(made), "tokens_per_second": len(made) / seconds}
        )
    else:
        print("" if pieces else prompt)
        if not quiet:
            display.note(f"{len(made)} tokens, {len(made) / seconds:.1f} tokens/s")


def parse_rotation(name: str | None) -> int | None:
    """The block size of ``none`` (1) or of a number; None stays None. Raises ValueError for anything else."""
    if name is None:
        return None
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


def main() -> None:
    """Run the command line; the entry point of ``ptq`` and ``python -m ptq``."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "ptq"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)


if __name__ == "__main__":
    main()
