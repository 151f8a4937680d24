"""An analysis as a page: which layers lose what, who wins and whether that was foreseen, what bits
buy, and what to do.

Sections whose data are not there are left out.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ptq import __version__
from ptq.drawing.axes import short
from ptq.drawing.heat_map import Cell, Tile, heat_map, shade_edges, tile_map
from ptq.drawing.histogram import Line, histogram
from ptq.drawing.page import Card, Figure, Page, Section, Table, render
from ptq.drawing.scatter import ParetoPoint, Point, agreement, front, pareto
from ptq.model.layer_names import block_label, block_of, kinds
from ptq.numerics.formats import FORMATS
from ptq.numerics.int_vs_fp import PAIRS
from ptq.numerics.tensor_statistics import BINS
from ptq.pipeline.analysis import GROUPS, LayerAnalysis, OutputErrors, TensorAnalysis, Variant
from ptq.pipeline.analysis_files import Analysis
from ptq.pipeline.analysis_summary import NARROW, Wins, lines, tensors, wins, worst

POINTS = 400  # of a plot: more are thinned evenly
FORMS = ((False, False), (False, True), (True, False), (True, True))  # balanced, rotated


@dataclass(frozen=True, kw_only=True)
class Least:
    """The four-bit format and form in which a layer's outputs have the least error."""

    error: float
    format: str
    form: OutputErrors

    @property
    def words(self) -> str:
        return f"{self.format} {form_words(self.form.balanced, self.form.rotated)}"


def analysis_page(
    found: Analysis, points: Sequence[ParetoPoint] = (), *, quality: str = "KL in nats per token"
) -> str:
    """The page of an analysis, as HTML.

    Args:
        points: of a front of bits against ``quality``, measured or predicted on the whole model.
    """
    rule = str(found.identity["scales"])
    layers = [layer for block in found.blocks for layer in block.layers]
    rows = wins(found.blocks, rule)
    sections = (
        _worst_layers(found),
        _errors(layers),
        _winners(rows),
        _crest(found, rule),
        _theory(found),
        _bits(layers, points, quality),
    )
    return render(
        Page(
            kind="ptq analyze: which format for which layer, and why",
            title=model_name(found.model),
            facts=_facts(found, rule),
            summary=tuple(_summary(layers, rows, found)),
            sections=tuple(section for section in sections if section is not None),
            foot="Weights and inputs are rounded to nearest here, without calibration: GPTQ loses "
            "less, and errors of layers are not those of a model (ptq eval measures these). All "
            "figures are in analysis.json and analysis.csv beside this page. Made by ptq "
            f"{__version__}.",
        )
    )


def model_name(model: str) -> str:
    """A model as it was given, without the folders that it lies in."""
    return PurePath(model).name if model.startswith(("/", ".", "~", "\\")) else model


def form_words(balanced: bool, rotated: bool) -> str:
    """A form in words."""
    words = [*(["balanced"] if balanced else []), *(["rotated"] if rotated else [])]
    return ", ".join(words) or "as it is"


def _facts(found: Analysis, rule: str) -> tuple[tuple[str, str], ...]:
    text = found.identity.get("text")
    text = text if isinstance(text, dict) else {}
    layers = sum(len(block.layers) for block in found.blocks)
    return (
        ("layers", f"{layers} in {len(found.blocks)} blocks"),
        ("tensors", str(sum(1 for _ in tensors(found.blocks)))),
        ("text", f"{text.get('tokens', '?')} tokens of {text.get('source', '?')}"),
        ("scales", rule),
        ("took", f"{found.seconds:.0f} s"),
    )


# ---------------------------------------------------------------- in short


