"""Quantize the bundled model with one format in three ways; print what each costs and draw the
error of every layer.

./scripts/demo [--format nvfp4] [--scheme w4a4] [--samples 64] [--out demo-output]
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

import ptq
from ptq.cli import display, progress
from ptq.cli.options import parse_device
from ptq.drawing.layer_plot import LayerSeries, layer_plot
from ptq.drawing.svg import WIDE, side_by_side
from ptq.model.layer_names import block_label, block_of
from ptq.runtime import figures
from ptq.runtime import inspect as report
from ptq.runtime import loaded_model as models
from ptq.runtime.checkpoint_page import compare_page
from ptq.runtime.comparison import compare_checkpoints
from ptq.runtime.evaluate import Evaluation, evaluate

# What each row of the table is, beside its format and scheme. The last is the best known recipe
# with a rotation.
METHODS: dict[str, dict[str, object]] = {
    "RTN": {"algorithm": "rtn", "rotation": 1, "scales": "absmax"},
    "GPTQ": {
        "algorithm": "gptq",
        "rotation": 1,
        "scales": "absmax",
        "order": "natural",
        "descent": 0,
    },
    "MR-GPTQ": {},
}
NVFP4_ROTATION = 16  # its default recipe has none; the demo shows MR-GPTQ as published


@dataclass(frozen=True)
class Row:
    """A method: what its checkpoint holds, what the text says about it, and how long making it
    took."""

    name: str
    report: report.Report
    evaluation: Evaluation
    seconds: float


def quantize(name: str, options: argparse.Namespace) -> tuple[Path, float]:
    """The checkpoint of a method, and the seconds it took."""
    given = dict(METHODS[name])
    if name == "MR-GPTQ" and options.format == "nvfp4":
        given["rotation"] = NVFP4_ROTATION
    given |= {"scheme": options.scheme, "samples": options.samples, "seq_len": 512}
    recipe = ptq.Recipe.default(options.format, **given)
    out = options.out / f"{options.format}-{options.scheme}-{name.lower()}"
    start = time.perf_counter()
    ptq.quantize("demo", out, recipe=recipe, overwrite=True, progress=not options.quiet)
    return out, time.perf_counter() - start


def measure(path: Path, original: models.Loaded, options: argparse.Namespace) -> Evaluation:
    """Perplexity, and divergence from the original, on held-out text."""
    model = models.load_model(path, device=parse_device(None))
    tokens = models.tokenize(model, "builtin", original)
    with progress.evaluating(quiet=options.quiet) as on_window:
        return evaluate(
            model.module,
            tokens,
            reference=original.module,
            seq_len=512,
            max_tokens=options.max_tokens,
            on_window=on_window,
        )


def table(rows: list[Row], title: str) -> Table:
    """One row for the original and one for each method."""
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    shown.add_column("")
    for column in ("ppl", "KL", "KL top 25", "top-1", "bits", "size", "time"):
        shown.add_column(column, justify="right", no_wrap=True)
    first = rows[0]
    original = figures.number(first.evaluation.reference_perplexity)
    shown.add_row(
        "original", original, "0", "0", "100 %", "16", figures.size(first.report.source_bytes), "–"
    )
    for row in rows:
        shown.add_row(
            row.name,
            figures.number(row.evaluation.perplexity),
            figures.number(row.evaluation.kl),
            figures.number(row.evaluation.kl_top25),
            figures.percent(row.evaluation.top1_agreement),
            f"{row.report.bits_per_weight:.2f}",
            figures.size(row.report.bytes),
            f"{row.seconds:.1f} s",
        )
    return shown


def _output_errors(row: Row, rows: list[Row]) -> dict[str, float | None]:
    """Errors of outputs by layer. Rounding to nearest reads no text and knows those of weights
    alone: what it costs outputs was measured beside a method that reads."""
    if all(layer.of_outputs for layer in row.report.layers):
        return {layer.layer: layer.error for layer in row.report.layers}
    readers = (r for r in rows if all(layer.of_outputs for layer in r.report.layers))
    reader = next(readers, None)
    return {} if reader is None else {x.layer: x.rtn_error for x in reader.report.layers}


def draw(rows: list[Row], order: list[str], title: str) -> str:
    """A picture of the output error of every layer, in the ``order`` of the model, one line for
    each method; the worst layers of the last are named. SVG."""
    errors = [_output_errors(row, rows) for row in rows]
    names = [name for name in order if name in errors[-1]]
    picture = layer_plot(
        names,
        [f"block {block_label(block_of(name))}" for name in names],
        [
            LayerSeries(name=row.name, values=tuple(of.get(name) for name in names))
            for row, of in zip(rows, errors, strict=True)
        ],
        width=WIDE,
        what="‖(W - Ŵ)X‖² / ‖WX‖²",
        label=title,
    )
    return side_by_side([picture], 1, title).file()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--scheme", default="w4a4", choices=["w4a16", "w4a4"])
    parser.add_argument(
        "--samples", type=int, default=64, help="calibration sequences of 512 tokens"
    )
    parser.add_argument("--max-tokens", type=int, default=32768, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args()
    torch.manual_seed(0)

    original = models.load_model("demo", device=parse_device(None))
    rows = []
    for name in METHODS:
        path, seconds = quantize(name, options)
        rows.append(Row(name, report.inspect(path), measure(path, original, options), seconds))
    title = f"{options.format} {options.scheme} of the bundled model"
    display.out.print(table(rows, f"{title}, {rows[0].evaluation.tokens} held-out predictions"))
    picture, page = options.out / "layer-error.svg", options.out / "compare.html"
    order = [name for name, _ in original.module.named_modules()]
    picture.write_text(draw(rows, order, f"output error by layer, {title}"), "utf-8")
    paths = [Path(row.report.path) for row in rows]
    page.write_text(compare_page(compare_checkpoints(paths)), "utf-8")
    print(f"checkpoints, {picture} and {page} are in {options.out}/")


if __name__ == "__main__":
    main()
