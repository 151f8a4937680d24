"""What a direct cast comes to: a whole model rounded to nearest in every format, and who is nearer
to the original, INT or FP.

The study compares formats so (its tables 3 and 12 to 15): no calibration, no search, scales that
never clip, weights and inputs of every linear layer in blocks, the output head left alone.
"""

import csv
import io
import math
from dataclasses import dataclass

from ptq.numerics.formats import FORMATS, MICROSCALED
from ptq.numerics.hardware_cost import relative_area
from ptq.numerics.int_vs_fp import PAIRS
from ptq.reading.schema import JsonObject

# Models of the study's twelve on which the integers have the smaller KL (its Table 3), without and
# with rotation.
PAPER_MODELS = 12
PAPER_WINS = {"mxint8": (12, 12), "mxint6": (0, 1), "mxint4": (0, 0), "nvint4": (0, 12)}
COLLAPSE = 2.0  # times the KL of the other form: a failure, and not a result to compare
PRINTED = 1e6 / 25  # the study prints a mean over 25 entries, times 10⁶


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The model in a format, against the original; nats per token, means over all predictions.

    Attributes:
        rotated: in Hadamard blocks of the format's group.
        kl: over the full vocabulary; ``kl_top25``: over the original's 25 most likely tokens, both
            sides renormalised.
        top1_agreement: share of positions where both find the same token most likely.
        windows: ``kl_top25`` by window.
    """

    format: str
    rotated: bool
    nll: float
    kl: float
    kl_top25: float
    top1_agreement: float
    windows: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)

    @property
    def kl_top25_printed(self) -> float:
        """``kl_top25`` in the unit of the study's tables."""
        return self.kl_top25 * PRINTED


@dataclass(frozen=True, kw_only=True)
class DirectCast:
    """All formats, with and without rotation.

    Attributes:
        identity: what decides the numbers: model, text, versions.
        tokens: predictions, windows * (seq_len - 1).
        reference_nll: of the original, nats per token.
        seconds: that it took, those of interrupted runs not counted.
    """

    identity: JsonObject
    tokens: int
    seq_len: int
    reference_nll: float
    seconds: float
    casts: tuple[Cast, ...]

    @property
    def reference_perplexity(self) -> float:
        return perplexity(self.reference_nll)

    def cast(self, format: str, *, rotated: bool) -> Cast:
        """That of a format, which is one of those cast."""
        found = (c for c in self.casts if c.format == format and c.rotated == rotated)
        return next(found)


@dataclass(frozen=True, kw_only=True)
class Versus:
    """A pair of formats in one form; pairs of figures are (INT, FP).

    Attributes:
        windows: of text; ``won``: how many of them the integers win by ``kl_top25``.
        paper: how many of the study's twelve models they win, by the same figure.
    """

    ints: str
    floats: str
    rotated: bool
    kl: tuple[float, float]
    kl_top25: tuple[float, float]
    perplexity: tuple[float, float]
    won: int
    windows: int
    paper: int

    @property
    def ints_win(self) -> bool:
        """As the study counts: by KL over the top 25."""
        return self.kl_top25[0] < self.kl_top25[1]


def versus(found: DirectCast) -> list[Versus]:
    """A row for every pair of which both formats were cast, and form."""
    cast = {(c.format, c.rotated): c for c in found.casts}
    rows = []
    for rotated in (False, True):
        for ints, floats in PAIRS:
            both = [cast.get((fmt.name, rotated)) for fmt in (ints, floats)]
            if both[0] is None or both[1] is None:
                continue
            a, b = both[0], both[1]
            rows.append(
                Versus(
                    ints=a.format,
                    floats=b.format,
                    rotated=rotated,
                    kl=(a.kl, b.kl),
                    kl_top25=(a.kl_top25, b.kl_top25),
                    perplexity=(a.perplexity, b.perplexity),
                    won=sum(x < y for x, y in zip(a.windows, b.windows, strict=True)),
                    windows=len(a.windows),
                    paper=PAPER_WINS[a.format][rotated],
                )
            )
    return rows


def collapsed(found: DirectCast) -> list[str]:
    """The formats that lose more than ``COLLAPSE`` times as much with rotation as without, by full
    KL: something broke, and no verdict on formats should rest on them."""
    cast = {(c.format, c.rotated): c.kl for c in found.casts}
    return [
        name
        for name in MICROSCALED
        if {(name, False), (name, True)} <= cast.keys()
        and cast[name, True] > COLLAPSE * cast[name, False]
    ]


def perplexity(nll: float) -> float:
    """exp(nll); infinite where that overflows."""
    return math.exp(nll) if nll < 700 else math.inf


def table(found: DirectCast) -> str:
    """A row for every format and form, the original first, as CSV with a head."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        (
            "format", "rotated", "bits_per_weight", "relative_area", "nll", "perplexity", "kl",
            "kl_top25", "kl_top25_printed", "top1_agreement",
        )
    )  # fmt: skip
    rows.writerow(
        ("original", "", "", "", _six(found.reference_nll), _six(found.reference_perplexity),
         "0", "0", "0", "1")
    )  # fmt: skip
    for cast in found.casts:
        fmt = FORMATS[cast.format]
        numbers = (
            fmt.bits_per_weight, relative_area(fmt), cast.nll, cast.perplexity, cast.kl,
            cast.kl_top25, cast.kl_top25_printed, cast.top1_agreement,
        )  # fmt: skip
        rows.writerow((cast.format, int(cast.rotated), *(_six(n) for n in numbers)))
    return text.getvalue()


def _six(number: float) -> str:
    return f"{number:.6g}"
