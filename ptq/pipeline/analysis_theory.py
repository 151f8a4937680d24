"""Theory on the page of an analysis: crest factors against the crossovers, and QSNR predicted
against measured."""

import statistics
from collections.abc import Iterable, Sequence

from ptq.drawing.histogram import Line, histogram
from ptq.drawing.page import Figure, Section, Table
from ptq.drawing.scatter import Point, agreement
from ptq.model.layer_names import block_label, block_of, kinds
from ptq.numerics.formats import FORMATS
from ptq.numerics.int_vs_fp import PAIRS
from ptq.numerics.tensor_statistics import BINS
from ptq.pipeline.analysis import GROUPS, BlockAnalysis, TensorAnalysis, Variant
from ptq.pipeline.analysis_layers import form_words
from ptq.pipeline.analysis_summary import lines, tensors

POINTS = 400  # of a plot: more are thinned evenly


def _variant(tensor: TensorAnalysis, *, rotated: bool) -> Variant | None:
    """The form that is not balanced."""
    found = (v for v in tensor.variants if not v.balanced and v.rotated == rotated)
    return next(found, None)


def _histogram(found: Iterable[TensorAnalysis], size: int, *, rotated: bool) -> list[int]:
    total = [0] * BINS
    for tensor in found:
        variant = _variant(tensor, rotated=rotated)
        for crest in variant.crest if variant else ():
            if crest.size == size:
                total = [a + b for a, b in zip(total, crest.histogram, strict=True)]
    return total


def crest_factors(blocks: Sequence[BlockAnalysis], rule: str) -> Section | None:
    """Histograms by group and role against the crossovers of a scale rule; None without tensors."""
    crossings = lines(rule)
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    for size in GROUPS:
        top = size**0.5
        edges = [1 + (top - 1) * i / BINS for i in range(BINS + 1)]
        of_size = {name: laws for name, laws in crossings.items()
                   if FORMATS[name].group_size == size}  # fmt: skip
        drawn = [
            Line(at=at, name=f"{name}, {law}", dashed=law != "blocks")
            if law != "blocks"
            else Line(at=at, name=f"{name} wins below {at:.2f}")
            for name, laws in of_size.items()
            for law, at in laws.items()
            if at is not None and at < top
        ]
        for role, words in (("weight", "Weights"), ("input", "Inputs")):
            chosen = [t for t in tensors(blocks) if t.role == role]
            before = _histogram(chosen, size, rotated=False)
            after = _histogram(chosen, size, rotated=True)
            if not sum(before):
                continue
            middle = [_median(edges, counts) for counts in (before, after)]
            figures.append(
                Figure(
                    title=f"{words}, blocks of {size}",
                    caption=f"Median {middle[0]:.2f} before rotation, {middle[1]:.2f} after.",
                    picture=histogram(
                        edges,
                        (("as they are", before), ("rotated", after)),
                        drawn,
                        x_name="crest factor, max / rms of a block",
                        label=f"Histogram of crest factors of {role}s in blocks of {size}: median "
                        f"{middle[0]:.2f} before rotation and {middle[1]:.2f} after.",
                    ),
                )
            )
            rows.append((f"{words}, blocks of {size}", *(f"{m:.3f}" for m in middle),
                         f"{sum(before)}"))  # fmt: skip
    if not figures:
        return None
    return Section(
        name="crest",
        title="Crest factors, before and after rotation",
        words=(
            "The largest number of a block over its rms decides who wins: integers left of a line, "
            "floats right of it. Solid lines are where real blocks cross; dotted ones are the "
            "printed and the corrected formula (docs/int-vs-fp.md). MXINT8 wins everywhere. "
            "Rotation spreads what is large over the block, and brings most blocks to about 2.1 "
            "(of 16) and 2.4 (of 32), where Gaussian numbers lie.",
        ),
        figures=tuple(figures),
        tables=(
            Table(
                title="Medians as a table",
                head=("blocks", "as they are", "rotated", "count"),
                rows=tuple(rows),
                folded=True,
            ),
            _crossover_table(crossings),
        ),
    )