def _summary(layers: Sequence[LayerAnalysis], rows: Sequence[Wins], found: Analysis):
    by_format = {}
    for fmt in NARROW:
        for form in FORMS:
            errors = [e.both[fmt] for layer in layers for e in _of_form(layer, form, fmt)]
            if errors:
                by_format[fmt, form] = statistics.median(errors)
    if by_format:
        (fmt, form), least = min(by_format.items(), key=lambda item: item[1])
        others = [
            f"{name} {short(min(v for (n, _), v in by_format.items() if n == name))}"
            for name in NARROW
            if name != fmt and any(n == name for n, _ in by_format)
        ]
        yield (
            f"Of four-bit formats, {fmt} ({form_words(*form)}) loses least: {short(least)} of the "
            f"outputs' energy in the median layer, weights and inputs rounded to nearest. The "
            f"others at their best: {', '.join(others)}."
        )
    closest = PAIRS[-1][0].name  # the pair of which rotation changes the winner
    narrow = {
        row.rotated: row
        for row in rows
        if (row.role, row.balanced, row.ints) == ("all", False, closest)
    }
    if len(narrow) == 2:
        plain, rotated = narrow[False], narrow[True]
        yield (
            f"INT or FP? {plain.ints} rounds {plain.share:.0%} of tensors better than "
            f"{plain.floats} as they are, and {rotated.share:.0%} after rotation."
        )
    hits = [(row.hits["integrated"], row.tensors) for row in rows
            if row.role == "all" and "integrated" in row.hits]  # fmt: skip
    if hits:
        share = sum(h * n for h, n in hits) / sum(n for _, n in hits)
        yield f"The crest factors of blocks foretell the winner in {share:.1%} of all cases."
    if hurt := worst(found.blocks, 1):
        yield f"{hurt[0].name} will hurt most: {hurt[0].error:.4f} at its best in four bits."


def _of_form(layer: LayerAnalysis, form: tuple[bool, bool], fmt: str) -> list[OutputErrors]:
    """The errors of a layer in a form, if the format is known there; where balancing changes
    nothing there is no balanced form, and the other one stands for it."""
    same = [e for e in layer.errors if e.rotated == form[1] and fmt in e.both]
    exact = [e for e in same if e.balanced == form[0]]
    return exact[:1] or same[:1]


# ---------------------------------------------------------------- layers


def _worst_layers(found: Analysis) -> Section | None:
    hurt = worst(found.blocks)
    if not hurt:
        return None
    return Section(
        name="worst",
        title=f"The {len(hurt)} layers that will hurt, and what to do",
        words=(
            "The largest errors of outputs that are left in four bits, each layer in its best "
            "format and form.",
        ),
        cards=tuple(
            Card(
                title=layer.name,
                figure=f"{layer.error:.4f} in {layer.format}, "
                f"{form_words(layer.balanced, layer.rotated)}",
                words=tuple(_sentence(words) for words in layer.advice),
            )
            for layer in hurt
        ),
    )


def _sentence(words: str) -> str:
    first = words.partition(" ")[0]
    return f"{words if first in FORMATS else first[:1].upper() + words[1:]}."


def _least(layer: LayerAnalysis, *, weights: bool) -> Least | None:
    known = [
        (errors[name], name, form)
        for form in layer.errors
        for errors in (form.weights if weights else form.both,)
        for name in NARROW
        if name in errors
    ]
    if not known:
        return None
    error, name, form = min(known, key=lambda item: item[0])
    return Least(error=error, format=name, form=form)


