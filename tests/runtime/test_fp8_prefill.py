"""Many tokens in fp8: which layers, what it costs, and that few tokens are what they were.

Without a GPU the kernels run in Triton's interpreter, on the CPU, and so does torch's product.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from ptq.kernels import gpu
from ptq.kernels.operands import Fp8Inputs, Prologue
from ptq.numerics.rotation import Rotation
from ptq.runtime import fp8_prefill
from ptq.runtime.kernel_weight import FP8_TOKENS, KernelWeight
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def hopper(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that multiplies FP8 numbers."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "multiplies_fp8", lambda device: True)
    elif not gpu.multiplies_fp8(DEVICE):
        pytest.skip("this GPU does not multiply FP8 numbers")


@pytest.fixture
def checkpoint(make_run, tmp_path) -> Callable[..., Path]:
    """``checkpoint(fmt)``: one decoder layer in bfloat16; the interpreter is slow."""

    def write(fmt: str, **recipe) -> Path:
        out = tmp_path / fmt
        make_run("llama", fmt, layers=1, **recipe)(out, dialect="ptq")
        return out

    return write


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def in_fp8(layer: QuantLinear) -> KernelWeight:
    layer.fp8_prefill = True
    return layer.kernel_weight()


@pytest.mark.parametrize(("name", "exact"), [("mxfp4", True), ("mxint4", True), ("nvfp4", False)])
def test_a_copy_is_exact_where_its_scales_are_powers_of_two(
    hopper, quantized, name: str, exact: bool
) -> None:
    layer = quantized(nn.Linear(128, 64), name)
    copy = in_fp8(layer).fp8
    assert copy is not None and copy.exact is exact
    dense = copy.values.double().cpu() * copy.factors.double().cpu().T
    wanted = layer.quantized_weight().dequantize().double().cpu()
    assert torch.equal(dense, wanted) is exact and error(dense, wanted) < 0.04
    layer.weight_scale.view(torch.uint8).view(-1)[0] = 100  # far below others of its row
    layer._kernel_weight = None
    again = layer.kernel_weight().fp8
    assert again is not None and not again.exact


@pytest.mark.parametrize("rotation", [1, 32, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_are_the_product_of_what_both_are_rounded_to(
    hopper, quantized, rotation: int, bias: bool
) -> None:
    layer = quantized(nn.Linear(256, 64, bias=bias), "mxfp4", rotation)
    few, many = (
        torch.randn(n, 256, device=DEVICE).bfloat16() for n in (FP8_TOKENS - 1, FP8_TOKENS)
    )
    before = layer(few)
    weight = in_fp8(layer)
    assert torch.equal(layer(few), before), "decoding reads the 4-bit weights as it did"
    inputs, kept = weight.inputs(many)
    assert isinstance(inputs, Fp8Inputs) and kept is many
    rotated = Rotation(rotation).exact(many.float().cpu())
    rounded = inputs.values.double().cpu() * inputs.factors.double().cpu()
    # half a unit of three bits of mantissa, and below 2^-6 of 448 half of the smallest number
    smallest = 2.0**-10 * inputs.factors.double().cpu()
    slack = 2.0**-4 * rotated.double().abs() * 1.05 + smallest
    assert ((rounded - rotated.double()).abs() <= slack).all()
    expected = rounded @ layer.quantized_weight().dequantize().double().cpu().T
    expected = expected if layer.bias is None else expected + layer.bias.double().cpu()
    y = layer(many)
    assert y.dtype == torch.bfloat16 and error(y.cpu(), expected) < 2.0**-8


def test_a_norm_is_kept_and_a_gated_product_is_rounded_at_once(hopper, quantized) -> None:
    weight = in_fp8(quantized(nn.Linear(64, 32), "mxfp4", 32))
    x = torch.randn(2, FP8_TOKENS, 64, device=DEVICE).bfloat16()
    gain = torch.ones(64, device=DEVICE).bfloat16()
    inputs, normed = weight.inputs(x, Prologue("rms_norm", gain, 1e-6, keep=True))
    assert isinstance(inputs, Fp8Inputs) and normed.shape == x.shape
    again, _ = weight.inputs(normed)
    assert isinstance(again, Fp8Inputs)
    assert torch.equal(again.values.view(torch.uint8), inputs.values.view(torch.uint8))
    both = torch.cat([x, x.flip(0)], dim=-1)
    gated, _ = weight.inputs(both, Prologue("silu_mul"))
    assert isinstance(gated, Fp8Inputs) and gated.values.shape == (2 * FP8_TOKENS, 64)
    y = weight.multiply(gated, (2, FP8_TOKENS), torch.bfloat16)
    assert y.shape == (2, FP8_TOKENS, 32)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_model_is_loaded_with_copies(hopper, checkpoint, fmt: str, caplog) -> None:
    path = checkpoint(fmt, rotation=32)
    plain = load(path, DEVICE, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="ptq.runtime.fp8_prefill"):
        model = load(path, DEVICE, dtype=torch.bfloat16, prefill="fp8")
    weights = list(fp8_prefill.kernel_weights(model))
    numbers = sum(w.weight.out_features * w.weight.in_features for w in weights)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert numbers == sum(m.out_features * m.in_features for m in layers)
    assert len(weights) == 4 < len(layers), "q, k, v and gate, up are stacked: one copy each"
    again = ", all of them exact" if fmt == "mxfp4" else "; 4 of them are rounded a second time"
    assert f"from {FP8_TOKENS} tokens on 4 weights" in caplog.text and again in caplog.text
    assert f"copies take {numbers / 1e9:.2f} GB more" in caplog.text
    ids = torch.randint(0, 64, (1, FP8_TOKENS + 2), device=DEVICE)
    with torch.no_grad():
        few = [m(ids[:, :5], use_cache=False).logits for m in (plain, model)]
        many = [m(ids, use_cache=False).logits for m in (plain, model)]
    assert torch.equal(*few)
    assert 0 < error(many[1], many[0]) < 0.1


def test_where_it_cannot_run_is_one_line(kernels, checkpoint, monkeypatch) -> None:
    path = checkpoint("mxfp4", rotation=32)
    with pytest.raises(ValueError, match="unknown prefill 'int8'; choose one of 16-bit, fp8"):
        load(path, DEVICE, prefill="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not go with a device_map"):
        load(path, device_map="auto", prefill="fp8")
    monkeypatch.setattr(gpu, "multiplies_fp8", lambda device: False)
    with pytest.raises(ValueError, match="does not multiply FP8 numbers in our kernels"):
        load(path, DEVICE, prefill="fp8")
    monkeypatch.setattr(gpu, "multiplies_fp8", lambda device: True)
    with pytest.raises(ValueError, match="no layer runs in kernels"):
        load(path, DEVICE, dtype=torch.float32, prefill="fp8")
