"""Show that memory does not grow with the model: quantize a random Llama that is written here and
report the peak.

    python scripts/large_model.py --dir DIR [--gigabytes 6.2] [--hidden 2560 --intermediate 6912]
    [-- OPTIONS OF PTQ QUANTIZE]

Writes DIR/model in bfloat16, one shard a block (once), prints what ``ptq quantize --dry-run``
predicts, quantizes to DIR/out in a process of its own, and prints the size of the model, the
predicted and the measured peak of resident memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

DEMO = Path(__file__).parents[1] / "ptq" / "demo"


def write_model(path: Path, gigabytes: float, hidden: int, intermediate: int) -> int:
    """A Llama with grouped-query attention (head size 128, 4 query heads a key head); returns its
    bytes."""
    kv = hidden // 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    blocks = round(gigabytes * 1e9 / sum(2 * o * i for o, i in shapes.values()))
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    path.mkdir(parents=True)
    weight_map, total = {}, 0
    for block in range(-1, blocks):
        generator = torch.Generator().manual_seed(block + 1)
        if block < 0:
            tensors = {
                "model.embed_tokens.weight": torch.randn(4096, hidden, generator=generator) * 0.02
            }
            tensors["model.norm.weight"] = torch.ones(hidden)
        else:
            prefix = f"model.layers.{block}."
            tensors = {
                f"{prefix}{name}.weight": torch.randn(*shape, generator=generator) * 0.02
                for name, shape in shapes.items()
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden)
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        file = f"model-{block + 2:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path / name)
    config.save_pretrained(path)  # last: now it is a model
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=6.2)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--intermediate", type=int, default=6912)
    parser.add_argument("options", nargs="*", help="options of ptq quantize, after --")
    args = parser.parse_args()
    model, out = args.dir / "model", args.dir / "out"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write_model(model, args.gigabytes, args.hidden, args.intermediate)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    command = [
        sys.executable,
        "-m",
        "ptq",
        "quantize",
        "--model",
        str(model),
        "--out",
        str(out),
        "--overwrite",
    ]
    command += args.options or ["--format", "nvfp4", "--samples", "16", "--seq-len", "256"]
    plan = json.loads(subprocess.check_output([*command, "--dry-run", "--json"]))
    start = time.monotonic()
    subprocess.run([*command, "--quiet"], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    packed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(
        "model GB, predicted peak GB, measured peak GB, of the model, result GB (predicted), "
        "minutes (predicted)"
    )
    print(
        f"{size / 1e9:.2f} | {plan['peak_bytes'] / 1e9:.2f} | {peak / 1e9:.2f} | {peak / size:.0%} "
        "| "
        f"{packed / 1e9:.2f} ({plan['output_bytes'] / 1e9:.2f}) | {seconds / 60:.1f} "
        f"({plan['seconds'] / 60:.1f})"
    )


if __name__ == "__main__":
    main()
