"""Where the tensors of safetensors files lie, by their headers and by the index of a model.

Nothing here reads the data, and nothing else of ptq reads a header.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from ptq.reading.schema import LARGEST, FileName, open_regular, read_json

# In the order in which safetensors lays tensors out: descending here, then by name, so that all of
# them are aligned.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
AGAIN = "the file is incomplete or damaged, download or copy it again"
Size = Annotated[int, Field(ge=0, lt=2**48)]


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, FileName]


_Header = TypeAdapter(dict[str, _Tensor | dict[str, str]])


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``bytes`` bytes of ``file`` from ``offset`` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Rows(Entry):
    """Every ``step``-th row, from ``start`` on, of what lies from ``offset`` on; ``shape`` and
    ``bytes`` are those of what is taken."""

    start: int
    step: int


@dataclass(frozen=True)
class Layout:
    """A safetensors file without its data.

    Attributes:
        entries: by name; data of all of them fill the file, without a gap or an overlap.
        digest: a sha256 (hex) of the header.
        bytes: of the file.
    """

    entries: dict[str, Entry]
    digest: str
    bytes: int


def read_layout(path: Path) -> Layout:
    """The layout of a safetensors file.

    Raises:
        ValueError: the file is shorter than it says, its tensors overlap or have other sizes than
            their shapes and dtypes, or it is no safetensors file.
        OSError: it is missing, or no regular file.
    """
    with open_regular(path) as file:
        size = path.stat().st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, LARGEST):
            raise ValueError(
                f"{path} is truncated, or not a safetensors file ({size} bytes, a header of "
                f"{length}): {AGAIN}"
            )
        raw = file.read(length)
    try:
        header = _Header.validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1] + first["loc"][2:])
        raise ValueError(
            f"{path} is not a safetensors file, or its header is damaged "
            f"({place}{': ' if place else ''}{first['msg']}): {AGAIN}"
        ) from error
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, e, 8 + length) for name, e in header.items()}
    _check_places(path, entries, 8 + length, size)
    return Layout(entries, hashlib.sha256(raw).hexdigest(), size)


def _entry(path: Path, name: str, found: _Tensor | dict[str, str], start: int) -> Entry:
    if not isinstance(found, _Tensor):
        raise ValueError(f"{path}: the header entry of {name} is no tensor: {AGAIN}")
    (begin, end), shape, dtype = found.data_offsets, found.shape, found.dtype
    count, known = prod(shape), DTYPES.get(dtype)
    if prod(n for n in shape if n) > 2**62:
        raise ValueError(f"{path}: {name} has shape {shape}, which no tensor has: {AGAIN}")
    if known is not None and count * known.itemsize != end - begin:  # others take half bytes, too
        raise ValueError(
            f"{path}: {name} has {end - begin} bytes, and {count * known.itemsize} by its shape "
            f"{shape} and dtype {dtype}: {AGAIN}"
        )
    return Entry(path, dtype, shape, start + begin, end - begin)


def _check_places(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Raise ValueError unless the tensors fill the file one after the other."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if entry.offset != at or entry.bytes < 0:
            raise ValueError(
                f"{path}: {name} starts at byte {entry.offset} and should start at {at}, the end "
                f"of the tensor before it: {AGAIN}"
            )
        at += entry.bytes
    if at != size:
        raise ValueError(
            f"{path} is truncated or damaged: it has {size} bytes and its header says {at}: {AGAIN}"
        )


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; raises as :func:`read_layout`."""
    return read_layout(path).entries


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, as the ``….safetensors.index.json`` of a model has it.

    Raises:
        ValueError: it is no such index, or a file that it names leads out of the directory.
        OSError: it is missing, or no regular file.
    """
    return read_json(path, _Index, "it is not a safetensors index, copy it again").weight_map


def check_listed(weight_map: dict[str, str], found: Iterable[str], index: Path) -> None:
    """Raise ValueError unless every tensor that the index lists is among those that were found."""
    if missing := weight_map.keys() - set(found):
        raise ValueError(
            f"{index.parent} lacks the tensor {min(missing)}, which {index.name} lists: {AGAIN}"
        )
