"""What an error in the output of a layer costs the whole model, by the Fisher matrix.

    score = 1/2 · mean over tokens of (Σ over the layers of a group of g · (ŷ - y))²

g is the gradient of -log p(token) by a layer's output, summed over the positions of a sequence,
the tokens sampled from the model itself: so the mean of its square is the Fisher matrix, and the
score the KL divergence that the error causes, to second order. Scores of different groups add up.

Memory holds one block at a time: a forward pass keeps what every block reads, for few sequences;
then blocks are run and differentiated one after the other, from the last.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptq.calib.block_arguments import Recorder, hidden_states
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.fold import remember
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.walk import Prepare, Steps, Watch, filled_on_demand
from ptq.model.source import Source

Layers = tuple[str, ...]  # full names
# ``errors(name, x)``: what the layer of that full name returns for x (tokens, in) with each of some
# choices, less what it should: (tokens, out) by choice.
Errors = Callable[[str, Tensor], Mapping[str, Tensor]]
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
) -> dict[Layers, dict[str, float]]:
    """The score of every group of ``layers`` that read the same, for every choice.

    Args:
        sequences: token ids (1, length), int64, all of the same length.
        layers: full names of Linears in blocks.
        activations: where hidden states live: "ram", "device" or "disk".
        prepare: as :func:`ptq.calib.walk.walk` takes it; must not change what a block computes.
            Parameters and modules that it replaces are put back.
        seed: of the sampled tokens.

    Raises:
        ValueError: architectures that cannot be run block by block, or without an output layer.
    """
    device, blocks = torch.device(device), source.blocks()
    watch = Watch(layers=set(layers), squares=True)
    tokens = sum(sequence.numel() for sequence in sequences)
    scores: dict[Layers, dict[str, float]] = {}
    with HiddenStates(activations, device) as states:
        steps = Steps(
            source=source,
            batches=sequences,
            held=[None] * len(sequences),
            states=states,
            recorder=Recorder(source.skeleton(), [b for _, b in blocks], torch.device("cpu")),
        )
        read: list[HiddenStates] = []  # by block
        try:
            _forward(steps, blocks, read)
            gradients = [
                _at_the_end(steps, index, torch.Generator().manual_seed(seed + index))
                for index in range(len(sequences))
            ]
            for index in reversed(range(len(blocks))):
                name, module = blocks[index]
                block = _block(blocks, index)
                source.fill(module, name, device)
                steps.states = read[index]
                try:
                    with _restored(module):
                        with torch.no_grad():
                            groups = _prepared(steps, block, watch, prepare)
                            errors = choose(block, groups)
                        for batch in range(len(sequences)):
                            costs = _Costs(block, groups, errors)
                            gradients[batch] = costs.back(steps, batch, gradients[batch])
                            _add(scores, costs.totals(), 0.5 / tokens)
                finally:
                    source.release(module)
                read[index].close()
        finally:
            for kept in read:
                kept.close()
    return dict(reversed(scores.items()))


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


def _add(
    scores: dict[Layers, dict[str, float]], sums: dict[Layers, dict[str, float]], factor: float
) -> None:
    for group, totals in sums.items():
        kept = scores.setdefault(group, dict.fromkeys(totals, 0.0))
        for choice, total in totals.items():
            kept[choice] += factor * total


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put the modules and parameters that ``module`` had back in their places at the end."""
    restore = remember(module)
    try:
        yield
    finally:
        restore()


def _block(blocks: Sequence[tuple[str, nn.Module]], index: int) -> CalibratedBlock:
    name, module = blocks[index]
    return CalibratedBlock(
        name=name, prefix=f"{name}.", module=module, groups=[], index=index, count=len(blocks)
    )


@torch.no_grad()
def _forward(
    steps: Steps, blocks: Sequence[tuple[str, nn.Module]], read: list[HiddenStates]
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
            steps.propagate(_block(blocks, index))
        finally:
            steps.source.release(module)


def _at_the_end(steps: Steps, batch: int, generator: torch.Generator) -> Tensor:
    """The gradient of -log p of tokens sampled from the model, by its last hidden states."""
    model = steps.source.skeleton()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear output layer: nothing tells what errors cost"
        )
    seen: list[Tensor] = []
    with filled_on_demand(steps.source, list(steps.recorder.blocks), steps.device):
        hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.enable_grad():
                last = steps.states[batch].requires_grad_()
                steps.recorder.reach_head(steps.batches[batch].to(steps.device), last)
                logits = nn.functional.linear(seen[0], output.weight.detach()).flatten(0, -2)
                log_p = logits.float().log_softmax(-1)
                p = log_p.detach().exp().cpu()
                drawn = torch.multinomial(p, 1, generator=generator).to(log_p.device)
                (gradient,) = torch.autograd.grad(-log_p.gather(-1, drawn).sum(), last)
        finally:
            hook.remove()
    return gradient


class _Costs:
    """The inner products of gradients and errors in one block, for one sequence."""

    def __init__(self, block: CalibratedBlock, groups: Sequence[Layers], errors: Errors) -> None:
        self._block, self._errors = block, errors
        self._group = {name: group for group in groups for name in group}
        self._sums: dict[Layers, dict[str, Tensor]] = {}

    def back(self, steps: Steps, batch: int, gradient: Tensor) -> Tensor:
        """Run and differentiate the block; the gradient by what it read."""
        prefix = self._block.prefix
        hooks = [
            self._block.module.get_submodule(name.removeprefix(prefix)).register_forward_hook(
                self._watch(name)
            )
            for name in self._group
        ]
        try:
            with torch.enable_grad():
                hidden = steps.states[batch].requires_grad_()
                call = steps.calls[batch][self._block.index]
                # a block may write into what it is given, which a leaf forbids
                returned = hidden_states(call(self._block.module, hidden.view_as(hidden)))
                (before,) = torch.autograd.grad(returned, hidden, gradient)
        finally:
            for hook in hooks:
                hook.remove()
        if not before.isfinite().all():
            raise ValueError(f"{self._block.name}: gradients contain NaN or infinity")
        return before

    def totals(self) -> dict[Layers, dict[str, float]]:
        """Σ over tokens of the squares, by group and choice."""
        return {
            group: {c: float(v.double().square().sum()) for c, v in sums.items()}
            for group, sums in reversed(self._sums.items())
        }

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(layer: nn.Module, args: tuple[Tensor, ...], returned: Tensor) -> None:
            x = args[0].detach()

            def backward(gradient: Tensor) -> None:
                rows = gradient.detach().flatten(0, -2).float()
                sums = self._sums.setdefault(self._group[name], {})
                for choice, error in self._errors(name, x.flatten(0, -2)).items():
                    product = (rows * error).sum(-1)
                    sums[choice] = product if choice not in sums else sums[choice] + product

            if returned.requires_grad:
                returned.register_hook(backward)

        return forward
