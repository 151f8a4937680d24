"""What ``ptq analyze --direct-cast`` and ``--advise`` print."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from ptq.cli import display
from ptq.runtime.figures import number, percent

if TYPE_CHECKING:
    from ptq.pipeline.advice import Advice, Point
    from ptq.pipeline.cast_results import DirectCast

SHOWN = 9.0  # bits per weight up to which points of a front are printed


def print_direct_cast(found: "DirectCast") -> None:
    """Every format and form against the original; who wins, INT or FP; what broke."""
    from ptq.numerics.formats import FORMATS
    from ptq.numerics.hardware_cost import relative_area
    from ptq.pipeline.cast_results import PAPER_MODELS, collapsed, versus

    text = found.identity.get("text")
    table = Table(
        title=f"direct cast, weights and inputs to nearest, {text}: {found.tokens} predictions in "
        f"windows of {found.seq_len}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("format", no_wrap=True)
    for name in ("bits", "area", "perplexity", "KL", "KL top 25", "as printed", "top-1"):
        table.add_column(name, justify="right")
    original = (number(found.reference_perplexity, 5), "0", "0", "0", "100 %")
    table.add_row("original", "16", "–", *original, style="dim")
    for cast in found.casts:
        fmt = FORMATS[cast.format]
        table.add_row(
            f"{cast.format}{' rotated' if cast.rotated else ''}",
            f"{fmt.bits_per_weight:g}",
            f"{relative_area(fmt):.2f}",
            number(cast.perplexity, 5),
            number(cast.kl),
            number(cast.kl_top25),
            number(cast.kl_top25_printed),
            percent(cast.top1_agreement),
        )
    display.out.print(table)
    wins = Table(title="INT against FP by KL over the top 25", box=box.SIMPLE_HEAD)
    for name in ("form", "INT / FP"):
        wins.add_column(name, no_wrap=True)
    for name in ("KL INT / FP", "winner", "INT wins windows", "in the study, models"):
        wins.add_column(name, justify="right")
    for row in versus(found):
        wins.add_row(
            "rotated" if row.rotated else "as it is",
            f"{row.ints}/{row.floats}",
            f"{row.kl_top25[0] / row.kl_top25[1]:.2f}",
            "INT" if row.ints_win else "FP",
            f"{row.won} of {row.windows}",
            f"{row.paper} of {PAPER_MODELS}",
        )
    display.out.print(wins)
    display.out.print(
        "nats per token; as printed: in the unit of the study's tables, × 10⁶ / 25; area: gates of "
        "a unit over those of mxfp8, a model and no synthesis (docs/int-vs-fp.md).",
        style="dim",
    )
    for name in collapsed(found):
        display.out.print(
            f"{name}: rotation more than doubles its KL: something broke, do not compare it",
            style="yellow",
        )


def print_advice(advice: "Advice") -> None:
    """What was chosen, what uniform formats would come to, and the front."""
    what = (
        f"{advice.budget:g} bits per weight"
        if advice.budget is not None
        else f"a loss of {advice.ceiling:g} nats per token"
    )
    table = Table(
        title=f"advice for {what}, {advice.damage.scheme}, by {advice.measure}: losses predicted, "
        "balanced and rounded to nearest",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("choice", no_wrap=True)
    for name in ("bits", "KL", "KL top 25"):
        table.add_column(name, justify="right")
    table.add_column("share of the weights", ratio=1)
    _row(table, "chosen", advice.point, style="bold")
    for point in advice.uniform:
        _row(table, f"all {point.label}", point, style="" if point.best else "dim")
    for point in advice.front:
        if point.bits <= max(SHOWN, advice.point.bits):
            _row(table, "front", point)
    display.out.print(table)
    if abs(advice.point.stored_bits - advice.point.bits) > 0.005:
        display.out.print(
            f"six-bit codes take a byte on disk: {advice.point.stored_bits:.2f} bits per weight "
            "there; leave mxint6 and mxfp6 out with --formats where that matters.",
            style="dim",
        )


def _row(table: Table, name: str, point: "Point", style: str = "") -> None:
    shares = ", ".join(f"{label} {share:.0%}" for label, share in point.shares.items())
    losses = (number(point.kl, 3), number(point.kl_top25, 3))
    table.add_row(name, f"{point.bits:.3f}", *losses, shares, style=style)
