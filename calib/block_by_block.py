"""A model that is run and differentiated a block at a time.

Of a batch only what every block reads is kept on the way forward. On the way back each block, from
the last, is run once more on that and differentiated: memory holds what one block needs for its
derivative. Nothing is known of what is trained: parameters of the blocks, or whatever their layers
do when a gradient reaches them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ptq.calib.block_arguments import Call, Recorder, hidden_states
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.walk import filled_on_demand
from ptq.model.source import Source


@dataclass
class Batch:
    """Tokens (sequences, length), the arguments of every block for them, and what blocks read:
    ``states[i]`` what block i does, and one more what the last one returned."""

    tokens: Tensor
    calls: list[Call]
    states: HiddenStates
    count: int = 0

    @property
    def last(self) -> Tensor:
        """What the last block that was run returned."""
        return self.states[self.count]


@dataclass
class BlockByBlock:
    """The blocks of a source, which whoever runs them has filled, and all that is around them,
    which is filled when it is needed.

    Use it inside :meth:`around`.

    Attributes:
        activations: where hidden states live: "ram", "device" or "disk".
    """

    source: Source
    device: torch.device
    activations: str = "ram"
    blocks: list[tuple[str, nn.Module]] = field(init=False)
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = self.source.blocks()
        modules = [module for _, module in self.blocks]
        self.recorder = Recorder(self.source.skeleton(), modules, torch.device("cpu"))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Embeddings, the last norm and the output layer stay filled in here."""
        with filled_on_demand(self.source, self.recorder.blocks, self.device):
            yield

    @torch.no_grad()
    def learn_form(self, tokens: Tensor) -> None:
        """See what blocks return, and that they can be run one by one; the first is filled.

        Raises:
            ValueError: they cannot, naming the reason.
        """
        self.recorder.learn(tokens[:1].to(self.device))

    @torch.no_grad()
    def begin(self, tokens: Tensor) -> Batch:
        """A batch before the first block; whoever asks closes its ``states``."""
        tokens = tokens.to(self.device)
        hidden, calls = self.recorder(tokens)
        states = HiddenStates(self.activations, self.device).__enter__()
        states[0] = hidden
        return Batch(tokens, calls, states)

    @torch.no_grad()
    def forward(self, batch: Batch) -> None:
        """Run the next block, and keep what it returned."""
        index = batch.count
        _, module = self.blocks[index]
        batch.states[index + 1] = hidden_states(batch.calls[index](module, batch.states[index]))
        batch.count += 1

    def back(self, batch: Batch, index: int, gradient: Tensor) -> Tensor:
        """Run block ``index`` once more and differentiate it; the gradient by what it read.

        Args:
            gradient: by what it returned; parameters that want one get theirs added.

        Raises:
            FloatingPointError: NaN or infinity, naming the block.
        """
        name, module = self.blocks[index]
        with torch.enable_grad():
            hidden = batch.states[index].requires_grad_()
            # a block may write into what it is given, which a leaf forbids
            returned = hidden_states(batch.calls[index](module, hidden.view_as(hidden)))
            returned.backward(gradient)
        if hidden.grad is None or not hidden.grad.isfinite().all():
            raise FloatingPointError(f"{name}: gradients contain NaN or infinity")
        return hidden.grad

    def divergence(
        self, tokens: Tensor, reference: Tensor, last: Tensor, *, differentiate: bool
    ) -> tuple[float, Tensor | None]:
        """KL(original ‖ this) in nats over the full vocabulary, summed over all tokens, and its
        derivative by ``last`` if that is wanted.

        Logits of one sequence exist at a time.

        Args:
            tokens: (sequences, length) on the device.
            reference, last: what the last block of the original returned for them, and of this.
        """
        total, parts = 0.0, list[Tensor]()
        for row in (slice(index, index + 1) for index in range(len(tokens))):
            with torch.no_grad():
                wanted = self.recorder.logits(tokens[row], reference[row]).float().log_softmax(-1)
            with torch.set_grad_enabled(differentiate):
                state = last[row].detach().requires_grad_(differentiate)
                found = self.recorder.logits(tokens[row], state).float().log_softmax(-1)
                value = kl_div(found, wanted, reduction="sum", log_target=True)
                if differentiate:
                    parts.append(torch.autograd.grad(value, state)[0])
            total += float(value.detach())
        return total, torch.cat(parts) if parts else None
