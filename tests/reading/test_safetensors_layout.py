"""A header is believed only as far as the file bears it out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq.reading.safetensors_layout import (
    DTYPES,
    check_listed,
    read_header,
    read_index,
    read_layout,
)

TENSORS = {"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.ones(4)}


def file_of(path: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: list | None = None, offsets: list | None = None) -> dict:
    return {
        "dtype": dtype,
        "shape": [2] if shape is None else shape,
        "data_offsets": [0, 8] if offsets is None else offsets,
    }


def test_a_tensor_lies_where_the_layout_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    layout = read_layout(path)
    assert layout.entries.keys() == TENSORS.keys() and layout.bytes == path.stat().st_size
    for name, found in layout.entries.items():
        raw = path.read_bytes()[found.offset : found.offset + found.bytes]
        read = torch.frombuffer(bytearray(raw), dtype=DTYPES[found.dtype]).view(found.shape)
        assert torch.equal(read, TENSORS[name])
    save_file({**TENSORS, "b": torch.zeros(4)}, path, metadata={"format": "pt"})
    assert read_layout(path).digest == layout.digest  # of the header, not of the data


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "is truncated or damaged: it has"),
        ({"a": entry()}, bytes(9), "is truncated or damaged: it has"),
        ({"a": entry(shape=[3])}, bytes(8), "a has 8 bytes, and 12 by its shape"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "a has -8 bytes"),
        ({"a": entry(), "b": entry()}, bytes(8), "b starts at byte .* and should start at"),
        ({"a": entry(offsets=[8, 16])}, bytes(16), "a starts at byte .* and should start at"),
        ({"a": entry(shape=[-2])}, bytes(8), "greater than or equal to 0"),
        ({"a": entry(shape=[2**40, 2**40], dtype="F99")}, bytes(8), "which no tensor has"),
        ({"a": {"x": "y"}}, b"", "the header entry of a is no tensor"),
        ({"a": entry() | {"dtype": 3}}, bytes(8), "its header is damaged"),
        (b"[" * 5000, b"", "its header is damaged"),
        (b"\xff", b"", "its header is damaged"),
    ],
)
def test_a_header_that_the_file_does_not_bear_out(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = file_of(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\1\0", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_header(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="is truncated, or not a safetensors file"):
        read_layout(tmp_path / "x.safetensors")


def test_a_type_that_torch_does_not_have_is_kept(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.safetensors", {"a": entry("F4", [4], [0, 2])}, bytes(2))
    assert read_header(path)["a"].dtype == "F4"


@pytest.mark.parametrize("file", ["../x", "/dev/zero", "", 7, None, "a\0b"])
def test_an_index_names_files_of_its_directory(tmp_path: Path, file: object) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a.b": file}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map\.a\.b is .*it should be a"):
        read_index(index)


def test_every_tensor_that_is_listed_is_there(tmp_path: Path) -> None:
    check_listed({"a": "x"}, ["a", "b"], tmp_path / "index")
    with pytest.raises(ValueError, match="lacks the tensor a, which index lists"):
        check_listed({"a": "x"}, ["b"], tmp_path / "index")
