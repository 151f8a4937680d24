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
from ptq.runtime import figures
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


def draw(rows: list[Row], order: list[str], path: Path, title: str) -> None:
    """A picture of the output error of every layer, in the ``order`` of the model, one line for
    each method; the worst layers of the last are named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    errors = [{layer.layer: layer.error or float("nan") for layer in r.report.layers} for r in rows]
    names = [name for name in order if name in errors[0]]
    places = range(len(names))
    figure, axes = pyplot.subplots(figsize=(max(8.0, 0.28 * len(names)), 5), layout="constrained")
    for row, of, marker in zip(rows, errors, "osD", strict=False):
        axes.semilogy([of[n] for n in names], marker, linestyle="-", linewidth=0.6, label=row.name)
    last = [errors[-1][name] for name in names]
    worst = sorted(places, key=last.__getitem__)[-3:][::-1]
    named = ", ".join(".".join(names[place].split(".")[-3:]) for place in worst)
    axes.plot(worst, [last[place] for place in worst], "o", markersize=12, fillstyle="none",
              color="black", label=f"worst of {rows[-1].name}: {named}")  # fmt: skip
    axes.set_xticks(places, [n.rpartition(".")[2] for n in names], rotation=90, fontsize=7)
    for place, name in enumerate(names):
        block = name.split(".")[2]
        if place == 0 or names[place - 1].split(".")[2] != block:
            axes.axvline(place - 0.5, color="0.8", linewidth=0.8)
            axes.text(place - 0.4, 0.99, f"block {block}", va="top", fontsize=7, color="0.4",
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_ylabel("‖(W - Ŵ)X‖² / ‖WX‖², lower is better")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
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
    order = [name for name, _ in original.module.named_modules()]
    draw(rows, order, picture, f"output error by layer, {title}")
    print(f"checkpoints and {picture} are in {options.out}/")


if __name__ == "__main__":
    main()
