"""What an error in the output of a layer costs the whole model, by the Fisher matrix.

    score = 1/2 · mean over tokens of (Σ over the layers of a group of g · (ŷ - y))²

g is the gradient of -log p(token) by a layer's output, summed over the positions of a sequence,
the tokens sampled from the model itself: so the mean of its square is the Fisher matrix, and the
score the KL divergence that the error causes, to second order. Scores of different groups add up.
Where p is taken over the most likely tokens alone and renormalised, and tokens are sampled from
those, it is the KL divergence over these.

Memory holds one block at a time: a forward pass keeps what every block reads, for few sequences;
then blocks are run and differentiated one after the other, from the last. What the layers of a
block read, and their gradients, are kept while the errors of its groups are asked for, one choice
after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# Of a group, a number for every measure by choice.
Scores = dict[Layers, dict[str, tuple[float, ...]]]
# ``errors(group, inputs)``: choice after choice, what each layer of the group returns with it, less
# what it should: (tokens, out) by full name, for all ``inputs``, each (tokens, in), joined.
Errors = Callable[[Layers, Sequence[Tensor]], Iterator[tuple[str, Mapping[str, Tensor]]]]
# ``choose(block, groups)``: the errors of the layers of a block, which is filled and prepared.
Choose = Callable[[CalibratedBlock, Sequence[Layers]], Errors]
ALL = 0  # a measure: of the whole vocabulary; a number is that of its most likely tokens


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
        sequences: token ids (1, length), int64, all of the same length.
        layers: full names of Linears in blocks.
        activations: where hidden states live: "ram", "device" or "disk".
        prepare: as :func:`ptq.calib.walk.walk` takes it; must not change what a block computes.
            Parameters and modules that it replaces are put back.
        seed: of the sampled tokens.
        measures: a score for each: ``ALL`` is the KL divergence over the vocabulary, a number that
            over so many of the most likely tokens, renormalised.
        on_block: told how many steps are done of how many; there are two for every block.

    Raises:
        ValueError: architectures that cannot be run block by block, or without an output layer.
    """
    device, blocks = torch.device(device), source.blocks()
    watch = Watch(layers=set(layers), squares=True)
    tokens = sum(sequence.numel() for sequence in sequences)
    scores: Scores = {}
    with HiddenStates(activations, device) as states:
        steps = Steps.of(source, sequences, states)
        read: list[HiddenStates] = []  # by block
        try:
            _forward(steps, blocks, read, lambda done: on_block(done, 2 * len(blocks)))
            gradients = [
                _at_the_end(steps, index, torch.Generator().manual_seed(seed + index), measures)
                for index in range(len(sequences))
            ]
            for index in reversed(range(len(blocks))):
                name, module = blocks[index]
                block = CalibratedBlock.of(name, module, index, len(blocks))
                source.fill(module, name, device)
                steps.states = read[index]
                try:
                    with _restored(module):
                        with torch.no_grad():
                            groups = _prepared(steps, block, watch, prepare)
                            errors = choose(block, groups)
                        costs = _Costs(block, groups)
                        for batch in range(len(sequences)):
                            gradients[batch] = costs.back(steps, batch, gradients[batch])
                        with torch.no_grad():
                            for group in reversed(groups):
                                scores[group] = costs.of(group, errors, 0.5 / tokens)
                finally:
                    source.release(module)
                read[index].close()
                on_block(2 * len(blocks) - index, 2 * len(blocks))
        finally:
            for kept in read:
                kept.close()
    return {group: score for group, score in reversed(scores.items()) if score}


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


@dataclass
class _Reading:
    """What a layer read in a call (tokens, in), how many outputs it has, and by measure the
    gradient by what it returned (tokens, out); none where nothing depends on that."""

    x: Tensor
    outputs: int
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def gradient(self, measure: int) -> Tensor:
        """That of a measure, float32; zeros where nothing depends on the call."""
        found = self.gradients.get(measure)
        return self.x.new_zeros(len(self.x), self.outputs).float() if found is None else found


class _Costs:
    """The gradients of one block, and the inner products of them and of errors."""

    def __init__(self, block: CalibratedBlock, groups: Sequence[Layers]) -> None:
        self._block = block
        self._readings: dict[str, list[_Reading]] = {name: [] for g in groups for name in g}
        self._measure, self._measures = 0, 0

    def back(self, steps: Steps, batch: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Run and differentiate the block; by measure, the gradient by what it read."""
        prefix = self._block.prefix
        hooks = [
            self._block.module.get_submodule(name.removeprefix(prefix)).register_forward_hook(
                self._watch(readings)
            )
            for name, readings in self._readings.items()
        ]
        self._measures = len(gradients)
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

    def of(self, group: Layers, errors: Errors, factor: float) -> dict[str, tuple[float, ...]]:
        """``factor`` times the sums over tokens of the squares, by choice; drops what it was made
        of. None where no token came by."""
        readings = {name: self._readings.pop(name) for name in group}
        inputs = [reading.x for reading in readings[group[0]]]
        assert all(len(calls) == len(inputs) for calls in readings.values()), group
        if not inputs:
            return {}
        gradients = {name: self._joined(calls) for name, calls in readings.items()}
        found: dict[str, tuple[float, ...]] = {}
        for choice, error in errors(group, inputs):
            products = [
                torch.stack([(gradients[name][m] * e).sum(-1) for name, e in error.items()]).sum(0)
                for m in range(self._measures)
            ]
            found[choice] = tuple(factor * float(p.double().square().sum()) for p in products)
        return found

    def _joined(self, calls: Sequence[_Reading]) -> list[Tensor]:
        """By measure, the gradients of all calls (tokens, out)."""
        return [torch.cat([call.gradient(m) for call in calls]) for m in range(self._measures)]

    def _watch(
        self, readings: list[_Reading]
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(layer: nn.Module, args: tuple[Tensor, ...], returned: Tensor) -> None:
            reading = _Reading(args[0].detach().flatten(0, -2), returned.shape[-1])
            readings.append(reading)

            def backward(gradient: Tensor) -> None:
                reading.gradients[self._measure] = gradient.detach().flatten(0, -2).float()

            if returned.requires_grad:
                returned.register_hook(backward)

        return forward
