"""Many tokens in fp8, where tensor cores multiply FP8 numbers (Hopper): a second copy of the
weights, in E4M3, that stays in memory.

An approximation to choose: inputs are rounded to E4M3, with a factor for each token, and so are
weights with E4M3 scales, a second time; those with E8M0 scales (MXFP4) are copied exactly. Few
tokens, as in decoding, read the 4-bit weights in 16 bits as before.
"""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from ptq.kernels import gpu
from ptq.runtime.kernel_weight import FP8_TOKENS, KernelWeight
from ptq.runtime.quant_linear import QuantLinear

logger = logging.getLogger(__name__)


def check(device: torch.device) -> None:
    """Raise ValueError where tensor cores do not multiply FP8 numbers, or kernels do not run."""
    if not (gpu.available(device) and gpu.multiplies_fp8(device)):
        raise ValueError(
            f"prefill fp8: {device} does not multiply FP8 numbers in our kernels; it takes an "
            "NVIDIA GPU of compute capability 8.9 or more, and Triton"
        )


def prepare(model: nn.Module) -> int:
    """Make the copies of the layers of ``model`` that run in kernels with 16-bit inputs and have
    ``fp8_prefill``; their bytes. Says how many there are, and what they are not.

    Raises:
        ValueError: there is none.
    """
    copies = [copy for weight in kernel_weights(model) if (copy := weight.fp8) is not None]
    if not copies:
        raise ValueError(
            "prefill fp8: no layer runs in kernels with 16-bit inputs here, of multiples of 16 "
            "features; load without it"
        )
    size = sum(copy.values.nbytes + copy.factors.nbytes for copy in copies)
    rounded = sum(not copy.exact for copy in copies)
    again = f"; {rounded} of them are rounded a second time" if rounded else ", all of them exact"
    logger.info(
        "from %d tokens on %d weights are multiplied in fp8, inputs rounded to it; copies take "
        "%.2f GB more%s",
        FP8_TOKENS,
        len(copies),
        size / 1e9,
        again,
    )
    return size


def kernel_weights(model: nn.Module) -> Iterator[KernelWeight]:
    """What kernels multiply with in ``model``, stacks of several layers once."""
    seen: set[int] = set()
    for layer in model.modules():
        if not isinstance(layer, QuantLinear) or layer.kernel_dtype is None:
            continue
        readers = layer.readers
        stack = None if readers is None else readers[0].weight
        weight = layer.kernel_weight() if stack is None else stack
        if id(weight) not in seen:
            seen.add(id(weight))
            yield weight
