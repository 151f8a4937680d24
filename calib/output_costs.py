"""Which errors of a layer's outputs cost the whole model much: ``G = E[g gᵀ]``, made robust.

g is the gradient of the model's own loss by what a layer returns (:mod:`ptq.calib.backward`). Its
size is very uneven: on a real model (SmolLM2-135M, 16 × 512 tokens) a hundredth of the tokens has
10 to 50 % of the squares, an attention sink 96 % of those of its values, and correlations of
outputs in one half of the text agree with those of the other by a cosine of .05 to .8, by layer. So
no token counts for more than the median one (.5 to .97 then), and correlations are shrunk by how
well both halves agree (A5).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from ptq.calib.hidden_states import HiddenStates


class OutputCosts:
    """G of layers, block diagonal, in float32; kept where hidden states are, but never on the
    device.

    ``parts``: the rows of every block, of a layer with so many.
    """

    def __init__(self, kept: HiddenStates, parts: Callable[[int], Sequence[slice]]) -> None:
        self._kept, self._parts = kept, parts
        self._where: dict[str, range] = {}

    def add(self, layer: str, gradients: Sequence[Float32[Tensor, "_ _"]]) -> None:
        """Take in a layer, by its full name: the gradients of every call, each (tokens, out)."""
        if not any(map(len, gradients)):
            return
        largest = torch.stack([g.abs().amax() for g in gradients if len(g)]).amax()
        if largest > 0:  # how large they are does not matter, but squares must be numbers
            gradients = [g / largest for g in gradients]
        limit = torch.cat([g.square().sum(1) for g in gradients]).median()
        gradients = [_limited(g, limit) for g in gradients]
        start = sum(map(len, self._where.values()))
        parts = self._parts(gradients[0].shape[1])
        self._where[layer] = range(start, start + len(parts))
        for index, rows in zip(self._where[layer], parts, strict=True):
            halves = [
                torch.cat([g[:, rows] for g in gradients[i::2]] or [gradients[0][:0, rows]])
                for i in (0, 1)
            ]
            self._kept[index] = shrunk(*(half.T @ half for half in halves))

    def of(self, layer: str) -> tuple[Tensor, ...] | None:
        """Its blocks, on the CPU; None where nothing was measured: of the output head, and where no
        token came by."""
        where = self._where.get(layer)
        return None if where is None else tuple(self._kept[index] for index in where)


def _limited(gradient: Tensor, limit: Tensor) -> Tensor:
    """Rows of at most the squared norm ``limit``."""
    squares = gradient.square().sum(1, keepdim=True)
    return (
        gradient * (limit / squares.clamp_min(torch.finfo(squares.dtype).tiny)).clamp(max=1).sqrt()
    )


def shrunk(
    one: Float32[Tensor, "rows rows"], other: Float32[Tensor, "rows rows"]
) -> Float32[Tensor, "rows rows"]:
    """``one + other``, two sums of products over halves of a text, its correlations multiplied by
    the share of them that is no noise.

    With the cosine r of the correlations in both halves that share of the mean is ``2r / (1 + r)``
    (Spearman and Brown, 1910).
    """
    mine, theirs = _correlations(one), _correlations(other)
    size = (mine.square().sum() * theirs.square().sum()).sqrt()
    r = ((mine * theirs).sum() / size).clamp(0, 1) if size > 0 else size
    both = one + other
    diagonal = both.diagonal().diag()
    return diagonal + (both - diagonal) * (2 * r / (1 + r))


def _correlations(products: Tensor) -> Tensor:
    """Of the sums of products; zeros on the diagonal, and for what is always zero."""
    size = products.diagonal().sqrt()
    scaled = torch.where(size > 0, 1 / size, 0.0)
    return (products * scaled * scaled.unsqueeze(1)).fill_diagonal_(0.0)
