"""Tokens a second on a CPU at batch size 1, as ratios to transformers in float32, in one run.

    bench_cpu.py MODEL                          # 135M parameters: about five minutes on one thread
    bench_cpu.py MODEL --work DIR               # keeps the two checkpoints for the next time
    bench_cpu.py MODEL --threads 2 --no-decode --out runs.jsonl

MODEL is quantized by rounding to nearest, with 16-bit inputs (W4A16) and with quantized ones
(W4A4), which takes a minute. Then these take turns, --repeats times, each for --tokens tokens of
greedy decoding and for one window of evaluation:

    float32, bfloat16      the original in transformers
    packed                 W4A16, 4 bits a weight in memory, unpacked for every token
    cached                 W4A16, dequantized weights kept
    emulated               W4A4, inputs quantized as hardware would, weights kept
    emulated, packed       W4A4, 4 bits a weight in memory

Everything that is not a quantized layer is float32, but in the row bfloat16. A time is CPU time of
the process divided by threads unless --wall: on a busy machine a wall says who else was there. The
median over the repeats is printed, and the median of the ratios within a turn.
"""

import argparse
import importlib.metadata
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptq.numerics.formats import FORMATS
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import evaluate
from ptq.runtime.generate import generate
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear

SCHEMES = ("w4a16", "w4a4")
Clock = Callable[[], float]
BASE = "float32"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a directory of transformers")
    parser.add_argument("--format", default="nvfp4", choices=list(FORMATS))
    parser.add_argument("--work", type=Path, help="where the checkpoints are, or will be")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="that are decoded in a turn")
    parser.add_argument("--window", type=int, default=512, help="tokens evaluated in a turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="time that passes, not CPU time")
    parser.add_argument("--no-decode", action="store_true", help="evaluate only")
    parser.add_argument("--no-eval", action="store_true", help="decode only")
    parser.add_argument("--rows", nargs="+", help="only these, and float32")
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    return parser.parse_args()


@contextmanager
def checkpoints(options: argparse.Namespace) -> Iterator[dict[str, Path]]:
    """Where MODEL lies in both schemes; made where they are not there yet."""
    with tempfile.TemporaryDirectory() as passing:
        work = options.work or Path(passing)
        paths = {scheme: work / f"{options.format}-{scheme}" for scheme in SCHEMES}
        for scheme, path in paths.items():
            if not path.exists():
                recipe = Recipe.default(options.format, scheme=scheme, quality="fast")
                quantize_model(options.model, path, recipe=recipe)
        yield paths


def models(options: argparse.Namespace, paths: dict[str, Path]) -> dict[str, nn.Module]:
    """The rows by their names, loaded."""

    def original(dtype: torch.dtype) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, local_files_only=True
        ).eval()

    def quantized(scheme: str, cache: bool) -> nn.Module:
        model = load(paths[scheme], dtype=torch.float32, inputs="quantized", cache=cache)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert layers and all(m.quantize_inputs == (scheme == "w4a4") for m in layers)
        return model

    rows: dict[str, Callable[[], nn.Module]] = {
        BASE: lambda: original(torch.float32),
        "bfloat16": lambda: original(torch.bfloat16),
        "packed": lambda: quantized("w4a16", False),
        "cached": lambda: quantized("w4a16", True),
        "emulated": lambda: quantized("w4a4", True),
        "emulated, packed": lambda: quantized("w4a4", False),
    }
    unknown = sorted(set(options.rows or ()) - set(rows))
    if unknown:
        raise ValueError(f"unknown rows {', '.join(unknown)}; choose from {', '.join(rows)}")
    chosen = [name for name in rows if not options.rows or name in (BASE, *options.rows)]
    return {name: rows[name]() for name in chosen}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers inside blocks, what they keep between calls included."""
    kept = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            kept += sum(t.nbytes for t in module.buffers())
            kept += module.kept_bytes
        elif isinstance(module, nn.Linear) and "lm_head" not in name:
            kept += sum(t.nbytes for t in module.parameters())
    return kept


def decoding(model: nn.Module, prompt: Tensor, tokens: int, clock: Clock) -> float:
    """Tokens per second after the prompt and the first token."""
    stream = generate(model, prompt.tolist(), max_new_tokens=tokens + 1)
    next(stream)
    start = clock()
    for _ in range(tokens):
        next(stream)
    return tokens / (clock() - start)


def evaluating(model: nn.Module, window: Tensor, clock: Clock) -> float:
    """Tokens per second of one window, logits and perplexity included."""
    start = clock()
    evaluate(model, window, seq_len=len(window))
    return len(window) / (clock() - start)


def bench(options: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError, OSError: no such model, or a row that there is not.
    """
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else lambda: time.process_time() / options.threads
    with checkpoints(options) as paths, torch.no_grad():
        rows = models(options, paths)
        vocabulary = rows[BASE].get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(0, vocabulary, (options.window,), generator=generator)
        prompt = text[: options.prompt_tokens]
        jobs: dict[str, Callable[[nn.Module], float]] = {}
        if not options.no_decode:
            jobs["decode"] = lambda model: decoding(model, prompt, options.tokens, clock)
        if not options.no_eval:
            jobs["eval"] = lambda model: evaluating(model, text, clock)
        speeds: dict[tuple[str, str], list[float]] = {(j, r): [] for j in jobs for r in rows}
        for turn in range(options.repeats + 1):
            for job, run in jobs.items():
                for row, model in rows.items():
                    speed = run(model)
                    if turn:  # the first one warms up
                        speeds[job, row].append(speed)
        report(options, rows, list(jobs), speeds)


def report(
    options: argparse.Namespace,
    rows: dict[str, nn.Module],
    jobs: list[str],
    speeds: dict[tuple[str, str], list[float]],
) -> None:
    """Print the table, and append its rows to --out."""
    machine = {
        "cpu": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "wall" if options.wall else "CPU time / threads",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"{options.model.name}, {options.format}, {options.tokens} tokens decoded, windows of "
        f"{options.window}, medians of {options.repeats} turns"
    )
    heads = [head for job in jobs for head in (f"{job}, tokens/s", f"× {BASE}")]
    columns = ["row", "linear layers, MB", *heads]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row, model in rows.items():
        cells, facts = [], {}
        for job in jobs:
            own, base = speeds[job, row], speeds[job, BASE]
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            cells += [f"{statistics.median(own):.1f}", f"{ratio:.2f}"]
            facts |= {job: statistics.median(own), f"{job}_ratio": ratio}
        size = weight_bytes(model)
        print(f"| {row} | {size / 1e6:.0f} | {' | '.join(cells)} |")
        if options.out:
            facts |= {"row": row, "model": options.model.name, "format": options.format}
            facts |= {"linear_bytes": size, **machine}
            with options.out.open("a", encoding="utf-8") as file:
                print(json.dumps(facts), file=file)


def processor() -> str:
    """What the machine calls its CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    """The exit code: 2, and one line, for what the user can put right."""
    logging.basicConfig(format="%(message)s")
    try:
        bench(parse())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
