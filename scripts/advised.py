"""Does advice hold? Quantize a model by advised recipes and in uniform formats of as many bits, and
measure the KL of each.

python scripts/advised.py --model demo --budgets 4.5 5 6.25
python scripts/advised.py --model DIR --text wikitext.txt --formats nvfp4,mxfp8 --budgets 4.87

Prints a table in markdown: bits per weight, KL predicted (balanced, rounded to nearest) and KL as
`ptq eval` measures it after `ptq quantize`.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ptq.numerics.formats import FORMATS
from ptq.pipeline.advice import Point, advise, uniform
from ptq.pipeline.advisor import AdviceOptions, measure_damage, recipe_of
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import Evaluation, evaluate
from ptq.runtime.loaded_model import Loaded, load_model, resolve_model, tokenize

CPU = torch.device("cpu")


def row(name: str, point: Point, measured: Evaluation, seconds: float) -> str:
    """A line of the table."""
    return (
        f"| {name} | {point.bits:.2f} | {point.kl:.3g} | {measured.kl:.3g} | "
        f"{measured.kl_top25:.3g} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="builtin", help="for the evaluation")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 5.0, 6.25])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--uniform", default="", help="formats to compare with; empty: none")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    given = parser.parse_args()
    model = resolve_model(given.model)
    options = AdviceOptions(
        scheme=given.scheme,
        formats=tuple(given.formats.split(",")),
        calibration=given.calibration,
    )
    began = time.process_time()
    damage = measure_damage(model, options)
    print(f"damage of {len(damage.units)} units: {time.process_time() - began:.0f} CPU-s\n")
    print(
        "| | bits per weight | KL predicted | KL | KL top 25 | CPU-s |\n|---|---|---|---|---|---|"
    )
    reference = load_model(model, device=CPU)
    run = Runs(given, model, reference)
    for name in filter(None, given.uniform.split(",")):
        recipe = options.recipe(name)
        label = name if recipe.rotation == 1 else f"{name} r{recipe.rotation}"
        points = {point.label: point for point in uniform(damage.units, "kl")}
        run(f"all {label}", points[label], recipe)
    for budget in given.budgets:
        advice = advise(damage, budget=budget)
        run(f"advice for {budget:g}", advice.point, recipe_of(advice, options))


class Runs:
    """Quantizes, evaluates, prints."""

    def __init__(self, given: argparse.Namespace, model: Path, reference: Loaded) -> None:
        self.given, self.model, self.reference = given, model, reference
        self.tokens = tokenize(reference, given.text)

    def __call__(self, name: str, point: Point, recipe: Recipe) -> None:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            recipe = replace(recipe, samples=self.given.samples)
            quantize_model(self.model, out, recipe=recipe, device="cpu")
            seconds = time.process_time() - began
            subject = load_model(out, device=CPU)
            measured = evaluate(
                subject.module,
                self.tokens,
                reference=self.reference.module,
                seq_len=self.given.seq_len,
                max_tokens=self.given.max_tokens,
            )
        print(row(name, point, measured, seconds), flush=True)


if __name__ == "__main__":
    main()
