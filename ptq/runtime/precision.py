"""Products in float32 as written, whatever the process allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products with float32 operands: neither TF32 (GPU), nor bf16 (oneDNN), nor
    autocast."""
    onednn = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - pyright does not know it
    backend = torch.backends.cuda.matmul if device.type == "cuda" else onednn
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:  # entering it costs a tenth of a small layer
            yield
    finally:
        backend.fp32_precision = before
