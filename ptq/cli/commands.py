"""The command line: argv → recipe and paths → one call → exit code. Heavy imports happen inside the
commands.

Numbers go to stdout, progress and messages to stderr; exit codes are those of ptq/cli/errors.py.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ptq.cli.analyze import analyze
from ptq.cli.bench import bench
from ptq.cli.chat import chat, generate
from ptq.cli.convert import convert
from ptq.cli.errors import fail, guarded
from ptq.cli.formats import formats
from ptq.cli.merge import merge
from ptq.cli.options import (
    ACTIVATIONS,
    ALGORITHMS,
    DIALECTS,
    FORMATS,
    INPUT_RULES,
    KEY_VALUES,
    MODEL_HELP,
    OUTPUT,
    QUALITIES,
    RECIPE,
    ROTATIONS,
    RUN,
    SCALES,
    SCHEMES,
    Bits,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    ModelFirst,
    Quiet,
    make_recipe,
    parse_device,
    parse_dtype,
    parse_gigabytes,
    parse_rotation,
    parse_share,
    values,
)
from ptq.cli.serve import serve

if TYPE_CHECKING:
    from ptq.pipeline.plan import Plan

app = typer.Typer(
    name="ptq",
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


@app.command(cls=ModelFirst)
@guarded
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL_HELP} --model is the same.", metavar="MODEL"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            show_default="none: required, but for --dry-run and --show-recipe",
            help="Directory of the result; new or empty.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            **values(FORMATS, "Of the weights; ptq formats compares them."),
            show_default="that of --recipe, else required",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            **values(
                QUALITIES,
                "fast rounds to nearest; default is the best known recipe, with as much text as "
                "takes minutes; best reads four times as much.",
            ),
            show_default="default",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            **values(SCHEMES, "w4a16 quantizes weights only, w4a4 activations too."),
            show_default="w4a16",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            **values(ALGORITHMS, "rtn rounds to nearest: quick, and less accurate."),
            show_default="gptq",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(
            **values(ROTATIONS, "Size of the Hadamard blocks; auto measures each layer."),
            show_default="the format's best: none for nvfp4 and mxfp8, else its group",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            metavar="0…1",
            show_default="0.25, 0.5 for w4a4, 0 for rtn",
            help="How far large inputs are scaled down, and their weights up.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    eight_bit: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            show_default="0%",
            help="Share of the weights that get 8 bits where that gains most, measured: 10%.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            show_default="the format's",
            help="The same by bits per weight, on average: 4.75.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    nested: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            show_default="0: none",
            help="Narrower format that mxint8 or mxint6 codes hold, run with --bits: 4.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(
            **values(SCALES, "Rule that chooses the scales of weights."),
            show_default="trial, mse for rtn, absmax for 8 bits",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    input_rule: Annotated[
        str | None,
        typer.Option(
            **values(INPUT_RULES, "Rule that scales quantized inputs."),
            show_default="the best one that those who read the result apply",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            **values(KEY_VALUES, "Calibrate scales for keys and values in an engine's FP8 cache."),
            show_default="none",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="builtin|FILE|DATASET",
            show_default="builtin",
            help="Text: a .txt, .jsonl or .parquet file, or a data set of the hub.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    field: Field = None,
    samples: Annotated[
        int | None,
        typer.Option(
            show_default="by --quality, model and device",
            help="Sequences of calibration text.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            show_default="likewise: 512 or 2048",
            help="Tokens in each.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            show_default="4", help="Sequences that run at the same time.", rich_help_panel=RECIPE
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="JSON or TOML file of choices, which options override; --show-recipe writes one.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="none",
            help="Layers to leave as they are: a name, a pattern with *, or re:…; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    lm_head: Annotated[
        bool | None,
        typer.Option(
            "--lm-head",
            show_default="no",
            help="Quantize the output head too (not a tied one).",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    route_all_experts: Annotated[
        bool | None,
        typer.Option(
            "--route-all-experts",
            show_default="no",
            help="Calibrate every expert on every token.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            show_default="0", help="Of the choice of calibration text.", rich_help_panel=RECIPE
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    activations: Annotated[
        str,
        typer.Option(
            **values(ACTIVATIONS, "Where activations wait between blocks."),
            rich_help_panel=RUN,
        ),
    ] = "ram",
    dialect: Annotated[
        str,
        typer.Option(
            **values(
                DIALECTS,
                "How the result lies on disk, and so who opens it; auto takes compressed-tensors "
                "where other engines compute it right.",
            ),
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    hessian_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            show_default="half of what is free",
            help="For the Hessians of a block's experts at a time.",
            rich_help_panel=RUN,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the checkpoint in --out.", rich_help_panel=OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only predict memory, time and size; needs config.json, no weights.",
            rich_help_panel=RUN,
        ),
    ] = False,
    show_recipe: Annotated[
        bool,
        typer.Option(
            "--show-recipe",
            help="Only print every choice as TOML, which --recipe reads; needs no model.",
            rich_help_panel=RUN,
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write the checkpoint. What is left out is the best known recipe of the
    format.

    Run again after an interruption, the same command continues where it stopped. Several processes
    share the work: torchrun --nproc-per-node N -m ptq quantize …
    """
    from ptq.checkpoint.dialect_choice import Choice
    from ptq.cli import display, progress
    from ptq.pipeline.forecast import forecast
    from ptq.pipeline.ranks import launched
    from ptq.pipeline.recipe_file import to_toml
    from ptq.pipeline.run import quantize_model
    from ptq.runtime.inspect import inspect as inspect_checkpoint
    from ptq.runtime.loaded_model import resolve_model

    options = {
        "quality": quality,
        "scheme": scheme,
        "algorithm": algorithm,
        "rotation": rotation if rotation in (None, "auto") else parse_rotation(rotation),
        "balance": balance,
        "eight_bit": None if eight_bit is None else parse_share("--eight-bit", eight_bit),
        "budget": budget,
        "nested": nested,
        "scales": scales,
        "input_rule": input_rule,
        "kv_cache": kv_cache,
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
    choices = make_recipe(format, recipe, options)
    if show_recipe:
        print(to_toml(choices), end="")
        return
    if model is None:
        raise ValueError("say which model: ptq quantize MODEL --format … --out …")
    if out is None and not dry_run:
        raise ValueError("say where the result goes: --out DIR")
    room = parse_gigabytes("--hessian-memory", hessian_memory)
    source = resolve_model(model)
    place, kind = parse_device(device), parse_dtype(dtype)
    lead = int(os.environ.get("RANK", "0")) == 0  # under torchrun one process speaks
    predict = partial(
        forecast,
        source,
        choices,
        device=place,
        dtype=kind,
        activations=activations,
        dialect=dialect,
        hessian_memory=room,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )
    if dry_run:
        prediction = predict()
        if lead:
            if json:
                display.print_json(prediction.to_dict())
            else:
                display.print_forecast(str(source), prediction)
        return
    assert out is not None

    def begins(plan: "Plan") -> None:
        display.print_plan(plan, predict().seconds)

    with progress.quantizing(quiet=quiet or not lead) as on_block, launched(place) as place:
        choice = quantize_model(
            source,
            out,
            recipe=choices,
            device=place,
            dtype=kind,
            overwrite=overwrite,
            dialect=dialect,
            activations=activations,
            hessian_memory=room,
            on_plan=None if quiet or not lead else begins,
            on_block=on_block,
        )
    if lead and not quiet and isinstance(choice, Choice):
        display.note(f"written as {choice.dialect}: {choice.reason}")
    if lead and json:
        display.print_json(inspect_checkpoint(out).to_dict())
    elif lead and not quiet:
        display.print_report(inspect_checkpoint(out), layers=False)


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
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model or checkpoint, and its KL divergence from a reference.

    The text is cut into windows that do not overlap and are fed without a start token. KL is in
    nats per token, over the full vocabulary; 'KL top 25' is over the reference's 25 most likely
    tokens, both sides renormalised over them.
    """
    from ptq.cli import display, progress
    from ptq.runtime.compare import compare

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
    if json:
        display.print_json(({} if bits is None else {"bits": bits}) | result.to_dict())
    else:
        display.show(*result.tables())


@app.command(cls=ModelFirst)
@guarded
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="MODEL")
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint holds: format, recipe, size, bits per weight, error of each layer. Loads no
    model."""
    from ptq.cli import display
    from ptq.runtime.inspect import inspect as inspect_checkpoint

    report = inspect_checkpoint(checkpoint)
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Whether a checkpoint is what was written: files missing, changed or added since, and tensors
    that no reader should take.

    One line for each problem, and exit code 2 if there is any; 0 if all is well.
    """
    from ptq.cli import display
    from ptq.runtime.verify import verify as verify_checkpoint

    verdict = verify_checkpoint(checkpoint)
    if json:
        display.print_json(verdict.to_dict())
    else:
        display.print_verdict(verdict, quiet=quiet)
    if not verdict.ok:
        sys.exit(2)


app.command()(convert)
app.command()(merge)
app.command(cls=ModelFirst)(analyze)
app.command(cls=ModelFirst)(generate)
app.command(cls=ModelFirst)(chat)
app.command(cls=ModelFirst)(serve)
app.command()(formats)
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
