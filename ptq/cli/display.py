"""What the command line shows: tables and JSON on stdout, messages on stderr."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from ptq.cli.figures import duration, number, percent, size
from ptq.cli.terminal import err, note, out, printable
from ptq.runtime.evaluate import TOP, Evaluation
from ptq.runtime.inspect import Report, block, kind, mean, natural
from ptq.runtime.verify import Verdict

if TYPE_CHECKING:  # ptq inspect must not wait for transformers
    from ptq.pipeline.forecast import Forecast
    from ptq.pipeline.plan import Plan


class Messages(logging.Handler):
    """Warnings of the library as lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(
            f"{record.levelname.lower()}: {record.getMessage()}",
            style="yellow",
            soft_wrap=True,
        )


def print_json(data: object) -> None:
    """JSON that any parser reads: infinity and NaN become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str) + "\n")


def _finite(data: object) -> object:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def print_verdict(verdict: Verdict, *, quiet: bool) -> None:
    """A line for each problem, or one that there is none; what was not looked at as a remark."""
    for line in verdict.problems:
        out.print(" ".join(line.split()), markup=False, soft_wrap=True)
    if verdict.ok and not quiet:
        looked = ", ".join(verdict.checked)
        out.print(f"{verdict.path}: ok ({looked})", markup=False, soft_wrap=True)
    if not quiet:
        note(f"not checked: {'; '.join(verdict.unchecked)}")


def print_plan(plan: "Plan", seconds: float | None) -> None:
    """What a run is about to do, with how much text, and how long that takes."""
    time = "" if seconds is None else f"; about {duration(seconds)} here"
    note(f"{plan.levers}{time}")
    if plan.about_budget:
        note(plan.about_budget)
    if plan.about_inputs:
        note(plan.about_inputs)


# ---------------------------------------------------------------- tables


def print_evaluation(model: str, reference: str | None, text: str, result: Evaluation) -> None:
    """One table: the reference first, if there is one, then the model."""
    table = Table(
        title=f"{text}: {result.tokens} predictions in {result.windows} windows of "
        f"{result.seq_len} tokens",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold")
    for name in ("perplexity", "nll", "KL", f"KL top {TOP}", "top-1", "tokens/s"):
        table.add_column(name, justify="right")
    if reference is not None:
        table.add_row(
            reference,
            number(result.reference_perplexity),
            number(result.reference_nll),
            "0",
            "0",
            "100 %",
            "–",
            style="dim",
        )
    table.add_row(
        model,
        number(result.perplexity),
        number(result.nll),
        number(result.kl),
        number(result.kl_top25),
        percent(result.top1_agreement),
        f"{result.tokens_per_second:.0f}",
    )
    out.print(table)
    if reference is not None:
        out.print(
            "nats per token; KL(reference ‖ model) over the full vocabulary; "
            f"KL top {TOP}: over the reference's {TOP} most likely tokens, both renormalised "
            f"(as the INT-vs-FP paper prints it, × 10⁶ / {TOP}: {number(result.kl_top25_printed)})",
            style="dim",
        )


def print_report(report: Report, *, layers: bool) -> None:
    """Size and formats by kind of module, what was kept, and with ``layers`` the error of every
    block and kind."""
    schemes = " + ".join(sorted({row.scheme for row in report.layers}))
    out.print(
        Text(printable(str(Path(report.path))), "bold"),
        f" {' + '.join(report.formats)} {schemes}, dialect {report.dialect}",
    )
    out.print(
        f"{size(report.bytes)} of tensors ({size(report.file_bytes)} on disk), "
        f"{report.bytes / report.source_bytes:.0%} of {size(report.source_bytes)} at 16 bits; "
        f"{report.bits_per_weight:.2f} bits per quantized weight, "
        f"{report.bits_per_parameter:.2f} per parameter"
    )
    out.print(
        "run here by " + "; ".join(f"{how} ({count} layers)" for how, count in report.runs.items())
    )
    if layers and report.recipe:
        choices = {
            key: value for key, value in report.recipe.items() if value not in (None, [], "")
        }
        out.print(
            "recipe: " + ", ".join(f"{key}={value}" for key, value in choices.items()),
            style="dim",
        )
    if nested := sorted({row.nested for row in report.layers if row.nested}):
        bits = " or ".join(map(str, nested))
        wide = number(mean(row.wide_error for row in report.layers), 3)
        out.print(
            f"codes hold those of {bits} bits (--bits {nested[0]}), which errors are of; as they "
            f"are stored the mean is {wide}"
        )
    out.print(_kinds(report))
    if layers and any(row.error is not None for row in report.layers):
        out.print(_errors(report))


def _kinds(report: Report) -> Table:
    table = Table(title="by kind of module", box=box.SIMPLE_HEAD)
    table.add_column("module")
    for name in ("count", "format", "rot.", "bal.", "bits", "size", "error", "held out", "RTN"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, int, float], list] = {}
    for row in report.layers:
        groups.setdefault(
            (kind(row.layer), row.format, row.rotation, row.balance or 0.0), []
        ).append(row)
    for (name, fmt, rotation, balance), rows in groups.items():
        weights = sum(math.prod(row.shape) for row in rows)
        table.add_row(
            name,
            str(len(rows)),
            fmt,
            str(rotation) if rotation > 1 else "none",
            f"{balance:g}" if balance else "none",
            f"{8 * sum(row.bytes for row in rows) / weights:.2f}",
            size(sum(row.bytes for row in rows)),
            number(mean(row.error for row in rows), 3),
            number(mean(row.held_out_error for row in rows), 3),
            number(mean(row.rtn_error for row in rows), 3),
        )
    unquantized: dict[tuple[str, str], list] = {}
    for tensor in report.kept:
        parts = tensor.name.split(".")
        unquantized.setdefault(
            (".".join(parts[-2:]) if len(parts) > 1 else tensor.name, tensor.dtype), []
        ).append(tensor)
    for (name, dtype), tensors in unquantized.items():
        table.add_row(
            name,
            str(len(tensors)),
            dtype.lower(),
            "none",
            "none",
            f"{8 * sum(t.bytes for t in tensors) / sum(math.prod(t.shape) for t in tensors):.2f}",
            size(sum(t.bytes for t in tensors)),
            *("–", "–", "–"),
            style="dim",
        )
    return table


def _errors(report: Report) -> Table:
    """Blocks down, kinds across; a cell is the mean error of its layers."""
    kinds = list(dict.fromkeys(kind(row.layer) for row in report.layers))
    table = Table(
        title="output error ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration text"
        if all(row.of_outputs for row in report.layers)
        else "error of the weights ‖W - Ŵ‖² / ‖W‖² where no inputs were measured",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("block")
    for name in kinds:
        table.add_column(name, justify="right")
    cells: dict[str, dict[str, list[float | None]]] = {}
    for row in report.layers:
        cells.setdefault(block(row.layer), {}).setdefault(kind(row.layer), []).append(row.error)
    for name in sorted(cells, key=natural):
        table.add_row(name, *(number(mean(cells[name].get(k, [])), 3) for k in kinds))
    return table


# ---------------------------------------------------------------- figures


def print_forecast(model: str, forecast: "Forecast") -> None:
    """What a run will need, part by part, and whether this machine has it."""
    out.print(
        Text(printable(model), "bold"),
        f" {forecast.parameters / 1e9:.2f} billion parameters, {forecast.blocks} blocks; "
        f"{forecast.layers} layers with {forecast.quantized / forecast.parameters:.1%} of them "
        "would be quantized",
    )
    out.print(
        f"result {size(forecast.output_bytes)}, "
        f"{forecast.output_bytes / forecast.source_bytes:.0%} of "
        f"{size(forecast.source_bytes)}; {forecast.bits_per_quantized_weight:.2f} bits per "
        "quantized weight, "
        f"{forecast.bits_per_parameter:.2f} per parameter"
    )
    out.print(f"levers: {forecast.levers}")
    table = Table(title="memory at the peak", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("size", justify="right")
    for part in ("program", "activations", "block", "hessians", "solver"):
        table.add_row(part, size(getattr(forecast, part)))
    table.add_row("peak", size(forecast.peak_bytes), style="bold")
    out.print(table)
    if forecast.rounds > 1:
        out.print(
            f"Hessians of experts in {forecast.rounds} rounds (all at once would be "
            f"{size(forecast.hessians_at_once)}; --hessian-memory): the same result, for one more "
            "pass over the experts"
        )
    verdict = "fits" if forecast.peak_bytes < 0.9 * forecast.machine_bytes else "does NOT fit"
    time = "" if forecast.seconds is None else f"; about {duration(forecast.seconds)} here"
    out.print(
        f"{verdict} in the {size(forecast.machine_bytes)} that this machine has "
        f"({forecast.device}){time}"
    )
