"""What a report says about a checkpoint, against counts made by hand from the tensors
themselves."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq.runtime.inspect import Report, inspect, mean, natural


@pytest.fixture(scope="module")
def made(
    make_tiny_model: Callable[..., Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Biases, tied embeddings, quantized inputs, two formats and a layer that is left out."""
    import ptq

    out = tmp_path_factory.mktemp("report") / "q"
    recipe = ptq.Recipe.default(
        "nvfp4",
        scheme="w4a4",
        algorithm="rtn",
        calibration=str(tiny_text),
        samples=8,
        seq_len=32,
        ignore=("o_proj",),
        rules=(("down_proj", "mxint8"),),
    )
    ptq.quantize(make_tiny_model("qwen2"), out, recipe=recipe)
    return out


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return inspect(made)


def test_every_byte_belongs_to_a_layer_a_bias_or_a_kept_tensor(report: Report, made: Path):
    tensors = load_file(made / "model.safetensors")
    biases = sum(t.nbytes for name, t in tensors.items() if name.endswith("_proj.bias"))
    assert biases > 0
    assert (
        sum(row.bytes for row in report.layers) + sum(k.bytes for k in report.kept) + biases
        == report.bytes
    )
    assert report.bytes == sum(t.nbytes for t in tensors.values())
    assert report.file_bytes > report.bytes


def test_parameters_are_those_of_the_original(report: Report, make_tiny_model: Callable[..., Path]):
    original = load_file(make_tiny_model("qwen2") / "model.safetensors")
    assert report.parameters == sum(t.numel() for t in original.values())
    assert report.source_bytes == 2 * report.parameters
    assert report.bits_per_parameter == pytest.approx(8 * report.bytes / report.parameters)


def test_layers_have_the_shapes_of_the_original(
    report: Report, make_tiny_model: Callable[..., Path]
):
    original = load_file(make_tiny_model("qwen2") / "model.safetensors")
    assert {row.layer: row.shape for row in report.layers} == {
        row.layer: tuple(original[f"{row.layer}.weight"].shape) for row in report.layers
    }


def test_bits_count_codes_scales_and_factors(report: Report):
    by_kind = {row.layer.rpartition(".")[2]: row for row in report.layers}
    count = math.prod(by_kind["up_proj"].shape)
    assert by_kind["up_proj"].bits_per_weight == pytest.approx(
        4 + 8 / 16 + 2 * 32 / count
    )  # weight and input factor
    assert by_kind["down_proj"].bits_per_weight == 8 + 8 / 32
    total = 8 * sum(row.bytes for row in report.layers) / report.quantized_parameters
    assert report.bits_per_weight == pytest.approx(total)


def test_formats_and_kept_layers_are_named(report: Report):
    assert report.formats == ("nvfp4", "mxint8")
    assert {row.format for row in report.layers if row.layer.endswith("down_proj")} == {"mxint8"}
    assert {row.scheme for row in report.layers} == {"w4a4"}
    kept = {tensor.name for tensor in report.kept}
    assert {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)} <= kept
    assert "model.embed_tokens.weight" in kept


def test_errors_come_from_calibration(report: Report):
    assert all(row.error is not None and 0 < row.error < 0.1 for row in report.layers)
    assert report.mean_error == pytest.approx(
        sum(row.error or 0 for row in report.layers) / len(report.layers)
    )
    eight = [row.error or 1 for row in report.layers if row.format == "mxint8"]
    four = [row.error or 0 for row in report.layers if row.format == "nvfp4"]
    assert max(eight) < min(four) / 10


def test_a_checkpoint_without_reports_has_no_errors(made: Path, tmp_path: Path):
    for file in made.iterdir():
        if file.name != "ptq_report.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    report = inspect(tmp_path)
    assert {row.error for row in report.layers} == {None} and report.mean_error is None


def test_names_are_sorted_by_number():
    names = ["model.layers.10.b", "model.layers.9.b", "lm_head", "model.layers.9.a"]
    assert sorted(names, key=natural) == [
        "lm_head",
        "model.layers.9.a",
        "model.layers.9.b",
        "model.layers.10.b",
    ]


def test_means_ignore_what_is_unknown():
    assert mean([1.0, None, 3.0]) == 2.0 and mean([None]) is None and mean([]) is None


def test_what_serves_the_layers_here_is_said(
    report: Report, made: Path, monkeypatch: pytest.MonkeyPatch
):
    assert sum(report.runs.values()) == len(report.layers)
    if not torch.cuda.is_available():
        assert list(report.runs) == ["the reference path: Triton kernels do not run on cpu"]
    monkeypatch.setattr("ptq.kernels.gpu.available", lambda device: True)
    monkeypatch.setattr("ptq.kernels.gpu.multiplies_fp4", lambda device: False)
    served = inspect(made).runs
    assert sum(served.values()) == len(report.layers) and any(
        "float32" in how for how in served
    )  # a float32 model
