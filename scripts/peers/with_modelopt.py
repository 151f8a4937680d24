"""Quantize by NVIDIA's ModelOpt; a driver of scripts/compare_peers, run in an environment of the
tool.

    python -P with_modelopt.py JOB.json

The job: as in with_llm_compressor.py; ``method`` is max or mse. The latter computes with a kernel
that needs a GPU; :func:`fake_quantize` stands in for it.
"""

import json
import sys
from types import SimpleNamespace

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CONFIGS = {
    ("max", "nvfp4", "w4a4"): "NVFP4_DEFAULT_CFG",
    ("max", "nvfp4", "w4a16"): "W4A16_NVFP4_CFG",
    ("max", "mxfp4", "w4a4"): "MXFP4_DEFAULT_CFG",
    ("mse", "nvfp4", "w4a4"): "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
}

# Between the magnitudes of E2M1; those that are not even keep a number that lies on them below.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
EVEN_BELOW, EVEN_ABOVE = torch.tensor([0.25, 1.25, 2.5, 5.0]), torch.tensor([0.75, 1.75, 3.5])


def fake_quantize(
    x, amax, global_amax=None, quantize_block_scales=True, fp8_max_for_normalization=448.0,
    out_dtype=None,
):  # fmt: skip
    """What the tool's kernel of this name computes, which needs a GPU: NVFP4 of blocks with the
    largest magnitudes ``amax``, ties to even, as floats."""
    scale = amax.float() / 6.0
    if quantize_block_scales:
        largest = amax.float().amax() if global_amax is None else global_amax.float()
        room = 448.0 / fp8_max_for_normalization
        scale = tensor_quant.scaled_e4m3_impl(scale, largest * room / 6.0)
    scale = scale.reshape(-1, 1)
    blocks = x.float().reshape(scale.shape[0], -1)
    magnitude = blocks.abs() / torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
    code = torch.bucketize(magnitude, EVEN_BELOW) + torch.bucketize(
        magnitude, EVEN_ABOVE, right=True
    )
    rounded = MAGNITUDES[code] * scale * torch.where(blocks >= 0, 1.0, -1.0)
    return rounded.reshape(x.shape).to(out_dtype or x.dtype)


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

    if job["method"] == "mse":
        tensor_quant.triton_kernel = SimpleNamespace(
            IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=fake_quantize
        )
    config = getattr(mtq, CONFIGS[job["method"], job["format"], job["scheme"]])
    model = mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=job["out"])


if __name__ == "__main__":
    main()
