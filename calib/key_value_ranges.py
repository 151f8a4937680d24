"""The largest keys and values of a block's attention layers, for a cache in 8 bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.calib.hessian import reduce_max
from ptq.model.attention import cached_attentions, tap


@dataclass(kw_only=True)
class Range:
    """max |x| over all keys, and over all values, of one attention layer (float32 scalars)."""

    keys: Tensor
    values: Tensor

    def reduce(self) -> None:
        """Combine those of all ranks; a no-op on one rank."""
        reduce_max(self.keys)
        reduce_max(self.values)


@contextmanager
def ranges_of(block: nn.Module, device: torch.device) -> Iterator[dict[str, Range]]:
    """What attention layers of ``block`` hand to a cache while batches run through it, by their
    names within it."""
    ranges: dict[str, Range] = {}
    hooks = []
    for inner, attention in cached_attentions(block).items():
        zero = torch.zeros((), device=device)
        ranges[inner] = Range(keys=zero, values=zero.clone())
        hooks.append(tap(attention, _noting(ranges[inner])))
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


def _noting(seen: Range) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen.keys = torch.maximum(seen.keys, keys.abs().amax().float())
        seen.values = torch.maximum(seen.values, values.abs().amax().float())
        return keys, values

    return note
