"""From the last block to the first: gradients of the model's own loss by what layers return.

The loss is -log p of tokens sampled from the model itself, summed over the positions of a sequence:
so the mean of products of its gradients is the Fisher matrix. Memory holds one block at a time: a
forward pass keeps what every block reads, for few sequences; then blocks are run and differentiated
one after the other, from the last. What the layers of a block read, and their gradients, are kept
while somebody looks at the block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.calib.block_arguments import hidden_states
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.fold import remember
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.walk import Prepare, Steps, Watch, filled_on_demand
from ptq.model.source import Source

Layers = tuple[str, ...]  # full names
ALL = 0  # a measure: of the whole vocabulary; a number is that of its most likely tokens


@dataclass
class Reading:
    """What a layer read in a call (tokens, in), how many outputs it has, and by measure the
    gradient by what it returned (tokens, out); none where nothing depends on that."""

    x: Tensor
    outputs: int
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def gradient(self, measure: int) -> Tensor:
        """That of a measure, float32; zeros where nothing depends on the call."""
        found = self.gradients.get(measure)
        return self.x.new_zeros(len(self.x), self.outputs).float() if found is None else found


@dataclass(frozen=True)
class Differentiated:
    """A block, filled and prepared, and the layers of it that read the same.

    Attributes:
        tokens: in all sequences.
        readings: of every layer, one for each of its calls; whoever has seen those of a layer may
            take them out.
    """

    block: CalibratedBlock
    groups: list[Layers]
    tokens: int
    readings: dict[str, list[Reading]]


def backward(
    source: Source,
    sequences: Sequence[Tensor],
    layers: Iterable[str],
    *,
    device: torch.device | str,
    activations: str = "ram",
    prepare: Prepare | None = None,
    seed: int = 0,
    measures: Sequence[int] = (ALL,),
    until: int = 0,
    inputs: bool = True,
    on_block: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[Differentiated]:
    """Yield every block from the last to number ``until``; each is valid until the next is asked
    for.

    Args:
        sequences: token ids (1, length), int64, all of the same length.
        layers: full names of Linears in blocks.
        activations: where hidden states live: "ram", "device" or "disk".
        prepare: as :func:`ptq.calib.walk.walk` takes it; must not change what a block computes.
            Parameters and modules that it replaces are put back.
        seed: of the sampled tokens.
        measures: a gradient for each: with ``ALL`` p is over the vocabulary, with a number over so
            many of the most likely tokens, renormalised, of which the token is sampled.
        inputs: whether what layers read is kept; without, readings have (tokens, 0).
        on_block: told how many steps are done of how many; there are two for every block.

    Raises:
        ValueError: architectures that cannot be run block by block, or without an output layer;
            gradients that are not finite.
    """
    device, blocks = torch.device(device), source.blocks()
    watch = Watch(layers=set(layers), squares=True)
    tokens, total = sum(sequence.numel() for sequence in sequences), 2 * len(blocks) - until
    with HiddenStates(activations, device) as states:
        steps = Steps.of(source, sequences, states)
        read: list[HiddenStates] = []  # by block
        try:
            _forward(steps, blocks, read, lambda done: on_block(done, total))
            gradients = [
                _at_the_end(steps, index, torch.Generator().manual_seed(seed + index), measures)
                for index in range(len(sequences))
            ]
            for index in reversed(range(until, len(blocks))):
                name, module = blocks[index]
                block = CalibratedBlock.of(name, module, index, len(blocks))
                source.fill(module, name, device)
                steps.states = read[index]
                try:
                    with _restored(module):
                        with torch.no_grad():
                            groups = _prepared(steps, block, watch, prepare)
                        pass_back = _PassBack(block, groups, inputs)
                        for batch in range(len(sequences)):
                            gradients[batch] = pass_back(steps, batch, gradients[batch])
                        yield Differentiated(block, groups, tokens, pass_back.readings)
                finally:
                    source.release(module)
                read[index].close()
                on_block(2 * len(blocks) - index, total)
        finally:
            for kept in read:
                kept.close()


def _prepared(
    steps: Steps, block: CalibratedBlock, watch: Watch, prepare: Prepare | None
) -> list[Layers]:
    """The layers of a block that read the same; the block is prepared."""
    steps.observe(block, watch, len(steps.batches))
    groups = [tuple(f"{block.prefix}{name}" for name in group.layers) for group in block.groups]
    if prepare is not None:
        prepare(block, steps.trial(block))
    block.forget()
    return groups


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put the modules and parameters that ``module`` had back in their places at the end."""
    restore = remember(module)
    try:
        yield
    finally:
        restore()


