"""Parts merged into files of bounded size, with an index that says where everything is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq.checkpoint.safetensors_files import sha256, write_tensors
from ptq.checkpoint.shards import write_shards
from ptq.reading.safetensors_layout import Entry, read_header


@pytest.fixture
def parts(tmp_path: Path) -> list[dict[str, Entry]]:
    """Five parts of 40 bytes."""
    headers = []
    for i in range(5):
        write_tensors(tmp_path / f"part{i}", {f"block.{i}.w": torch.full((10,), float(i))})
        headers.append(read_header(tmp_path / f"part{i}"))
    return headers


@pytest.mark.parametrize(("limit", "files"), [(1000, 1), (100, 3), (80, 3), (79, 5), (1, 5)])
def test_files_are_as_large_as_they_may_be(
    tmp_path: Path, parts: list[dict[str, Entry]], limit: int, files: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    entries, sums = write_shards(out, parts, limit)
    assert sums == {path.name: sha256(path) for path in out.iterdir()}
    names = sorted(path.name for path in out.glob("*.safetensors"))
    single = ["model.safetensors"]
    several = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    assert names == (single if files == 1 else several)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200 and set(index["weight_map"]) == set(entries)
    for name, file in index["weight_map"].items():
        value = load_file(out / file)[name]
        assert torch.equal(value, torch.full((10,), float(name.split(".")[1])))


def test_a_tensor_that_comes_twice_is_a_mistake_of_ours(
    tmp_path: Path, parts: list[dict[str, Entry]]
) -> None:
    with pytest.raises(AssertionError, match="written twice"):
        write_shards(tmp_path, [parts[0], parts[0]], 1000)