def _crossover_table(crossings: dict[str, dict[str, float | None]]) -> Table:
    def shown(at: float | None) -> str:
        return "none" if at is None else f"{at:.2f}"

    return Table(
        title="Crossovers as a table: the crest factor below which INT wins",
        head=("INT", "group", "printed", "corrected", "blocks"),
        rows=tuple(
            (name, str(FORMATS[name].group_size),
             *(shown(laws[law]) for law in ("printed", "corrected", "blocks")))
            for name, laws in crossings.items()
        ),
        folded=True,
    )  # fmt: skip


def _median(edges: Sequence[float], counts: Sequence[int]) -> float:
    """The median of what was counted, within its bin as if spread evenly."""
    half, seen = sum(counts) / 2, 0
    for i, count in enumerate(counts):
        if count and seen + count >= half:
            return edges[i] + (edges[i + 1] - edges[i]) * (half - seen) / count
        seen += count
    return edges[-1]


# ---------------------------------------------------------------- predicted and measured


def predictions(blocks: Sequence[BlockAnalysis]) -> Section | None:
    """A plot for every format that a law predicts; None where there is none."""
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    kind = kinds(layer.name for block in blocks for layer in block.layers)
    thinned = 1
    for name in (fmt.name for pair in reversed(PAIRS) for fmt in pair):
        series: list[tuple[str, list[Point]]] = []
        for rotated in (False, True):
            points = [
                Point(
                    x=figures_of.integrated,
                    y=figures_of.qsnr,
                    title=f"{block_label(block_of(tensor.name))} {kind.get(tensor.name)} "
                    f"{tensor.role}: predicted {figures_of.integrated:.2f} dB, measured "
                    f"{figures_of.qsnr:.2f}",
                )
                for tensor in tensors(blocks)
                if (variant := _variant(tensor, rotated=rotated)) is not None
                and (figures_of := variant.formats.get(name)) is not None
                and figures_of.integrated is not None
            ]
            series.append((form_words(False, rotated), points))
        every = [p for _, points in series for p in points]
        if not every:
            continue
        off = [abs(p.x - p.y) for p in every]
        far = max(every, key=lambda p: abs(p.x - p.y))
        rows.append((name, str(len(every)), f"{statistics.median(off):.2f}", f"{max(off):.2f}",
                     far.title.partition(":")[0]))  # fmt: skip
        step = max(-(-len(every) // POINTS), 1)
        thinned = max(thinned, step)
        figures.append(
            Figure(
                title=name,
                caption=f"Off by {statistics.median(off):.2f} dB in the median, by "
                f"{max(off):.2f} at most ({rows[-1][-1]}).",
                picture=agreement(
                    [(said, points[::step]) for said, points in series],
                    x_name="predicted, dB",
                    y_name="measured, dB",
                    label=f"QSNR in {name}, predicted against measured, of {len(every)} tensors: "
                    f"off by {statistics.median(off):.2f} dB in the median.",
                ),
            )
        )
    if not figures:
        return None
    said = "" if thinned == 1 else f" Every {_ordinal(thinned)} point is drawn; figures are of all."
    return Section(
        name="theory",
        title="QSNR, predicted and measured",
        words=(
            "A point is a weight or an input in a format; on the line, theory is right. Predicted "
            "from the crest factors of its blocks alone, by integrating the rounding of an element "
            f"over a block. Rings lie beyond the frame: inputs that have most of their energy in a "
            f"few numbers, of which nothing but luck says how they round.{said}",
        ),
        figures=tuple(figures),
        tables=(
            Table(
                title="Deviations as a table",
                head=("format", "points", "median, dB", "largest, dB", "of"),
                rows=tuple(rows),
                folded=True,
                words=frozenset((0, 4)),
            ),
        ),
    )


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
