"""Spend a budget of bits where it helps most, and compare that with a rule of thumb.

Three checkpoints: four bits everywhere; a budget, which `ptq` spends on the layers whose errors
cost the model most (measured); and rules, with which you say it yourself.

python examples/mixed_precision.py [MODEL] [--budget 4.75] [--out DIR]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import ptq


def main(arguments: Sequence[str] | None = None) -> dict[str, ptq.Evaluation]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="directory, hub id, or demo")
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--budget", type=float, default=4.75, help="bits per weight, on average")
    parser.add_argument("--quality", default="default", help="fast, default or best")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the text to measure on")
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    options = parser.parse_args(arguments)
    text = {"samples": options.samples, "seq_len": options.seq_len}
    how = {"scheme": options.scheme, "quality": options.quality}
    common = {"format": options.format, **how, **text}

    recipes = {
        "four bits": ptq.Recipe.default(**common),
        # eight bits where the loss falls most for them
        "budget": ptq.Recipe.default(**common, budget=options.budget),
        # eight bits for every down projection; the first rule that matches a layer decides
        "rule": ptq.Recipe.default(**common, rules=[["*down_proj", "mxfp8"]]),
    }
    found: dict[str, ptq.Evaluation] = {}
    for name, recipe in recipes.items():
        out = options.out / name.replace(" ", "-")
        written = ptq.quantize(options.model, out, recipe=recipe)
        limits = {"seq_len": 256, "max_tokens": options.max_tokens}
        found[name] = ptq.evaluate(out, options.model, **limits)
        eight = sum(row.format == "mxfp8" for row in written.report.layers)
        print(
            f"{name:10} {written.report.bits_per_weight:.2f} bits per weight, {eight} layers of 8 "
            f"bits, KL {found[name].kl:.4f} nats per token, dialect {written.dialect}"
        )
    return found


if __name__ == "__main__":
    main()
