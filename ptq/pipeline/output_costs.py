"""Which errors of a layer's outputs cost the whole model much: ``G = E[g gᵀ]`` of every layer.

g is the gradient of the model's own loss by what the layer returns (:mod:`ptq.calib.backward`), of
the balanced model before anything is quantized, so that G is half of what GPTQ on both sides
(:mod:`ptq.numerics.both_sides`) makes small. Measured once, before the first block is quantized; a
run that continues measures what it still needs. Balancing after earlier blocks were quantized finds
slightly other factors than here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ptq.calib.backward import backward
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.output_costs import OutputCosts
from ptq.model.source import Source
from ptq.numerics.both_sides import parts
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.plan import Plan


@contextmanager
def output_costs(
    source: Source,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    device: torch.device | str,
    activations: str = "ram",
    until: int = 0,
    on_block: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[OutputCosts]:
    """Measure G of the layers that the recipe wants it of, in blocks number ``until`` and later, on
    the first of ``batches``.

    Raises:
        ValueError: see :func:`ptq.calib.backward.backward`.
    """
    windows = torch.cat(list(batches))[: plan.recipe.fisher]
    layers = [n for n in plan.layers if n != plan.head and plan[n].recipe.fisher]
    with HiddenStates("disk" if activations == "disk" else "ram", torch.device("cpu")) as kept:
        costs = OutputCosts(kept, parts)
        seen_blocks = backward(
            source,
            list(windows.split(1)),
            layers,
            device=device,
            activations=activations,
            prepare=Balancing(plan) if plan.balances else None,
            seed=plan.recipe.seed,
            until=until,
            on_block=on_block,
        )
        for seen in seen_blocks if until < len(source.blocks()) else ():
            for name in [name for group in seen.groups for name in group if name in layers]:
                costs.add(seen, name)
        yield costs
