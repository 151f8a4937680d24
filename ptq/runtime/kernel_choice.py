"""Whether a quantized layer runs in kernels, and who is told if it does not."""

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.kernels import coverage, gpu
from ptq.numerics.formats import FORMATS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Visits:
    """Where hooks of accelerate bring the tensors of a layer that lie elsewhere, for the time of a
    forward, and the largest byte of its scales."""

    device: torch.device
    largest_scale: Tensor


def visits(layer: nn.Module) -> Visits | None:
    """Where hooks bring the tensors of a quantized layer, or None if those stay where they are."""
    hook = getattr(layer, "_hf_hook", None)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook) and each.offload:
            assert each.weights_map is not None and each.execution_device is not None
            device = torch.device(each.execution_device)  # pyright: ignore[reportArgumentType]
            bits = each.weights_map["weight_scale"].view(torch.uint8)
            return Visits(device, bits.max())
    return None


def hooked(model: nn.Module) -> bool:
    """Whether accelerate has a part in what ``model`` does."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def kernel_obstacle(
    info: LayerInfo,
    in_features: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_bits: Tensor | None = None,
) -> str | None:
    """Why a layer takes the reference path on ``device`` for inputs of ``dtype``, or None if Triton
    kernels serve it.

    Args:
        scale_bits: of the weight; without them it is not known whether E8M0 scales stay in the
            kernels' range.
    """
    fmt = FORMATS[info.format]
    if not gpu.available(device):
        return f"Triton kernels do not run on {device.type}"
    if info.quantize_inputs and not (gpu.multiplies_fp4(device) and fmt.element.name == "e2m1"):
        return f"{fmt.name} inputs are emulated: this device has no matrix product for them"
    # larger ones than the kernels have are the library's, unless inputs are quantized with them
    beyond = info.rotation not in coverage.ROTATIONS and not info.quantize_inputs
    return coverage.obstacle(
        fmt.element.name,
        fmt.scale_name,
        fmt.size(in_features),
        in_features,
        rotation=1 if beyond else info.rotation,
        dtype=dtype,
        scale_bits=scale_bits,
    )


@lru_cache(maxsize=64)
def tell_once(message: str) -> None:
    """Warn, the first time: hundreds of layers have the same to say, at every token."""
    logger.warning("%s", message)
