"""What weights of about one bit cost a model: PTQ1.61's mask and iFairy's rounding, emulated.

    python scripts/one_bit_study.py [--model demo] [--calibration FILE] [--text FILE]

No format on disk carries these weights: they replace those of the layers in memory, in float32, and
the model is compared with itself. Hessians are those of the original model, one pass; errors of
earlier layers are not made up for by later ones. Prints a Markdown table of bits per weight and
KL(original ‖ rounded) in nats per token; docs/siblings.md has it.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptq.numerics.formats import MXINT4
from ptq.numerics.one_bit import bits_of_mask, masked_binary, phases, sign_mean
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import load_model
from ptq.text.windows import load_calibration, load_text

Rounding = Callable[[Tensor, Tensor], Tensor]


def four_bits(weight: Tensor, hessian: Tensor) -> Tensor:
    return rtn(weight, None, Grid(MXINT4, torch.ones(()), "mse")).dequantize()


def masked(share: float) -> Rounding:
    return lambda weight, hessian: masked_binary(weight, hessian, share=share)


def roundings(features: int) -> dict[str, tuple[float, Rounding]]:
    """Name → (bits per weight for layers with so many inputs, rounding of weight and Hessian)."""
    row = 16 / features
    return {
        "MXINT4, round to nearest": (MXINT4.bits_per_weight, four_bits),
        "PTQ1.61-like, half in INT4": (bits_of_mask(0.5, features), masked(0.5)),
        "PTQ1.61-like, a fifth in INT4": (bits_of_mask(0.2, features), masked(0.2)),
        "binary, scales of least output error": (bits_of_mask(0.0, features), masked(0.0)),
        "binary, sign · mean": (1 + row, lambda weight, hessian: sign_mean(weight)),
        "iFairy's {±1, ±i}": (1 + row, lambda weight, hessian: phases(weight)),
    }


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers in blocks: the output head stays."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdecimal() for part in name.split("."))
    }


@torch.no_grad()
def hessians(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """E[x xᵀ] of the input of every layer, in float64."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears(model).items()]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    tokens = sum(batch.numel() for batch in batches)
    return {name: total / tokens for name, total in sums.items()}


@torch.no_grad()
def rounded(model: nn.Module, found: dict[str, Tensor], rounding: Rounding) -> nn.Module:
    """A copy whose layers have rounded weights."""
    result = copy.deepcopy(model)
    for name, layer in linears(result).items():
        layer.weight.copy_(rounding(layer.weight, found[name]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=16384)
    args = parser.parse_args()
    original = load_model(args.model, device=torch.device("cpu"))
    data = load_calibration(
        original.tokenizer,
        args.calibration,
        samples=args.samples,
        seq_len=512,
        batch_size=4,
        seed=0,
    )
    found = hessians(original.module, data.batches)
    tokens = torch.tensor(original.encode(load_text(args.text)))
    sizes = [
        (layer.weight.numel(), layer.in_features) for layer in linears(original.module).values()
    ]
    weights = sum(count for count, _ in sizes)
    print("| weights | bits per weight | KL |\n|---|---|---|")
    for name, (_, rounding) in roundings(1).items():
        bits = sum(count * roundings(features)[name][0] for count, features in sizes) / weights
        result = evaluate(
            rounded(original.module, found, rounding),
            tokens,
            reference=original.module,
            seq_len=512,
            max_tokens=args.max_tokens,
        )
        print(f"| {name} | {bits:.2f} | {result.kl:.3f} |", flush=True)


if __name__ == "__main__":
    main()
