"""What merging keeps of its parts: two fine-tuned copies of a model, merged by every method.

    python scripts/merge_study.py ONE.txt OTHER.txt --work DIR [--model demo] [--steps 150]

Fine-tunes a copy on each text, but for its last tenth, merges them, quantizes the merged models to
NVFP4, and prints nats per token on both last tenths as a Markdown table (docs/siblings.md).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ptq.pipeline.merge import METHODS, merge
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import load_model, resolve_model
from ptq.text.windows import load_tokenizer

LENGTH, BATCH, RATE, HELD = 256, 8, 3e-4, 8192


def tune(base: Path, ids: Tensor, steps: int, out: Path) -> None:
    """A copy of the model after so many steps of AdamW, in its own dtype."""
    stored = AutoModelForCausalLM.from_pretrained(base).dtype
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        logits = model(batch).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.nn.Module.to(model, stored)
    model.save_pretrained(out)
    load_tokenizer(base).save_pretrained(out)


def nats(path: Path, texts: list[Tensor]) -> list[float]:
    """Mean negative log-likelihood of each text."""
    model = load_model(path, device=torch.device("cpu")).module
    return [evaluate(model, ids, seq_len=LENGTH, max_tokens=HELD).nll for ids in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs=2, type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    base = resolve_model(args.model)
    tokenizer = load_tokenizer(base)
    ids, held = [], []
    for file in args.texts:
        text = file.read_text("utf-8")[:2_000_000]
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cut = len(found) * 9 // 10
        ids.append(torch.tensor(found[:cut]))
        held.append(torch.tensor(found[cut:]))
    parts = [args.work / f"part-{i}" for i in range(2)]
    for tokens, part in zip(ids, parts, strict=True):
        if not part.exists():
            tune(base, tokens, args.steps, part)
    print("| | " + " | ".join(file.stem for file in args.texts) + " |\n|---|---|---|")

    def row(name: str, path: Path) -> None:
        print(f"| {name} | " + " | ".join(f"{n:.3f}" for n in nats(path, held)) + " |", flush=True)

    row("base", base)
    for file, part in zip(args.texts, parts, strict=True):
        row(f"tuned on {file.stem}", part)
    for method in METHODS:
        for strength in {"arithmetic": (0.5, 0.7, 1.0)}.get(method, (None,)):
            name = method if strength is None else f"{method}, strength {strength}"
            out = args.work / name.replace(", ", "-").replace(" ", "-")
            merge(base, parts, out, method=method, strength=strength)
            row(name, out)
            quantized = out.with_name(f"{out.name}-nvfp4")
            quantize_model(out, quantized, recipe=Recipe.default("nvfp4", algorithm="rtn"))
            row(f"{name}, NVFP4 rounded to nearest", quantized)


if __name__ == "__main__":
    main()
