"""The model card (README.md) of a checkpoint: what it is, who runs it and who computes it wrongly,
how to load it."""

from collections.abc import Mapping

from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, is_expert
from ptq.numerics.formats import FORMATS

# Unrotated checkpoints in engines that were read, not run (spec interop.md, section 6).
SGLANG = {
    "nvfp4": "right",
    "mxfp4": "stops with an error",
    "nvint4": "**do not use it**, its int4 kernel neither takes nor refuses groups of 16",
}
TENSORRT = {
    ("nvfp4", False): "stops with an error",
    ("nvfp4", True): "right",
    ("mxfp4", False): "right",
    ("mxfp4", True): "right, with 16-bit activations",
    ("nvint4", False): "stops with an error",
}


def model_card(
    choice: Choice,
    layers: Mapping[str, LayerInfo],
    total_bytes: int,
    recipe: JsonDict,
    provenance: JsonDict,
    name: str,
) -> str:
    """Markdown with the front matter of the hub; depends on nothing but its arguments."""
    formats = sorted({info.format for info in layers.values()})
    bits = ", ".join(f"{FORMATS[f].bits_per_weight:g} bits a weight in {f}" for f in formats)
    rotations = sorted({info.rotation for info in layers.values()} - {1})
    inputs = any(info.quantize_inputs for info in layers.values())
    source = provenance.get("source") or provenance.get("model")
    rows = [
        ("format", ", ".join(formats)),
        ("activations", "quantized to the same format" if inputs else "16 bit"),
        (
            "rotation",
            f"Hadamard blocks of {', '.join(map(str, rotations))} inputs, online"
            if rotations
            else "none",
        ),
        (
            "balance",
            f"strength {recipe['balance']}, folded into the weights"
            if recipe.get("balance")
            else "none",
        ),
        ("dialect", f"{choice.dialect} ({choice.reason})"),
        ("size", f"{total_bytes / 1e9:.3g} GB, {len(layers)} quantized layers, {bits}"),
    ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [ptq, quantized, " + ", ".join(formats) + "]",
    ]
    lines += [f"base_model: {source}"] if isinstance(source, str) and source.count("/") == 1 else []
    lines += [
        "---",
        "",
        f"# {name}",
        "",
        "```python",
        *_loading(choice, bool(rotations)),
        "```",
        "",
    ]
    lines += [
        f"Quantized by ptq from `{source}`." if source else "Quantized by ptq.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    lines += [
        "## What runs it",
        "",
        *(f"- {line}" for line in engines(choice.dialect, layers)),
        "",
        "## Recipe",
        "",
    ]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {key} | `{value}` |" for key, value in recipe.items()),
        "",
    ]
    lines += ["Errors of every layer are in `ptq_report.json`.", ""]
    return "\n".join(lines)


def _loading(choice: Choice, rotated: bool) -> list[str]:
    lines = ["from transformers import AutoModelForCausalLM"]
    if choice.dialect == "ptq" or rotated:
        why = (
            "without it the weights would be random"
            if choice.dialect == "ptq"
            else "attaches the online rotation"
        )
        lines.insert(0, f"import ptq.hf  # {why}")
    return [*lines, 'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")']


def engines(dialect: str, layers: Mapping[str, LayerInfo]) -> list[str]:
    """One sentence for each engine: right, wrong, or an error (spec interop.md, section 6)."""
    if dialect == "ptq":
        return [
            "**ptq** (`ptq.load`) and **transformers** after `import ptq.hf`: right. "
            'Without it transformers prints "Unknown quantization type" and returns **randomly initialised layers**.',
            "**vLLM** needs the plugin of ptq; **SGLang** and **TensorRT-LLM** stop with an error.",
        ]
    rotated = any(info.rotation > 1 for info in layers.values())
    inputs = any(info.quantize_inputs for info in layers.values())
    fmt = next(iter(layers.values())).format
    experts = any(is_expert(name) for name in layers)
    lines = ["**ptq** (`ptq.load`): right."]
    if experts and fmt == "nvfp4":
        lines.append(
            "**transformers**: **silently wrong**, it drops the global scale of NVFP4 experts "
            "(#48371)."
        )
    elif rotated:
        lines.append(
            "**transformers** with compressed-tensors: right after `import ptq.hf`, an error "
            "without it."
        )
    else:
        lines.append(
            "**transformers** with compressed-tensors: right, decompressed to bf16 on first use."
        )
    if rotated:
        lines.append("**vLLM** ≥ 0.33: right, with `tensor_parallel_size=1` only.")
        lines.append(
            "**SGLang**, **TensorRT-LLM**: **do not rotate and compute it wrongly without an "
            "error**. Do not use them."
        )
    else:
        lines.append("**vLLM** ≥ 0.33: right.")
        lines.append(f"**SGLang**: {SGLANG[fmt]}. **TensorRT-LLM**: {TENSORRT[fmt, inputs]}.")
    if inputs:
        lines.append(
            "Engines choose the scales of activations themselves; GPUs without FP4 units keep "
            "activations in 16 bit."
        )
    elif fmt == "mxfp4":
        lines.append(
            "vLLM on Blackwell GPUs quantizes the activations too, although this model was made "
            "for 16 bit."
        )
    return lines
