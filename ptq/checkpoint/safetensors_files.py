"""Files that are either complete or not there, and safetensors files written and merged piece by
piece.

A file is written under a temporary name, flushed to the device and renamed; a reader never sees
half of it, whatever happens to the process or the machine. The bytes of :func:`write_tensors` are
those of ``safetensors.torch.save``.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ptq.reading.safetensors_layout import DTYPES, Entry, Rows

TEMPORARY = ".tmp"  # suffix of a file that is being written
PIECE = 16 << 20  # bytes copied at a time
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {name: i for i, name in enumerate(DTYPES)}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write ``pieces`` durably to ``path`` and return their sha256 (hex).

    Raises:
        OSError: the device is full, or any other failure of the file system; ``path`` is then as it
            was before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left while writing {path}: free some and run the same command again, "
                "it continues"
            )
            raise OSError(error.errno, message) from error
        raise
    return digest.hexdigest()


def write_json(path: Path, data: object) -> str:
    """``data`` as indented JSON, durably; returns the sha256."""
    return write_file(path, [(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()])


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file durably and return its sha256; one tensor at a time is copied to
    host memory."""
    entries = {
        name: (NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors.items()
    }
    header, order = _header(entries)

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data if flat.numel() else b""

    return write_file(path, pieces())


def merge_tensors(path: Path, entries: Mapping[str, Entry]) -> str:
    """Write a safetensors file that holds the tensors ``entries`` of other files, copying a piece
    at a time."""
    header, order = _header({name: (e.dtype, e.shape, e.bytes) for name, e in entries.items()})

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            entry = entries[name]
            with open(entry.file, "rb") as file:
                file.seek(entry.offset)
                left = entry.bytes
                while left:
                    piece = file.read(min(left, PIECE))
                    if not piece:
                        raise OSError(errno.EIO, f"{entry.file} ends before the tensor {name}")
                    left -= len(piece)
                    yield piece

    return write_file(path, pieces())


def _header(entries: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file for {name: (dtype, shape, bytes)}, and the names in the order
    of their data."""
    order = sorted(entries, key=lambda name: (-ORDER[entries[name][0]], name))
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, size = entries[name]
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def read_tensor(entry: Entry) -> Tensor:
    """One tensor, read into memory of its own."""
    step = entry.step if isinstance(entry, Rows) else 1
    buffer = bytearray(entry.bytes * step)
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        if file.readinto(buffer) != len(buffer):
            raise ValueError(
                f"{entry.file} ends in the middle of a tensor: the copy is incomplete, copy it "
                "again"
            )
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(
            f"{entry.file} holds a tensor of dtype {entry.dtype}, which torch does not have: "
            "convert it first"
        )
    flat = (
        torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
        if entry.bytes
        else torch.empty(0, dtype=dtype)
    )
    if isinstance(entry, Rows):
        rows, *rest = entry.shape
        return flat.reshape(rows * step, *rest)[entry.start :: step].contiguous()
    return flat.reshape(entry.shape)
