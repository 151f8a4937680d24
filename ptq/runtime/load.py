"""From a checkpoint directory to a model that runs."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.quantization_config import is_key_value_scale
from ptq.checkpoint.reader import Checkpoint, config_dtype
from ptq.kernels import gpu
from ptq.model.attention import cached_attentions
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.structure import read_generation_config
from ptq.runtime import fp8_prefill
from ptq.runtime.fusion import fuse
from ptq.runtime.kernel_choice import visits
from ptq.runtime.key_values import round_cached, take_scales
from ptq.runtime.nested_width import at_width, converted
from ptq.runtime.packed_experts import pack_experts
from ptq.runtime.quant_linear import QuantLinear, stored_layer

logger = logging.getLogger(__name__)

Inputs = Literal["auto", "quantized", "full"]
INPUTS = ("auto", "quantized", "full")
Prefill = Literal["16-bit", "fp8"]
PREFILLS = ("16-bit", "fp8")
CACHE_BYTES = 4 << 30  # of dequantized weights that are kept without being asked for


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    inputs: Inputs = "auto",
    cache: bool | None = None,
    bits: int | None = None,
    prefill: Prefill = "16-bit",
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: Path | str | None = None,
) -> nn.Module:
    """The transformers model of a checkpoint, with a QuantLinear for every quantized layer, in
    evaluation mode.

    Experts are modules of linear layers, as in calibration; on a GPU they run together
    (:mod:`ptq.runtime.packed_experts`) unless a ``device_map`` spreads them. Without one tensors go
    to ``device`` one by one.

    Args:
        dtype: of everything that is not quantized, and of the results of quantized layers; None is
            the checkpoint's.
        inputs: what happens to the inputs of layers that were made for quantized ones (W4A4):
            ``"quantized"`` rounds them, ``"full"`` keeps them, which is closer to the original
            model, ``"auto"`` rounds them where the GPU multiplies FP4 natively.
        cache: keep dequantized weights where no kernel runs (QuantLinear.cache): the same bits in
            less time, for 4 bytes a weight. None does so for checkpoints that take at most
            ``CACHE_BYTES`` that way, and says so, unless there is a ``device_map``.
        bits: of the weights, where the checkpoint has nested codes: at which of its two widths to
            run (:mod:`ptq.runtime.nested_width`); None is the wide one.
        prefill: what many tokens are multiplied in by layers with 16-bit inputs; ``"fp8"`` keeps a
            copy of their weights, a byte each (:mod:`ptq.runtime.fp8_prefill`): faster on Hopper,
            and an approximation.
        device_map: of accelerate, e.g. ``"auto"``; layers may lie on ``"cpu"`` or ``"disk"`` while
            they do not run. The packed model must fit into host memory while it is loaded.
        max_memory: bytes by device, for ``device_map="auto"``.
        offload_folder: where layers on ``"disk"`` go.

    Raises:
        FileNotFoundError: no such directory, an unfinished one, or a missing file.
        ValueError: not a checkpoint of ptq, an unknown version, format or key, a truncated or
            damaged file, a missing tensor, or one that does not fit the model.
    """
    if inputs not in INPUTS:
        raise ValueError(f"unknown inputs {inputs!r}; choose one of {', '.join(INPUTS)}")
    if prefill not in PREFILLS:
        raise ValueError(f"unknown prefill {prefill!r}; choose one of {', '.join(PREFILLS)}")
    if prefill == "fp8":
        if device_map:
            raise ValueError(
                "prefill fp8 does not go with a device_map: its copies cannot be moved"
            )
        fp8_prefill.check(torch.device(device))
    checkpoint = Checkpoint(path)
    infos = at_width(checkpoint.layers, bits, checkpoint.path)
    named = config_dtype(checkpoint.config)
    source = CheckpointSource(path, dtype=dtype or (getattr(torch, named) if named else None))
    source.config.__dict__.pop("quantization_config", None)  # ours to interpret, not transformers'
    model = source.skeleton()
    assert isinstance(model, PreTrainedModel)  # of this source
    place = torch.device("cpu") if device_map else torch.device(device)
    wide = 4 * checkpoint.sizes["weights"]
    if cache is None:
        cache = device_map is None and wide <= CACHE_BYTES
    modules, replaced = dict(model.named_modules()), {}
    for name in checkpoint.layer_names():
        target = source.module_name(f"{name}.weight_packed").rpartition(".")[0]
        if target not in modules:
            raise ValueError(
                f"{checkpoint.path}: {name} is no layer of the model that its config.json describes"
            )
        replaced[name] = target
        model.set_submodule(target, nn.Identity())  # whose parameters nobody looks for
    source.fill(model, "", place)
    model.tie_weights()
    for name, target in replaced.items():
        tensors = converted(checkpoint.layer(name), checkpoint.layers[name], infos[name], name)
        layer = stored_layer(modules[target], infos[name], tensors, name)
        layer.cache, layer.fp8_prefill = cache, prefill == "fp8"
        model.set_submodule(target, layer.to(place, source.compute_dtype))
    if checkpoint.parsed.kv_cache is not None:
        _round_key_values(model, checkpoint, source)
    if (settings := read_generation_config(checkpoint.path)) is not None:
        model.generation_config = settings
    logger.info(
        "types, shapes and ranges of %d quantized layers were checked, not whether files are "
        "unchanged: `ptq verify %s` does that",
        len(replaced),
        checkpoint.path,
    )
    if device_map:
        distribute(model, device_map, max_memory, offload_folder)
    settle_inputs(model, inputs)
    prepare_kernels(model, source.compute_dtype)
    if prefill == "fp8":
        fp8_prefill.prepare(model)
    slow = [m for m in model.modules() if isinstance(m, QuantLinear) and m.kernel_dtype is None]
    if slow:
        logger.info(
            "%d quantized layers %s",
            len(slow),
            f"keep dequantized weights, {wide / 1e9:.1f} GB (cache=False unpacks them every time)"
            if cache
            else "unpack their weights every time (cache=True keeps them, "
            f"{wide / 1e9:.1f} GB, and is faster)",
        )
    return model.eval()


def _round_key_values(
    model: PreTrainedModel, checkpoint: Checkpoint, source: CheckpointSource
) -> None:
    """Give attention layers the scales of keys and values. Other tools leave out those of 1, which
    is what engines take where there are none."""
    tensors = {
        source.module_name(n): checkpoint.tensor(n)
        for n in checkpoint.entries
        if is_key_value_scale(n)
    }
    if not tensors and not checkpoint.recipe:
        for attention in cached_attentions(model).values():
            round_cached(attention, torch.ones(1), torch.ones(1))
    elif not take_scales(model, tensors):
        raise ValueError(
            f"{checkpoint.path} has no scales of keys and values, although its config.json says "
            f"{checkpoint.parsed.kv_cache}: the checkpoint is damaged, copy it again"
        )
    logger.info(
        "keys and values are rounded to %s as in an engine's cache; their memory is the same",
        checkpoint.parsed.kv_cache,
    )


def prepare_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Let quantized layers and experts use the Triton kernels where those can run, and say once
    what runs how.

    Layers that accelerate's hooks bring to a GPU use its kernels as well, one by one: what hooks
    move cannot be stacked.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if tell(Counter(layer.prepare(dtype) for layer in layers)):
        log_experts(pack_experts(model))
    fuse(model, dtype)


def tell(reasons: Counter[str | None]) -> int:
    """Say once what runs how, from the reasons against kernels or None of every layer; how many run
    in kernels."""
    served = reasons.pop(None, 0)
    if served:
        total = served + reasons.total()
        logger.info("%d of %d quantized layers run in Triton kernels", served, total)
    for reason, count in reasons.items() if served or torch.cuda.is_available() else ():
        logger.warning("%d quantized layers run in the reference path: %s", count, reason)
    return served


def log_experts(obstacles: Mapping[str, str | None]) -> None:
    """Say once how layers of experts run, from their names and why each does not run grouped, or
    None where it does."""
    reasons = Counter(reason for reason in obstacles.values() if reason is not None)
    if grouped := len(obstacles) - reasons.total():
        logger.info("%d of %d layers of experts run grouped", grouped, len(obstacles))
    for reason, count in reasons.items():
        logger.info("%d layers of experts run one expert after the other: %s", count, reason)


def settle_inputs(model: nn.Module, inputs: str) -> None:
    """Decide, for layers that were made for quantized inputs, whether they quantize them; see
    :func:`load`."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.quantize_inputs]
    if not layers or inputs == "quantized":
        return
    native = inputs == "auto" and all(gpu.multiplies_fp4(_runs_on(m)) for m in layers)
    if inputs == "auto":
        logger.info(
            "inputs of quantized layers %s",
            "are quantized: this GPU multiplies FP4"
            if native
            else "keep 16 bits: this device does not multiply FP4",
        )
    for layer in layers:
        layer.quantize_inputs = native


def _runs_on(layer: QuantLinear) -> torch.device:
    brought = visits(layer)
    return layer.weight_packed.device if brought is None else brought.device


def distribute(
    model: PreTrainedModel,
    device_map: str | Mapping[str, int | str | torch.device],
    max_memory: dict[int | str, int | str] | None,
    offload_folder: Path | str | None,
) -> None:
    """Spread a model in host memory over devices, with accelerate's hooks; see :func:`load`."""
    if isinstance(device_map, str):
        whole = list(model._no_split_modules or [])
        device_map = infer_auto_device_map(
            model, max_memory=max_memory, no_split_module_classes=whole, offload_buffers=True
        )
    if "disk" in device_map.values() and offload_folder is None:
        raise ValueError("some layers go to disk: give an offload_folder, or more max_memory")
    dispatch_model(
        model, device_map=dict(device_map), offload_dir=offload_folder, offload_buffers=True
    )
