"""What measurements of layers say: rows of a table, markdown, a plot. Predictions are called so in
each."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ptq.bench.layers import DENSE, FORMATLESS
from ptq.bench.measurement import Limits, Measurement, block_sums
from ptq.drawing.curves import Curve, curves
from ptq.drawing.svg import Picture, side_by_side

WORDS = ("layer", "format", "backend")  # columns that are not numbers
INPUTS_ALONE = ("rotate", "quantize")  # no product, so nothing to compare with one
SPEEDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)  # marks of the axis
PANEL = 480.0  # width
OTHERS = 5
COLOURS = {  # of backends, by index
    "w4a16": 0,
    "rotate+w4a16": 2,
    "w4a4": 1,
    "rotate+w4a4": 4,
    "rotate+w4a8": 3,
    "fp8": OTHERS,
    "reference": 0,
}
DASHES = {"nvfp4": 0, "mxfp4": 1, "nvint4": 2, "mxint4": 3}  # likewise, of formats
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
    if path.suffix.lower() != ".svg":
        raise ValueError(f"--plot {path}: give a name that ends in .svg")
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
    sums = block_sums(measurements)
    dense = next(m.backend for m in sums if m.backend in DENSE)
    predicted = any(m.predicted for m in sums)
    whole = side_by_side(
        [_panel(model, [m for m in sums if m.model == model], dense)
         for model in dict.fromkeys(m.model for m in sums)],
        columns=2,
        title=f"The linear layers of a decoder block on {sums[0].device}",
        note=PREDICTED if predicted else f"measured {sums[0].date[:10]}",
        alarm=predicted,
    )  # fmt: skip
    path.write_text(whole.file(), "utf-8")


def _panel(model: str, sums: Sequence[Measurement], dense: str) -> Picture:
    base = {m.shape[0]: m.median_s for m in sums if m.backend in DENSE}
    tokens = sorted(base)
    lines: dict[tuple[str, tuple[tuple[float, float], ...]], list[str]] = {}
    for m in sums:
        if m.backend in (*DENSE, *INPUTS_ALONE):
            continue
        same = [x for x in sums if (x.backend, x.format) == (m.backend, m.format)]
        points = tuple(
            sorted((float(x.shape[0]), round(base[x.shape[0]] / x.median_s, 3)) for x in same)
        )
        # formats of equal size have one line in a prediction
        names = lines.setdefault((m.backend, points), [])
        names += [m.format] if m.format not in names else []
    found = [Curve(name=dense, points=tuple((float(n), 1.0) for n in tokens), colour=None)]
    for (backend, points), names in lines.items():
        said = backend if backend in FORMATLESS else f"{backend} {', '.join(names)}"
        found.append(
            Curve(
                name=f"{said} {points[-1][1]:.2f}×",
                points=points,
                colour=COLOURS.get(backend, OTHERS),
                dash=DASHES.get(names[0], 0),
            )
        )
    return curves(
        found,
        width=PANEL,
        x_ticks=[(float(count), str(count)) for count in tokens],
        y_ticks=[(speed, f"{speed:g}×") for speed in SPEEDS],
        x_name="tokens",
        y_name=f"speed, × {dense}, higher is better",
        title=model,
        label=f"Speed over {dense} of {model} by number of tokens.",
        unit="×",
    )
