"""Weight files: one or many, read lazily, and every message about those that cannot be read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.weight_files import Shards
from ptq.reading.safetensors_layout import read_index

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]


def test_shards_equal_one_file(tiny_model: Build, tiny_checkpoint: Save, tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    sharded, single = Shards(tmp_path), Shards(tiny_checkpoint("llama"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert sharded.names() == single.names()
    assert all(torch.equal(sharded.tensor(n), single.tensor(n)) for n in single.names())
    assert sharded.digest() != single.digest()
    fingerprints = {CheckpointSource(p).fingerprint for p in (tmp_path, tiny_checkpoint("llama"))}
    assert len(fingerprints) == 2


def test_the_common_dtype_is_that_of_most_values(tmp_path: Path):
    tensors = {
        "few": torch.ones(10, dtype=torch.float32),
        "many": torch.ones(100, dtype=torch.bfloat16),
        "codes": torch.ones(1000, dtype=torch.uint8),
        "bytes": torch.ones(1000).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    assert shards.common_dtype() == torch.bfloat16
    assert {name: shards.dtype(name) for name in tensors} == {
        n: t.dtype for n, t in tensors.items()
    }
    assert "few" in shards and "nonesuch" not in shards
    assert shards.total_bytes == (tmp_path / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match="has no tensor nonesuch"):
        shards.tensor("nonesuch")


def test_the_digest_is_of_headers_and_sizes_not_of_values(tmp_path: Path):
    digests = []
    for index, tensor in enumerate((torch.zeros(4), torch.ones(4), torch.ones(5))):
        (tmp_path / str(index)).mkdir()
        save_file({"a": tensor}, tmp_path / str(index) / "model.safetensors")
        digests.append(Shards(tmp_path / str(index)).digest())
    assert digests[0] == digests[1] != digests[2]


DAMAGES = {
    "no weights": (FileNotFoundError, "contains no safetensors weights: expected"),
    "only pickles": (FileNotFoundError, "only pytorch_model.bin; convert it"),
    "truncated": (ValueError, "model.safetensors is truncated or damaged"),
    "cut in the header": (ValueError, "model.safetensors is truncated"),
    "not safetensors": (ValueError, "model.safetensors is not a safetensors file"),
    "missing shard": (FileNotFoundError, "1 of 2 weight files.*first: b.safetensors"),
    "broken index": (ValueError, "is not a safetensors index"),
    "outside": (ValueError, r"weight_map.* is '\.\./other\.safetensors', it should be a file of"),
    "absolute": (ValueError, "weight_map.* is '/dev/zero', it should be a file of this directory"),
    "no name": (ValueError, "weight_map.* is 7, it should be a valid string"),
    "a zero": (ValueError, "weight_map.* is 'a.+b', it should be a file of this directory"),
    "no index": (FileNotFoundError, "has 2 safetensors files but no model.safetensors.index.json"),
}


def damage(kind: str, path: Path) -> None:
    """Damage the checkpoint in ``path``."""
    weights, index = path / "model.safetensors", path / "model.safetensors.index.json"
    match kind:
        case "no weights":
            weights.unlink()
        case "only pickles":
            weights.rename(path / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "cut in the header":
            weights.write_bytes(weights.read_bytes()[:50])
        case "not safetensors":
            weights.write_bytes((20).to_bytes(8, "little") + b"x" * 100)
        case "missing shard":
            first = "model-00001-of-00002.safetensors"
            weights.rename(path / first)
            files = {"model.norm.weight": first, "lm_head.weight": "b.safetensors"}
            index.write_text(json.dumps({"weight_map": files}))
        case "broken index":
            weights.unlink()
            index.write_text("{}")
        case "outside" | "absolute" | "no name" | "a zero":
            other = shutil.move(weights, path.parent / "other.safetensors")
            names = {"outside": f"../{other.name}", "absolute": "/dev/zero", "no name": 7}
            file = names.get(kind, "a\0b")
            index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
        case "no index":
            shutil.copy(weights, path / "a.safetensors")
            weights.rename(path / "b.safetensors")
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("read", [Shards, CheckpointSource])
@pytest.mark.parametrize("kind", DAMAGES)
def test_unusable_files_are_named_in_one_line(
    kind: str, read: Callable[[Path], object], tiny_checkpoint: Save, tmp_path: Path
):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    damage(kind, tmp_path / "model")
    error, message = DAMAGES[kind]
    with pytest.raises(error, match=message) as caught:
        read(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_files_of_an_index_may_lie_deeper(tmp_path: Path):
    index = tmp_path / "index.json"
    files = {"x": "b.safetensors", "y": "part/a.safetensors", "z": "b.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    assert read_index(index) == files


def test_a_pipe_is_no_weight_file(tiny_checkpoint: Save, tmp_path: Path):
    """Opening one would wait for ever."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="contains no safetensors"):
        Shards(tmp_path / "model")
