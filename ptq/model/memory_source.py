"""A model that is already in memory as the source of a run."""

import copy
import hashlib
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq.model.checkpoint_source import CONV1D, STACKED
from ptq.model.experts import unfuse
from ptq.model.parameter_names import NameMap
from ptq.model.structure import find_blocks, find_head, linearize


class MemorySource:
    """A model in memory as the :class:`~ptq.model.source.Source` of a run.

    It is changed in place: fused experts are split, and a run replaces its layers.
    """

    def __init__(self, model: nn.Module):
        names = NameMap(model) if isinstance(model, PreTrainedModel) else None
        experts = unfuse(model, names.expert_names if names else _refuse)
        self._stacked = names is not None and any(names.stacked(path) for path in experts)
        self._transposed = linearize(model)
        self._model = model.requires_grad_(False).eval()
        self.path = Path(getattr(model, "name_or_path", "") or "memory")
        self.config = copy.deepcopy(cast(PretrainedConfig, model.config))
        self.dtype = self.compute_dtype = next(
            p.dtype for p in model.parameters() if p.is_floating_point()
        )
        self._blocks = find_blocks(model)
        self._start = dict(model.state_dict())
        self.total_bytes = sum(t.nbytes for t in self._start.values())

    @property
    def fingerprint(self) -> str:
        """A sha256 over the configuration and all values."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for name, value in self._start.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    def digests(self, block: str | None) -> dict[str, str]:
        """None: the fingerprint is of all values, as they were at the start."""
        return {}

    def skeleton(self) -> nn.Module:
        """The model itself."""
        return self._model

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The decoder's blocks in order, with their full names."""
        return [(name, self._model.get_submodule(name)) for name in self._blocks]

    def head(self) -> tuple[str, nn.Module]:
        """The output head and its full name; ValueError when it is tied to the embedding, or no
        linear layer."""
        return self._head, self._model.get_submodule(self._head)

    @cached_property
    def _head(self) -> str:
        return find_head(self._model)  # once: later it may have been replaced by a quantized layer

    def foreign(self) -> str | None:
        """Why other programs would not find the layers of this model in a checkpoint, or None."""
        return CONV1D if self._transposed else STACKED if self._stacked else None

    def names(self) -> list[str]:
        """The names of all tensors that the model had at the start; a tied output layer has none of
        its own."""
        tied = getattr(self._model, "all_tied_weights_keys", {})
        return sorted(name for name in self._start if name not in tied)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the model as it was at the start; ValueError when there is none of that
        name."""
        if name not in self._start:
            raise ValueError(f"the model in memory has no tensor {name}")
        value = self._start[name].detach().cpu()
        return value.T.contiguous() if name in self._transposed else value

    def checkpoint_name(self, name: str) -> str:
        """The model's own names are the names."""
        return name

    def module_name(self, name: str) -> str:
        """The model's own names are the names."""
        return name

    def rest(self, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to no block, nor to modules in ``without``, one at a time."""
        prefixes = tuple(f"{name}." for name in (*self._blocks, *without))
        yield from (
            (name, self.tensor(name)) for name in self.names() if not name.startswith(prefixes)
        )

    def kept(self, block: str, replaced: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that ``block`` had at the start, without the parameters in ``replaced`` (full
        names)."""
        names = (
            name for name in self.names() if name.startswith(f"{block}.") and name not in replaced
        )
        yield from ((name, self.tensor(name)) for name in names)

    def fill(
        self, module: nn.Module, prefix: str, device: torch.device | str, *, recurse: bool = True
    ) -> None:
        """Move ``module`` to ``device``; its values are there already."""
        for owner in module.modules() if recurse else (module,):
            for parameter in owner.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in owner.named_buffers(recurse=False):
                owner._buffers[name] = buffer.to(device)

    def release(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Nothing: the model is the caller's."""


def _refuse(path: str):
    raise ValueError(f"{path}: only transformers models may have fused experts")
