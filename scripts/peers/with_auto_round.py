"""Quantize by AutoRound; a driver of scripts/compare_peers, run in an environment of the tool.

    python -P with_auto_round.py JOB.json

The job: as in with_llm_compressor.py; ``method`` is the number of steps a block.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {("nvfp4", "w4a4"): "NVFP4", ("mxfp4", "w4a4"): "MXFP4"}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, local_files_only=True
    )
    ids = load_file(job["windows"])["input_ids"]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"], local_files_only=True),
        scheme=SCHEMES[job["format"], job["scheme"]],
        iters=int(job["method"]),
        dataset=[{"input_ids": row.unsqueeze(0)} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        seed=job["seed"],
        device_map="cpu",
    )
    # it adds a folder of its own naming
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rounder.quantize_and_save(output_dir=folder, format="llm_compressor")
        (written,) = Path(folder).rglob("config.json")
        written.parent.rename(job["out"])


if __name__ == "__main__":
    main()
