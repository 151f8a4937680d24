"""``ptq bench``: how fast linear layers are here, or could be on a named GPU; and the tuning of
kernels to this one."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import Debug, Device, Quiet, parse_rotation

if TYPE_CHECKING:  # torch only inside the command
    import torch

    from ptq.bench.layers import Plan
    from ptq.bench.measurement import Limits, Measurement
    from ptq.bench.shapes import Layer

DEMO = "demo"
# On a CPU, products of a large model would take an hour and say nothing about it: layers up to so
# many weights are timed as they are, those of larger models are replaced.
LARGEST_ON_CPU = 1 << 21
SMALL: tuple["Layer", ...] = (("square", 512, 512), ("wide", 1024, 256))
CPU_TOKENS = (1, 16, 128)
MOST_TOKENS = 1 << 20  # rows of the inputs of a layer; a prefill has thousands
REPEATS = {"cuda": 30, "cpu": 10}
TUNE_SECONDS = 3600


@guarded
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="llama-3.1-8b (if left out), llama-3.1-70b, qwen3-8b, qwen3-32b, 'demo', or a "
            "directory with a "
            "config.json, quantized or not.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(show_default="1 to 8192", help="Rows of the inputs, as 1,16,128 or repeated."),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="nvfp4|mxfp4|nvint4|mxint4",
            show_default="the first three",
            help="Of the weights; repeatable.",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="all that can run",
            help="bf16, fp8, w4a16, w4a4, rotate+w4a16, …; repeatable.",
        ),
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(
            metavar="none|16|32|64|128", show_default="32", help="Size of the Hadamard blocks."
        ),
    ] = None,
    device: Device = None,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="h100|h200|b200|l40s|rtx4090|rtx5090|a100",
            show_default="none: measure",
            help="Measure nothing: print rooflines of a GPU.",
        ),
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--sum", help="One row per decoder block, not per layer.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="Append every measurement to this .jsonl file.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="none", help="Write the table to this file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="Draw speed over bf16: a .svg file.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time tiles of the kernels and rewrite the table of this GPU."),
    ] = False,
    tune_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            show_default=str(TUNE_SECONDS),
            help="How long --tune may take; called again it goes on from its log.",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print a line of JSON per measurement on stdout, and nothing else there."
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time the linear layers of models: 4-bit kernels beside bf16, fp8 and other libraries that are
    installed.

    On a GPU, times are medians of CUDA-graph replays over weights that do not stay in its cache.
    Without one, the reference path is timed on small layers; --predict says what no kernel on a
    named GPU can be faster than.
    """
    if tune:
        others = {
            "--backend": backend,
            "--rotation": rotation,
            "--predict": predict,
            "--sum": blocks,
            "--out": out,
        }
        others |= {"--markdown": markdown, "--plot": plot, "--json": json}
        if refused := [name for name, value in others.items() if value]:
            raise ValueError(
                f"{refused[0]} does not go with --tune, which takes models, --tokens, --format, "
                "--device, --tune-seconds"
            )
        tune_tables(models, tokens, format, device, tune_seconds, quiet)
        return
    if tune_seconds is not None:
        raise ValueError("--tune-seconds says how long --tune may take: give --tune as well")

    from ptq.bench import speed_report
    from ptq.bench.layers import TOKENS, Plan, measured_limits
    from ptq.bench.measurement import Limits, append, block_sums
    from ptq.cli import display

    place = find_place(predict, device)
    layers, counts = find_layers(models), parse_tokens(tokens)
    if not isinstance(place, Limits) and place.type == "cpu":
        layers, counts = on_cpu(layers, quiet), counts or CPU_TOKENS
    size = None if rotation is None else parse_rotation(rotation)
    plans = [
        Plan(
            model=name,
            layers=shapes,
            tokens=counts or TOKENS,
            formats=listed(format) or Plan.formats,
            rotation=Plan.rotation if size is None else size,
            backends=listed(backend),
        )
        for name, shapes in layers.items()
    ]
    backends = plans[0].backends_by_format(place).values()
    if plot:
        speed_report.check_plot(plot, [name for names in backends for name in names])
    for path in (out, markdown, plot):
        if path:
            require_writable(path)

    limits = place if isinstance(place, Limits) else measured_limits(place)
    results: list[Measurement] = []
    for measurement in measurements(plans, place, limits, quiet):
        results.append(measurement)
        if out:
            append(out, [measurement])  # a run that is interrupted keeps what it has
        if json and not blocks:
            print(measurement.to_json(), flush=True)
    rows = block_sums(results) if blocks else results
    if json and blocks:
        print("\n".join(m.to_json() for m in rows))
    elif not json:
        print_tables(rows, limits)
    if markdown:
        markdown.write_text(speed_report.markdown(rows, limits), encoding="utf-8")
    if plot:
        speed_report.plot(results, plot)
    if not quiet and (files := [str(path) for path in (out, markdown, plot) if path]):
        display.note(f"written: {', '.join(files)}")


