"""Perplexity and KL of every method for one model.

    python scripts/compare.py [--model demo] [--calibration FILE] [--text FILE] [--siblings]

Quantizes in memory by each method, format and scheme, evaluates against the original on the same
windows, and prints a Markdown table of KL(original ‖ quantized) in nats per token (and perplexity
in the JSON lines on stderr). The numbers of docs/measurements.md come from here,
with --siblings those of docs/siblings.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ptq.numerics.formats import FORMATS
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import resolve_model
from ptq.text.windows import load_text, load_tokenizer

PLAIN = {"algorithm": "gptq", "rotation": 1, "descent": 0, "damping": 0.01, "balance": 0.0}


def methods(fmt: str) -> dict[str, dict[str, object]]:
    """Name → fields of the recipe."""
    group = FORMATS[fmt].size(128)
    return {
        "RTN": {"algorithm": "rtn", "rotation": 1, "scales": "absmax"},
        "RTN, searched scales": {"algorithm": "rtn", "rotation": 1, "scales": "mse"},
        "GPTQ": {**PLAIN, "scales": "absmax", "order": "natural"},
        "GPTQ, mse, act": {**PLAIN, "scales": "mse", "order": "act"},
        f"MR-GPTQ (paper, {group})": {**PLAIN, "scales": "mse", "order": "act", "rotation": group},
        "trial + descent": {"rotation": 1, "balance": 0.0},
        f"trial + descent, {group}": {"rotation": group, "balance": 0.0},
        "balanced": {"rotation": 1},
        f"balanced, {group}": {"rotation": group},
    }


def siblings(fmt: str) -> dict[str, dict[str, object]]:
    """The methods in the manner of others, each beside what it starts from."""
    plain = {**PLAIN, "scales": "mse", "order": "act"}
    fp4 = {"algorithm": "llm-fp4", "rotation": 1}
    return {
        "RTN": {"algorithm": "rtn", "rotation": 1},
        "LLM-FP4-like": fp4,
        "LLM-FP4-like, exact factors": {**fp4, "balance_factors": "exact"},
        "LLM-FP4-like, not balanced": {**fp4, "balance": 0.0},
        "GPTQ": plain,
        "decoupleQ-like from GPTQ": {**plain, "algorithm": "decoupleq"},
        "default": {},
        "decoupleQ-like from the default": {"algorithm": "decoupleq"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "nvint4"])
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=24576)
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w4a4"])
    parser.add_argument("--siblings", action="store_true")
    args = parser.parse_args()
    chosen = siblings if args.siblings else methods
    path = resolve_model(args.model)
    tokenizer = load_tokenizer(path)
    tokens = torch.tensor(
        tokenizer(load_text(args.text), add_special_tokens=False, verbose=False)["input_ids"]
    )
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    table: dict[str, list[str]] = {}
    for fmt in args.formats:
        for scheme in args.schemes:
            for name, fields in chosen(fmt).items():
                recipe = Recipe.default(
                    fmt,
                    scheme=scheme,
                    calibration=args.calibration,
                    samples=args.samples,
                    seq_len=args.seq_len,
                    batch_size=8,
                    **fields,
                )
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                quantized = quantize_model(model, recipe=recipe, tokenizer=tokenizer, device="cpu")
                assert isinstance(quantized, torch.nn.Module)
                result = evaluate(
                    quantized,
                    tokens,
                    reference=original,
                    seq_len=args.seq_len,
                    max_tokens=args.max_tokens,
                )
                row = {
                    "format": fmt,
                    "scheme": scheme,
                    "method": name,
                    "kl": result.kl,
                    "ppl": result.perplexity,
                }
                row |= {"reference_ppl": result.reference_perplexity, "top1": result.top1_agreement}
                print(json.dumps(row), file=sys.stderr, flush=True)
                table.setdefault(f"{fmt} {scheme}", []).append(f"{result.kl:.4f}")
    heads = [
        name.replace(", 32", ", rotated").replace(" (paper, 32)", " (paper)")
        for name in chosen("mxfp4")
    ]
    print(f"| {Path(args.model).name} | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, cells in table.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
