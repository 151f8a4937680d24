"""Checkpoints as pages: one by one, and several of one model beside each other."""

from collections.abc import Sequence
from pathlib import Path

from ptq.drawing.heat_map import Cell, Tile, heat_map, shade_edges, tile_map
from ptq.drawing.layer_plot import LayerSeries, layer_plot
from ptq.drawing.page import Card, Figure, Page, Section, Table, render
from ptq.drawing.scatter import ParetoPoint, pareto
from ptq.drawing.style import COUNT
from ptq.drawing.svg import NARROW, WIDE
from ptq.model.layer_names import block_label, block_of, kinds
from ptq.runtime import tables
from ptq.runtime.comparison import Comparison
from ptq.runtime.figures import number, size
from ptq.runtime.inspect import LayerRow, Report, errors, mean
from ptq.runtime.inspect import kinds as by_kind

WORST = 6
FOOT = (
    "Errors are ‖(W - Ŵ)X‖² / ‖WX‖² of a layer's outputs on the text that the run read, or those "
    "of weights where it read none. They are not a model's loss: ptq eval measures that."
)


def inspect_page(report: Report) -> str:
    """A checkpoint as HTML."""
    known = [row for row in report.layers if row.error is not None]
    sections = (
        *((_maps(report), _lines(report), _worst(known)) if known else ()),
        _sizes(report),
        _recipe(report),
    )
    return render(
        Page(
            kind="ptq inspect: what a checkpoint holds",
            title=Path(report.path).resolve().name,
            facts=(
                ("format", " + ".join(report.formats) or "none"),
                ("scheme", " + ".join(sorted({row.scheme for row in report.layers})) or "none"),
                ("tensors", size(report.bytes)),
                ("at 16 bits", size(report.source_bytes)),
                ("bits per quantized weight", f"{report.bits_per_weight:.2f}"),
                ("bits per parameter", f"{report.bits_per_parameter:.2f}"),
                ("dialect", report.dialect),
            ),
            summary=tuple(_summary(report, known)),
            sections=tuple(section for section in sections if section is not None),
            foot=FOOT,
        )
    )


def _summary(report: Report, known: Sequence[LayerRow]):
    share = report.bytes / report.source_bytes if report.source_bytes else 1.0
    yield (
        f"{len(report.layers)} layers are quantized; the checkpoint takes {share:.0%} of what 16 "
        "bits for every number would."
    )
    if not known:
        yield "It does not say what its layers lost: it has no report of a run."
        return
    better = [(row.error, row.rtn_error) for row in known if row.error and row.rtn_error]
    what = "outputs" if all(row.of_outputs for row in known) else "weights"
    line = f"The mean error of {what} is {number(mean(row.error for row in known), 3)}"
    if better and any(a != b for a, b in better):
        ratio = sum(a for a, _ in better) / sum(b for _, b in better)
        line += f", {ratio:.2f} times that of rounding to nearest"
    yield f"{line}."
    worst = max(known, key=lambda row: row.error or 0.0)
    yield f"{worst.layer} lost most: {number(worst.error, 3)}."