def measurements(
    plans: Sequence["Plan"], place: "torch.device | Limits", limits: "Limits", quiet: bool
) -> Iterator["Measurement"]:
    """What is measured on a device, with progress on stderr, or predicted."""
    from ptq.bench.layers import predict, run
    from ptq.bench.measurement import Limits
    from ptq.cli import progress

    if isinstance(place, Limits):
        for plan in plans:
            yield from predict(plan, place)
        return
    with progress.bar(quiet, "timing") as step:
        for plan in plans:
            yield from run(plan, place, limits, repeats=REPEATS[place.type], on_step=step)


def print_tables(measurements: Sequence["Measurement"], limits: "Limits") -> None:
    """A table for each model on stdout, and below it where the numbers come from."""
    from rich import box
    from rich.table import Table

    from ptq.bench import speed_report
    from ptq.cli import display

    for model in dict.fromkeys(m.model for m in measurements):
        of_model = [m for m in measurements if m.model == model]
        predicted = f": {speed_report.PREDICTED}" if of_model[0].predicted else ""
        names, rows = speed_report.table(of_model)
        table = Table(title=f"{model} on {limits.name}{predicted}", box=box.SIMPLE_HEAD)
        for name in names:
            table.add_column(
                name, justify="left" if name in speed_report.WORDS else "right", no_wrap=True
            )
        for row in rows:
            table.add_row(*row)
        display.out.print(table)
    display.out.print(speed_report.provenance(measurements, limits), style="dim")


# ---------------------------------------------------------------- what the options say


def listed(values: Sequence[str] | None) -> list[str]:
    """The words of a repeatable option whose values may hold several, with commas between them;
    lower case."""
    return list(
        dict.fromkeys(word.strip().lower() for value in values or [] for word in value.split(","))
    )


def parse_tokens(values: Sequence[str] | None) -> list[int]:
    """The numbers of --tokens. Raises ValueError for anything else."""
    words = listed(values)
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ValueError(f"--tokens {wrong[0]!r}: give whole numbers, such as 1,16,128")
    counts = sorted({int(word) for word in words})
    if counts and not (counts[0] >= 1 and counts[-1] <= MOST_TOKENS):
        raise ValueError(f"--tokens {','.join(words)}: give numbers from 1 to {MOST_TOKENS}")
    return counts


def find_place(predict: str | None, device: str | None) -> "torch.device | Limits":
    """The device to measure on, or the GPU to predict for.

    Raises:
        ValueError: there is no such device or GPU, or both are given.
    """
    import torch

    from ptq.bench.measurement import GPUS

    if (
        predict is None and device is None
    ):  # as parse_device, without the seconds that transformers takes
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if predict is None:
        from ptq.cli.options import parse_device

        return parse_device(device)
    if device is not None:
        raise ValueError("--device does not go with --predict, which runs nothing")
    if predict.lower() not in GPUS:
        raise ValueError(
            f"--predict {predict}: peaks of this GPU are not known; choose from {', '.join(GPUS)}"
        )
    return GPUS[predict.lower()]


