"""What a run was worth: how far its result is from the original, and how far the same model is when
it is only rounded to nearest.

Three models of the size of the original are run on a little text, two of them at a time in memory;
whether that is cheap beside the run is asked first (:func:`cheap`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptq.pipeline.memory import free_bytes
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.pipeline.speed import product_seconds
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import Loaded, load_model, tokenize

WINDOW, TOKENS = 512, 1024  # of held-out text: enough to tell two methods of one model apart
RANGE_SAMPLES = 2  # of calibration text, where inputs have static scales
SHARE, SECONDS = 0.15, 20.0  # of a run, or at least so long: what measuring may take
# Passes over the text (two models, each beside the original), with what else is done meanwhile:
# loading, rounding to nearest.
PASSES = 6
COPIES = 2.5  # models in float32 that are in memory together
TUNED = frozenset({"algorithm", "scales", "weighted", "order", "damping", "descent", "balance"})


@dataclass(frozen=True, kw_only=True)
class AgainstNearest:
    """KL(original ‖ quantized) in nats per token over ``tokens`` predictions of held-out text, of a
    result and of the same model rounded to nearest."""

    kl: float
    nearest_kl: float
    tokens: int

    @property
    def avoided(self) -> float:
        """The share of the damage of rounding to nearest that is not there; negative if there is
        more."""
        return 1 - self.kl / self.nearest_kl if self.nearest_kl > 0 else 0.0


def cheap(parameters: int, run_seconds: float, device: torch.device) -> bool:
    """Whether comparing a model of so many parameters takes little beside a run of so many seconds,
    and fits in memory."""
    seconds = PASSES * 2 * parameters * TOKENS * product_seconds(device)
    fits = COPIES * 4 * parameters < free_bytes(device)
    return fits and seconds < max(SHARE * run_seconds, SECONDS)


def against_nearest(
    model: str | Path,
    checkpoint: Path,
    recipe: Mapping[str, Any],
    device: torch.device,
) -> AgainstNearest:
    """Compare ``checkpoint``, made from ``model`` by ``recipe`` (as a checkpoint states it), and
    the same rounded to nearest, on text that comes with the package.

    Raises:
        ValueError, FileNotFoundError: as for loading either.
    """
    original = load_model(model, device=device)
    subject = load_model(checkpoint, device=device)
    tokens = tokenize(original, "builtin", subject)
    ours, count = _divergence(subject, original, tokens)
    del subject
    nearest = load_model(model, device=device)
    quantize_model(
        nearest.module, recipe=to_nearest(recipe), device=device, tokenizer=nearest.tokenizer
    )
    theirs, _ = _divergence(nearest, original, tokens)
    return AgainstNearest(kl=ours, nearest_kl=theirs, tokens=count)


def to_nearest(recipe: Mapping[str, Any]) -> Recipe:
    """The same formats for the same layers, rounded to nearest by the preset ``fast``."""
    run = Recipe.from_dict(recipe)
    rules = []
    for pattern, change in run.rules:
        if change != "skip":
            fields = {"format": change} if isinstance(change, str) else dict(change)
            kept = {key: value for key, value in fields.items() if key not in TUNED}
            rotation = Recipe.default(kept.get("format", run.format)).rotation
            change = {"rotation": rotation, "scales": "mse"} | kept
        rules.append((pattern, change))
    return Recipe.default(
        run.format,
        quality="fast",
        scheme=run.scheme,
        ignore=run.ignore,
        rules=tuple(rules),
        lm_head=run.lm_head,
        calibration=run.calibration,
        field=run.field,
        samples=RANGE_SAMPLES,
        seq_len=WINDOW,
    )


def _divergence(subject: Loaded, original: Loaded, tokens: torch.Tensor) -> tuple[float, int]:
    window = min(WINDOW, subject.window(None))
    found = evaluate(
        subject.module,
        tokens,
        reference=original.module,
        seq_len=window,
        max_tokens=max(TOKENS, window),
    )
    assert found.kl is not None
    return found.kl, found.tokens
