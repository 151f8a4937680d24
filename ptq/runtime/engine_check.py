"""Whether the engines that are installed here compute a checkpoint as ptq does.

Each opens it in a process of its own (:mod:`ptq.runtime.engine_probe`) and gives the probabilities
of the whole vocabulary after each token of a built-in text. They are compared with those of
``ptq.load`` in float32, which computes what the checkpoint says; how far ``ptq.load`` in bfloat16
is from that is the yardstick.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.checkpoint.engines import (
    ABSENT,
    IMPORTED,
    NARROW,
    PLUGGED,
    REFUSED,
    UNCLEAR,
    WORKS,
    WRONG,
    Result,
)
from ptq.checkpoint.reader import Checkpoint
from ptq.runtime import engine_probe
from ptq.runtime.evaluate import kl_divergence
from ptq.text.builtin import held_out_text
from ptq.text.windows import load_tokenizer

TOKENS = 32
SECONDS = 900
# A right engine rounds in other places than ptq does: its KL is of the order of the yardstick, that
# of a wrong one larger by orders of magnitude.
FACTOR, FLOOR = 10.0, 1e-6
# Beyond this nothing can be told from the size of it: quantized inputs of a random model that round
# to the other side come to as much.
CEILING = 0.1


@dataclass(frozen=True)
class Engine:
    """A way to open a checkpoint.

    Attributes:
        name: for people.
        probe: a key of :data:`ptq.runtime.engine_probe.PROBES`.
        modules: that must be there.
    """

    name: str
    probe: str
    modules: tuple[str, ...]


ENGINES = (
    Engine("transformers", "plain", ("transformers",)),
    Engine(IMPORTED, "plugin", ("transformers",)),
    Engine("lm-eval after import ptq", "lm_eval", ("lm_eval",)),
    Engine("vLLM", "vllm", ("vllm",)),
    Engine(PLUGGED, "vllm_plugin", ("vllm",)),
)

# Probe → the one that asks in float32, where bfloat16 is too noisy to tell.
AGAIN = {"vllm_plugin": "vllm_plugin_32"}


def check_engines(
    path: Path | str,
    engines: Iterable[Engine] = ENGINES,
    *,
    on_engine: Callable[[str], None] | None = None,
) -> list[Result]:
    """Open a checkpoint in each of ``engines`` and compare.

    Args:
        on_engine: told the name of what is opened next.

    Raises:
        FileNotFoundError, ValueError: it is no checkpoint of ptq, or ``ptq.load`` does not open it.
    """
    path, tell = Path(path), on_engine or (lambda name: None)
    checkpoint = Checkpoint(path)
    ids = token_ids(checkpoint)
    tell("ptq, for comparison")
    exact, rounded = (_needed(name, path, ids) for name in ("reference", "reference_16"))
    full = None
    if any(info.quantize_inputs for info in checkpoint.layers.values()):
        full = _needed("reference_full_16", path, ids)
    found = []
    for engine in engines:
        if missing := [module for module in engine.modules if find_spec(module) is None]:
            found.append(Result(engine=engine.name, outcome=ABSENT, reason=f"no {missing[0]}"))
            continue
        tell(engine.name)
        result = judged(engine.name, run_probe(engine.probe, path, ids), exact, rounded, full)
        if result.outcome == UNCLEAR and (again := AGAIN.get(engine.probe)) is not None:
            result = judged(engine.name, run_probe(again, path, ids), exact, rounded, full)
        found.append(result)
    return found


def judged(
    engine: str,
    answer: Mapping[str, Any],
    exact: Tensor,
    rounded: Tensor,
    full: Tensor | None = None,
) -> Result:
    """What the answer of a probe means; arguments as those of :func:`judge`."""
    about = {key: answer.get(key, default) for key, default in (("version", ""), ("seconds", 0.0))}
    if "error" in answer:
        return Result(engine=engine, outcome=REFUSED, reason=answer["error"], **about)
    return Result(engine=engine, **judge(answer["logits"], exact, rounded, full), **about)


def judge(
    logits: Tensor, exact: Tensor, rounded: Tensor, full: Tensor | None = None
) -> dict[str, Any]:
    """``outcome``, ``kl``, ``yardstick`` and ``same_bits`` of what an engine gave.

    Args:
        logits: (tokens, vocabulary), up to a constant of each row.
        exact, rounded: of ``ptq.load`` in float32 and in bfloat16.
        full: in bfloat16 with inputs in 16 bits, where the checkpoint quantizes them.
    """
    size = min(len(logits), len(exact))  # some say nothing of what follows the last token
    logits, exact, rounded = logits[:size], exact[:size], rounded[:size]
    vocabulary = exact.shape[-1]
    if logits.shape[-1] < vocabulary or not bool(logits[:, :vocabulary].isfinite().all()):
        return {"outcome": WRONG}
    logits = logits[:, :vocabulary]
    divergences, noise = kl_divergence(exact, logits), kl_divergence(exact, rounded)
    outcome = WORKS
    if full is not None:
        narrow = kl_divergence(full[:size], logits)
        # an engine that rounds inputs in its own way is about as far from both
        if narrow.mean() < kl_divergence(rounded, logits).mean() / 4:
            divergences, outcome = narrow, NARROW
    # medians: where a router chooses another expert one token is far off, in ptq as well
    typical, allowed = float(divergences.median()), FACTOR * float(noise.median())
    same_bits = torch.equal(logits, rounded)
    if typical > max(allowed, FLOOR):
        outcome = WRONG
    elif typical > CEILING and not same_bits:
        outcome = UNCLEAR
    return {
        "outcome": outcome,
        "kl": float(divergences.mean()),
        "yardstick": float(noise.mean()),
        "same_bits": same_bits,
    }


def token_ids(checkpoint: Checkpoint) -> list[int]:
    """The first tokens of the built-in text; without a tokenizer, one id after the other."""
    size = checkpoint.config.get("vocab_size")
    text = checkpoint.config.get("text_config")
    if not isinstance(size, int):
        size = text.get("vocab_size") if isinstance(text, dict) else None
    limit = size if isinstance(size, int) else TOKENS
    try:
        ids = load_tokenizer(checkpoint.path)(held_out_text()[:2000], add_special_tokens=False)
    except (FileNotFoundError, ValueError):
        return [i % limit for i in range(TOKENS)]
    return list(ids["input_ids"])[:TOKENS]  # pyright: ignore[reportArgumentType]


def _needed(probe: str, path: Path, ids: list[int]) -> Tensor:
    answer = run_probe(probe, path, ids)
    if "error" in answer:
        raise ValueError(f"ptq.load does not open {path}: {answer['error']}")
    return answer["logits"]


def run_probe(
    probe: str, path: Path, ids: list[int], seconds: float = SECONDS
) -> Mapping[str, Any]:
    """The answer of :mod:`ptq.runtime.engine_probe` from a process of its own."""
    # where ptq is, for probes that import it: the folder above the package, whatever its link
    place = str(Path(engine_probe.__file__).parents[2])
    paths = [place, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        jobs, result = Path(folder) / "jobs.json", Path(folder) / "result.pt"
        job = {"path": str(path.resolve()), "tokens": ids, "result": str(result)}
        jobs.write_text(json.dumps([job]))
        # -P: or modules of this wing would hide those of the standard library
        command = [sys.executable, "-P", engine_probe.__file__, probe, str(jobs)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer after {seconds:.0f} s"}
        if not result.is_file():
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            return {"error": f"its process ended with {done.returncode}: {''.join(last)[:300]}"}
        return torch.load(result, weights_only=True)
