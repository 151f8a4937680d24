"""Configurations and weight files that are not of each other are told apart by names and shapes."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.coverage import Header, check_tensor

Save = Callable[[str], Path]


@pytest.fixture
def copied(tiny_checkpoint: Save, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))


def layers(path: Path) -> int:
    return json.loads((path / "config.json").read_text())["num_hidden_layers"]


def change(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_layers_is_refused(copied: Path, more: int) -> None:
    count = layers(copied)
    change(copied, num_hidden_layers=count + more)
    message = rf"config\.json says {count + more} layers and the weight files hold {count}"
    with pytest.raises(ValueError, match=message):
        CheckpointSource(copied).check()


def test_tensors_that_nobody_uses_are_told(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file(tensors | {"own.thing": torch.ones(2)}, copied / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        CheckpointSource(copied).check()
    assert "1 tensors of the weight files are not used" in caplog.text
    assert "own.thing" in caplog.text


def test_a_whole_checkpoint_says_nothing(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        CheckpointSource(copied).check()
    assert not caplog.text


@pytest.mark.parametrize(
    ("prefix", "cause"),
    [
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "peft"),
        ("module.", "data parallel"),
        ("model._fsdp_wrapped_module.", "FSDP"),
    ],
)
def test_names_that_a_library_changed_name_it(copied: Path, prefix: str, cause: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file({prefix + name: t for name, t in tensors.items()}, copied / "model.safetensors")
    source = CheckpointSource(copied)
    for use in (source.check, lambda: source.fill(source.skeleton(), "", "cpu")):
        with pytest.raises(ValueError, match=f"it was saved through {cause}") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "current", "message"),
    [
        (
            (2, 3),
            torch.float32,
            torch.ones(3, 2),
            r"x has shape \(2, 3\), its model wants \(3, 2\)",
        ),
        ((2,), torch.float8_e4m3fn, torch.ones(2), "stored as torch.float8_e4m3fn: already"),
        ((2,), torch.int8, torch.ones(2), "stored as torch.int8: already quantized"),
        ((2,), None, torch.ones(2), "a type that torch does not have: already quantized"),
        ((2,), None, torch.ones(2, dtype=torch.int64), "a type that torch does not have"),
    ],
)
def test_a_tensor_that_cannot_be_the_parameter(
    shape: tuple[int, ...], dtype: torch.dtype | None, current: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor(Header(shape, dtype), current, "x", Path("model"))


@pytest.mark.parametrize(
    ("dtype", "current"),
    [(torch.float16, torch.ones(2)), (torch.int64, torch.ones(2, dtype=torch.int64))],
)
def test_a_tensor_that_can(dtype: torch.dtype, current: torch.Tensor) -> None:
    check_tensor(Header((2,), dtype), current, "x", Path("model"))
