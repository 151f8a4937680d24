"""``ptq quantize``: the options of a run, what is said before, during and after it."""

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq.cli.errors import describe, guarded, out_of_memory
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
    TUNED_BY,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    Private,
    Quiet,
    Revision,
    Target,
    make_recipe,
    parse_device,
    parse_dtype,
    parse_gigabytes,
    parse_rotation,
    parse_share,
    values,
)

if TYPE_CHECKING:
    import torch

    from ptq.pipeline.against_nearest import AgainstNearest
    from ptq.pipeline.forecast import Forecast
    from ptq.pipeline.plan import Plan
    from ptq.runtime.inspect import Report


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
                "takes minutes; best weighs errors by gradients.",
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
            **values(
                ALGORITHMS,
                "rtn rounds to nearest: quick, and less accurate; decoupleq refits scales, too; "
                "llm-fp4 rounds to nearest, scales searched by output error.",
            ),
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
    fisher: Annotated[
        int | None,
        typer.Option(
            metavar="WINDOWS",
            show_default="0, 32 for --quality best",
            help="Weigh errors by the model's own gradients on so many windows; takes longer.",
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
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            show_default="0",
            help="Then distil codes and norms from the original in so many steps; kept if KL on "
            "held-out text falls.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    tune_codes: Annotated[
        str | None,
        typer.Option(
            **values(
                TUNED_BY,
                "How --tune moves codes: by latents that drift; or a few at a time, in the manner "
                "of PV-Tuning.",
            ),
            show_default="latents",
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
    target: Target = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            show_default="none",
            help="Upload the result, with the token of hf auth login or HF_TOKEN.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    private: Private = False,
    revision: Revision = None,
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
    from ptq.checkpoint.companions import has_chat_template
    from ptq.checkpoint.dialect_choice import Choice, Readers
    from ptq.checkpoint.hub import check_push
    from ptq.checkpoint.hub import push as upload
    from ptq.cli import display, outcome, outlook, progress
    from ptq.pipeline.against_nearest import cheap
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
        "fisher": fisher,
        "eight_bit": None if eight_bit is None else parse_share("--eight-bit", eight_bit),
        "budget": budget,
        "nested": nested,
        "tune": tune,
        "tune_codes": tune_codes,
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
    lead = int(os.environ.get("RANK", "0")) == 0  # under torchrun one process speaks
    if push_to_hub is not None and lead:
        check_push(push_to_hub)
    source = resolve_model(model, revision)
    place, kind = parse_device(device), parse_dtype(dtype)
    predict = partial(
        forecast,
        source,
        choices,
        device=place,
        dtype=kind,
        activations=activations,
        dialect=dialect,
        target=target,
        hessian_memory=room,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )
    if dry_run:
        prediction = predict()
        if lead and json:
            display.print_json(prediction.to_dict())
        elif lead:
            outlook.print_outlook(model, prediction, display.out)
            display.show(prediction.memory)
            for engine, opening in prediction.opens.items():
                display.out.print(f"in {engine}: {opening}", markup=False, soft_wrap=True)
        return
    assert out is not None
    tells = lead and not quiet
    started = time.monotonic()
    foreseen: list[Forecast] = []

    with progress.quantizing(quiet=not tells) as on_block, launched(place) as here:

        def begins(plan: "Plan") -> None:
            if not foreseen:
                foreseen.append(predict())
                outlook.print_outlook(f"{model} → {out}", foreseen[0])
            elif plan.about_budget:
                outlook.print_choice(plan)
            on_block.expect(foreseen[0].block_seconds, seconds=True)

        choice = quantize_model(
            source,
            out,
            recipe=choices,
            device=here,
            dtype=kind,
            overwrite=overwrite,
            dialect=Readers(dialect, target),
            activations=activations,
            hessian_memory=room,
            on_plan=begins if tells else None,
            on_block=on_block,
        )
    if lead and json:
        display.print_json(inspect_checkpoint(out).to_dict())
    elif tells and isinstance(choice, Choice):
        seconds = time.monotonic() - started
        report = inspect_checkpoint(out)
        compared = None
        if cheap(report.parameters, seconds, place):
            compared = _compared(source, report, place)
        outcome.print_outcome(report, choice.dialect, choice.reason, seconds, compared)
        outcome.print_next(model, out, chats=has_chat_template(out), compared=compared is not None)
    if push_to_hub is not None and lead:
        address = upload(out, push_to_hub, private=private)
        display.note(f"uploaded: {address}")


def _compared(source: Path, report: "Report", device: "torch.device") -> "AgainstNearest | None":
    """What the result is worth. The checkpoint is finished: what keeps it from being compared is
    told, and no error."""
    from ptq.cli import display, progress
    from ptq.pipeline.against_nearest import against_nearest

    display.note("comparing with the original, and with rounding to nearest")
    try:
        with progress.bar(quiet=False, what="comparing"):
            return against_nearest(source, Path(report.path), report.recipe, device)
    except (ValueError, OSError, MemoryError) as error:
        display.note(f"not compared: {describe(error)}")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        display.note(f"not compared: {describe(error)}")
    return None
