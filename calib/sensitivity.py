"""What an error in the output of a layer costs the whole model, by the Fisher matrix.

    score = 1/2 · mean over tokens of (Σ over the layers of a group of g · (ŷ - y))²

g is the gradient by a layer's output (:mod:`ptq.calib.backward`): the mean of its square is the
Fisher matrix, and the score the KL divergence that the error causes, to second order. Scores of
different groups add up. Where p is taken over the most likely tokens alone and renormalised, and
tokens are sampled from those, it is the KL divergence over these.

The errors of the groups of a block are asked for while it is looked at, one choice after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ptq.calib.backward import ALL, Differentiated, Layers, Reading, backward
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.walk import Prepare
from ptq.model.source import Source

# Of a group, a number for every measure by choice.
Scores = dict[Layers, dict[str, tuple[float, ...]]]
# ``errors(group, inputs)``: choice after choice, what each layer of the group returns with it, less
# what it should: (tokens, out) by full name, for all ``inputs``, each (tokens, in), joined.
Errors = Callable[[Layers, Sequence[Tensor]], Iterator[tuple[str, Mapping[str, Tensor]]]]
# ``choose(block, groups)``: the errors of the layers of a block, which is filled and prepared.
Choose = Callable[[CalibratedBlock, Sequence[Layers]], Errors]


def sensitivities(
    source: Source,
    sequences: Sequence[Tensor],
    layers: Iterable[str],
    choose: Choose,
    *,
    device: torch.device | str,
    activations: str = "ram",
    prepare: Prepare | None = None,
    seed: int = 0,
    measures: Sequence[int] = (ALL,),
    on_block: Callable[[int, int], object] = lambda done, total: None,
) -> Scores:
    """The scores of every group of ``layers`` that read the same, for every choice.

    Args:
        measures: a score for each: ``ALL`` is the KL divergence over the vocabulary, a number that
            over so many of the most likely tokens, renormalised.

    The others, and what is raised, are those of :func:`ptq.calib.backward.backward`.
    """
    found = backward(
        source,
        sequences,
        layers,
        device=device,
        activations=activations,
        prepare=prepare,
        seed=seed,
        measures=measures,
        on_block=on_block,
    )
    scores: Scores = {}
    for seen in found:
        with torch.no_grad():
            errors = choose(seen.block, seen.groups)
            for group in reversed(seen.groups):
                scores[group] = _scores(seen, group, errors, len(measures))
    return {group: score for group, score in reversed(scores.items()) if score}


def _scores(
    seen: Differentiated, group: Layers, errors: Errors, measures: int
) -> dict[str, tuple[float, ...]]:
    """By choice; drops what they are made of. None where no token came by."""
    readings = {name: seen.readings.pop(name) for name in group}
    inputs = [reading.x for reading in readings[group[0]]]
    assert all(len(calls) == len(inputs) for calls in readings.values()), group
    if not inputs:
        return {}
    gradients = {name: _joined(calls, measures) for name, calls in readings.items()}
    found: dict[str, tuple[float, ...]] = {}
    for choice, error in errors(group, inputs):
        products = [
            torch.stack([(gradients[name][m] * e).sum(-1) for name, e in error.items()]).sum(0)
            for m in range(measures)
        ]
        found[choice] = tuple(
            0.5 / seen.tokens * float(p.double().square().sum()) for p in products
        )
    return found


def _joined(calls: Sequence[Reading], measures: int) -> list[Tensor]:
    """By measure, the gradients of all calls (tokens, out)."""
    return [torch.cat([call.gradient(m) for call in calls]) for m in range(measures)]
