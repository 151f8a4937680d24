"""A checkpoint on disk as the source of a run, a block at a time in memory."""

import hashlib
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ptq.model import tied_weights
from ptq.model.coverage import Header, check_layers, check_tensor, wrapped
from ptq.model.expert_layouts import Part
from ptq.model.experts import unfuse
from ptq.model.extremes import LARGEST, extremes
from ptq.model.fp8_weights import open_shards
from ptq.model.parameter_names import NameMap, Origin, apart, dtype_plan, split_experts
from ptq.model.structure import (
    DEQUANTIZED,
    build_model,
    find_blocks,
    find_head,
    linearize,
    load_config,
    quantized_by,
    refuse_quantized,
    require_config,
    resolve,
)
from ptq.model.tensor_digest import digest
from ptq.model.weight_files import Shards

CONV1D = "its Conv1D layers are linear layers here, which other programs do not look for"
STACKED = "its experts are stored in one tensor, and other programs do not look for single ones"


class CheckpointSource:
    """A checkpoint as the :class:`~ptq.model.source.Source` of a run: a directory, or a hub id that
    is downloaded (or found in the cache) first.

    Its model is a *skeleton*: parameters on the meta device, buffers real, experts split into
    Linears. Modules are filled when they are needed and released afterwards.
    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype | None = None, hashed: bool = False):
        """Read the configuration and the headers of all files, and build the skeleton.

        Args:
            dtype: to compute in; None is the checkpoint's own.
            hashed: hash every tensor that is read, see :meth:`digests`.

        Raises:
            FileNotFoundError, ValueError: with what to do, for anything that is not a readable
                causal language model in safetensors files.
        """
        self.path = resolve(path)
        require_config(self.path)
        stored = Shards(self.path).stored
        self._digests: dict[str, str] | None = {} if hashed else None
        self.config: PretrainedConfig = load_config(self.path, stored)
        self._shards = open_shards(self.path, self.config)
        self.dtype = self._shards.common_dtype()
        self.compute_dtype = dtype or self.dtype
        self.total_bytes = self._shards.total_bytes
        self._model = build_model(self.config, self.path, self.compute_dtype, stored)
        self._model.requires_grad_(False).eval()
        self._names = NameMap(self._model)
        self._transposed = linearize(self._model)
        self._origins = self._find_origins()
        self._tied = tied_weights.settle(self._model, self._origins, self._equal, self.path)
        self._dtypes = dtype_plan(self._model, self.compute_dtype)
        self._module_paths = {name for name, _ in self._model.named_modules()}
        self._module_names: dict[str, str] = {}  # of tensors that were asked for
        self._blocks = find_blocks(self._model)
        self._compared = False

    @classmethod
    def on(
        cls,
        path: str | Path,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        hashed: bool = False,
    ) -> "CheckpointSource":
        """The source of what computes on ``device``: in ``dtype``, or if that is None in float32 on
        a CPU (16 bits are exact in it) and in the checkpoint's own elsewhere."""
        wide = torch.float32 if device.type == "cpu" else None
        return cls(path, dtype=dtype or wide, hashed=hashed)

    def _find_origins(self) -> dict[str, Origin]:
        """Where every parameter comes from; splits fused experts of the skeleton into Linears."""
        stored = self._shards.names()
        origins = self._names.origins(stored)
        for name in self._transposed & origins.keys():
            origins[name] = replace(origins[name], part=Part(transposed=True))
        experts = unfuse(self._model, self._names.expert_names)
        origins = split_experts(origins, experts)
        if experts:
            parameters = {name for name, _ in self._model.named_parameters()}
            apart(origins, stored, parameters, self._names)
        return origins

    def _equal(self, a: str, b: str) -> bool:
        """Whether two parameters of the model have the same tensor."""
        tensors = [
            origin.load(self._shards.tensor, self._names)[origin.target]
            for origin in (self._origins[a], self._origins[b])
        ]
        return torch.equal(*tensors)

    @property
    def fingerprint(self) -> str:
        """A sha256 over config.json and name, size and header of every weight file."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        config = (self.path / "config.json").read_bytes()
        return hashlib.sha256(config + self._shards.digest().encode()).hexdigest()

    def skeleton(self) -> nn.Module:
        """The model with its parameters on the meta device."""
        return self._model

    def check(self) -> None:
        """Compare the model with the headers of the weight files, once, and tell of tensors that it
        does not have. A checkpoint that is quantized already is left to its reader.

        Raises:
            ValueError: layers that only config.json or only the files have, a parameter without a
                tensor, or with one of another shape or of a dtype that no weights have.
        """
        if self._compared or quantized_by(self.config) not in (None, *DEQUANTIZED):
            return
        self._compared = True
        read = {name for origin in self._origins.values() for name in origin.names}
        unread = {n: self._names.candidates(n) for n in self.names() if n not in read}
        check_layers(self._model, self._blocks, self._origins.keys(), unread, self.path)
        for name, owner, is_buffer in _stored(self._model, True):
            origin = self._origin(name, is_buffer)
            if origin is not None and origin.direct and origin.part is None:
                stored, leaf = origin.direct, name.rpartition(".")[2]
                current = owner._buffers[leaf] if is_buffer else owner._parameters[leaf]
                header = Header(self._shards.shape(stored), self._shards.dtype(stored))
                check_tensor(header, cast(Tensor, current), name, self.path)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The decoder's blocks in order; ValueError when the checkpoint is quantized already, or as
        :meth:`check`."""
        refuse_quantized(self.config, self.path)
        self.check()
        return [(name, self._model.get_submodule(name)) for name in self._blocks]

    def head(self) -> tuple[str, nn.Module]:
        """The output head and its full name."""
        return self._head, self._model.get_submodule(self._head)

    @cached_property
    def _head(self) -> str:
        return find_head(self._model)  # once: later it may have been replaced by a quantized layer

    def foreign(self) -> str | None:
        """Why other programs would not find the layers of a checkpoint that has them as here."""
        if self._transposed:
            return CONV1D
        stacked = any(origin.part is not None for origin in self._origins.values())
        return STACKED if stacked else None

    def names(self) -> list[str]:
        """The names of all tensors of the checkpoint."""
        return self._shards.names()

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint as stored, on the CPU.

        Raises:
            ValueError: there is none of that name, or it is not what it was when it was read first.
        """
        value = self._shards.tensor(name)
        if self._digests is not None and (now := digest(value)) != self._digests.setdefault(
            name, now
        ):
            raise ValueError(
                f"{self.path}: {name} changed while it was in use: leave the model alone, and run "
                "the same command again"
            )
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the checkpoint; no data is read."""
        return self._shards.shape(name)

    def digests(self, block: str | None) -> dict[str, str]:
        """Hashes of the data of all tensors of ``block``, or of those outside of all blocks, by
        their names in the checkpoint.

        Those of tensors that were read already cost nothing. ``hashed`` must have been asked for.
        """
        assert self._digests is not None, "asked to hash nothing"
        inside = self._sources([f"{block}."]) if block else self._names_outside(self._blocks)
        for name in inside:
            if name not in self._digests:
                self.tensor(name)
        return {name: self._digests[name] for name in sorted(inside)}

    def _sources(self, prefixes: Collection[str]) -> set[str]:
        """The tensors that parameters whose names start so are made of."""
        starts = tuple(prefixes)
        return {
            source
            for name, origin in self._origins.items()
            if name.startswith(starts)
            for source in origin.names
        }

    def _names_outside(self, modules: Collection[str]) -> list[str]:
        """The tensors of the checkpoint that belong to none of ``modules``, sorted."""
        prefixes = tuple(f"{name}." for name in modules)
        inside = self._sources(prefixes)
        return [
            name
            for name in self.names()
            if name not in inside and not self.module_name(name).startswith(prefixes)
        ]

    def checkpoint_name(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model, also one that only a quantized layer
        has.

        In Mixtral ``layers.0.mlp.experts.1.w2.weight`` →
        ``layers.0.block_sparse_moe.experts.1.w2.weight``.
        """
        module, _, leaf = name.rpartition(".")
        for own in (name, f"{module}.weight"):
            if (origin := self._origins.get(own)) and (direct := origin.direct):
                stem = direct if own == name else direct.removesuffix(".weight") + f".{leaf}"
                return stem if own == name or direct.endswith(".weight") else name
        return name

    def module_name(self, name: str) -> str:
        """What the model calls a tensor of a checkpoint: the inverse of :meth:`checkpoint_name`."""
        if name not in self._module_names:
            candidates = self._names.candidates(name)
            known = (c for c in candidates if c.rpartition(".")[0] in self._module_paths)
            self._module_names[name] = next(known, candidates[0])
        return self._module_names[name]

    def rest(self, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint that belong to no block, nor to modules in ``without``, one
        at a time, as stored."""
        for name in self._names_outside((*self._blocks, *without)):
            yield name, self.tensor(name)

    def kept(self, block: str, replaced: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors of ``block``, as stored, without those of the parameters in
        ``replaced``.

        ``replaced`` are full names of weights in the model. Of experts stored in one tensor, those
        that are not replaced, and the biases if any weight is, come one by one under the model's
        names.
        """
        users: dict[Origin, list[str]] = {}
        for name, origin in self._origins.items():
            if name.startswith(f"{block}."):
                users.setdefault(origin.whole(), []).append(name)
        for whole, parameters in users.items():
            left = [name for name in parameters if name not in replaced]
            divided = any(
                self._origins[n].direct is None and _weight_of(n) in replaced for n in parameters
            )
            if len(left) == len(parameters) and not divided:
                yield from ((name, self.tensor(name)) for name in whole.names)
            elif left:
                tensors = whole.load(self.tensor, self._names)
                yield from (
                    (name, _select(self._origins[name], tensors, name).clone()) for name in left
                )

    def fill(
        self, module: nn.Module, prefix: str, device: torch.device | str, *, recurse: bool = True
    ) -> None:
        """Load, cast and check the parameters and persistent buffers of ``module``, which the model
        calls ``prefix``.

        Without ``recurse`` only those that ``module`` itself owns. Parameters that are already
        filled stay as they are. Raises ValueError for tensors that are missing, have another shape,
        or contain NaN or infinity.
        """
        refuse_quantized(self.config, self.path)
        prefix = f"{prefix.rstrip('.')}." if prefix else ""
        by_origin: dict[Origin, list[tuple[Origin, str, nn.Module, bool]]] = {}
        for name, owner, is_buffer in _stored(module, recurse):
            missing = is_buffer or cast(Tensor, owner._parameters[name.rpartition(".")[2]]).is_meta
            if missing and (origin := self._origin(prefix + name, is_buffer)):
                by_origin.setdefault(origin.whole(), []).append((origin, name, owner, is_buffer))
        for whole, users in by_origin.items():
            tensors = whole.load(self.tensor, self._names)
            for origin, name, owner, is_buffer in users:
                self._assign(
                    owner, prefix + name, _select(origin, tensors, prefix + name), device, is_buffer
                )
        for owner in module.modules() if recurse else (module,):
            for name, buffer in owner.named_buffers(recurse=False):
                if not buffer.is_meta:
                    owner._buffers[name] = buffer.to(device)

    def release(self, module: nn.Module, *, recurse: bool = True) -> None:
        """Put parameters and persistent buffers of ``module`` back on the meta device; other
        buffers go to the CPU."""
        release(module, recurse=recurse)

    def _assign(
        self,
        owner: nn.Module,
        name: str,
        value: Tensor,
        device: torch.device | str,
        is_buffer: bool,
    ) -> None:
        leaf = name.rpartition(".")[2]
        current = cast(Tensor, owner._buffers[leaf] if is_buffer else owner._parameters[leaf])
        # a buffer may well hold the least number of its type, as masks do
        limit = math.inf if is_buffer else LARGEST
        value = self._checked(value, name, current, limit).to(
            device, self._dtype_of(name, current), copy=True
        )
        if is_buffer:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _origin(self, name: str, is_buffer: bool) -> Origin | None:
        origin = self._origins.get(name) or self._origins.get(self._tied.get(name, ""))
        if origin is None and not self._may_be_missing(name):
            raise ValueError(
                f"{self.path} has no tensor for {'buffer' if is_buffer else 'parameter'} {name} of "
                f"its model{wrapped(self.names())}"
            )
        return origin

    def _may_be_missing(self, name: str) -> bool:
        return any(
            re.search(pattern, name)
            for pattern in self._model._keys_to_ignore_on_load_missing or ()
        )

    def _dtype_of(self, name: str, current: Tensor) -> torch.dtype:
        return (
            self._dtypes(name) or current.dtype
            if current.dtype.is_floating_point
            else current.dtype
        )

    def _checked(self, value: Tensor, name: str, current: Tensor, limit: float) -> Tensor:
        check_tensor(Header(tuple(value.shape), value.dtype), current, name, self.path)
        if value.dtype.is_floating_point and value.dtype.itemsize > 1:
            low, high = extremes(value)
            if not (-limit < low and high < limit):  # false for NaN
                beyond = f"numbers beyond {limit:.0e}" if abs(low) + abs(high) < math.inf else ""
                raise ValueError(
                    f"{self.path}: {name} contains {beyond or 'NaN or infinity'}; the checkpoint "
                    "is damaged"
                )
        return value


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Put the parameters and persistent buffers of ``module`` on the meta device, and its other
    buffers on the CPU."""
    for owner in module.modules() if recurse else (module,):
        for name, parameter in owner.named_parameters(recurse=False):
            owner._parameters[name] = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=False
            )
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(
                "cpu" if name in owner._non_persistent_buffers_set else "meta"
            )
        forget = getattr(owner, "forget", None)
        if callable(forget):  # what a replaced layer keeps besides its buffers
            forget()


def _stored(module: nn.Module, recurse: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    """Name, owner, and whether it is a buffer, of everything in ``module`` that a checkpoint
    stores."""
    for path, owner in module.named_modules() if recurse else (("", module),):
        prefix = f"{path}." if path else ""
        for name, _ in owner.named_parameters(recurse=False):
            yield prefix + name, owner, False
        for name, _ in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield prefix + name, owner, True


def _select(origin: Origin, made: dict[str, Tensor], name: str) -> Tensor:
    if origin.part is not None:
        stored, expert = made[origin.target], origin.part.expert
        if expert is not None and expert >= len(stored):
            raise ValueError(
                f"{origin.target} has {len(stored)} experts, and the model that config.json "
                f"describes has {name}: copy it again"
            )
        return origin.part.take(stored)
    return made[name] if name in made else made[origin.target]


def _weight_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.weight"
