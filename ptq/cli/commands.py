"""The command line: argv → recipe and paths → one call → exit code. Heavy imports happen inside the
commands.

Numbers go to stdout, progress and messages to stderr; exit codes are those of ptq/cli/errors.py.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ptq.cli.analyze import analyze
from ptq.cli.bench import bench
from ptq.cli.chat import chat, generate
from ptq.cli.compare import compare
from ptq.cli.convert import convert
from ptq.cli.errors import fail, guarded
from ptq.cli.formats import formats
from ptq.cli.merge import merge
from ptq.cli.options import (
    MODEL_HELP,
    OUTPUT,
    Bits,
    Command,
    Commands,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    ModelFirst,
    Quiet,
    Revision,
    parse_device,
    parse_dtype,
)
from ptq.cli.pages import Html, check_page, write_page
from ptq.cli.push import push
from ptq.cli.quantize import quantize
from ptq.cli.serve import serve

if TYPE_CHECKING:
    from ptq.runtime.lm_eval_tasks import TaskResults

app = typer.Typer(
    name="ptq",
    cls=Commands,
    help="Quantize language models to 4 bits (MXFP4, NVFP4, NVINT4), measure and run them.",
    pretty_exceptions_enable=False,
    epilog="Code that comes with a model is never run (trust_remote_code is off): models of "
    "transformers' own classes load, others are refused.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

# What every error is for which the command line's own parser is to blame, in whichever parser typer
# brings along.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])


def version(wanted: bool) -> None:
    if wanted:
        from ptq import __version__

        print(f"ptq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(cls=ModelFirst)(quantize)


@app.command("eval", cls=ModelFirst)
@guarded
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="none: perplexity alone",
            help=f"The original, to compare with. {MODEL_HELP}",
        ),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            metavar="builtin|FILE",
            help="A .txt, .jsonl or .parquet file; 'builtin' is held-out Python source.",
        ),
    ] = "builtin",
    field: Field = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, show_default="all", help="Use at most so many tokens of the text."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, show_default="2048, or the model's positions", help="Tokens in a window."
        ),
    ] = None,
    bits: Bits = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            show_default="none",
            help="Tasks of lm-eval, or YAML files of some, instead of a text.",
        ),
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default="none", help="Where more task files are."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, show_default="all", help="Use at most so many questions of a task."),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Write the result into the model card of the checkpoint, too."),
    ] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep the result in a hidden file of the checkpoint, where ptq compare finds it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model or checkpoint, and its KL divergence from a reference.

    The text is cut into windows that do not overlap and are fed without a start token. KL is in
    nats per token, over the full vocabulary; 'KL top 25' is over the reference's 25 most likely
    tokens, both sides renormalised over them. With --tasks lm-eval asks the questions
    (pip install 'ptq-llm[lm-eval]').
    """
    from ptq.checkpoint.checksums import read_sums
    from ptq.checkpoint.evaluations import record
    from ptq.cli import display, progress
    from ptq.runtime import kept_evaluations
    from ptq.runtime.compare import compare
    from ptq.runtime.loaded_model import resolve_model

    if tasks is not None:
        if keep or card:
            raise ValueError("--keep and --card are for a text, not for --tasks")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        done = on_tasks(model, reference, names, task_files, limit, revision, device, dtype)
        display.print_json(done.to_dict()) if json else display.show(*done.tables())
        return
    if revision is not None:
        model = str(resolve_model(model, revision))
    if card:
        read_sums(Path(model))  # before any work
    if keep and bits is not None:
        raise ValueError("--keep does not go with --bits: it is of the checkpoint as it is stored")
    if keep:
        kept_evaluations.check_keep(Path(model))
    with progress.evaluating(quiet=quiet) as on_window:
        result = compare(
            model,
            reference,
            text=text,
            field=field,
            seq_len=seq_len,
            max_tokens=max_tokens,
            bits=bits,
            device=parse_device(device),
            dtype=parse_dtype(dtype),
            on_window=on_window,
        )
    if keep:
        kept_evaluations.keep(Path(model), result)
    if card:
        record(Path(model), {**result.to_dict(), **({} if bits is None else {"bits": bits})})
    if json:
        display.print_json(({} if bits is None else {"bits": bits}) | result.to_dict())
    else:
        display.show(*result.tables())


def on_tasks(
    model: str,
    reference: str | None,
    names: list[str],
    files: Path | None,
    limit: int | None,
    revision: str | None,
    device: str | None,
    dtype: str | None,
) -> "TaskResults":
    """``ptq eval --tasks``; what is asked for is looked up before models are loaded."""
    from ptq.runtime.lm_eval_tasks import check_tasks, run_tasks
    from ptq.runtime.loaded_model import load_model, resolve_model

    check_tasks(names, files)
    place, kind = parse_device(device), parse_dtype(dtype)
    subject = load_model(resolve_model(model, revision), device=place, dtype=kind)
    against = None if reference is None else load_model(reference, device=place, dtype=kind)
    return run_tasks(subject, names, reference=against, files=files, limit=limit)


@app.command(cls=ModelFirst)
@guarded
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="MODEL")
    ],
    html: Html = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint holds: format, recipe, size, bits per weight, error of each layer. Loads no
    model."""
    from ptq.cli import display
    from ptq.runtime.checkpoint_page import inspect_page
    from ptq.runtime.inspect import inspect as inspect_checkpoint

    if html is not None:
        check_page(html, checkpoint)
    report = inspect_checkpoint(checkpoint)
    if html is not None:
        write_page(html, inspect_page(report))
        display.note(f"written: {html}")
    if json:
        display.print_json(report.to_dict())
    else:
        display.print_report(report, layers=True)


@app.command(cls=ModelFirst)
@guarded
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="MODEL")
    ],
    engines: Annotated[
        bool,
        typer.Option(
            "--engines",
            help="Open it in each engine that is installed too, and compare probabilities.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Whether a checkpoint is what was written: files missing, changed or added since, and tensors
    that no reader should take.

    One line for each problem, and exit code 2 if there is any; 0 if all is well. With --engines a
    line for each of transformers, lm-eval and vLLM: it works, refuses the checkpoint, or computes
    it wrongly, which is a problem.
    """
    from ptq.cli import display
    from ptq.runtime.verify import verify as verify_checkpoint

    told = display.telling_engines(quiet)
    verdict = verify_checkpoint(checkpoint, engines=engines, on_engine=told)
    if json:
        display.print_json(verdict.to_dict())
    else:
        display.print_verdict(verdict, quiet=quiet)
    if not verdict.ok:
        sys.exit(2)


app.command(cls=Command)(compare)
app.command(cls=Command)(convert)
app.command(cls=Command)(merge)
app.command(cls=Command)(push)
app.command(cls=ModelFirst)(analyze)
app.command(cls=ModelFirst)(generate)
app.command(cls=ModelFirst)(chat)
app.command(cls=ModelFirst)(serve)
app.command(cls=Command)(formats)
app.command(cls=ModelFirst)(bench)


def main() -> None:
    """Run the command line; the entry point of ``ptq`` and ``python -m ptq``."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "ptq"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)


if __name__ == "__main__":
    main()
