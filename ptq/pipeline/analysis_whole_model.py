"""The whole model on the page of an analysis: what a direct cast to each format costs, and the
formats that were advised."""

from ptq.drawing.heat_map import Tile, tile_map
from ptq.drawing.page import Figure, Section, Table
from ptq.drawing.scatter import ParetoPoint, front, pareto
from ptq.drawing.style import COUNT
from ptq.model.layer_names import block_label, block_of, kinds
from ptq.numerics.formats import FORMATS
from ptq.pipeline.advice import Advice, Point
from ptq.pipeline.analysis_layers import form_words
from ptq.pipeline.cast_results import DirectCast, collapsed, versus

KL = "KL in nats per token"


def direct_cast(found: DirectCast) -> Section:
    """The model rounded to nearest in every format, against the original."""
    points = [
        ParetoPoint(
            bits=FORMATS[cast.format].bits_per_weight,
            quality=cast.kl,
            label=cast.format,
            group=form_words(False, cast.rotated),
        )
        for cast in found.casts
    ]
    broken = collapsed(found)
    words = [
        "All linear layers rounded to nearest at once, weights and inputs, without calibration: "
        f"means over {found.tokens} predictions in windows of {found.seq_len} tokens. The "
        f"original's perplexity is {found.reference_perplexity:.3f}."
    ]
    if broken:
        words.append(
            f"Rotation breaks {', '.join(broken)} here: no verdict should rest on these rows."
        )
    return Section(
        name="cast",
        title="The whole model in each format",
        words=tuple(words),
        figures=(
            Figure(
                title="Bits and KL to the original",
                caption=_on_front(points),
                picture=pareto(
                    points, quality=KL,
                    label=f"Bits per weight against KL of {len(points)} casts.",
                ),
            ),
        ),
        tables=(
            Table(
                title="Casts",
                head=("format", "form", "bits", "perplexity", "KL", "KL top 25", "as printed",
                      "same top-1"),
                rows=tuple(
                    (
                        cast.format,
                        form_words(False, cast.rotated),
                        f"{FORMATS[cast.format].bits_per_weight:g}",
                        f"{cast.perplexity:.4g}",
                        f"{cast.kl:.4g}",
                        f"{cast.kl_top25:.4g}",
                        f"{cast.kl_top25_printed:.0f}",
                        f"{cast.top1_agreement:.1%}",
                    )
                    for cast in found.casts
                ),
                words=frozenset((0, 1)),
            ),
            Table(
                title="INT or FP by KL over the top 25, beside the study's twelve models",
                head=("INT / FP", "form", "INT", "FP", "the better", "windows INT wins",
                      "models INT wins in the study"),
                rows=tuple(
                    (
                        f"{row.ints} / {row.floats}",
                        form_words(False, row.rotated),
                        f"{row.kl_top25[0]:.4g}",
                        f"{row.kl_top25[1]:.4g}",
                        row.ints if row.ints_win else row.floats,
                        f"{row.won} of {row.windows}",
                        f"{row.paper} of 12",
                    )
                    for row in versus(found)
                ),
                words=frozenset((0, 1)),
            ),
        ),
    )  # fmt: skip


def advice(found: Advice) -> Section:
    """The choice of a format for every layer, on the front of bits against predicted loss."""
    points = [
        *(_pareto_point(p, found, "one format", p.label) for p in found.uniform),
        *(_pareto_point(p, found, "mixed", "") for p in found.front),
        _pareto_point(found.point, found, "advised", "advised"),
    ]
    wanted = (
        f"at most {found.budget:g} bits per weight"
        if found.budget is not None
        else f"a loss of at most {found.ceiling:g} nats per token"
    )
    return Section(
        name="advice",
        title="A format for every layer",
        words=(
            f"The choice that loses least for {wanted}: {found.point.bits:.3f} bits per weight, "
            f"predicted KL {found.point.kl:.4g}. Losses were measured layer by layer and add up, "
            "to second order; ptq eval of the result is the judge.",
        ),
        figures=(
            Figure(
                title="Bits and predicted loss",
                caption=_on_front(points),
                picture=pareto(
                    points, quality=f"predicted {KL}",
                    label=f"Bits per weight against predicted KL: {len(found.uniform)} uniform "
                    f"formats, {len(found.front)} mixtures, and the one advised.",
                ),
            ),
            _choices(found),
        ),
        tables=(
            Table(
                title="Points of the front",
                head=("bits per weight", "KL", "KL top 25", "of the weights"),
                rows=tuple(
                    (f"{p.bits:.3f}", f"{p.kl:.4g}", f"{p.kl_top25:.4g}", _shares(p))
                    for p in found.front
                ),
                folded=True,
                words=frozenset((3,)),
            ),
        ),
    )  # fmt: skip


def _pareto_point(point: Point, found: Advice, group: str, label: str) -> ParetoPoint:
    loss = getattr(point, found.measure)
    return ParetoPoint(bits=point.bits, quality=loss, label=label, group=group)


def _shares(point: Point) -> str:
    return ", ".join(f"{share:.0%} {label}" for label, share in point.shares.items())


def _on_front(points: list[ParetoPoint]) -> str:
    names = [p.label for p in front(points) if p.label]
    return f"On the front: {', '.join(names)}." if names else ""


def _choices(found: Advice) -> Figure:
    """Which option every layer has; those of least weight are one colour where there are more
    than colours."""
    chosen = {
        layer: unit.options[option].label
        for unit, option in zip(found.damage.units, found.choice, strict=True)
        for layer in unit.layers
    }
    labels = list(found.point.shares)
    shown = labels if len(labels) <= COUNT else [*labels[: COUNT - 1], "others"]
    kind = kinds(chosen)
    blocks = list(dict.fromkeys(map(block_of, chosen)))
    columns = list(dict.fromkeys(kind.values()))
    places: dict[tuple[int, int], list[str]] = {}
    for layer, label in chosen.items():
        at = blocks.index(block_of(layer)), columns.index(kind[layer])
        places.setdefault(at, []).append(label)
    tiles = []
    for (row, column), options in places.items():
        most = max(options, key=options.count)
        where = f"block {block_label(blocks[row])}, {columns[column]}"
        of = "" if len(options) == 1 else f" in {options.count(most)} of {len(options)} layers"
        tiles.append(
            Tile(
                row=row,
                column=column,
                choice=min(labels.index(most), len(shown) - 1),
                title=f"{where}: {most}{of}",
            )
        )
    return Figure(
        title="What each layer gets",
        caption=_shares(found.point) + ".",
        picture=tile_map(
            [block_label(block) for block in blocks], columns, tiles, shown,
            label=f"Map of the advised formats: {_shares(found.point)}.",
        ),
    )  # fmt: skip
