"""What an analysis comes to: who wins, whether that was predicted, which layers will hurt.

"Wins" are counted as the study counts them: a tensor is a win of the format with the higher QSNR.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptq.numerics.formats import FORMATS, MICROSCALED, Format
from ptq.numerics.int_vs_fp import PAIRS, corrected_qsnr, crossover, integrated_qsnr, printed_qsnr
from ptq.pipeline.analysis import (
    BlockAnalysis,
    LayerAnalysis,
    OutputErrors,
    TensorAnalysis,
    Variant,
)

LAWS = ("printed", "corrected", "integrated")
# Crest factors below which integers are better with searched scales (`mse`), simulated; at eight
# bits they always are.
SEARCHED = {"mxint8": None, "mxint6": 2.19, "mxint4": 2.29, "nvint4": 2.19}
# Figure 4 of the study: share of tensors on which integers win, without and with rotation.
PAPER = {
    "mxint8": (1.0, 1.0),
    "mxint6": (0.001, 0.055),
    "mxint4": (0.003, 0.013),
    "nvint4": (0.643, 0.993),
}
NARROW = tuple(name for name, fmt in MICROSCALED.items() if fmt.element.bits == 4)
HELPS = 0.85  # of an error: what is worth a step of its own
DELICATE = 2.0  # times the median error of all layers: where more bits are worth a thought


@dataclass(frozen=True, kw_only=True)
class Wins:
    """A pair of formats over all tensors in one form.

    Attributes:
        ints, floats: names of the formats.
        qsnr: means over tensors in dB, (INT, FP).
        share: of the tensors on which INT is better; ``paper``: the same in the study, for 8B
            parameters and inputs of six kinds.
        hits: by law, how often it names the winner; laws that do not apply are not there.
            ``crossover`` compares the mean crest factor with that at which blocks cross.
    """

    ints: str
    floats: str
    rotated: bool
    balanced: bool
    role: str
    tensors: int
    qsnr: tuple[float, float]
    share: float
    paper: float
    hits: dict[str, float]


def wins(blocks: Sequence[BlockAnalysis], rule: str = "absmax") -> list[Wins]:
    """A row for every pair, form and role ("all", "weight", "input"); forms that no tensor has are
    left out."""
    rows = []
    for balanced in (False, True):
        for rotated in (False, True):
            for pair in PAIRS:
                for role in ("all", "weight", "input"):
                    found = [
                        variant
                        for tensor in tensors(blocks)
                        for variant in tensor.variants
                        if role in ("all", tensor.role)
                        and (variant.balanced, variant.rotated) == (balanced, rotated)
                        and pair[0].name in variant.formats
                    ]
                    if found:
                        rows.append(_row(pair, found, role, rule))
    return rows


def tensors(blocks: Sequence[BlockAnalysis]) -> Iterator[TensorAnalysis]:
    """All tensors in the order of the model."""
    return (tensor for block in blocks for tensor in block.tensors)


def crossings(rule: str) -> dict[str, float | None]:
    """By the integers of a pair, the crest factor below which they are better, for the scale rule
    in force; None: everywhere."""
    if rule != "absmax":
        return dict(SEARCHED)
    return {pair[0].name: crossover(pair, integrated_qsnr) for pair in PAIRS}


def lines(rule: str) -> dict[str, dict[str, float | None]]:
    """Crossovers by pair for a plot: printed, corrected, and that of blocks."""
    laws = {"printed": printed_qsnr, "corrected": corrected_qsnr}
    blocks = crossings(rule)
    return {
        pair[0].name: {
            **{name: crossover(pair, law) for name, law in laws.items()},
            "blocks": blocks[pair[0].name],
        }
        for pair in PAIRS
    }


def _row(pair: tuple[Format, Format], found: Sequence[Variant], role: str, rule: str) -> Wins:
    names = (pair[0].name, pair[1].name)
    measured = [_better(variant, names, "qsnr") for variant in found]
    crossing = crossings(rule)[names[0]]
    hits: dict[str, float] = {}
    for law in LAWS:
        said = [_better(variant, names, law) for variant in found]
        if None not in said:
            hits[law] = _share(a == b for a, b in zip(said, measured, strict=True))
    by_crest = [crossing is None or _crest(variant, pair[0]) < crossing for variant in found]
    hits["crossover"] = _share(a == b for a, b in zip(by_crest, measured, strict=True))
    means = [statistics.fmean(variant.formats[n].qsnr for variant in found) for n in names]
    return Wins(
        ints=names[0],
        floats=names[1],
        rotated=found[0].rotated,
        balanced=found[0].balanced,
        role=role,
        tensors=len(found),
        qsnr=(means[0], means[1]),
        share=_share(measured),
        paper=PAPER[names[0]][found[0].rotated],
        hits=hits,
    )


def _better(variant: Variant, names: tuple[str, str], figure: str) -> bool | None:
    ints, floats = (getattr(variant.formats[name], figure) for name in names)
    return None if ints is None or floats is None else ints > floats


def _crest(variant: Variant, fmt: Format) -> float:
    return next(crest.mean for crest in variant.crest if crest.size == fmt.group_size)


def _share(values) -> float:
    found = list(values)
    return sum(map(bool, found)) / len(found)


# ---------------------------------------------------------------- layers


@dataclass(frozen=True, kw_only=True)
class Worst:
    """A layer that will hurt, and what to do.

    Attributes:
        error: of its outputs in ``format``, weights and inputs rounded to nearest, at its best;
            ``plain``: not rotated, not balanced.
        advice: sentences.
    """

    name: str
    format: str
    rotated: bool
    balanced: bool
    error: float
    plain: float
    advice: tuple[str, ...]


def errors_at(
    layer: LayerAnalysis, *, balanced: bool = False, rotated: bool = False
) -> OutputErrors | None:
    """The errors of a layer in that form; where balancing changes nothing, in the other one."""
    found = [form for form in layer.errors if form.rotated == rotated]
    return next((form for form in found if form.balanced == balanced), next(iter(found), None))


def best(layer: LayerAnalysis, names: Sequence[str]) -> tuple[str, OutputErrors] | None:
    """The format of ``names`` and the form in which a layer's outputs have the least error; None
    where none is known."""
    known = [(form.both[n], n, form) for form in layer.errors for n in names if n in form.both]
    if not known:
        return None
    _, name, form = min(known, key=lambda item: item[0])
    return name, form


def worst(blocks: Sequence[BlockAnalysis], count: int = 10) -> list[Worst]:
    """The layers of largest error at their best in four bits, and what to do about each."""
    inputs = {
        name: tensor
        for tensor in tensors(blocks)
        if tensor.role == "input"
        for name in tensor.layers
    }
    found: list[tuple[LayerAnalysis, str, OutputErrors]] = []
    for block in blocks:
        for layer in block.layers:
            if (choice := best(layer, NARROW)) is not None:
                found.append((layer, *choice))
    if not found:
        return []
    median = statistics.median(form.both[name] for _, name, form in found)
    found.sort(key=lambda item: -item[2].both[item[1]])
    return [
        _worst(layer, name, form, inputs.get(layer.name), median)
        for layer, name, form in found[:count]
    ]


def _worst(
    layer: LayerAnalysis,
    name: str,
    form: OutputErrors,
    read: TensorAnalysis | None,
    median: float,
) -> Worst:
    error = form.both[name]
    unchanged = errors_at(layer)
    plain = unchanged.both[name] if unchanged and name in unchanged.both else math.nan
    advice: list[str] = []
    steps = []
    if form.rotated:
        steps.append(f"rotate it (--rotation {FORMATS[name].group_size})")
    if form.balanced:
        steps.append("balance it (--balance 0.5)")
    if steps and error < HELPS * plain:
        advice.append(f"{' and '.join(steps)}: {plain:.4f} -> {error:.4f} in {name}")
    if error > form.weights[name] * 4:
        advice.append(
            f"its inputs cost most: with weights alone (w4a16) {form.weights[name]:.4f} is left"
        )
    if read is not None and read.channels.outliers:
        loud = read.channels
        are = "channel is an outlier" if loud.outliers == 1 else "channels are outliers"
        advice.append(
            f"{loud.outliers} input {are} ({', '.join(map(str, loud.loudest))}); "
            f"one per cent holds {loud.top_share:.0%} of the energy"
        )
    if read is not None and read.first_tokens is not None and read.first_tokens.amax > 4:
        advice.append(
            f"the first token reaches {read.first_tokens.amax:.0f} times as far as all others: "
            "take scales by token"
        )
    wide = best(layer, [n for n, fmt in MICROSCALED.items() if fmt.element.bits == 8])
    if error > DELICATE * median and wide is not None:
        advice.append(
            f"{error / median:.1f} times the median layer: give it eight bits "
            f"({wide[0]} {wide[1].both[wide[0]]:.5f}), as --eight-bit 10% does by measured loss"
        )
    return Worst(
        name=layer.name,
        format=name,
        rotated=form.rotated,
        balanced=form.balanced,
        error=error,
        plain=plain,
        advice=tuple(advice) or (f"{name} is its best format in four bits; nothing stands out",),
    )
