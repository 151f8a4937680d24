"""Finished blocks: to disk as checkpoints have them, and back into the model when a run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ptq.calib.walk import CalibratedBlock
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import is_key_value_scale
from ptq.checkpoint.reader import from_disk, to_disk
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.attention import cached_attentions, stored_stem
from ptq.model.source import Source
from ptq.pipeline.ranks import world
from ptq.runtime.key_values import SCALES, take_scales
from ptq.runtime.quant_linear import QuantLinear, stored_layer

# What names of latents in a block's file begin with; they are no tensors of a checkpoint.
LATENT = "latent."


class Blocks(Protocol):
    """Where finished blocks go."""

    def has(self, name: str) -> bool:
        """Whether an earlier run finished the block."""
        ...

    def reinstall(self, block: CalibratedBlock) -> None:
        """Make of a block what that run made of it."""
        ...

    def add(
        self,
        block: CalibratedBlock,
        layers: Mapping[str, QuantLinear],
        reports: Sequence[LayerReport],
        changes: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
    ) -> None:
        """Keep a finished block.

        Args:
            layers, reports: of its quantized layers, by full name.
            changes: new values of parameters that are not quantized, by full name.
            latents: of layers that will be tuned, by full name.

        The block's attention layers may have scales for keys and values by now; they are kept too.
        """
        ...


class BlocksInMemory:
    """The model itself is the result: there is nothing to keep."""

    def has(self, name: str) -> bool:
        return False

    def reinstall(self, block: CalibratedBlock) -> None:
        raise AssertionError("no block is finished before it is solved")

    def add(
        self, block: object, layers: object, reports: object, changes: object, latents: object
    ) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class BlocksOnDisk:
    """Blocks in a :class:`CheckpointWriter`, under the names that the source's checkpoint has.

    Rank 0 writes; the others read what it found finished.
    """

    source: Source
    writer: CheckpointWriter
    device: torch.device

    def has(self, name: str) -> bool:
        return self.writer.has(name)

    def add(
        self,
        block: CalibratedBlock,
        layers: Mapping[str, QuantLinear],
        reports: Sequence[LayerReport],
        changes: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
    ) -> None:
        """Quantized layers as they are; everything else of the block as the source stores it, not
        as it was computed with, but for what balancing changed."""
        if world()[0] != 0:
            return
        stored = {name: self._stored_name(name) for name in layers}
        infos = {stored[name]: layer.info for name, layer in layers.items()}
        packed = {
            f"{stored[name]}.{key}": value
            for name, layer in layers.items()
            for key, value in layer.state_dict().items()
            if key != "bias"
        }
        kept = dict(self.source.kept(block.name, {f"{name}.weight" for name in layers}))
        for parameter, value in changes.items():
            name = self.source.checkpoint_name(parameter)
            kept[name] = value.to("cpu", kept[name].dtype)  # exact: see ptq.calib.fold
        kept |= self._key_value_scales(block)
        kept |= {f"{LATENT}{stored[name]}": latent for name, latent in latents.items()}
        renamed = [replace(report, name=stored[report.name]) for report in reports]
        weights = self.source.digests(block.name)
        self.writer.add(block.name, to_disk(packed, infos) | kept, infos, renamed, weights)

    def reinstall(self, block: CalibratedBlock) -> None:
        """Its quantized layers, and the values of norms, biases and routers that balancing
        changed.

        Raises:
            ValueError: the source has other weights than those that the block was made of (C3).
        """
        self.writer.check_weights(block.name, self.source.digests(block.name))
        infos = self.writer.layers(block.name)
        tensors = from_disk(self.writer.read(block.name), infos)
        self._restore(block, tensors)
        names = {n: self.source.module_name(n) for n in tensors if is_key_value_scale(n)}
        inner = {own.removeprefix(block.prefix): tensors[n] for n, own in names.items()}
        take_scales(block.module, inner)
        linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        for stored, info in infos.items():
            name = self.source.module_name(f"{stored}.weight_packed").rpartition(".")[0]
            inner = name.removeprefix(block.prefix)
            if inner not in linears:
                raise ValueError(
                    f"{stored} of a finished block is no linear layer of the model: delete "
                    f"{self.writer.partial} to start over"
                )
            old = linears[inner]
            buffers = {
                key.removeprefix(f"{stored}."): tensor
                for key, tensor in tensors.items()
                if key.rpartition(".")[0] == stored
            }
            layer = stored_layer(old, info, buffers, stored).to(self.device)
            bias = getattr(old, "bias", None)  # in the dtype of the computation
            layer.bias = None if bias is None else bias.detach()
            layer.cache = True  # the block runs over all batches
            block.module.set_submodule(inner, layer)

    def _restore(self, block: CalibratedBlock, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored parameters that are not those of the source."""
        known = set(self.source.names())
        for name, parameter in block.module.named_parameters():
            stored = self.source.checkpoint_name(f"{block.prefix}{name}")
            if stored not in tensors:
                continue
            if stored in known and torch.equal(tensors[stored], self.source.tensor(stored)):
                continue
            if tensors[stored].shape != parameter.shape:
                raise ValueError(
                    f"{stored} of a finished block has shape {tuple(tensors[stored].shape)}, the "
                    f"model wants {tuple(parameter.shape)}: delete {self.writer.partial} to start "
                    "over"
                )
            parameter.data = tensors[stored].to(parameter)

    def _key_value_scales(self, block: CalibratedBlock) -> dict[str, Tensor]:
        name = self.source.checkpoint_name
        return {
            f"{stored_stem(attention, f'{block.prefix}{inner}', name)}.{leaf}": scale.to("cpu")
            for inner, attention in cached_attentions(block.module).items()
            for leaf in SCALES
            if (scale := attention._buffers.get(leaf)) is not None
        }

    def _stored_name(self, name: str) -> str:
        """What a checkpoint calls a layer of the model."""
        return self.source.checkpoint_name(f"{name}.weight_packed").removesuffix(".weight_packed")
