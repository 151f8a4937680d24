"""Verification: nothing that changed passes, and what is not looked at is said."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.checkpoint.checksums import SUMS
from ptq.reading.safetensors_layout import read_header
from ptq.runtime.verify import verify


@pytest.fixture(scope="module")
def written(make_run, tmp_path_factory) -> Path:
    """A W4A4 checkpoint with biases, not to be changed."""
    out = tmp_path_factory.mktemp("written") / "out"
    make_run("qwen2", "nvfp4", scheme="w4a4")(out, dialect="ptq")
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def test_what_was_written_is_ok(written: Path) -> None:
    verdict = verify(written)
    assert verdict.ok and verdict.problems == ()
    assert verdict.checked and verdict.unchecked
    assert json.loads(json.dumps(verdict.to_dict()))["ok"] is True


@pytest.mark.parametrize("fmt", ["mxfp4", "nvint4", "mxfp6"])
def test_every_way_to_store_layers_is_understood(make_run, tmp_path: Path, fmt: str) -> None:
    make_run("llama", fmt)(tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()


def test_every_flip_of_a_bit_of_the_weights_is_noticed(copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    start = min(entry.offset for entry in read_header(file).values())
    generator = random.Random(0)
    for _ in range(60):
        place, bit = generator.randrange(start, len(whole)), generator.randrange(8)
        raw = bytearray(whole)
        raw[place] ^= 1 << bit
        file.write_bytes(raw)
        assert "model.safetensors is changed" in verify(copied).problems[0], (place, bit)
    file.write_bytes(whole)
    assert verify(copied).ok


def test_damage_is_named_by_tensor_whatever_the_sums_say(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    tensors[f"{layer}.weight_scale"].view(torch.uint8)[1, 2] = 0x7F
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    changed, scale, norm = verify(copied).problems
    assert changed.startswith("model.safetensors is changed")
    assert scale.startswith(f"{layer}.weight_scale holds NaN")
    assert norm.startswith("model.norm.weight holds NaN")


def test_files_are_asked_for_even_if_nothing_can_be_opened(copied: Path) -> None:
    (copied / "config.json").unlink()
    (copied / "tokenizer.json").write_text("{}")
    problems = verify(copied).problems
    assert any(line.startswith("tokenizer.json is changed") for line in problems)
    assert any("has no config.json" in line for line in problems)


def test_a_model_that_is_not_quantized_has_no_sums(tiny_llama: Path, tmp_path: Path) -> None:
    sums, quantized = verify(tiny_llama).problems
    assert SUMS in sums and "is not quantized" in quantized
    with pytest.raises(FileNotFoundError, match="is no directory"):
        verify(tmp_path / "nothing")
