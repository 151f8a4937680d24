"""What ``ptq analyze`` shows, as tables."""

from collections.abc import Sequence

from ptq.numerics.formats import FORMATS
from ptq.numerics.hardware_cost import relative_area
from ptq.pipeline.advice import Advice, Point
from ptq.pipeline.analysis import BlockAnalysis
from ptq.pipeline.analysis_summary import Worst, tensors, wins
from ptq.pipeline.cast_results import PAPER_MODELS, DirectCast, collapsed, versus
from ptq.runtime.figures import number, percent
from ptq.runtime.tables import Table

SHOWN = 9.0  # bits per weight up to which points of a front are shown


def win_table(blocks: Sequence[BlockAnalysis], rule: str) -> Table:
    """Who has the higher QSNR, INT or FP, in every form, and whether laws foresaw it."""
    count = sum(1 for _ in tensors(blocks))
    layers = sum(len(block.layers) for block in blocks)
    rows = []
    for row in wins(blocks, rule):
        if row.role != "all":
            continue
        laws = (row.hits.get(law) for law in ("printed", "corrected", "integrated"))
        rows.append(
            (
                _form(balanced=row.balanced, rotated=row.rotated),
                f"{row.ints}/{row.floats}",
                f"{row.qsnr[0]:.2f}",
                f"{row.qsnr[1]:.2f}",
                f"{row.share:.1%}",
                "–" if row.balanced else f"{row.paper:.1%}",
                *("–" if hit is None else f"{hit:.1%}" for hit in laws),
                f"{relative_area(FORMATS[row.ints], FORMATS[row.floats]):.2f}",
            )
        )
    return Table(
        title=f"{layers} layers, {count} tensors, scales {rule}: who has the higher QSNR",
        columns=(
            *("form", "INT / FP", "INT dB", "FP dB", "INT wins", "in the study"),
            *("printed", "corrected", "blocks", "area"),
        ),
        rows=tuple(rows),
        words=frozenset({1}),
        notes=(
            "printed, corrected, blocks: how often that law of the crest factor names the winner "
            "(docs/int-vs-fp.md); in the study: Figure 4, Llama-3.1-8B; area: gates of a unit, INT "
            "over FP, a model and no synthesis.",
        ),
    )


def _form(*, balanced: bool, rotated: bool) -> str:
    words = [*(["balanced"] if balanced else []), *(["rotated"] if rotated else [])]
    return " + ".join(words) or "as it is"


def worst_table(found: Sequence[Worst]) -> Table:
    """The layers that will hurt."""
    return Table(
        title="the layers that will hurt, at their best in four bits",
        columns=("layer", "output error", "what to do"),
        rows=tuple((w.name, f"{w.error:.4f}", "; ".join(w.advice)) for w in found),
        words=frozenset({2}),
    )


def cast_tables(found: DirectCast) -> list[Table]:
    """Every format and form against the original; who wins, INT or FP; what broke."""
    original = number(found.reference_perplexity, 5)
    rows = [("original", "16", "–", original, "0", "0", "0", "100 %")]
    for cast in found.casts:
        fmt = FORMATS[cast.format]
        rows.append(
            (
                f"{cast.format}{' rotated' if cast.rotated else ''}",
                f"{fmt.bits_per_weight:g}",
                f"{relative_area(fmt):.2f}",
                number(cast.perplexity, 5),
                number(cast.kl),
                number(cast.kl_top25),
                number(cast.kl_top25_printed),
                percent(cast.top1_agreement),
            )
        )
    text = found.identity.get("text")
    table = Table(
        title=f"direct cast, weights and inputs to nearest, {text}: {found.tokens} predictions in "
        f"windows of {found.seq_len}",
        columns=(
            *("format", "bits", "area", "perplexity", "KL", "KL top 25", "as printed", "top-1"),
        ),
        rows=tuple(rows),
        dim=frozenset({0}),
    )
    won = tuple(
        (
            "rotated" if row.rotated else "as it is",
            f"{row.ints}/{row.floats}",
            f"{row.kl_top25[0] / row.kl_top25[1]:.2f}",
            "INT" if row.ints_win else "FP",
            f"{row.won} of {row.windows}",
            f"{row.paper} of {PAPER_MODELS}",
        )
        for row in versus(found)
    )
    verdict = Table(
        title="INT against FP by KL over the top 25",
        columns=(
            *("form", "INT / FP", "KL INT / FP", "winner", "INT wins windows"),
            "in the study, models",
        ),
        rows=won,
        words=frozenset({1}),
        notes=(
            "nats per token; as printed: in the unit of the study's tables, × 10⁶ / 25; area: "
            "gates of a unit over those of mxfp8, a model and no synthesis (docs/int-vs-fp.md).",
            *(
                f"{name}: rotation more than doubles its KL: something broke, do not compare it"
                for name in collapsed(found)
            ),
        ),
    )
    return [table, verdict]


def advice_table(advice: Advice) -> Table:
    """What was chosen, what uniform formats would come to, and the front."""
    what = (
        f"{advice.budget:g} bits per weight"
        if advice.budget is not None
        else f"a loss of {advice.ceiling:g} nats per token"
    )
    points = [("chosen", advice.point), *((f"all {p.label}", p) for p in advice.uniform)]
    beaten = {1 + index for index, point in enumerate(advice.uniform) if not point.best}
    most = max(SHOWN, advice.point.bits)
    points += [("front", point) for point in advice.front if point.bits <= most]
    stored = advice.point.stored_bits
    return Table(
        title=f"advice for {what}, {advice.damage.scheme}, by {advice.measure}: losses predicted, "
        "balanced and rounded to nearest",
        columns=("choice", "bits", "KL", "KL top 25", "share of the weights"),
        rows=tuple(_row(name, point) for name, point in points),
        words=frozenset({4}),
        dim=frozenset(beaten),
        notes=(
            f"six-bit codes take a byte on disk: {stored:.2f} bits per weight there; leave mxint6 "
            "and mxfp6 out with --formats where that matters.",
        )
        if abs(stored - advice.point.bits) > 0.005
        else (),
    )


def _row(name: str, point: Point) -> tuple[str, ...]:
    shares = ", ".join(f"{label} {share:.0%}" for label, share in point.shares.items())
    return name, f"{point.bits:.3f}", number(point.kl, 3), number(point.kl_top25, 3), shares
