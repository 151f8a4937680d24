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
from ptq.pipeline.damage import LENGTH, first_windows
from ptq.pipeline.plan import Plan
from ptq.pipeline.tuning_cost import TOKEN_COPIES

# Of the gradients of a layer: joined, limited, squared.
COPIES = 4


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
    the first ``LENGTH`` tokens of the first windows of ``batches``.

    Raises:
        ValueError: see :func:`ptq.calib.backward.backward`.
    """
    layers = [n for n in plan.layers if n != plan.head and plan[n].recipe.fisher]
    with HiddenStates("disk" if activations == "disk" else "ram", torch.device("cpu")) as kept:
        costs = OutputCosts(kept, parts)
        seen_blocks = backward(
            source,
            first_windows(batches, plan.recipe.fisher),
            layers,
            device=device,
            activations=activations,
            prepare=Balancing(plan) if plan.balances else None,
            seed=plan.recipe.seed,
            until=until,
            inputs=False,
            on_block=on_block,
        )
        for seen in seen_blocks if until < len(source.blocks()) else ():
            for name in list(seen.readings):
                costs.add(name, [call.gradient(0) for call in seen.readings.pop(name)])
        yield costs


def output_costs_bytes(
    plan: Plan, blocks: Sequence[Sequence[int]], hidden: int, activations: str
) -> tuple[int, int]:
    """Memory: of G of all layers, and of the gradients of a block while they are measured, by the
    outputs of the layers of every block; nothing without a Fisher matrix."""
    if not plan.recipe.fisher:
        return 0, 0
    kept = sum(
        4 * (rows.stop - rows.start) ** 2
        for block in blocks
        for outputs in block
        for rows in parts(outputs)
    )
    length = min(LENGTH, plan.seq_len)
    tokens = min(plan.recipe.fisher, plan.samples) * length
    widest = max((outputs for block in blocks for outputs in block), default=0)
    # gradients of a block, copies of those of a layer, one window that is differentiated, and what
    # every block reads
    numbers = tokens * (max(map(sum, blocks), default=0) + COPIES * widest)
    numbers += length * hidden * TOKEN_COPIES
    numbers += 0 if activations == "disk" else tokens * hidden * len(blocks)
    passed = 4 * numbers
    return (0 if activations == "disk" else kept), passed