def _grid(rows: Sequence[LayerRow]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Labels of blocks, kinds, and (row, column) by layer."""
    kind = kinds(row.layer for row in rows)
    blocks = list(dict.fromkeys(block_of(row.layer) for row in rows))
    columns = list(dict.fromkeys(kind.values()))
    places = {
        row.layer: (blocks.index(block_of(row.layer)), columns.index(kind[row.layer]))
        for row in rows
    }
    return [block_label(block) for block in blocks], columns, places


def _cells(
    rows: Sequence[LayerRow],
    figure: str,
    labels: Sequence[str],
    columns: Sequence[str],
    places: dict[str, tuple[int, int]],
) -> list[Cell]:
    by_place: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        value = getattr(row, figure)
        if value is not None:
            by_place.setdefault(places[row.layer], []).append(value)
    return [
        Cell(
            row=i,
            column=j,
            value=sum(values) / len(values),
            title=f"block {labels[i]}, {columns[j]}: {sum(values) / len(values):.4g}"
            + (f", mean of {len(values)} layers, {min(values):.3g} to {max(values):.3g}"
               if len(values) > 1 else ""),
        )
        for (i, j), values in by_place.items()
    ]  # fmt: skip


def _maps(report: Report) -> Section:
    labels, columns, places = _grid(report.layers)
    outputs = any(row.of_outputs for row in report.layers)
    of_text = "Error on the calibration text" if outputs else "Error of weights"
    maps = (
        ("error", of_text, "The layers as they are stored."),
        ("held_out_error", "Error on text that was kept aside", "In the same shades."),
        ("rtn_error", "Rounding to nearest", "What it would have cost, in the same shades."),
    )
    edges = shade_edges(
        v for name, *_ in maps[:2] for row in report.layers if (v := getattr(row, name)) is not None
    )
    figures = [
        Figure(
            title=title,
            caption=caption,
            picture=heat_map(
                labels, columns, cells, edges=edges,
                label=f"Heat map: {title.lower()}, {len(labels)} blocks by {len(columns)} kinds.",
            ),
        )
        for name, title, caption in maps
        if (cells := _cells(report.layers, name, labels, columns, places))
        and not (name == "rtn_error" and all(row.error == row.rtn_error for row in report.layers))
    ]  # fmt: skip
    if 1 < len(report.formats) <= COUNT:
        figures.append(_formats(report, labels, columns, places))
    return Section(
        name="layers",
        title="Error by depth and kind of layer",
        words=("Rows are blocks, from the first to the last; lower is better.",),
        figures=tuple(figures),
        tables=(_table(errors(report), folded=True),),
    )


def _formats(
    report: Report,
    labels: Sequence[str],
    columns: Sequence[str],
    places: dict[str, tuple[int, int]],
) -> Figure:
    found: dict[tuple[int, int], list[str]] = {}
    for row in report.layers:
        found.setdefault(places[row.layer], []).append(row.format)
    tiles = [
        Tile(
            row=i,
            column=j,
            choice=report.formats.index(max(names, key=names.count)),
            title=f"block {labels[i]}, {columns[j]}: {', '.join(sorted(set(names)))}",
        )
        for (i, j), names in found.items()
    ]
    return Figure(
        title="Format",
        caption="Which layers have more bits.",
        picture=tile_map(
            labels, columns, tiles, report.formats,
            label=f"Map of formats: {', '.join(report.formats)}.",
        ),
    )  # fmt: skip


def _lines(report: Report) -> Section:
    rows = report.layers
    series = [LayerSeries(name="as stored", values=tuple(row.error for row in rows))]
    if any(row.rtn_error not in (None, row.error) for row in rows):
        rtn = LayerSeries(name="rounded to nearest", values=tuple(row.rtn_error for row in rows))
        series.insert(0, rtn)
    return Section(
        name="order", title="Layers in the order of the model", figures=(_plot(rows, series),)
    )


def _plot(rows: Sequence[LayerRow], series: Sequence[LayerSeries]) -> Figure:
    names = [row.layer for row in rows]
    blocks = [block_label(block_of(name)) for name in names]
    label = (
        f"Error of {len(names)} layers in the order of the model: "
        f"{', '.join(s.name for s in series)}."
    )
    wide, narrow = (
        layer_plot(names, blocks, series, width=width, what="error", label=label)
        for width in (WIDE, NARROW)
    )
    return Figure(
        title="Error of every layer",
        caption="Logarithmic; numbers along the top are blocks.",
        picture=narrow,
        wide=wide,
    )


def _worst(known: Sequence[LayerRow]) -> Section:
    rows = sorted(known, key=lambda row: -(row.error or 0.0))[:WORST]
    return Section(
        name="worst",
        title="The layers that lost most",
        cards=tuple(
            Card(
                title=row.layer,
                figure=f"{number(row.error, 3)} in {row.format}",
                words=(
                    f"{row.shape[0]} × {row.shape[1]}, {row.algorithm}"
                    + (f", rotated by {row.rotation}" if row.rotation > 1 else ""),
                    f"Rounding to nearest would have cost {number(row.rtn_error, 3)}.",
                    *(
                        (f"{number(row.held_out_error, 3)} on text that was kept aside.",)
                        if row.held_out_error is not None
                        else ()
                    ),
                ),
            )
            for row in rows
        ),
    )


def _sizes(report: Report) -> Section:
    runs = "; ".join(f"{how} ({count} layers)" for how, count in report.runs.items())
    return Section(
        name="sizes",
        title="What takes how much",
        words=(f"Run on this machine by {runs}.",) if runs else (),
        tables=(_table(by_kind(report)),),
    )


def _recipe(report: Report) -> Section | None:
    chosen = tuple(
        (str(key), str(value))
        for key, value in report.recipe.items()
        if value not in (None, [], "")
    )
    if not chosen:
        return None
    table = Table(
        title="All choices", head=("choice", "value"), rows=chosen, folded=True,
        words=frozenset((0, 1)),
    )  # fmt: skip
    return Section(name="recipe", title="How it was made", tables=(table,))


def _table(of: tables.Table, *, folded: bool = False) -> Table:
    return Table(title=of.title, head=of.columns, rows=of.rows, folded=folded)


# ---------------------------------------------------------------- several


def compare_page(found: Comparison) -> str:
    """Checkpoints of one model as HTML."""
    every = found.checkpoints
    (table,) = found.tables()
    sections = (
        Section(
            name="figures",
            title="Beside each other",
            words=tuple(f"{note[:1].upper()}{note[1:]}." for note in table.notes),
            tables=(_table(table),),
        ),
        _compared_layers(found),
        _bits(found),
    )
    return render(
        Page(
            kind="ptq compare: checkpoints of one model",
            title=", ".join(c.name for c in every),
            facts=tuple((c.name, f"{' + '.join(c.report.formats)}, {size(c.report.bytes)}")
                        for c in every),
            summary=tuple(_verdict(found)),
            sections=tuple(section for section in sections if section is not None),
            foot=FOOT,
        )
    )  # fmt: skip


def _verdict(found: Comparison):
    known = [
        (e, c.name)
        for c in found.checkpoints
        if (e := found.error(c, outputs=found.of_outputs)) is not None
    ]
    if len(known) > 1:
        error, name = min(known)
        yield f"{name} has the least mean error of {_what(found)}, {number(error, 3)}."
    measured = [
        (c.evaluation.kl, c.name)
        for c in found.checkpoints
        if c.evaluation is not None and c.evaluation.kl is not None
    ]
    if len(measured) > 1:
        kl, name = min(measured)
        yield f"{name} is nearest to the reference: KL {number(kl, 3)} nats per token."
    smallest = min(found.checkpoints, key=lambda c: c.report.bytes)
    yield f"{smallest.name} is the smallest: {size(smallest.report.bytes)}."


def _what(found: Comparison) -> str:
    """What errors are of."""
    return "outputs" if found.of_outputs else "weights"


def _compared_layers(found: Comparison) -> Section | None:
    every = found.checkpoints
    cells = [
        Cell(row=i, column=j, value=error, title=f"{c.name}, {kind}: {error:.4g}")
        for j, c in enumerate(every)
        for i, kind in enumerate(found.shown_kinds)
        if (error := found.error(c, kind, outputs=found.of_outputs)) is not None
    ]
    if not cells:
        return None
    figures = [
        Figure(
            title="Error by kind of layer",
            caption=f"Means over layers, of {_what(found)}.",
            picture=heat_map(
                found.shown_kinds, [c.name for c in every], cells,
                label=f"Heat map of mean errors, {len(found.shown_kinds)} kinds by {len(every)} "
                "checkpoints.",
            ),
        )
    ]  # fmt: skip
    rows = [row for row in every[0].report.layers if row.layer in found.common]
    series = []
    for c in every[:COUNT]:
        of = {row.layer: row.error for row in c.rows(found.common, outputs=found.of_outputs)}
        if any(value is not None for value in of.values()):
            values = tuple(of.get(row.layer) for row in rows)
            series.append(LayerSeries(name=c.name, values=values))
    figures.append(_plot(rows, series))
    left_out = f" Lines are of the first {COUNT}." if len(every) > COUNT else ""
    return Section(
        name="layers",
        title="Which layers lose what",
        words=(f"Of the {len(found.common)} layers that all have; lower is better.{left_out}",),
        figures=tuple(reversed(figures)),
    )


def _bits(found: Comparison) -> Section | None:
    figures = []
    by_error = [
        ParetoPoint(bits=c.report.bits_per_weight, quality=error, label=c.name)
        for c in found.checkpoints
        if (error := found.error(c, outputs=found.of_outputs)) is not None
    ]
    by_kl = [
        ParetoPoint(bits=c.report.bits_per_weight, quality=c.evaluation.kl, label=c.name)
        for c in found.checkpoints
        if c.evaluation is not None and c.evaluation.kl is not None
    ]
    for points, quality, title in (
        (by_kl, "KL in nats per token", "Bits and KL to the reference"),
        (by_error, f"mean error of {_what(found)}", "Bits and mean error of layers"),
    ):
        if len(points) > 1:
            figures.append(
                Figure(
                    title=title,
                    caption="With no more bits, nothing on the line is beaten.",
                    picture=pareto(
                        points, quality=quality, label=f"{title}, {len(points)} checkpoints."
                    ),
                )
            )
    return Section(name="bits", title="What bits buy", figures=tuple(figures)) if figures else None
