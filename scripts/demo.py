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
from ptq.cli import display
from ptq.cli.options import parse_device
from ptq.runtime import inspect as report
from ptq.runtime import loaded_model as models
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
    with display.quantizing(quiet=options.quiet) as on_block:
        ptq.quantize(models.demo_path(), out, recipe=recipe, overwrite=True, on_block=on_block)
    return out, time.perf_counter() - start


def measure(path: Path, original: models.Loaded, options: argparse.Namespace) -> Evaluation:
    """Perplexity, and divergence from the original, on held-out text."""
    model = models.load_model(path, device=parse_device(None))
    tokens = models.tokenize(model, "builtin", original)
    with display.evaluating(quiet=options.quiet) as on_window:
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
    original = display.number(first.evaluation.reference_perplexity)
    shown.add_row(
        "original", original, "0", "0", "100 %", "16", display.size(first.report.source_bytes), "–"
    )
    for row in rows:
        shown.add_row(
            row.name,
            display.number(row.evaluation.perplexity),
            display.number(row.evaluation.kl),
            display.number(row.evaluation.kl_top25),
            display.percent(row.evaluation.top1_agreement),
            f"{row.report.bits_per_weight:.2f}",
            display.size(row.report.bytes),
            f"{row.seconds:.1f} s",
        )
    return shown


def draw(rows: list[Row], path: Path, title: str) -> None:
    """A picture of the output error of every layer, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [layer.layer.removeprefix("model.layers.") for layer in rows[0].report.layers]
    figure, axes = pyplot.subplots(figsize=(max(8.0, 0.28 * len(names)), 5), layout="constrained")
    for row, marker in zip(rows, "osD", strict=False):
        errors = [layer.error or float("nan") for layer in row.report.layers]
        axes.semilogy(errors, marker=marker, markersize=4, linewidth=1, label=row.name)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylabel("‖(W - Ŵ)X‖² / ‖WX‖²")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


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
    picture = options.out / "layer-error.png"
    draw(rows, picture, f"output error by layer, {title}")
    print(f"checkpoints and {picture} are in {options.out}/")


if __name__ == "__main__":
    main()
