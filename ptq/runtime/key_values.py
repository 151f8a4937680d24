"""Attention layers that read keys and values as an FP8 cache would return them.

Numbers are those of the cache; its memory is not: keys and values stay in the type of the model.
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from ptq.checkpoint.quantization_config import KEY_VALUE_SCALES, is_key_value_scale
from ptq.model.attention import cached_attentions, tap
from ptq.numerics.key_values import round_key_values

SCALES = KEY_SCALE, VALUE_SCALE = KEY_VALUE_SCALES


def round_cached(attention: nn.Module, keys: Tensor, values: Tensor) -> None:
    """Let ``attention`` round keys and values with these scales (float32, [1]), which become its
    buffers.

    Raises:
        ValueError: no scale: not one positive float32 number.
    """
    for leaf, scale in zip(SCALES, (keys, values), strict=True):
        if scale.shape != (1,) or scale.dtype != torch.float32 or not 0 < scale.item() < torch.inf:
            raise ValueError(
                f"{leaf} is {scale.dtype} {list(scale.shape)}: it must be one positive float32 "
                "number; the checkpoint is damaged, copy it again"
            )
        attention.register_buffer(leaf, scale)
    hook_rounding(attention)


def hook_rounding(attention: nn.Module) -> None:
    """The same for an attention layer that has the two scales already, wherever they move."""

    def see(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (
            round_key_values(k, getattr(attention, KEY_SCALE)),
            round_key_values(v, getattr(attention, VALUE_SCALE)),
        )

    tap(attention, see)


def take_scales(module: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Give the attention layers of ``module`` the scales that are among ``tensors``, by names
    within it.

    Returns:
        How many have some.

    Raises:
        ValueError: one of two scales is missing, or there is one of no attention layer.
    """
    attentions = cached_attentions(module)
    owners = {name.rpartition(".")[0] for name in tensors if is_key_value_scale(name)}
    for inner in sorted(owners):
        if inner not in attentions:
            raise ValueError(f"{inner}.{KEY_SCALE} belongs to no attention layer of the model")
        attention, names = attentions[inner], [f"{inner}.{leaf}" for leaf in SCALES]
        for name in names:
            if name not in tensors:
                raise ValueError(
                    f"there is no tensor {name}: the checkpoint is damaged, copy it again"
                )
        device = next(chain(attention.parameters(), attention.buffers())).device
        round_cached(attention, *(tensors[name].to(device) for name in names))
    return len(owners)
