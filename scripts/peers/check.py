"""The scorer beside another implementation: transformers with compressed-tensors, which decodes the
files and quantizes inputs by code of its own.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peers.run import environment, measured
from peers.score import Original, Text, logits_of

from ptq.runtime import engine_probe
from ptq.runtime.evaluate import kl_divergence
from ptq.runtime.load import load


def check_scorer(
    folder: Path, python: Path, original: Original, text: Text, threads: int
) -> dict[str, Any]:
    """KL to the original of one checkpoint, on the first window of a text, by both; how far they
    are ``apart`` in bfloat16, and, the yardstick, what ``rounding`` to bfloat16 does to the scorer.

    Args:
        folder: of a finished run of llm-compressor.
        python: of the environment of that tool.

    Raises:
        ValueError: transformers could not open it, with the reason.
    """
    row, result = text.rows[0], folder / "transformers.pt"
    jobs = [{"path": str(folder / "out"), "tokens": row.tolist(), "result": str(result)}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python), "-P", engine_probe.__file__, "plain", str(folder / "jobs.json")]
    measured(command, folder, environment("llm-compressor", threads), folder / "check.txt")
    answer = torch.load(result, weights_only=True)
    if "error" in answer:
        raise ValueError(f"transformers does not open it: {answer['error']}")
    theirs = answer["logits"].float()
    exact = torch.from_numpy(original.logits(text)[0].copy())
    ours = logits_of(load(folder / "out", dtype=torch.float32, inputs="quantized"), row, "ptq")
    rounded = logits_of(load(folder / "out", dtype=torch.bfloat16, inputs="quantized"), row, "ptq")

    def between(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(kl_divergence(first[:-1], second[:-1]).mean())

    return {
        "of": folder.name,
        "by": answer["version"],
        "text": text.name,
        "predictions": len(row) - 1,
        "theirs": between(exact, theirs),
        "ours": between(exact, ours),
        "ours_16": between(exact, rounded),
        "apart": between(rounded, theirs),
        "rounding": between(ours, rounded),
    }
