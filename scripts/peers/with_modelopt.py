"""Quantize by NVIDIA's ModelOpt; a driver of scripts/compare_peers, run in an environment of the
tool.

    python -P with_modelopt.py JOB.json

The job: as in with_llm_compressor.py; ``method`` is max or mse.
"""

import json
import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CONFIGS = {
    ("max", "nvfp4", "w4a4"): "NVFP4_DEFAULT_CFG",
    ("max", "nvfp4", "w4a16"): "W4A16_NVFP4_CFG",
    ("max", "mxfp4", "w4a4"): "MXFP4_DEFAULT_CFG",
    ("mse", "nvfp4", "w4a4"): "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, local_files_only=True
    )
    ids = load_file(job["windows"])["input_ids"]

    @torch.no_grad()
    def calibrate(module) -> None:
        for row in ids:
            module(input_ids=row.unsqueeze(0), use_cache=False)

    config = getattr(mtq, CONFIGS[job["method"], job["format"], job["scheme"]])
    model = mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=job["out"])


if __name__ == "__main__":
    main()
