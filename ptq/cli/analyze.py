"""``ptq analyze``: which format for which layer, and why."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import (
    ACTIVATIONS,
    MICROSCALED,
    MODEL_HELP,
    OUTPUT,
    RECIPE,
    RUN,
    SCHEMES,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    Quiet,
    parse_device,
    parse_dtype,
    values,
)

ANALYSIS_SCALES = ("absmax", "mse")
MEASURES = ("kl", "kl_top25")
CAST = "Direct cast: the whole model in every format"
ADVICE = "Advice: a format and a rotation for every layer"


@guarded
def analyze(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            show_default="none: the summary alone",
            help="Where report.html and analysis.json and .csv go; new, empty, or an unfinished "
            "analysis.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    scales: Annotated[
        str,
        typer.Option(
            **values(
                ANALYSIS_SCALES,
                "How scales are chosen: as in the study, without clipping, or by a search, which "
                "no law predicts.",
            ),
            rich_help_panel=RECIPE,
        ),
    ] = "absmax",
    balance: Annotated[
        float,
        typer.Option(
            metavar="0…1",
            help="Strength of the balanced forms; 0 leaves them out.",
            rich_help_panel=RECIPE,
        ),
    ] = 0.5,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="builtin|FILE|DATASET",
            help="Text that the inputs come from.",
            rich_help_panel=RECIPE,
        ),
    ] = "builtin",
    field: Field = None,
    samples: Annotated[int, typer.Option(help="Sequences of text.", rich_help_panel=RECIPE)] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens in each.", rich_help_panel=RECIPE)] = 256,
    tokens: Annotated[
        int,
        typer.Option(help="Of every input that are rounded and counted.", rich_help_panel=RECIPE),
    ] = 512,
    numbers: Annotated[
        int,
        typer.Option(
            show_default="2^20",
            help="Of every weight that are rounded and counted, in evenly spaced rows.",
            rich_help_panel=RECIPE,
        ),
    ] = 1 << 20,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="none",
            help="Layers to leave out: a name, a pattern with *, or re:…; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of text.", rich_help_panel=RECIPE)] = 0,
    direct_cast: Annotated[
        bool,
        typer.Option(
            "--direct-cast",
            help="Also round the whole model in each format, rotated and not: perplexity, KL.",
            rich_help_panel=CAST,
        ),
    ] = False,
    text: Annotated[
        str,
        typer.Option(
            metavar="builtin|FILE",
            help="Text that it is measured on, as ptq eval takes it.",
            rich_help_panel=CAST,
        ),
    ] = "builtin",
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of that text.", rich_help_panel=CAST)
    ] = 8192,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens in a window.", rich_help_panel=CAST)
    ] = 512,
    advise: Annotated[
        bool,
        typer.Option(
            "--advise",
            help="Also measure what every format costs every layer, and write recipe.toml.",
            rich_help_panel=ADVICE,
        ),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            show_default="none: give this or --max-kl",
            help="Bits per weight on average.",
            rich_help_panel=ADVICE,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            show_default="none",
            help="Loss per token, predicted, to be reached with the fewest bits.",
            rich_help_panel=ADVICE,
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            **values(MEASURES, "The loss: KL over all tokens, or the 25 most likely."),
            rich_help_panel=ADVICE,
        ),
    ] = "kl",
    scheme: Annotated[
        str,
        typer.Option(**values(SCHEMES, "Weights only, or inputs too."), rich_help_panel=ADVICE),
    ] = "w4a4",
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME…",
            show_default=f"{', '.join(MICROSCALED)}; layers may stay in 16 bits, too",
            help="To choose from, e.g. nvfp4,mxfp8 for engines.",
            rich_help_panel=ADVICE,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    activations: Annotated[
        str,
        typer.Option(
            **values(ACTIVATIONS, "Where activations of --direct-cast and --advise wait."),
            rich_help_panel=RUN,
        ),
    ] = "ram",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the analysis in --out.", rich_help_panel=OUTPUT),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what every linear layer and its inputs lose in the eight formats, before and after
    rotation and balancing, and say who wins, INT or FP, and whether theory foresaw it.

    The model is not changed. Run again after an interruption, the same command with --out goes on
    where it stopped; --direct-cast and --advise add to what is there. Laws, crossovers, direct
    casts: docs/int-vs-fp.md; advice: docs/analyze.md.
    """
    from functools import partial

    from ptq.cli import display, progress
    from ptq.pipeline.analysis_files import check_folder
    from ptq.pipeline.study import StudyOptions, study
    from ptq.runtime.loaded_model import resolve_model

    options = StudyOptions.of(
        {
            "scales": scales,
            "balance": balance,
            "calibration": calibration,
            "field": field,
            "samples": samples,
            "seq_len": seq_len,
            "tokens": tokens,
            "numbers": numbers,
            "ignore": ignore,
            "seed": seed,
            "text": text,
            "max_tokens": max_tokens,
            "window": window,
            "budget": budget,
            "max_kl": max_kl,
            "measure": measure,
            "scheme": scheme,
            "formats": None if formats is None else formats.replace(",", " ").split(),
        },
        direct_cast=direct_cast,
        advise=advise,
    )
    if out is not None:
        check_folder(out, overwrite=overwrite, adding=direct_cast or advise)
    source = resolve_model(model)
    found = study(
        source,
        options,
        partial(progress.bar, quiet),
        folder=out,
        overwrite=overwrite,
        device=parse_device(device),
        dtype=parse_dtype(dtype),
        activations=activations,
    )
    if json:
        display.print_json(found.to_dict())
    elif not quiet:
        for table in found.tables():
            display.show(table)
        if out is not None:
            names = sorted(path.name for path in out.iterdir())
            display.note(f"written to {out}: report.html to look at, all of {', '.join(names)}")
            if found.recipe is not None:
                display.note(f"next: ptq quantize {model} --recipe {out}/recipe.toml --out DIR")
