"""Train low-rank adapters on top of a quantized model (QLoRA), in plain torch.

The packed weights stay as they are; gradients pass through them to the adapters. Here the adapters
learn from the original model, to give back some of what quantization took.

python examples/lora.py [MODEL] [--rank 8] [--steps 40] [--out DIR]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.runtime.loaded_model import resolve_model
from ptq.runtime.quant_linear import QuantLinear
from ptq.text.windows import load_calibration


class Adapted(nn.Module):
    """``layer(x) + B A x``: a quantized layer and its adapter, which begins as zero."""

    def __init__(self, layer: QuantLinear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        place = layer.weight_packed.device
        self.a = nn.Parameter(torch.randn(rank, layer.in_features, device=place) * 0.02)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.a.to(x.dtype))
        return self.layer(x) + nn.functional.linear(low, self.b.to(x.dtype))


def adapt(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put an adapter beside every quantized layer; everything else is frozen."""
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, Adapted(layer, rank))
    return [p for p in model.parameters() if p.requires_grad]


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="directory, hub id, or demo")
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the text to measure on")
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    options = parser.parse_args(arguments)

    out = options.out / "base"
    ptq.quantize(options.model, out, format=options.format, quality="fast")
    model, tokenizer = ptq.load(out, tokenizer=True, dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(
        resolve_model(options.model), dtype="float32", device_map=model.device
    )

    def kl() -> float:
        limits = {"seq_len": options.seq_len, "max_tokens": options.max_tokens}
        found = ptq.evaluate(model, teacher, tokenizer=tokenizer, progress=False, **limits)
        assert found.kl is not None  # there is a reference
        return found.kl

    before = kl()
    trained = adapt(model, options.rank)
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    text = load_calibration(
        tokenizer,
        "builtin",
        samples=4 * options.steps,
        seq_len=options.seq_len,
        batch_size=4,
        seed=0,
    )
    for step, batch in enumerate(text.batches):
        batch = batch.to(model.device)
        with torch.no_grad():
            wanted = teacher(input_ids=batch).logits.log_softmax(-1)
        given = model(input_ids=batch).logits.log_softmax(-1)
        loss = nn.functional.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: KL {loss.item():.4f} on the batch")
    after = kl()
    print(f"KL on held-out text: {before:.4f} before, {after:.4f} with adapters of rank "
          f"{options.rank} ({sum(p.numel() for p in trained)} numbers)")  # fmt: skip
    adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file(adapters, options.out / "adapters.safetensors")
    return before, after


if __name__ == "__main__":
    main()
