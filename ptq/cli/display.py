"""What the command line shows: tables and JSON on stdout, messages on stderr."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from ptq.checkpoint.engines import Result
from ptq.cli.terminal import err, note, out
from ptq.reading.printable import printable
from ptq.runtime.figures import number
from ptq.runtime.inspect import Report, errors, kinds, mean
from ptq.runtime.tables import Table as Tabled
from ptq.runtime.verify import Verdict


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
    if verdict.engines:
        print_engines(verdict.engines)
    if not quiet:
        note(f"not checked: {'; '.join(verdict.unchecked)}")


def print_engines(engines: Iterable[Result]) -> None:
    """What engines made of a checkpoint."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("engine", "version", "result"):
        table.add_column(name)
    table.add_column("KL", justify="right", no_wrap=True)
    table.add_column("of ptq in bf16", justify="right", no_wrap=True)
    for found in engines:
        result = f"{found.outcome}: {found.reason}" if found.reason else found.outcome
        result += ", the same bits as ptq in bf16" if found.same_bits else ""
        kl, yardstick = (
            "" if value is None else f"{value:.1e}" for value in (found.kl, found.yardstick)
        )
        row = (found.engine, found.version, result, kl, yardstick)
        table.add_row(*(Text(printable(cell)) for cell in row))
    out.print(table)


def telling_engines(quiet: bool) -> Callable[[str], None]:
    """Says which engine is just opened, for ``on_engine``."""

    def on_engine(name: str) -> None:
        if not quiet:
            note(f"opening it in {name}")

    return on_engine


# ---------------------------------------------------------------- tables


def show(table: Tabled) -> None:
    """A table of a result on stdout; its notes below, dim."""
    shown = Table(title=table.title, box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.columns):
        if table.left(index):
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name, justify="right")
    for index, row in enumerate(table.rows):
        shown.add_row(*row, style="dim" if index in table.dim else None)
    out.print(shown)
    for line in table.notes:
        out.print(line, style="dim")


def print_report(report: Report, *, layers: bool) -> None:
    """Size and formats by kind of module, what was kept, and with ``layers`` the error of every
    block and kind."""
    schemes = " + ".join(sorted({row.scheme for row in report.layers}))
    out.print(
        Text(printable(str(Path(report.path))), "bold"),
        f" {' + '.join(report.formats)} {schemes}, dialect {report.dialect}",
    )
    out.print(report.sizes)
    out.print(
        "run here by " + "; ".join(f"{how} ({count} layers)" for how, count in report.runs.items())
    )
    if report.tuning is not None:
        out.print(f"tuning: {report.tuning}")
    if layers and report.recipe:
        choices = {
            key: value for key, value in report.recipe.items() if value not in (None, [], "")
        }
        out.print(
            "recipe: " + ", ".join(f"{key}={value}" for key, value in choices.items()),
            style="dim",
        )
    if two := two_widths(report):
        out.print(two)
    show(kinds(report))
    if layers and any(row.error is not None for row in report.layers):
        show(errors(report))


def two_widths(report: Report) -> str:
    """What there is to say of codes that hold narrower ones; empty if none do."""
    nested = sorted({row.nested for row in report.layers if row.nested})
    if not nested:
        return ""
    wide = number(mean(row.wide_error for row in report.layers), 3)
    return (
        f"codes hold those of {' or '.join(map(str, nested))} bits (--bits {nested[0]}), which "
        f"errors are of; as they are stored the mean is {wide}"
    )
