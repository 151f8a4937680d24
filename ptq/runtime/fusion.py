"""Fewer launches for a model that was loaded: what can be made or multiplied together is."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from ptq.checkpoint.quantization_config import fused_groups
from ptq.model.experts import Expert
from ptq.runtime.fused_modules import fuse_mlps, fuse_norms
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.shared_inputs import Readers

logger = logging.getLogger(__name__)


def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Share inputs and stack weights of layers that engines merge; where layers run in kernels for
    inputs of ``dtype``, also fuse RMSNorms and gated MLPs (:mod:`ptq.runtime.fused_modules`).

    Names of layers and parameters stay, state_dict and saving are as before. Again after the model
    was moved, copied or loaded anew: what such a layer had together with others is gone.
    """
    stacks = share_inputs(model)
    if not any(m.kernel_dtype == dtype for m in model.modules() if isinstance(m, QuantLinear)):
        return
    norms, mlps = fuse_norms(model, dtype), fuse_mlps(model, dtype)
    logger.info("fused: %d stacks of layers, %d RMSNorms, %d gated MLPs", stacks, norms, mlps)


def share_inputs(model: nn.Module) -> int:
    """Have layers of ``model`` that engines merge (q, k and v; gate and up) share what is made of
    their inputs, where they are alike; stack their weights where kernels multiply them, but for
    experts, which have stacks of their own. Returns the number of stacks."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    experts = {n for n, m in model.named_modules() if isinstance(m, Expert)}
    stacks = 0
    for layer in layers.values():
        layer.readers = None
    for names in fused_groups(layers):
        group = [layers[name] for name in names]
        if _alike(group) and (group[0].kernel_dtype is not None or group[0].changes_inputs):
            readers = Readers(group)
            if group[0].kernel_dtype is not None:
                if names[0].rpartition(".")[0] not in experts and _one_global_scale(group):
                    readers.weight, stacks = QuantLinear.stack(group), stacks + 1
                readers.source = readers.weight or group[0].kernel_weight()
            readers.freeze(group)
    if stacks:
        # the holes that the layers' own tensors leave are too small for stacks to fill them
        torch.cuda.empty_cache()
    return stacks


def _alike(layers: Sequence[QuantLinear]) -> bool:
    """Whether the same can be made of their inputs."""
    # 128 × 4 blocks of scales are for weights of whole eights of rows, units for whole ones
    facts = {
        (
            m.info,
            m.in_features,
            m.kernel_dtype,
            m.weight_packed.device,
            m.out_features % 8 == 0,
            m.packed_weight.tiled,
        )
        for m in layers
    }
    if len(facts) > 1 or any(layer.weight_packed.is_meta for layer in layers):
        return False
    scales = [scale for layer in layers if (scale := layer.input_scale) is not None]
    return all(torch.equal(scale, scales[0]) for scale in scales)


def _one_global_scale(layers: Sequence[QuantLinear]) -> bool:
    first = layers[0].global_scale
    return first.ndim == 0 and all(torch.equal(layer.global_scale, first) for layer in layers)
