"""Finished blocks: to disk as checkpoints have them, and back into the model when a run
continues."""

import torch
from torch import Tensor

from ptq.calib.walk import CalibratedBlock
from ptq.checkpoint.reader import from_disk, to_disk
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.checkpoint_source import Source
from ptq.model.memory_source import MemorySource
from ptq.runtime.quant_linear import QuantLinear, stored_layer


def write(
    block: CalibratedBlock,
    layers: dict[str, QuantLinear],
    changes: dict[str, Tensor],
    source: Source | MemorySource,
    out: CheckpointWriter,
    reports: list[dict[str, object]],
) -> None:
    """Quantized layers as they are; everything else of the block as the source stores it, not as it
    was computed with, but for what balancing changed."""
    names = {name: _stored_name(source, name) for name in layers}
    infos = {names[name]: layer.info for name, layer in layers.items()}
    tensors = {
        f"{names[name]}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if key != "bias"
    }
    kept = dict(source.kept(block.name, {f"{name}.weight" for name in layers}))
    for name, value in changes.items():
        stored = source.checkpoint_name(name)
        kept[stored] = value.to("cpu", kept[stored].dtype)  # exact: see ptq.calib.fold
    tensors = to_disk(tensors, infos) | kept
    out.add(
        block.name,
        tensors,
        infos,
        [report | {"layer": names[str(report["layer"])]} for report in reports],
    )


def _stored_name(source: Source | MemorySource, name: str) -> str:
    """What a checkpoint calls a layer of the model."""
    return source.checkpoint_name(f"{name}.weight_packed").removesuffix(".weight_packed")


def reinstall(
    block: CalibratedBlock,
    source: Source | MemorySource,
    out: CheckpointWriter,
    device: torch.device | str,
) -> None:
    """Replace the layers of a block that an earlier run finished."""
    infos = out.layers(block.name)
    tensors = from_disk(out.read(block.name), infos)
    known = set(source.names())
    for (
        name,
        parameter,
    ) in block.module.named_parameters():  # norms, biases, routers: balancing may have changed them
        stored = source.checkpoint_name(f"{block.prefix}{name}")
        if stored in tensors and not (
            stored in known and torch.equal(tensors[stored], source.tensor(stored))
        ):
            assert tensors[stored].shape == parameter.shape, stored
            parameter.data = tensors[stored].to(parameter)
    for stored, info in infos.items():
        name = source.module_name(f"{stored}.weight_packed").rpartition(".")[0]
        inner = name.removeprefix(block.prefix)
        old = block.module.get_submodule(inner)
        own = {
            key.removeprefix(f"{stored}."): t
            for key, t in tensors.items()
            if key.rpartition(".")[0] == stored
        }
        layer = stored_layer(old, info, own, stored).to(device)
        layer.bias = getattr(old, "bias", None)  # in the dtype of the computation
        layer.cache = True
        block.module.set_submodule(inner, layer)
