"""Layers run in kernels wherever those can, however the model was moved, cast or spread; where they
cannot, one line says why, once."""

import logging

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM

import ptq.hf  # noqa: F401 - registers the dialect
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.runtime import kernel_choice
from ptq.runtime.kernel_choice import hooked, kernel_obstacle, visits
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _untold() -> None:
    kernel_choice.tell_once.cache_clear()


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def in_kernels(layer: QuantLinear, inputs: torch.Tensor) -> bool:
    """Whether the layer multiplied them in kernels, which alone make 16-bit operands."""
    return layer.prepared(inputs).dtype == inputs.dtype != torch.float32  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reason_is_that_of_device_and_format(monkeypatch, device: str) -> None:
    monkeypatch.setattr(kernel_choice.gpu, "available", lambda place: place.type == "cuda")
    monkeypatch.setattr(kernel_choice.gpu, "multiplies_fp4", lambda place: False)
    place = torch.device(device)
    assert kernel_obstacle(LayerInfo(format="nvfp4", rotation=16), 128, place) == (
        None if device == "cuda" else "Triton kernels do not run on cpu"
    )
    if device == "cuda":
        reasons = {
            "float16 cannot hold": kernel_obstacle(
                LayerInfo(format="mxfp4", rotation=32), 128, place, dtype=torch.float16
            ),
            "inputs are emulated": kernel_obstacle(
                LayerInfo(format="nvfp4", rotation=16, quantize_inputs=True), 128, place
            ),
        }
        assert all(reason and part in reason for part, reason in reasons.items())
        assert kernel_obstacle(LayerInfo(format="nvfp4", rotation=256), 512, place) is None
        monkeypatch.setattr(kernel_choice.gpu, "multiplies_fp4", lambda place: True)
        w4a4 = LayerInfo(format="nvfp4", rotation=256, quantize_inputs=True)
        assert "rotation of 256" in str(kernel_obstacle(w4a4, 512, place))


def test_a_cast_model_goes_on_in_kernels(kernels, quantized) -> None:
    layer = quantized(nn.Linear(64, 16), "nvfp4", 16)
    assert in_kernels(layer, x())
    layer.half()
    assert layer.kernel_dtype == torch.float16 and in_kernels(layer, x(torch.float16))
    layer.to(torch.bfloat16)
    assert in_kernels(layer, x())


def test_what_float16_cannot_hold_is_said_once(kernels, quantized, caplog) -> None:
    layers = nn.ModuleList([quantized(nn.Linear(64, 16), "mxfp4", 32) for _ in range(3)])
    with caplog.at_level(logging.WARNING, "ptq"):
        layers.half()
    assert [r.getMessage() for r in caplog.records] == [
        "quantized layers run in the reference path: float16 cannot hold E8M0 scales; load the "
        "model in bfloat16"
    ]


def test_inputs_of_another_dtype_are_told_once(kernels, quantized, caplog) -> None:
    layer = quantized(nn.Linear(64, 16))
    with caplog.at_level(logging.WARNING, "ptq"):
        layer.float()(x(torch.float32))
        layer(x(torch.float32))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "torch.float32 inputs and were prepared for torch.bfloat16" in message
    assert in_kernels(layer, x()), "16-bit inputs still meet kernels"


def test_autocast_casts_inputs_as_for_a_linear_layer(kernels, quantized) -> None:
    layer = quantized(nn.Linear(64, 16), "nvfp4", 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x(torch.float32))
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x(torch.float32).bfloat16()))


def test_a_layer_that_comes_to_a_device_with_kernels_takes_them(quantized, monkeypatch) -> None:
    layer = quantized(nn.Linear(64, 16), "nvfp4", 16)
    monkeypatch.setattr(kernel_choice.gpu, "available", lambda device: False)
    assert layer.prepare(torch.bfloat16) is not None and layer.kernel_dtype is None
    monkeypatch.setattr(kernel_choice.gpu, "available", lambda device: True)
    monkeypatch.setattr(kernel_choice.gpu, "architecture", lambda device: 90)
    assert layer.to(DEVICE).kernel_dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_rotation_beyond_the_kernels_is_the_librarys(kernels, quantized, name: str) -> None:
    layer = quantized(nn.Linear(256, 24), name, 256)
    half = torch.randn(3, 256, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rotated = layer.prepared(half)
    assert in_kernels(layer, half)
    assert torch.equal(rotated, layer.rotation.rotate(half)), "rounded once"
    y, layer.kernel_dtype = layer(half).float(), None
    expected = layer(half).float()
    assert float((y - expected).norm() / expected.norm()) < 4e-3


# ---------------------------------------------------------------- hooks of accelerate


def test_a_layer_visits_where_its_hook_takes_it(quantized) -> None:
    layer = quantized(nn.Linear(64, 8, bias=False), "mxfp4")
    largest = layer.weight_scale.max().cpu()
    assert visits(layer) is None and not hooked(layer)
    hook = AlignDevicesHook(execution_device=DEVICE, offload=True, offload_buffers=True)
    add_hook_to_module(layer, hook)
    assert layer.weight_packed.is_meta and hooked(layer)
    for each in (hook, SequentialHook(AlignDevicesHook(), hook)):
        layer._hf_hook = each  # pyright: ignore[reportAttributeAccessIssue]
        found = visits(layer)
        assert found is not None and found.device.type == DEVICE
        assert torch.equal(found.largest_scale.cpu(), largest)


# As on a GPU that is too small: a block lies on the disk while it does not run.
SPREAD: dict[str, int | str | torch.device] = dict.fromkeys(
    ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"),
    0 if DEVICE == "cuda" else "cpu",
)
SPREAD["model.layers.1"] = "disk"


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_transformers_spreads_a_model_that_runs_in_kernels(
    kernels, make_run, tmp_path, token_ids, caplog, kind: str
) -> None:
    path, ids = tmp_path / "out", token_ids.to(DEVICE)
    make_run(kind, "nvfp4", rotation=16)(path, dialect="ptq")
    expected = load(path, DEVICE)(ids).logits.float()
    caplog.clear()
    with caplog.at_level(logging.INFO, "ptq"):
        model = AutoModelForCausalLM.from_pretrained(
            path, device_map=SPREAD, offload_folder=tmp_path / "offload"
        )
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert f"{len(layers)} of {len(layers)} quantized layers run in Triton kernels" in caplog.text
    grouped = "accelerate's hooks say where each of their layers runs" in caplog.text
    assert grouped == (kind == "qwen3_moe")
    y = model(ids).logits.float()
    assert float((y - expected).norm() / expected.norm()) < 2e-2
    away = [layer for layer in layers if layer.weight_packed.is_meta]
    assert len(away) == len(layers) / 2 and not any(layer._kernel_weight for layer in away)
