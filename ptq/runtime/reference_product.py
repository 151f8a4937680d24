"""The product of the reference path: float32 numbers times a weight that is dequantized some rows
at a time, so that memory stays that of 4 bits a weight.

A chunk is part of the numerics: libraries sum in an order that may depend on shapes, so a weight
that is kept dequantized is multiplied in the same chunks as one that is made anew, for the same
bits. Few tokens on a CPU (decoding) spend their time on dequantizing: their chunks stay in a cache,
from look-up to product.
"""

import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from ptq.numerics.tensor import Scales, Unpacker, dequantize_packed
from ptq.runtime.precision import as_written, full_precision, many_products

# So many bytes of dequantized weight (float32 rows) exist at a time.
CHUNK_BYTES = 64 << 20
# Of few tokens. Smaller ones, for the second-level cache, cost more in calls than they save.
CHUNK_BYTES_FEW, FEW_TOKENS = 4 << 20, 16


class _Unpackers(threading.local):
    """Those of a thread: their memory is written at every call."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, torch.device], Unpacker] = {}


_unpackers = _Unpackers()


def chunk_rows(out_features: int, in_features: int, tokens: int, device: torch.device) -> int:
    """Rows of a weight that are multiplied at a time with so many tokens."""
    limit = CHUNK_BYTES_FEW if few(tokens, device) else CHUNK_BYTES
    most = max(1, limit // (4 * in_features))
    return -(-out_features // -(-out_features // most))  # chunks of about one size


def few(tokens: int, device: torch.device) -> bool:
    """Whether so many tokens are multiplied in small chunks."""
    return tokens <= FEW_TOKENS and device.type == "cpu"


def remade(packed: Tensor, scales: Scales, tokens: int) -> Iterator[Tensor]:
    """Chunks (rows, in) of the weight that ``packed`` (out, bytes) and its ``scales`` stand for, in
    order, each valid until the next is asked for."""
    fmt, device = scales.format, packed.device
    in_features = packed.shape[1] * fmt.per_byte
    rows = chunk_rows(packed.shape[0], in_features, tokens, device)
    if few(tokens, device):
        unpacker = _unpackers.of.get((fmt.name, device))
        if unpacker is None:
            unpacker = _unpackers.of[fmt.name, device] = Unpacker(fmt, device)
        yield from unpacker.chunks(packed, scales, rows)
        return
    for bits, codes in zip(scales.bits.split(rows), packed.split(rows), strict=True):
        yield dequantize_packed(codes, Scales(bits, scales.global_scale, fmt))


def product(x: Tensor, chunks: Iterable[Tensor], out_features: int) -> Tensor:
    """``x Ŵᵀ`` (tokens, out) in float32, of ``x`` (tokens, in) and the chunks (rows, in) of Ŵ."""
    if as_written(x.device):  # entering a context costs a tenth of a small layer
        return _product(x, chunks, out_features)
    with full_precision(x.device):
        return _product(x, chunks, out_features)


def _product(x: Tensor, chunks: Iterable[Tensor], out_features: int) -> Tensor:
    if not few(x.shape[0], x.device):
        parts = [many_products(x, rows) for rows in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    size = chunk_rows(out_features, x.shape[1], x.shape[0], x.device)
    if size == out_features:
        (rows,) = chunks
        return linear(x, rows)
    y = x.new_empty(x.shape[0], out_features)
    for part, rows in zip(y.split(size, dim=1), chunks, strict=True):
        torch.mm(x, rows.T, out=part)
    return y
