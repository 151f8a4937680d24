"""An analysis as a page: which layers lose what, who wins and whether that was foreseen, what bits
buy, and what to do.

Sections whose data are not there are left out.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from ptq import __version__
from ptq.drawing.axes import short
from ptq.drawing.page import Figure, Page, Section, Table, render
from ptq.drawing.scatter import ParetoPoint, front, pareto
from ptq.numerics.formats import MICROSCALED
from ptq.numerics.int_vs_fp import PAIRS
from ptq.pipeline import analysis_whole_model
from ptq.pipeline.analysis import LayerAnalysis, OutputErrors
from ptq.pipeline.analysis_files import Analysis
from ptq.pipeline.analysis_layers import error_maps, form_words, worst_layers
from ptq.pipeline.analysis_summary import NARROW, Wins, tensors, wins, worst
from ptq.pipeline.analysis_theory import crest_factors, predictions

MEAN_ERROR = "mean error of layers"
FORMS = ((False, False), (False, True), (True, False), (True, True))  # balanced, rotated


def analysis_page(found: Analysis) -> str:
    """The page of an analysis, as HTML."""
    rule = str(found.identity["scales"])
    layers = [layer for block in found.blocks for layer in block.layers]
    rows = wins(found.blocks, rule)
    cast, advised = found.direct_cast, found.advice
    sections = (
        None if advised is None else analysis_whole_model.advice(advised),
        worst_layers(found.blocks),
        error_maps(layers),
        None if cast is None else analysis_whole_model.direct_cast(cast),
        _winners(rows),
        crest_factors(found.blocks, rule),
        predictions(found.blocks),
        _bits(layers),
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


# ---------------------------------------------------------------- bits


def _bits(layers: Sequence[LayerAnalysis]) -> Section | None:
    groups = {
        "weights and inputs": lambda form: form.both,
        "weights alone": lambda form: form.weights,
    }
    points: dict[str, list[ParetoPoint]] = {}
    for group, errors_of in groups.items():
        for name, fmt in MICROSCALED.items():
            known = [[errors_of(form)[name] for form in layer.errors if name in errors_of(form)]
                     for layer in layers]  # fmt: skip
            if any(known):
                mean = statistics.fmean(min(errors) for errors in known if errors)
                point = ParetoPoint(bits=fmt.bits_per_weight, quality=mean, label=name, group=group)
                points.setdefault(group, []).append(point)
    if not points:
        return None
    return Section(
        name="bits",
        title="What bits buy",
        words=(
            "One format for all layers, each in its best form: the mean error of outputs. The line "
            "is the front: with no more bits nothing else here loses less.",
        ),
        figures=tuple(
            Figure(
                title=group[:1].upper() + group[1:],
                caption=f"On the front: {', '.join(p.label for p in front(some))}.",
                picture=pareto(
                    [replace(p, group="") for p in some],
                    quality=MEAN_ERROR,
                    label=f"Bits per weight against {MEAN_ERROR}, {group}, {len(some)} formats.",
                ),
            )
            for group, some in points.items()
        ),
        tables=(
            Table(
                title="Bits and errors as a table",
                head=("format", "of", "bits per weight", MEAN_ERROR, "on the front"),
                rows=tuple(
                    (p.label, group, f"{p.bits:.3g}", f"{p.quality:.4g}",
                     "yes" if p in front(some) else "no")
                    for group, some in points.items()
                    for p in sorted(some, key=lambda p: (p.bits, p.quality))
                ),
                folded=True,
                words=frozenset((0, 1)),
            ),
        ),
    )  # fmt: skip
