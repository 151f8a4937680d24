"""Products in float32 as written, whatever the process allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EXACT = ("ieee", "none")
_ONEDNN: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - pyright does not know it


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products with float32 operands: neither TF32 (GPU), nor bf16 (oneDNN), nor
    autocast."""
    if as_written(device):
        yield
        return
    backend = _backend(device)
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def as_written(device: torch.device) -> bool:
    """Whether products are in full precision already: nobody asked for less."""
    allowed = _backend(device).fp32_precision  # what more general settings say, too
    return allowed in EXACT and not torch.is_autocast_enabled(device.type)


def _backend(device: torch.device) -> Any:
    return torch.backends.cuda.matmul if device.type == "cuda" else _ONEDNN


def many_products(x: Tensor, rows: Tensor) -> Tensor:
    """``x rowsᵀ`` (tokens, out) of float32 numbers, for many tokens: by oneDNN where torch has it,
    which has kernels for every x86 CPU. On an AMD one they take half the time of MKL's, torch's
    own choice; on an Intel one both are alike."""
    if x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, rows, None, "none", [], "")
    return x @ rows.T


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
