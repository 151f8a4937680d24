"""Perplexity of a model in vLLM on a CPU beside that of ``ptq eval``, on the same windows.

    scripts/test_engines --perplexity MODEL TEXT

It is part of scripts/engine_matrix.py. What this file runs by itself, in the environment of vLLM,
is :func:`answer`: the log-probability of every token of every window, which imports nothing of ptq.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEQ_LEN, TOKENS = 512, 8192
SECONDS = 3600


@dataclass(frozen=True)
class Case:
    """A checkpoint to be measured.

    Attributes:
        plugin: whether vLLM opens it with the plugin of ptq, or alone.
    """

    format: str
    dialect: str
    plugin: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"perplexity-{self.dialect}-{self.format}"


CASES = (
    Case("nvfp4", "compressed-tensors", plugin=True),
    Case("nvint4", "compressed-tensors", plugin=False),
)


def measure(model: Path, text: Path, folder: Path, python: Path) -> list[str]:
    """The rows of a Markdown table; quantizes what is not in ``folder`` yet.

    Args:
        python: of an environment that has vLLM and ptq.
    """
    import torch

    import ptq
    from ptq.checkpoint.engines import PLUGGED, VLLM
    from ptq.runtime.evaluate import windows
    from ptq.text.windows import load_text, load_tokenizer

    ids = load_tokenizer(model)(load_text(str(text)), add_special_tokens=False)["input_ids"]
    rows = windows(torch.tensor(ids), SEQ_LEN, TOKENS)
    given = {"text": str(text), "seq_len": SEQ_LEN, "max_tokens": TOKENS, "progress": False}

    found = []
    for case in CASES:
        out = folder / case.name
        if not (out / "config.json").is_file():
            recipe = ptq.Recipe.default(
                case.format, scheme="w4a16", algorithm="rtn", rotation=1, samples=4, seq_len=64
            )
            ptq.quantize(model, out, recipe=recipe, dialect=case.dialect, progress=False)
        theirs = _in_vllm(out, rows.tolist(), folder, python, case)
        ours = ptq.evaluate(out, dtype="float32", **given).perplexity
        engine = PLUGGED if case.plugin else VLLM
        found.append(
            f"| {case.dialect} {case.format} w4a16 | {engine} | {theirs:.3f} | {ours:.3f} |"
        )
    return [
        f"`{model.name}`, weights rounded to nearest without rotation, on the first {rows.numel()}",
        f"tokens of `{text.name}` in windows of {SEQ_LEN}, on a CPU:",
        "",
        "| checkpoint | opened by | perplexity there, in bfloat16 | `ptq eval`, in float32 |",
        "|---|---|---|---|",
        *found,
    ]


def _in_vllm(
    path: Path, rows: Sequence[Sequence[int]], folder: Path, python: Path, case: Case
) -> float:
    """The perplexity in vLLM, kept in ``folder``."""
    from ptq.runtime.engine_probe import SETTINGS

    result = folder / f"{case.name}.json"
    if not result.is_file():
        job = folder / "perplexity-job.json"
        job.write_text(json.dumps({"path": str(path), "rows": rows, "result": str(result)}))
        environ = {**SETTINGS, **os.environ, "VLLM_PLUGINS": "ptq" if case.plugin else ""}
        # ptq is found where it is installed, as users have it
        environ.pop("PYTHONPATH", None)
        command = [str(python), "-P", __file__, str(job)]
        subprocess.run(command, env=environ, check=True, timeout=SECONDS)
    values = json.loads(result.read_text())["logprobs"]
    return math.exp(-sum(values) / len(values))


def answer(job: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of all tokens but the first of every window, in vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["path"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=len(job["rows"][0]) + 1,
        max_num_seqs=1,
    )
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in job["rows"]]
    values = []
    for row, done in zip(job["rows"], llm.generate(prompts, wanted, use_tqdm=False), strict=True):
        assert done.prompt_logprobs is not None
        places = zip(done.prompt_logprobs[1:], row[1:], strict=True)
        values += [place[token].logprob for place, token in places if place is not None]
    return values


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["result"]).write_text(json.dumps({"logprobs": answer(given)}))
