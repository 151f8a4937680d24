"""``ptq merge``: fine-tuned copies of one model into one, before it is quantized."""

from pathlib import Path
from typing import Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import Debug, Device, Json, Quiet, parse_device, values

METHODS = ("arithmetic", "tsvm", "r-tsvm")


@guarded
def merge(
    base: Annotated[
        str, typer.Argument(help="The model that the others were made from.", metavar="BASE")
    ],
    models: Annotated[
        list[str], typer.Argument(help="Two or more fine-tuned copies of it.", metavar="MODEL...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the result.")],
    method: Annotated[
        str,
        typer.Option(
            **values(
                METHODS,
                "arithmetic adds the changes; tsvm keeps the singular vectors of each and makes "
                "them orthogonal; r-tsvm also weights them by outliers.",
            )
        ),
    ] = "arithmetic",
    strength: Annotated[
        float | None,
        typer.Option(
            show_default="1, for arithmetic 1 / number of models",
            help="What the merged change is multiplied with.",
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge what fine-tuned models learned, tensor by tensor, in the dtype of BASE.

    They have to be copies of BASE: the same tensors, shapes and vocabulary. Tokenizer and
    configuration of the result are those of BASE. Quantize it like any other model.
    """
    from ptq.cli import display, progress
    from ptq.pipeline.merge import merge as merge_models
    from ptq.runtime.figures import size
    from ptq.runtime.loaded_model import resolve_model

    place = parse_device(device)
    with progress.bar(quiet, "merging") as step:
        merged = merge_models(
            resolve_model(base),
            [resolve_model(model) for model in models],
            out,
            method=method,
            strength=strength,
            device=place,
            on_tensor=step,
        )
    if json:
        display.print_json(
            {"out": str(out), "method": method, **{k: getattr(merged, k) for k in FIGURES}}
        )
    elif not quiet:
        display.out.print(
            f"{out}: {merged.tensors} tensors, {merged.matrices} matrices merged by {method}, "
            f"{size(merged.bytes)}",
        )


FIGURES = ("tensors", "matrices", "bytes")
