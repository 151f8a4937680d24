"""Layers of an analysis on its page: the worst of them, and maps of all by depth and kind."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.drawing.axes import short
from ptq.drawing.heat_map import Cell, Tile, heat_map, shade_edges, tile_map
from ptq.drawing.page import Card, Figure, Section, Table
from ptq.model.layer_names import block_label, block_of, kinds
from ptq.numerics.formats import FORMATS
from ptq.pipeline.analysis import BlockAnalysis, LayerAnalysis, OutputErrors
from ptq.pipeline.analysis_summary import NARROW, worst


def form_words(balanced: bool, rotated: bool) -> str:
    """A form in words."""
    words = [*(["balanced"] if balanced else []), *(["rotated"] if rotated else [])]
    return ", ".join(words) or "as it is"


@dataclass(frozen=True, kw_only=True)
class Least:
    """The four-bit format and form in which a layer's outputs have the least error."""

    error: float
    format: str
    form: OutputErrors

    @property
    def words(self) -> str:
        return f"{self.format} {form_words(self.form.balanced, self.form.rotated)}"


def worst_layers(blocks: Sequence[BlockAnalysis]) -> Section | None:
    """The layers of largest error, a card each; None where no error is known."""
    hurt = worst(blocks)
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


def error_maps(layers: Sequence[LayerAnalysis]) -> Section | None:
    """Maps of the least error of every layer, and of who has it; None where none is known."""
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
