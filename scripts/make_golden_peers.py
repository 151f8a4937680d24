"""Small checkpoints as other tools write them, for tests/golden/peers; run in an environment of the
tool, never by the tests.

    python -m venv .engines/peers && .engines/peers/bin/pip install llmcompressor==0.14.0.1
    python -m venv .engines/modelopt && .engines/modelopt/bin/pip install nvidia-modelopt==0.47.0
    .engines/peers/bin/python scripts/make_golden_peers.py llm-compressor tests/golden/peers
    .engines/modelopt/bin/python scripts/make_golden_peers.py modelopt tests/golden/peers

Beside each checkpoint lies ``expected.safetensors``: the logits of eight tokens as the tool itself
computes them; of ModelOpt, which computes NVFP4 on GPUs alone, the weight of a layer before it was
rounded, and the largest keys and values that it saw.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 31]])
LAYER = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"


def tiny(folder: Path) -> Path:
    """A random Llama of one block, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    path = folder / "tiny"
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def llm_compressor(source: Path, out: Path) -> None:
    """NVFP4, MXFP4, int4 and FP8 by round to nearest, and two formats in two groups with ``re:``
    targets."""
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    small = preset_name_to_scheme("W4A16", ["Linear"]).model_dump()
    small["weights"]["group_size"] = 32  # of 64 inputs
    recipes = {
        "llm-compressor-int4": QuantizationModifier(
            config_groups={"group_0": QuantizationScheme(**small)}, ignore=["lm_head"]
        ),
        "llm-compressor-fp8": QuantizationModifier(
            targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]
        ),
        "llm-compressor-nvfp4a16": QuantizationModifier(
            targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]
        ),
        "llm-compressor-mxfp4": QuantizationModifier(
            targets=["re:.*self_attn.*", "re:.*mlp.*"], scheme="MXFP4A16", ignore=["lm_head"]
        ),
        "llm-compressor-mixture": QuantizationModifier(
            config_groups={
                "group_0": QuantizationScheme(
                    **preset_name_to_scheme("NVFP4A16", ["re:.*mlp.*"]).model_dump()
                ),
                "group_1": QuantizationScheme(
                    **preset_name_to_scheme("MXFP8A16", ["re:.*self_attn.*"]).model_dump()
                ),
            },
            ignore=["lm_head"],
        ),
        "llm-compressor-groups": QuantizationModifier(
            config_groups={
                "group_0": QuantizationScheme(
                    **preset_name_to_scheme("NVFP4A16", ["re:.*self_attn.*"]).model_dump()
                ),
                "group_1": QuantizationScheme(
                    **preset_name_to_scheme("MXFP4A16", ["re:.*mlp.*"]).model_dump()
                ),
            },
            ignore=["lm_head"],
        ),
    }
    for name, recipe in recipes.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        oneshot(model=model, recipe=recipe)
        with torch.no_grad():
            logits = model(input_ids=IDS, use_cache=False).logits[0].float()
        model.save_pretrained(out / name, save_compressed=True)
        save_file({"logits": logits.contiguous()}, out / name / "expected.safetensors")


def modelopt(source: Path, out: Path) -> None:
    """NVFP4 with calibrated inputs, with both of the files that say so."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    cache = {"quant_cfg": [*mtq.NVFP4_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}
    for name, config in (
        ("modelopt-nvfp4", mtq.NVFP4_DEFAULT_CFG),
        ("modelopt-nvfp4-kv", mtq.NVFP4_DEFAULT_CFG | cache),
    ):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        weight = model.get_submodule(LAYER).weight.detach().float().clone()  # pyright: ignore[reportCallIssue]
        model = mtq.quantize(model, config, lambda m: m(input_ids=IDS))
        known = {LAYER: weight}
        for quantizer in ("k_bmm_quantizer", "v_bmm_quantizer"):
            found = model.get_submodule(f"{ATTENTION}.{quantizer}") if "kv" in name else None
            if found is not None:
                known[f"{ATTENTION}.{quantizer}"] = found.amax.float().reshape(1)
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out / name)
        save_file(known, out / name / "expected.safetensors")


def main(tool: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    source = tiny(out)
    {"llm-compressor": llm_compressor, "modelopt": modelopt}[tool](source, out)
    shutil.rmtree(source)
    for path in sorted(out.rglob("config.json")):
        text = json.loads(path.read_text())
        print(path.parent.name, json.dumps(text.get("quantization_config")))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
