"""One model in several variants, block by block: every variant has hidden states of its own, and a
block's weights are read once for all of them.

Memory holds one block, and the hidden states of all variants (which may lie on disk). What makes a
variant comes in as a function; nothing here knows what that is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.walk import Steps, filled_on_demand
from ptq.model.source import Source

# ``alter(block, variant)``: the block is that variant while the context lasts, and afterwards what
# it was.
Alter = Callable[[CalibratedBlock, str], AbstractContextManager[None]]


class SideBySide:
    """A walk in variants. A context manager: hidden states are dropped at its end.

    Args:
        batches: token ids (sequences, length), int64, all of the same length.
        variants: names.
        activations: where hidden states live: "ram", "device" or "disk".
    """

    def __init__(
        self,
        source: Source,
        batches: Sequence[Tensor],
        variants: Sequence[str],
        *,
        device: torch.device | str,
        activations: str = "ram",
    ) -> None:
        self._source, self._batches = source, batches
        self._device, self._activations = torch.device(device), activations
        self._blocks = source.blocks()
        self._variants = tuple(variants)
        self._states: dict[str, HiddenStates] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SideBySide":
        for variant in ("", *self._variants):
            states = HiddenStates(self._activations, self._device)
            self._states[variant] = self._stack.enter_context(states)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @torch.no_grad()
    def run(
        self,
        alter: Alter,
        *,
        begin: int = 0,
        states: Callable[[str, int], Tensor] | None = None,
    ) -> Iterator[CalibratedBlock]:
        """Run the blocks from ``begin`` on, every one in all variants; each is told when all are
        through it.

        Args:
            states: what the block before ``begin`` returned, of a variant and batch, as
                :meth:`hidden` gave it; None for the first block.

        Raises:
            ValueError: architectures that cannot be run block by block.
        """
        steps = self._steps = Steps.of(self._source, self._batches, self._states[""])
        self._filled(0, steps.record)
        for variant in self._variants:
            for batch in range(len(self._batches)):
                read = self._states[""][batch] if states is None else states(variant, batch)
                self._states[variant][batch] = read
        for index in range(begin, len(self._blocks)):
            name, module = self._blocks[index]
            block = CalibratedBlock.of(name, module, index, len(self._blocks))
            self._filled(index, lambda block=block: self._through(block, alter))
            yield block

    def _filled(self, index: int, do: Callable[[], None]) -> None:
        """Something that needs the weights of a block."""
        name, module = self._blocks[index]
        try:
            self._source.fill(module, name, self._device)
            do()
        finally:
            self._source.release(module)

    def _through(self, block: CalibratedBlock, alter: Alter) -> None:
        for variant in self._variants:
            self._steps.states = self._states[variant]
            with alter(block, variant):
                self._steps.propagate(block)

    def hidden(self, variant: str, batch: int) -> Tensor:
        """A copy of what the last block returned, or of what the first one reads."""
        return self._states[variant][batch]

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[int, Iterator[tuple[str, Tensor]]]]:
        """By batch, what the model makes of the last hidden states of every variant: (variant,
        (sequences, length, vocabulary)), each computed when it is asked for."""
        recorder = self._steps.recorder
        with filled_on_demand(self._source, recorder.blocks, self._device):
            for index, batch in enumerate(self._batches):
                tokens = batch.to(self._device)
                yield (
                    index,
                    (
                        (variant, recorder.logits(tokens, self._states[variant][index]))
                        for variant in self._variants
                    ),
                )


def linear_layers(block: CalibratedBlock) -> dict[str, nn.Linear]:
    """The Linears of a block by their full names."""
    return {
        f"{block.prefix}{name}": layer
        for name, layer in block.module.named_modules()
        if isinstance(layer, nn.Linear)
    }
