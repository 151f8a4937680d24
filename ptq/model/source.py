"""What a run needs of a model, wherever its weights are."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


@runtime_checkable
class Source(Protocol):
    """A causal language model whose blocks can be filled with their weights one after the other.

    Attributes:
        path: the directory of the checkpoint, or a name.
        config: of the model, as transformers has it.
        dtype: that most values are stored in; ``compute_dtype``: that blocks are filled in.
        total_bytes: of all weights.
        fingerprint: a hash that tells two sources apart.
    """

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype
    compute_dtype: torch.dtype
    total_bytes: int

    @property
    def fingerprint(self) -> str: ...

    def digests(self, block: str | None) -> dict[str, str]:
        """What the fingerprint does not tell apart: hashes of the data of the tensors of ``block``,
        or with None of those outside of all blocks, by their names in the checkpoint.

        Tensors that were not read yet are read.
        """
        ...

    def skeleton(self) -> nn.Module:
        """The whole model, of which any module may be empty: on the meta device."""
        ...

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The decoder's blocks in order, with their full names.

        Raises:
            ValueError: the weights are quantized already.
        """
        ...

    def head(self) -> tuple[str, nn.Module]:
        """The full name of the output head, and the layer.

        Raises:
            ValueError: it is tied to the embedding, or no linear layer.
        """
        ...

    def foreign(self) -> str | None:
        """Why other programs would not find the layers of a checkpoint that has them as this model
        does, or None."""
        ...

    def names(self) -> list[str]:
        """The names of all tensors, as the checkpoint has them, sorted."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU; ValueError when there is none of that name."""
        ...

    def checkpoint_name(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model, also one that only a quantized layer
        has.

        In Mixtral ``layers.0.mlp.experts.1.w2.weight`` →
        ``layers.0.block_sparse_moe.experts.1.w2.weight``.
        """
        ...

    def module_name(self, name: str) -> str:
        """What the model calls a tensor of the checkpoint: the inverse of ``checkpoint_name``."""
        ...

    def rest(self, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no block, nor to modules in ``without``, one at a time, as
        stored."""
        ...

    def kept(self, block: str, replaced: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``block`` as stored, without those of the parameters in ``replaced`` (full
        names of weights in the model).

        Of experts stored in one tensor, those that are not replaced, and the biases if any weight
        is, come one by one under the model's names.
        """
        ...

    def fill(
        self, module: nn.Module, prefix: str, device: torch.device | str, *, recurse: bool = True
    ) -> None:
        """Put ``module``, which the model calls ``prefix``, with its weights on ``device``.

        Without ``recurse`` only what ``module`` itself owns. Parameters that are filled already
        stay as they are.

        Raises:
            ValueError: tensors that are missing, have another shape, or contain NaN or infinity.
        """
        ...

    def release(self, module: nn.Module, *, recurse: bool = True) -> None:
        """``module`` is not needed for now: its memory may be freed."""
        ...