@torch.no_grad()
def _forward(
    steps: Steps,
    blocks: Sequence[tuple[str, nn.Module]],
    read: list[HiddenStates],
    told: Callable[[int], object],
) -> None:
    """Run all blocks; ``read`` gets what each of them was given."""
    for index, (name, module) in enumerate(blocks):
        try:
            steps.source.fill(module, name, steps.device)
            if index == 0:
                steps.record()
            read.append(steps.states.another())
            for batch in range(len(steps.batches)):
                read[-1][batch] = steps.states[batch]
            steps.propagate(CalibratedBlock.of(name, module, index, len(blocks)))
        finally:
            steps.source.release(module)
        told(index + 1)


def _at_the_end(
    steps: Steps, batch: int, generator: torch.Generator, measures: Sequence[int]
) -> list[Tensor]:
    """By measure, the gradient of -log p of tokens sampled from the model, by its last hidden
    states."""
    model = steps.source.skeleton()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear output layer: nothing tells what errors cost"
        )
    seen: list[Tensor] = []
    found: list[Tensor] = []
    with filled_on_demand(steps.source, list(steps.recorder.blocks), steps.device):
        hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.enable_grad():
                last = steps.states[batch].requires_grad_()
                steps.recorder.reach_head(steps.batches[batch].to(steps.device), last)
                logits = nn.functional.linear(seen[0], output.weight.detach()).flatten(0, -2)
                for index, count in enumerate(measures):
                    top = logits.topk(min(count, logits.shape[-1]), -1).values if count else logits
                    log_p = top.float().log_softmax(-1)
                    p = log_p.detach().exp().cpu()
                    drawn = torch.multinomial(p, 1, generator=generator).to(log_p.device)
                    loss, more = -log_p.gather(-1, drawn).sum(), index + 1 < len(measures)
                    found.append(torch.autograd.grad(loss, last, retain_graph=more)[0])
        finally:
            hook.remove()
    return found


class _PassBack:
    """Runs and differentiates a block; keeps what its layers read, and the gradients by what they
    returned."""

    def __init__(self, block: CalibratedBlock, groups: Sequence[Layers], inputs: bool) -> None:
        self._inputs = inputs
        self.readings: dict[str, list[Reading]] = {name: [] for g in groups for name in g}
        self._block, self._measure = block, 0

    def __call__(self, steps: Steps, batch: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """By measure, the gradient by what the block read."""
        prefix = self._block.prefix
        hooks = [
            self._block.module.get_submodule(name.removeprefix(prefix)).register_forward_hook(
                self._watch(readings)
            )
            for name, readings in self.readings.items()
        ]
        before: list[Tensor] = []
        try:
            with torch.enable_grad():
                hidden = steps.states[batch].requires_grad_()
                call = steps.calls[batch][self._block.index]
                # a block may write into what it is given, which a leaf forbids
                returned = hidden_states(call(self._block.module, hidden.view_as(hidden)))
                for index, gradient in enumerate(gradients):
                    self._measure, more = index, index + 1 < len(gradients)
                    before += torch.autograd.grad(returned, hidden, gradient, retain_graph=more)
        finally:
            for hook in hooks:
                hook.remove()
        if not all(gradient.isfinite().all() for gradient in before):
            raise ValueError(f"{self._block.name}: gradients contain NaN or infinity")
        return before

    def _watch(
        self, readings: list[Reading]
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(layer: nn.Module, args: tuple[Tensor, ...], returned: Tensor) -> None:
            read = args[0].detach().flatten(0, -2)
            read = read if self._inputs else read.new_empty(len(read), 0)
            reading = Reading(read, returned.shape[-1])
            readings.append(reading)

            def backward(gradient: Tensor) -> None:
                reading.gradients[self._measure] = gradient.detach().flatten(0, -2).float()

            if returned.requires_grad:
                returned.register_hook(backward)

        return forward