def _errors(layers: Sequence[LayerAnalysis]) -> Section | None:
    both = {layer.name: least for layer in layers if (least := _least(layer, weights=False))}
    alone = {layer.name: least for layer in layers if (least := _least(layer, weights=True))}
    if not both:
        return None
    kind = kinds(both)
    blocks = list(dict.fromkeys(map(block_of, both)))
    columns = list(dict.fromkeys(kind.values()))
    places: dict[tuple[int, int], list[str]] = {}
    for name in both:
        at = blocks.index(block_of(name)), columns.index(kind[name])
        places.setdefault(at, []).append(name)
    rows = [block_label(block) for block in blocks]
    edges = shade_edges(least.error for of in (both, alone) for least in of.values())
    return Section(
        name="layers",
        title="Error by depth and kind of layer",
        words=(
            "‖XWᵀ - X̂Ŵᵀ‖² / ‖XWᵀ‖² of each layer's outputs, in the four-bit format and form (as it "
            "is, rotated, balanced, both) that loses least there; lower is better. Numbers to the "
            "left are blocks, from the first to the last.",
        ),
        figures=(
            Figure(
                title="Weights and inputs in four bits",
                caption="W4A4. Shades are equal ratios.",
                picture=heat_map(
                    rows, columns, _cells(places, both, rows, columns),
                    label=f"Heat map of the output error with weights and inputs in four bits, "
                    f"{len(rows)} blocks by {len(columns)} kinds of layer.",
                    edges=edges,
                ),
            ),
            Figure(
                title="Weights alone in four bits",
                caption="W4A16, in the same shades: what is lighter here is what inputs cost.",
                picture=heat_map(
                    rows, columns, _cells(places, alone, rows, columns),
                    label="Heat map of the output error with weights alone in four bits.",
                    edges=edges,
                ),
            ),
            Figure(
                title="The format that loses least",
                caption="W4A4. Point at a cell for the form in which it does.",
                picture=tile_map(
                    rows, columns, _tiles(places, both, rows, columns), NARROW,
                    label="Map of the four-bit format with the least error: "
                    + ", ".join(f"{fmt} {_count(both, fmt)}" for fmt in NARROW) + ".",
                ),
            ),
        ),
        tables=(_grid_table("Weights and inputs, as a table", rows, columns, places, both),),
    )  # fmt: skip


def _count(both: dict[str, Least], fmt: str) -> int:
    return sum(least.format == fmt for least in both.values())


Places = dict[tuple[int, int], list[str]]


def _cells(
    places: Places, of: dict[str, Least], rows: Sequence[str], columns: Sequence[str]
) -> list[Cell]:
    cells = []
    for (row, column), names in places.items():
        errors = [of[name].error for name in names]
        where = f"block {rows[row]}, {columns[column]}"
        if len(names) == 1:
            told = f"{where}: {errors[0]:.4g}, {of[names[0]].words}"
        else:
            told = (
                f"{where}: mean {statistics.fmean(errors):.4g} of {len(names)} layers, "
                f"{min(errors):.4g} to {max(errors):.4g}"
            )
        cells.append(Cell(row=row, column=column, value=statistics.fmean(errors), title=told))
    return cells


def _tiles(
    places: Places, of: dict[str, Least], rows: Sequence[str], columns: Sequence[str]
) -> list[Tile]:
    tiles = []
    for (row, column), names in places.items():
        formats = [of[name].format for name in names]
        most = statistics.mode(formats)
        told = (
            of[names[0]].words
            if len(names) == 1
            else f"{most} in {formats.count(most)} of {len(names)} layers"
        )
        where = f"block {rows[row]}, {columns[column]}"
        tiles.append(
            Tile(row=row, column=column, choice=NARROW.index(most), title=f"{where}: {told}")
        )
    return tiles


def _grid_table(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    places: Places,
    of: dict[str, Least],
) -> Table:
    def cell(row: int, column: int) -> str:
        names = places.get((row, column))
        return short(statistics.fmean(of[name].error for name in names)) if names else "–"

    return Table(
        title=title,
        head=("block", *columns),
        rows=tuple(
            (name, *(cell(i, j) for j in range(len(columns)))) for i, name in enumerate(rows)
        ),
        folded=True,
    )


# ---------------------------------------------------------------- INT or FP


