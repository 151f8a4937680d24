"""``ptq analyze``: which format for which layer, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import (
    MODEL_HELP,
    OUTPUT,
    RECIPE,
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
    device: Device = None,
    dtype: Dtype = None,
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
    where it stopped. Laws and crossovers: docs/int-vs-fp.md.
    """
    from ptq.cli import display, progress
    from ptq.pipeline.analysis_files import check_folder, write_results
    from ptq.pipeline.analysis_page import analysis_page
    from ptq.pipeline.analyze import Options
    from ptq.pipeline.analyze import analyze as measure
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
    if out is not None:
        check_folder(out, overwrite=overwrite)
    source = resolve_model(model)
    with progress.bar(quiet, "analyzing") as step:

        def on_block(block: "BlockAnalysis", count: int, resumed: bool) -> None:
            step(
                block.index + 1,
                count,
                block.name + (" measured before" if resumed else ""),
                known=resumed,
            )

        found = measure(
            source,
            options,
            folder=out,
            overwrite=overwrite,
            device=parse_device(device),
            dtype=parse_dtype(dtype),
            on_block=on_block,
        )
    if out is not None:
        write_results(out, found, analysis_page(found))
    if json:
        display.print_json(summary(found))
    elif not quiet:
        print_summary(found)
        if out is not None:
            display.note(f"written to {out}: report.html to look at, analysis.json, analysis.csv")


def summary(found: "Analysis") -> dict[str, object]:
    """What ``--json`` prints: win tables and the worst layers; all figures are in analysis.json."""
    from dataclasses import asdict

    from ptq.pipeline.analysis_summary import lines, wins, worst

    rule = str(found.identity["scales"])
    return {
        "model": found.model,
        "options": found.identity,
        "seconds": found.seconds,
        "crossovers": lines(rule),
        "wins": [asdict(row) for row in wins(found.blocks, rule)],
        "worst": [asdict(row) for row in worst(found.blocks)],
    }


def print_summary(found: "Analysis") -> None:
    """The win table by form, and the layers that will hurt."""
    from rich import box
    from rich.table import Table

    from ptq.cli import display
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
        )
    display.out.print(table)
    display.out.print(
        "printed, corrected, blocks: how often that law of the crest factor names the winner "
        "(docs/int-vs-fp.md); in the study: Figure 4, Llama-3.1-8B.",
        style="dim",
    )
    hurt = Table(title="the layers that will hurt, at their best in four bits", box=box.SIMPLE_HEAD)
    hurt.add_column("layer", overflow="fold")
    hurt.add_column("output error", justify="right")
    hurt.add_column("what to do", ratio=1)
    for layer in worst(found.blocks):
        hurt.add_row(layer.name, f"{layer.error:.4f}", "; ".join(layer.advice))
    display.out.print(hurt)
