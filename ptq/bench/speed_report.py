"""What measurements of layers say: rows of a table, markdown, a plot. Predictions are called so in
each."""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.bench.layers import DENSE, FORMATLESS
from ptq.bench.measurement import Limits, Measurement, block_sums

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS = ("layer", "format", "backend")  # columns that are not numbers
INPUTS_ALONE = ("rotate", "quantize")  # no product, so nothing to compare with one
SPEEDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)  # marks of the axis
PLOTS = (".svg", ".png", ".pdf")
GREY = "#777777"
COLOURS = {
    "w4a16": "#0072B2",
    "rotate+w4a16": "#56B4E9",
    "w4a4": "#D55E00",
    "rotate+w4a4": "#E69F00",
    "rotate+w4a8": "#CC79A7",
    "fp8": "#009E73",
    "reference": "#0072B2",
}
DASHES = {"nvfp4": "-", "mxfp4": "--", "nvint4": ":", "mxint4": "-.", "": "-"}
SAID = "Predicted, not measured"
PREDICTED = "predicted from a roofline, not measured"


# ---------------------------------------------------------------- tables


def table(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of cells), a row per measurement.

    ``of limit`` is the share of what the device does at most, of its copy bandwidth or of its
    matmul peak, whichever is larger; the last column compares with the dense product on the same
    layer and tokens in the same run. Predictions have no spread.
    """
    base = {(m.model, m.layer, m.shape[0]): m.median_s for m in measurements if m.backend in DENSE}
    measured = [m for m in measurements if not m.predicted]
    dense = next((m.backend for m in measurements if m.backend in DENSE), DENSE[0])
    rows = []
    for m in measurements:
        compared = None if m.backend in INPUTS_ALONE else base.get((m.model, m.layer, m.shape[0]))
        row = [m.layer, str(m.shape[0]), m.format or "–", m.backend, f"{m.median_s * 1e6:.1f}"]
        row += [f"{m.p20_s * 1e6:.1f}–{m.p80_s * 1e6:.1f}"] if measured else []
        row += [_figure(m.terabytes_per_second), _figure(m.tflops)]
        row += ["–" if m.share is None else f"{100 * m.share[0]:.0f} % {m.share[1]}"]
        row += [f"{compared / m.median_s:.2f}" if compared else "–"]
        rows.append(row)
    names = ["layer", "tokens", "format", "backend", "µs", *(["p20–p80"] if measured else [])]
    return [*names, "TB/s", "TFLOP/s", "of limit", f"× {dense}"], rows


def markdown(measurements: Sequence[Measurement], limits: Limits) -> str:
    """Where the numbers come from, and a table for each model."""
    predicted = any(m.predicted for m in measurements)
    parts = [provenance(measurements, limits).replace(SAID, f"**{SAID}**") + "\n"]
    for model in dict.fromkeys(m.model for m in measurements):
        names, rows = table([m for m in measurements if m.model == model])
        align = [" --- " if name in WORDS else " ---: " for name in names]
        lines = [
            f"| {' | '.join(names)} |",
            f"|{'|'.join(align)}|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        title = f"{model}, predicted" if predicted else model
        parts.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def provenance(measurements: Sequence[Measurement], limits: Limits) -> str:
    """One line: measured or predicted, on what, with which peaks and versions."""
    peaks = [("copy", limits.bandwidth, "TB/s")]
    peaks += [(name, getattr(limits, name), "TFLOP/s") for name in ("bf16", "fp8", "fp4")]
    known = ", ".join(f"{name} {_figure(rate / 1e12)} {unit}" for name, rate, unit in peaks if rate)
    at_most = f"{known} ({limits.source})" if known else limits.source
    if any(m.predicted for m in measurements):
        return f"{SAID}: the roofline of {limits.name}, {at_most}."
    last = measurements[-1]
    versions = (
        f"ptq {last.ptq}, torch {last.torch}, triton {last.triton or 'none'}, {last.date[:10]}"
    )
    return f"Measured on {limits.name}: {at_most}; {versions}."


def _figure(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


# ---------------------------------------------------------------- plot


def check_plot(path: Path, backends: Iterable[str]) -> None:
    """Raise ValueError where :func:`plot` would: before hours of measuring, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'ptq-llm[plot]'")
    if path.suffix not in PLOTS:
        raise ValueError(f"--plot {path}: give a name that ends in {', '.join(PLOTS)}")
    names = set(backends)
    if not names & set(DENSE) or not names - {*DENSE, *INPUTS_ALONE}:
        raise ValueError(
            "--plot draws speed over the dense product: time bf16 (on a CPU fp32) and another "
            "backend too"
        )


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Speed over the dense product by number of tokens: a panel per model, a line per backend and
    format, each summed over the layers of a decoder block. Both axes are logarithmic.

    Raises:
        ValueError: as :func:`check_plot`.
    """
    check_plot(path, [m.backend for m in measurements])
    import matplotlib
    from matplotlib.figure import Figure

    sums = block_sums(measurements)
    models = list(dict.fromkeys(m.model for m in sums))
    columns = min(len(models), 2)
    rows = math.ceil(len(models) / columns)
    dense = next(m.backend for m in sums if m.backend in DENSE)
    # the same bytes for the same numbers, and text as text
    with matplotlib.rc_context({"svg.hashsalt": "ptq", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(
            figsize=(7.0 if columns == 1 else 10.4, 3.3 * rows + 0.8), layout="constrained"
        )
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, model in zip(panels.flat, models, strict=False):
            _panel(axes, [m for m in sums if m.model == model], dense)
            axes.set_title(model, loc="left", fontsize=10, fontweight="bold")
        for axes in list(panels.flat)[len(models) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"speed, × {dense}")
        for axes in panels[-1]:
            axes.set_xlabel("tokens")
        predicted = any(m.predicted for m in sums)
        what = PREDICTED if predicted else f"measured {sums[0].date[:10]}"
        figure.suptitle(
            f"The linear layers of a decoder block on {sums[0].device}\n{what}",
            **{
                "x": 0.01,
                "ha": "left",
                "fontsize": 11,
                "color": "#B00020" if predicted else "black",
            },
        )
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: "Axes", sums: Sequence[Measurement], dense: str) -> None:
    base = {m.shape[0]: m.median_s for m in sums if m.backend in DENSE}
    curves: dict[tuple[str, tuple[tuple[int, float], ...]], list[str]] = {}
    for m in sums:
        if m.backend in (*DENSE, *INPUTS_ALONE):
            continue
        same = [x for x in sums if (x.backend, x.format) == (m.backend, m.format)]
        points = tuple(sorted((x.shape[0], round(base[x.shape[0]] / x.median_s, 3)) for x in same))
        names = curves.setdefault(
            (m.backend, points), []
        )  # formats of equal size have one line in a prediction
        names += [m.format] if m.format not in names else []
    tokens = sorted(base)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.plot(tokens, [1.0] * len(tokens), color=GREY, linewidth=1.0)
    ends, best = [(1.0, dense, GREY)], (1.0, tokens[0])
    for (backend, points), names in curves.items():
        colour = COLOURS.get(backend, GREY)
        counts, speeds = [x for x, _ in points], [y for _, y in points]
        axes.plot(
            counts,
            speeds,
            DASHES[names[0]],
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.5,
        )
        label = backend if backend in FORMATLESS else f"{backend} {', '.join(names)}"
        ends.append((speeds[-1], f"{label} {speeds[-1]:.2f}×", colour))
        best = max(best, *((y, x) for x, y in points))
    low, high = (math.log2(y) for y in axes.get_ylim())
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_yticks(SPEEDS, [f"{speed:g}×" for speed in SPEEDS])
    axes.minorticks_off()
    axes.set_ylim(2.0 ** min(low, -0.2), 2.0 ** max(high + 0.1, 1.0))
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if best[0] > 1:
        _label(axes, best[1], best[0], f"{best[0]:.2f}×", "black", (0, 7))
    _label_ends(axes, tokens[-1], ends)


def _label_ends(axes: "Axes", x: int, ends: list[tuple[float, str, str]]) -> None:
    """Names (y, name, colour) beside the last points, moved upwards where they would overlap."""
    low, high = (math.log2(y) for y in axes.get_ylim())
    place = -math.inf
    for y, name, colour in sorted(ends):
        place = max(math.log2(y), place + 0.06 * (high - low))
        _label(axes, x, 2.0**place, name, colour, (8, -3))


def _label(
    axes: "Axes", x: float, y: float, text: str, colour: str, offset: tuple[int, int]
) -> None:
    axes.annotate(
        text,
        (x, y),
        offset,
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        annotation_clip=False,
    )