def find_layers(models: Sequence[str] | None) -> dict[str, tuple["Layer", ...]]:
    """Model → its linear layers. Raises ValueError or OSError for a model that is neither known nor
    a directory."""
    from ptq.bench import shapes

    layers = {}
    for model in models or ["llama-3.1-8b"]:
        if model == DEMO:
            from ptq.runtime.loaded_model import demo_path

            layers[model] = shapes.block_layers(str(demo_path()))
        else:
            layers[model] = shapes.block_layers(model)
    return layers


def on_cpu(
    layers: Mapping[str, tuple["Layer", ...]], quiet: bool
) -> dict[str, tuple["Layer", ...]]:
    """The models whose layers are small, and small layers for the others; says so on stderr."""
    from ptq.cli import display

    small = {
        model: shapes
        for model, shapes in layers.items()
        if max(n * k for _, n, k in shapes) <= LARGEST_ON_CPU
    }
    large = [model for model in layers if model not in small]
    sizes = ", ".join(f"{n}×{k}" for _, n, k in SMALL)
    instead = f" on small layers ({sizes}) instead of those of {', '.join(large)}" if large else ""
    if not quiet:
        display.note(
            f"timing the reference path on the CPU in fp32{instead}; --predict h200 says what a "
            "GPU could do at most"
        )
    return small | ({"small layers": SMALL} if large else {})


def require_writable(path: Path) -> None:
    """Raise OSError where ``path`` cannot be written, before anything is measured; leaves no new
    file behind."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a"):
        pass
    if new:
        path.unlink()


# ---------------------------------------------------------------- tile tables


def tune_tables(
    models: Sequence[str] | None,
    tokens: Sequence[str] | None,
    formats: Sequence[str] | None,
    device: str | None,
    seconds: float | None,
    quiet: bool,
) -> None:
    """Search for fast tiles for so many seconds and rewrite this GPU's table, row by row; what is
    timed stays in a log beside it, where the next call goes on.

    Raises:
        ValueError: no GPU that runs the kernels, a choice without a row in the tables, no time, or
            a log that does not belong to this GPU and these kernels.
    """
    import time
    from functools import partial

    import torch

    from ptq.bench import tile_search, tile_timing, tune
    from ptq.bench.layers import Plan
    from ptq.bench.measurement import Limits
    from ptq.bench.tuning_log import TuningLog
    from ptq.cli import display, progress
    from ptq.kernels import gpu, tiles

    seconds = TUNE_SECONDS if seconds is None else seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--tune-seconds {seconds:g}: give a number of seconds above 0")
    place = find_place(None, device)
    assert not isinstance(place, Limits)
    arch = gpu.architecture(place) if gpu.available(place) else None
    if arch is None:
        raise ValueError(
            "--tune needs an NVIDIA GPU of compute capability 8.0 or more, and Triton; it found "
            "none here"
        )
    layers = [layer for found in find_layers(models).values() for layer in found]
    names = listed(formats) or Plan.formats
    Plan(model="", layers=(), tokens=(1,), formats=names, rotation=16)  # refuses unknown formats
    work = tune.problems(arch, layers, names, parse_tokens(tokens) or tiles.BUCKETS)
    table, file = tune.current(arch), tune.path(arch)
    require_writable(file)
    log = TuningLog(tune.log_path(arch), torch.cuda.get_device_name(place))
    kept: set[object] = set()
    with progress.bar(quiet, "tuning") as step:

        def keep(row: tiles.Row) -> None:
            nonlocal table
            table = tune.updated(table, row, torch.cuda.get_device_name(place))
            tune.write(table)
            kept.add((row.operation, row.format, row.tokens, row.n, row.k))
            what = f"{row.operation} {row.format} {row.tokens} tokens {row.n}×{row.k}"
            step(len(kept), len(work), f"{what}: {row.microseconds} µs, {row.tile}")

        left = tile_search.tune(
            arch,
            [(one, tune.starts(table, one)) for one in work],
            partial(tile_timing.timer, device=place),
            log,
            keep,
            seconds=seconds,
            clock=time.monotonic,
        )
    if not quiet:
        rest = f"; {left} could go on: call it again" if left else ""
        display.note(f"{len(kept)} rows of {file} are timed now{rest} (log: {log.path})")
