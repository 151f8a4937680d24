"""What is said after a run: what it cost in accuracy, in words and numbers, which layers suffered
most and what can be done, and what to do next."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from ptq.cli.display import two_widths
from ptq.cli.outlook import ALARM, LABEL, labelled, plain
from ptq.cli.terminal import out
from ptq.pipeline.against_nearest import AgainstNearest
from ptq.pipeline.readers import OURS, readers_in_words
from ptq.runtime.figures import number, percent, size, span
from ptq.runtime.inspect import LayerRow, Report, mean

# KL(original ‖ quantized) in nats per token up to which a result is called so: of SmolLM2-135M,
# NVFP4 weights by themselves have 0.06, with 4-bit inputs 0.18, rounded to nearest 0.4.
WORDS = (
    (0.01, "hard to tell from the original"),
    (0.05, "close to the original"),
    (0.15, "a loss that shows in measurements"),
    (0.5, "a loss that shows in answers"),
    (float("inf"), "badly damaged"),
)
WORST = 3  # layers that are named
FAR = 3.0  # times the mean error from which on a layer stands out
DRIFT = 1.3  # times the calibration error on text kept aside: more means too little text


def print_outcome(
    report: Report, dialect: str, reason: str, seconds: float, compared: AgainstNearest | None
) -> None:
    """A few lines: size and time, who opens it, what was lost, where, and what can be done."""
    grid = labelled()
    schemes = " + ".join(sorted({row.scheme for row in report.layers}))
    grid.add_row(
        "written",
        plain(
            f"{report.path}: {' + '.join(report.formats)} {schemes}, "
            f"{size(report.bytes)}, {report.bytes / report.source_bytes:.0%} of "
            f"{size(report.source_bytes)} at 16 bits, in {span(seconds)}"
        ),
    )
    words = readers_in_words(dialect, reason)
    grid.add_row("opens in", plain(words, ALARM if dialect == OURS else ""))
    if compared is not None:
        grid.add_row("verdict", plain(verdict(compared), "bold"))
    if report.tuning is not None:
        grid.add_row("tuning", plain(str(report.tuning)))
    if two := two_widths(report):
        grid.add_row("codes", plain(two.removeprefix("codes ")))
    for label, line in _layers(report):
        grid.add_row(label, plain(line))
    out.print(grid)


def verdict(compared: AgainstNearest) -> str:
    """What the divergence from the original means, beside that of rounding to nearest."""
    word = next(word for limit, word in WORDS if compared.kl <= limit)
    told = (
        f"{word}: KL {number(compared.kl, 3)} nats per token on {compared.tokens:,} held-out tokens"
    )
    nearest = number(compared.nearest_kl, 3)
    if compared.avoided > 0.02:
        return f"{told}; rounding to nearest: {nearest}, of which {compared.avoided:.0%} is avoided"
    if compared.avoided < -0.02:
        return f"{told}; rounding to nearest: {nearest}, which is better: say --quality fast"
    return f"{told}, as by rounding to nearest"


def _layers(report: Report) -> Iterator[tuple[str, str]]:
    """(label, text): what layers lose, where most, and what can be done about it."""
    rows = [row for row in report.layers if row.error is not None]
    average = mean(row.error for row in rows)
    if average is None:
        return
    if all(row.of_outputs for row in rows):
        told = f"{percent(average)} of the output is lost on average"
    else:
        told = f"weights are off by {percent(average)} on average"
    nearest = mean(row.rtn_error for row in rows)
    if nearest is not None and nearest > 1.02 * average:
        told += f", {nearest / average:.1f} times less than by rounding to nearest"
    held = mean(row.held_out_error for row in rows)
    if held is not None:
        told += f"; {percent(held)} on text kept aside"
    yield "layers", told
    if report.recipe.get("algorithm") == "rtn":
        yield "", "--quality default reads text and loses less"
    if held is not None and held > DRIFT * average:
        more = "more --samples" if report.recipe.get("quality") == "best" else "--quality best"
        yield "", f"more text would help: {more}, or --calibration with text of your own"
    worst = sorted(rows, key=_error, reverse=True)[:WORST]
    named = ", ".join(f"{row.layer} {percent(_error(row))}" for row in worst)
    yield "worst", named
    if _error(worst[0]) > FAR * average:
        yield "", "to spare them: --eight-bit 10% (measures which layers need it), or --ignore NAME"


def _error(row: LayerRow) -> float:
    return row.error or 0.0


def print_next(model: str, path: Path, *, chats: bool, compared: bool) -> None:
    """The commands that make sense now."""
    place = shlex.quote(str(path))
    talk = f"ptq chat {place}" if chats else f"ptq generate {place} --prompt 'def main():'"
    commands = [
        (talk, "try it"),
        (f"ptq eval {place} --reference {shlex.quote(model)}", "perplexity and KL, on any --text"),
        (f"ptq inspect {place}", "the error of every layer"),
        (f"ptq serve {place}", "OpenAI's API, by vLLM or transformers"),
    ]
    if not compared:  # what was too dear to measure by itself comes first
        commands.insert(0, commands.pop(1))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=LABEL)
    grid.add_column(no_wrap=True)
    grid.add_column(style="dim")
    for index, (command, why) in enumerate(commands):
        grid.add_row("" if index else "next", plain(command), why)
    out.print(grid)
