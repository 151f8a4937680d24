"""Quantize a model, say what that cost, and let the result write.

python examples/quantize_and_evaluate.py [MODEL] [--format nvfp4] [--text FILE] [--out DIR]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import ptq


def main(arguments: Sequence[str] | None = None) -> ptq.Evaluation:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="directory, hub id, or demo")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--scheme", default="w4a16", help="w4a4 quantizes inputs of layers too")
    parser.add_argument("--quality", default="default", help="fast, default or best")
    parser.add_argument("--text", default="builtin", help="what to measure on")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of that text")
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    parser.add_argument("--prompt", default="def area(width, height):\n    return")
    options = parser.parse_args(arguments)
    recipe = ptq.Recipe.default(options.format, scheme=options.scheme, quality=options.quality)

    # before anything is read: memory, time, size
    print(ptq.forecast(options.model, recipe=recipe))

    written = ptq.quantize(options.model, options.out, recipe=recipe)
    print(written)

    # how far it is from the original, in nats per token
    limits = {"seq_len": 256, "max_tokens": options.max_tokens}
    found = ptq.evaluate(options.out, options.model, text=options.text, **limits)
    print(found)

    # a model of transformers, on the GPU if there is one
    model, tokenizer = ptq.load(options.out, tokenizer=True)
    ids = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(input_ids=ids["input_ids"], max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(tokens[0]))
    return found


if __name__ == "__main__":
    main()
