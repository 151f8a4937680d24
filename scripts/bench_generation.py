"""Tokens a second of a randomly initialised model at batch size 1: bf16, and with quantized layers,
in one run.

    bench_generation.py --model llama-3.1-8b --formats nvfp4 mxfp4 nvint4 --out runs.jsonl
    bench_generation.py --checkpoint DIR        # and its shape in bf16, with random weights
    bench_generation.py --device cpu --small    # the reference path of a tiny model

Every linear layer of the decoder gets random codes and scales, made where they lie; the head stays
in bf16, and the rotation is the format's default. Timed is ``ptq.runtime.generate.generate`` from
the token after the recording on, choice of tokens included; a time is the mean over --tokens
tokens, and the median over --repeats of them is printed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint
from ptq.cli.options import parse_device
from ptq.numerics.formats import FORMATS, Format
from ptq.pipeline.recipe import Recipe
from ptq.runtime.decoding import Decode
from ptq.runtime.generate import generate
from ptq.runtime.load import load, prepare_kernels
from ptq.runtime.quant_linear import QuantLinear

# Rotary settings are left out: they do not change the time.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
# tokens that are not timed: the prompt's, the watched step's, those of compiling and recording
WARM_UP = 5


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a directory of ptq quantize, instead of --model and --formats",
    )
    parser.add_argument(
        "--formats", nargs="+", default=["nvfp4", "mxfp4", "nvint4"], choices=list(FORMATS)
    )
    parser.add_argument(
        "--decode",
        nargs="+",
        default=[],
        choices=get_args(Decode)[1:],
        help="default: captured; on a CPU static. See ptq/decoding.py",
    )
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of one repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:N, or cpu for the reference path"
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny model of the same family (for a CPU)"
    )
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()
    options.new_tokens = WARM_UP + options.tokens * options.repeats
    return options


def random_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """A bfloat16 model with random weights, made on the device."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def quantize_randomly(
    model: nn.Module, format: Format, rotation: int, device: torch.device
) -> None:
    """Replace the decoder's linear layers, one by one; codes and scales are random, weights about
    0.02 as usual."""
    for name in [
        n
        for n, m in model.named_modules()
        if ".layers." in n and isinstance(m, nn.Linear | QuantLinear)
    ]:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear | QuantLinear) and old.bias is None
        info = LayerInfo(format=format.name, rotation=rotation)
        layer = QuantLinear(old.in_features, old.out_features, info, device=device)
        layer.weight_packed.random_(0, 256)
        layer.weight_scale.random_(
            *((0x30, 0x40) if format.has_global_scale else (118, 121))
        )  # 0.5 … 1.9, 2^-9 … 2^-7
        if layer.weight_global_scale is not None:
            layer.weight_global_scale.fill_(2.0**-8)
        model.set_submodule(name, layer)
    prepare_kernels(model, torch.bfloat16)


def linear_bytes(model: nn.Module) -> int:
    """Bytes of all linear layers, a tied head included."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | QuantLinear)]
    return sum(
        t.nbytes for m in layers for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    )


def seconds_per_token(model: nn.Module, decode: Decode, options: argparse.Namespace) -> float:
    """The median over the repeats, each the mean over its tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    prompt = torch.randint(
        0, vocabulary, (options.prompt_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    tokens = generate(model, prompt, max_new_tokens=options.new_tokens, decode=decode)
    for _ in range(WARM_UP):
        next(tokens)
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        for _ in range(options.tokens):
            next(tokens)  # waits for the token
        times.append((time.perf_counter() - start) / options.tokens)
    return statistics.median(times)


def bench(options: argparse.Namespace) -> None:
    """Measure and print, a row as soon as it is there.

    Raises:
        ValueError, OSError: no such device or checkpoint, or a way to decode that the model cannot
            do.
    """
    device = parse_device(options.device)
    ways: list[Decode] = options.decode or (["captured"] if device.type == "cuda" else ["static"])
    length = options.prompt_tokens + options.new_tokens
    name = f"{options.checkpoint or options.model}{' (small)' if options.small else ''}"
    if options.checkpoint:
        Checkpoint(options.checkpoint)  # says in one line what it is not
        config = AutoConfig.from_pretrained(options.checkpoint, local_files_only=True)
        config.__dict__.pop(
            "quantization_config", None
        )  # the model to compare with is not quantized
    else:
        settings: dict[str, Any] = MODELS[options.model] | (SMALL if options.small else {})
        config = AutoConfig.for_model(**settings, max_position_embeddings=length)
    machine = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else "none",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(
        f"{name}, batch size 1, {options.prompt_tokens} tokens of prompt, {options.new_tokens} new "
        "ones"
    )
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if device.type != "cuda":
        print(
            "On a CPU this times the reference path, which saves memory and not time; it says "
            "nothing about kernels."
        )
    columns = (
        "weights",
        "layers in kernels",
        "decode",
        "tokens/s",
        "ms/token",
        "linear layers, GB",
        "× bf16",
    )
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    model: nn.Module = random_model(config, device)
    base: dict[str, float] = {}
    for weights in ["bf16", *(["checkpoint"] if options.checkpoint else options.formats)]:
        rotation = 1 if weights == "bf16" else None
        if weights == "checkpoint":
            del model  # first, so that the other fits
            model = load(options.checkpoint, device, dtype=torch.bfloat16)
        elif weights != "bf16":
            rotation = int(Recipe.default(weights).rotation)
            quantize_randomly(model, FORMATS[weights], rotation, device)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        in_kernels = sum(m.kernel_dtype is not None for m in layers)
        for decode in ways:
            seconds = seconds_per_token(model, decode, options)
            base.setdefault(decode, seconds)
            row = {
                "model": name,
                "weights": weights,
                "decode": decode,
                "tokens_per_second": 1 / seconds,
                "ms_per_token": 1e3 * seconds,
                "times_bf16": base[decode] / seconds,
                "cache_tokens": length,
                "linear_bytes": linear_bytes(model),
                "rotation": rotation,
                "layers": len(layers),
                "layers_in_kernels": in_kernels,
                **machine,
            }
            cells = f"{1 / seconds:.1f} | {1e3 * seconds:.3f} | {row['linear_bytes'] / 1e9:.3g}"
            print(
                f"| {weights} | {in_kernels} of {len(layers)} | {decode} | {cells} | "
                f"{base[decode] / seconds:.2f} |",
                flush=True,
            )
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    print(json.dumps(row), file=file)


def main() -> int:
    """The exit code: 2, and one line, for what the user can put right."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ptq").setLevel(
        logging.INFO
    )  # which layers run in kernels, which shapes have no tile
    try:
        bench(parse())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
