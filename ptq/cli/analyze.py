"""``ptq analyze``: which format for which layer, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import (
    ACTIVATIONS,
    FORMATS,
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

if TYPE_CHECKING:
    from ptq.pipeline.analysis import BlockAnalysis
    from ptq.pipeline.analysis_files import Analysis

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
            show_default=f"all: {', '.join(FORMATS)}; layers may stay in 16 bits, too",
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
    from dataclasses import replace

    from ptq.cli import display, progress, study_tables
    from ptq.pipeline.advice import advise as choose
    from ptq.pipeline.advice import check_limits
    from ptq.pipeline.advisor import AdviceOptions, measure_damage, recipe_of
    from ptq.pipeline.analysis_files import CAST_STATES, check_folder, write_results
    from ptq.pipeline.analysis_page import analysis_page
    from ptq.pipeline.analyze import Options
    from ptq.pipeline.analyze import analyze as measure_tensors
    from ptq.pipeline.direct_cast import CastOptions
    from ptq.pipeline.direct_cast import direct_cast as cast
    from ptq.pipeline.recipe_file import to_toml
    from ptq.runtime.loaded_model import resolve_model

    options = Options(
        calibration=calibration,
        field=field,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        tokens=tokens,
        values=numbers,
        scales=scales,
        balance=balance,
        ignore=tuple(ignore or ()),
    )
    casting = CastOptions(
        text=text, field=field, seq_len=window, max_tokens=max_tokens, ignore=options.ignore
    )
    advising = AdviceOptions(
        scheme=scheme,
        formats=FORMATS if formats is None else tuple(formats.replace(",", " ").split()),
        calibration=calibration,
        field=field,
        seed=seed,
        ignore=options.ignore,
    )
    if advise:
        check_limits(budget=budget, ceiling=max_kl, measure=measure)
    elif budget is not None or max_kl is not None:
        raise ValueError("--budget and --max-kl are for --advise")
    if out is not None:
        check_folder(out, overwrite=overwrite, adding=direct_cast or advise)
    source = resolve_model(model)
    place, kind = parse_device(device), parse_dtype(dtype)
    with progress.bar(quiet, "analyzing") as step:

        def on_block(block: "BlockAnalysis", count: int, resumed: bool) -> None:
            step(
                block.index + 1,
                count,
                block.name + (" measured before" if resumed else ""),
                known=resumed,
            )

        found = measure_tensors(
            source,
            options,
            folder=out,
            overwrite=overwrite,
            device=place,
            dtype=kind,
            on_block=on_block,
        )
    if out is not None:
        write_results(out, found, analysis_page(found))
    if direct_cast:
        with progress.bar(quiet, "casting") as step:
            made = cast(
                source,
                casting,
                folder=None if out is None else out / CAST_STATES,
                overwrite=overwrite,
                known=found.direct_cast,
                device=place,
                dtype=kind,
                activations=activations,
                on_step=step,
            )
        found = replace(found, direct_cast=made)
        if out is not None:
            write_results(out, found, analysis_page(found))
    recipe = None
    if advise:
        with progress.bar(quiet, "measuring damage") as step:
            damage = measure_damage(
                source,
                advising,
                known=None if found.advice is None else found.advice.damage,
                device=place,
                dtype=kind,
                activations=activations,
                on_block=lambda done, total: step(done, total, ""),
            )
        advice = choose(damage, budget=budget, ceiling=max_kl, measure=measure)
        found = replace(found, advice=advice)
        recipe = to_toml(recipe_of(advice, advising))
        if out is not None:
            write_results(out, found, analysis_page(found), recipe)
    if json:
        display.print_json(summary(found) | ({} if recipe is None else {"recipe": recipe}))
    elif not quiet:
        print_summary(found)
        if direct_cast and found.direct_cast is not None:
            study_tables.print_direct_cast(found.direct_cast)
        if advise and found.advice is not None:
            study_tables.print_advice(found.advice)
        if out is not None:
            names = sorted(path.name for path in out.iterdir())
            display.note(f"written to {out}: report.html to look at, all of {', '.join(names)}")
            if recipe is not None:
                display.note(f"next: ptq quantize {model} --recipe {out}/recipe.toml --out DIR")


def summary(found: "Analysis") -> dict[str, object]:
    """What ``--json`` prints: win tables and the worst layers, and what else was asked for; all
    figures are in analysis.json."""
    from dataclasses import asdict

    from ptq.pipeline.analysis_summary import lines, wins, worst
    from ptq.reading.schema import plain

    rule = str(found.identity["scales"])
    return {
        "model": found.model,
        "options": found.identity,
        "seconds": found.seconds,
        "crossovers": lines(rule),
        "wins": [asdict(row) for row in wins(found.blocks, rule)],
        "worst": [asdict(row) for row in worst(found.blocks)],
        "direct_cast": None if found.direct_cast is None else plain(found.direct_cast),
        "advice": None if found.advice is None else plain(found.advice),
    }


def print_summary(found: "Analysis") -> None:
    """The win table by form, and the layers that will hurt."""
    from rich import box
    from rich.table import Table

    from ptq.cli import display
    from ptq.numerics.formats import FORMATS as FORMAT_RECORDS
    from ptq.numerics.hardware_cost import relative_area
    from ptq.pipeline.analysis_summary import tensors, wins, worst

    rule = str(found.identity["scales"])
    count = sum(1 for _ in tensors(found.blocks))
    layers = sum(len(block.layers) for block in found.blocks)
    table = Table(
        title=f"{layers} layers, {count} tensors, scales {rule}: who has the higher QSNR",
        box=box.SIMPLE_HEAD,
    )
    for name in ("form", "INT / FP"):
        table.add_column(name, no_wrap=True)
    for name in ("INT dB", "FP dB", "INT wins", "in the study", "printed", "corrected", "blocks"):
        table.add_column(name, justify="right")
    table.add_column("area", justify="right")
    for row in wins(found.blocks, rule):
        if row.role != "all":
            continue
        form = " + ".join(
            [*(["balanced"] if row.balanced else []), *(["rotated"] if row.rotated else [])]
        )
        laws = (row.hits.get(law) for law in ("printed", "corrected", "integrated"))
        table.add_row(
            form or "as it is",
            f"{row.ints}/{row.floats}",
            f"{row.qsnr[0]:.2f}",
            f"{row.qsnr[1]:.2f}",
            f"{row.share:.1%}",
            "–" if row.balanced else f"{row.paper:.1%}",
            *("–" if hit is None else f"{hit:.1%}" for hit in laws),
            f"{relative_area(FORMAT_RECORDS[row.ints], FORMAT_RECORDS[row.floats]):.2f}",
        )
    display.out.print(table)
    display.out.print(
        "printed, corrected, blocks: how often that law of the crest factor names the winner "
        "(docs/int-vs-fp.md); in the study: Figure 4, Llama-3.1-8B; area: gates of a unit, INT "
        "over FP, a model and no synthesis.",
        style="dim",
    )
    hurt = Table(title="the layers that will hurt, at their best in four bits", box=box.SIMPLE_HEAD)
    hurt.add_column("layer", overflow="fold")
    hurt.add_column("output error", justify="right")
    hurt.add_column("what to do", ratio=1)
    for layer in worst(found.blocks):
        hurt.add_row(layer.name, f"{layer.error:.4f}", "; ".join(layer.advice))
    display.out.print(hurt)