def _winners(rows: Sequence[Wins]) -> Section | None:
    shown = [row for row in rows if row.role == "all"]
    if not shown:
        return None
    laws = ("printed", "corrected", "integrated")
    return Section(
        name="winners",
        title="INT or FP: who rounds more tensors better",
        words=(
            "Every weight and input, rounded to nearest in pairs of formats of the same size. A "
            "tensor is a win of the format with the higher QSNR (signal over rounding noise, in "
            "dB). “In the study” is Figure 4 of “INT v.s. FP” for Llama-3.1-8B, without balancing.",
        ),
        tables=(
            Table(
                title="Wins of INT, and how often a law of the crest factor names the winner",
                head=("INT / FP", "form", "INT dB", "FP dB", "INT wins", "in the study", "printed",
                      "corrected", "blocks"),
                rows=tuple(
                    (
                        f"{row.ints} / {row.floats}",
                        form_words(row.balanced, row.rotated),
                        f"{row.qsnr[0]:.2f}",
                        f"{row.qsnr[1]:.2f}",
                        f"{row.share:.1%}",
                        "–" if row.balanced else f"{row.paper:.1%}",
                        *(f"{row.hits[law]:.1%}" if law in row.hits else "–" for law in laws),
                    )
                    for row in shown
                ),
                words=frozenset((0, 1)),
            ),
        ),
    )  # fmt: skip


# ---------------------------------------------------------------- crest factors


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


def _crest(found: Analysis, rule: str) -> Section | None:
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
            chosen = [t for t in tensors(found.blocks) if t.role == role]
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


def _theory(found: Analysis) -> Section | None:
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    kind = kinds(layer.name for block in found.blocks for layer in block.layers)
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
                for tensor in tensors(found.blocks)
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


# ---------------------------------------------------------------- bits


def _bits(
    layers: Sequence[LayerAnalysis], points: Sequence[ParetoPoint], quality: str
) -> Section | None:
    given = list(points)
    of_layers = [
        ParetoPoint(
            bits=FORMATS[name].bits_per_weight,
            quality=statistics.fmean(errors),
            label=name,
            group=group,
        )
        for group, which in (("weights and inputs", "both"), ("weights alone", "weights"))
        for name in FORMATS
        if (errors := [
            min(getattr(form, which)[name] for form in layer.errors if name in form.both)
            for layer in layers
            if any(name in form.both for form in layer.errors)
        ])
    ]  # fmt: skip
    figures: list[Figure] = []
    tables: list[Table] = []
    if given:
        figures.append(_front("The whole model", given, quality))
        tables.append(_points_table("The whole model as a table", given, quality))
    mean_error = "mean error of layers"
    for group in dict.fromkeys(p.group for p in of_layers):
        some = [p for p in of_layers if p.group == group]
        figures.append(_front(f"One format for all layers: {group}", some, mean_error))
    if of_layers:
        tables.append(_points_table("One format for all layers, as a table", of_layers, mean_error))
    if not figures:
        return None
    return Section(
        name="bits",
        title="What bits buy",
        words=(
            "The line is the front: with no more bits nothing else here loses less. Errors of "
            "layers are those of outputs, each layer in its best form.",
        ),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def _front(title: str, points: Sequence[ParetoPoint], quality: str) -> Figure:
    best = front(points)
    names = ", ".join(f"{p.label} ({p.bits:.3g})" for p in best[:6] if p.label)
    return Figure(
        title=title,
        caption=f"On the front: {names}." if names else "",
        picture=pareto(
            [ParetoPoint(bits=p.bits, quality=p.quality, label=p.label) for p in points],
            quality=quality,
            label=f"{title}: bits per weight against {quality}, {len(points)} points, "
            f"{len(best)} on the front.",
        ),
    )


def _points_table(title: str, points: Sequence[ParetoPoint], quality: str) -> Table:
    best = {(p.bits, p.quality) for p in front(points)}
    return Table(
        title=title,
        head=("what", "of", "bits per weight", quality, "on the front"),
        rows=tuple(
            (p.label or "mixed", p.group or "–", f"{p.bits:.3g}", f"{p.quality:.4g}",
             "yes" if (p.bits, p.quality) in best else "no")
            for p in sorted(points, key=lambda p: (p.group, p.bits, p.quality))
        ),
        folded=True,
        words=frozenset((0, 1)),
    )  # fmt: skip
