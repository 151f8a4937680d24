"""Time the linear layers of a model, or predict them for a named GPU: a markdown table, JSONL, a plot.

python scripts/bench_layers.py --model llama-3.1-8b --tokens 1 16 128 2048 --out runs.jsonl --plot runs.png
python scripts/bench_layers.py --predict h200                 # rooflines, on any machine
python scripts/bench_layers.py --device cpu --small           # the reference path on small shapes
"""

import argparse
from pathlib import Path

import torch

from ptq import benchmark
from ptq.formats import FORMATS

SMALL = [("small", 512, 512), ("wide", 1024, 256)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=["llama-3.1-8b"], help="a built-in name or a directory with a config.json"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(benchmark.TOKENS))
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4", "nvint4"], choices=sorted(FORMATS))
    parser.add_argument(
        "--backends", nargs="+", default=[], help=f"of {', '.join(benchmark.BACKENDS)}; default: all that can run"
    )
    parser.add_argument("--rotation", type=int, default=32, help="size of the Hadamard blocks of rotate+… and quantize")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--predict", choices=sorted(benchmark.GPUS), help="print rooflines of this GPU instead of measuring"
    )
    parser.add_argument("--small", action="store_true", help="small shapes instead of the model's (for a CPU)")
    parser.add_argument("--sum", action="store_true", help="one row per decoder block instead of one per layer")
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    parser.add_argument("--markdown", type=Path, help="file for the table, which is printed in any case")
    parser.add_argument("--plot", type=Path, help="image of the speed against bf16 (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    """Measure or predict, then render."""
    options = parse()
    found: list[benchmark.Measurement] = []
    gpu = benchmark.GPUS.get(options.predict)
    layers = SMALL if options.small else None
    for model in options.model:
        if gpu:
            steps = benchmark.predict(model, options.tokens, options.formats, gpu, options.rotation)
        else:
            steps = benchmark.run(
                model,
                options.tokens,
                options.formats,
                options.device,
                rotation=options.rotation,
                only=options.backends,
                layers=layers,
            )
        for measurement in steps:
            found.append(measurement)
            if options.out:
                benchmark.append(options.out, [measurement])  # a run that is interrupted keeps what it has
    if gpu is None and torch.device(options.device).type == "cuda":
        gpu = benchmark.measured(torch.device(options.device))
    text = benchmark.table(benchmark.layer_sums(found) if options.sum else found, gpu)
    if gpu:
        text += f"\n{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s, bf16 {gpu.bf16 / 1e12:.0f} TFLOP/s ({gpu.source}).\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.plot:
        benchmark.plot(found, options.plot)


if __name__ == "__main__":
    main()
