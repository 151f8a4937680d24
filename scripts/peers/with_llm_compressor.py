"""Quantize by llm-compressor; a driver of scripts/compare_peers, run in an environment of the tool.

    python -P with_llm_compressor.py JOB.json

The job: ``model``, ``windows`` (a safetensors file with ``input_ids`` int64 (windows, tokens)),
``format``, ``scheme``, ``method`` (rtn, gptq, gptq-hadamard), ``seed``, ``out``.
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {
    ("nvfp4", "w4a4"): "NVFP4",
    ("nvfp4", "w4a16"): "NVFP4A16",
    ("mxfp4", "w4a4"): "MXFP4",
    ("mxfp4", "w4a16"): "MXFP4A16",
}
HADAMARD = 32


def recipe(method: str, scheme: str) -> list:
    """Modifiers with the tool's own defaults."""
    chosen = {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
    if method == "rtn":
        return [QuantizationModifier(**chosen)]
    rotation = QuIPModifier(
        rotations=["v"],
        transform_type="hadamard",
        transform_block_size=HADAMARD,
        ignore=["lm_head"],
    )
    return [*([rotation] if method == "gptq-hadamard" else []), GPTQModifier(**chosen)]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, local_files_only=True
    )
    ids = load_file(job["windows"])["input_ids"]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(job["model"], local_files_only=True),
        dataset=Dataset.from_list(rows),
        recipe=recipe(job["method"], SCHEMES[job["format"], job["scheme"]]),
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main()
