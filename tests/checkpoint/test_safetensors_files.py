"""Files that are complete or absent, in the bytes of safetensors."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from ptq.checkpoint.safetensors_files import (
    merge_tensors,
    read_tensor,
    sha256,
    write_file,
    write_json,
    write_tensors,
)
from ptq.reading.safetensors_layout import DTYPES, Rows, read_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    made = {
        f"b.{i}": (torch.arange(12.0).reshape(3, 4)).to(dtype)
        for i, dtype in enumerate(DTYPES.values())
    }
    return made | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "a.ü": torch.ones(3, dtype=torch.bfloat16),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_bytes_are_those_of_safetensors(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    assert digest == sha256(path)


def test_merged_files_are_the_file_of_all_tensors(tmp_path, tensors):
    names = list(tensors)
    write_tensors(tmp_path / "a", {n: tensors[n] for n in names[::2]})
    write_tensors(tmp_path / "b", {n: tensors[n] for n in names[1::2]})
    merge_tensors(tmp_path / "merged", read_header(tmp_path / "a") | read_header(tmp_path / "b"))
    write_tensors(tmp_path / "whole", tensors)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_is_read_is_what_was_written(tmp_path, tensors):
    write_tensors(tmp_path / "x.safetensors", tensors)
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        read = read_tensor(entry)
        assert read.dtype == tensors[name].dtype and read.shape == tensors[name].shape
        assert bits(read) == bits(tensors[name])
    del tensors["b.5"]  # E8M0, which load_file of some versions does not know
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, tensors, keep):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors .*copy it again"):
        read_header(path)


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "x")


def test_a_full_device_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left while writing .*progress\.json") as caught:
        write_file(path, [b"new"])
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["progress.json"] and "old" in path.read_text()


def test_the_bytes_are_durable_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    path, seen, fsync = tmp_path / "x", [], os.fsync

    def watch(descriptor):
        seen.append(
            ("file" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "folder", path.exists())
        )
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_file(path, [b"bytes"])
    assert seen == [("file", False), ("folder", True)]


def test_rows_are_those_of_the_tensor_that_lies_there(tmp_path: Path) -> None:
    tensor = torch.arange(48, dtype=torch.int16).view(2, 6, 4)
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    whole = read_header(tmp_path / "x.safetensors")["x"]
    for expert, start, step in ((0, 0, 2), (1, 1, 2), (1, 2, 3), (1, 0, 1)):
        size = whole.bytes // 2
        rows = Rows(
            whole.file,
            whole.dtype,
            (6 // step, 4),
            whole.offset + expert * size,
            size // step,
            start=start,
            step=step,
        )
        assert torch.equal(read_tensor(rows), tensor[expert, start::step])
