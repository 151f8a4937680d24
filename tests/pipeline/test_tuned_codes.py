"""How codes are tuned: latents and jumps of one layer, and what they remember."""

import pytest
import torch
from torch import Tensor

from ptq.calib.hidden_states import HiddenStates
from ptq.numerics.adam import BETAS
from ptq.numerics.formats import FORMATS
from ptq.numerics.latents import codes, latents
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor
from ptq.pipeline import tuned_codes
from ptq.pipeline.tuned_codes import WAIT, Jumps, Latents, Moments, Trained, differing
from ptq.runtime.quant_linear import QuantLinear

ROWS, FEATURES = 48, 64


def store() -> HiddenStates:
    return HiddenStates("ram", torch.device("cpu"))


def layer(name: str, weight: Tensor) -> tuple[QuantLinear, QuantizedTensor]:
    fmt = FORMATS[name]
    found = rtn(
        weight, torch.eye(FEATURES), Grid(fmt, fmt.global_scale(weight.abs().amax()), "absmax")
    )
    return QuantLinear.from_quantized(
        found, Rotation(1), None, quantize_inputs=False, input_global_scale=None
    ), found


def made(name: str, kind: str, weight: Tensor) -> tuple[QuantLinear, Latents | Jumps]:
    linear, found = layer(name, weight)
    if kind == "pv":
        return linear, Jumps(linear, Moments(store(), 0, weight))
    return linear, Latents(linear, Trained(store(), 0, latents(weight, found)))


def loss(linear: QuantLinear, wanted: Tensor, hessian: Tensor) -> tuple[float, Tensor]:
    """tr(D H Dᵀ) / 2 of D = Ŵ - wanted, and its derivative by Ŵ."""
    difference = linear.quantized_weight().dequantize() - wanted
    gradient = difference @ hessian
    return float((difference * gradient).sum() / 2), gradient


@pytest.mark.parametrize("kind", ["latents", "pv"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvint4"])
def test_steps_lower_a_loss(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are correlated, so that nearest codes are not the best."""
    monkeypatch.setattr(tuned_codes, "SHARE", 0.01)
    monkeypatch.setattr(tuned_codes, "TRUST", 0.1)  # the layer is small
    monkeypatch.setattr(tuned_codes, "LATENT_RATE", 0.03)
    weight = torch.randn(ROWS, FEATURES)
    x = torch.randn(256, 16) @ torch.randn(16, FEATURES) + 0.3 * torch.randn(256, FEATURES)
    hessian = x.T @ x / len(x)
    linear, tuned = made(name, kind, weight)
    before = linear.weight_packed
    first, _ = loss(linear, weight, hessian)
    for step in range(40):
        tuned.step(loss(linear, weight, hessian)[1], 1 - step / 40)
    assert loss(linear, weight, hessian)[0] < 0.8 * first
    assert 0 < differing(linear, before) < 0.3 * weight.numel()


def test_a_step_moves_no_more_codes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_codes, "SHARE", 0.01)
    monkeypatch.setattr(tuned_codes, "TRUST", 0.3)
    linear, tuned = made("nvfp4", "pv", torch.randn(ROWS, FEATURES))
    gradient, moved = torch.randn(ROWS, FEATURES), []
    for _ in range(WAIT + 3):
        before = linear.weight_packed
        tuned.step(gradient, 0.5)
        moved.append(differing(linear, before))
    assert moved[:WAIT] == [0] * WAIT  # first it only looks
    assert all(0 < count <= 0.005 * gradient.numel() for count in moved[WAIT:])
    before = linear.weight_packed
    tuned.step(gradient, 0.0)
    assert torch.equal(linear.weight_packed, before)


def test_what_has_jumped_waits_for_derivatives_where_it_is(monkeypatch) -> None:
    monkeypatch.setattr(tuned_codes, "SHARE", 1.0)
    monkeypatch.setattr(tuned_codes, "TRUST", 10.0)
    linear, tuned = made("nvint4", "pv", torch.randn(ROWS, FEATURES))
    ones = torch.ones(ROWS, FEATURES)
    before = linear.quantized_weight().codes
    for _ in range(WAIT + 1):
        tuned.step(ones, 1.0)
    moved = linear.quantized_weight().codes != before
    first = tuned.state()["first"]
    assert moved.any() and not first[moved].any() and first[~moved].all()
    jumped = linear.quantized_weight().codes
    tuned.step(-1e-3 * ones, 1.0)  # all but nothing: what had built up would move them on
    assert torch.equal(linear.quantized_weight().codes[moved], jumped[moved])


@pytest.mark.parametrize("kind", ["latents", "pv"])
def test_they_go_on_from_a_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_codes, "SHARE", 0.01)
    monkeypatch.setattr(tuned_codes, "TRUST", 0.3)
    monkeypatch.setattr(tuned_codes, "LATENT_RATE", 0.1)
    weight, gradients = torch.randn(ROWS, FEATURES), torch.randn(9, ROWS, FEATURES)
    linear, tuned = made("nvfp4", kind, weight)
    start = linear.weight_packed
    for gradient in gradients[:6]:
        tuned.step(gradient, 1.0)
    state = {name: tensor.clone() for name, tensor in tuned.state().items()}
    assert set(state) == set(tuned.PARTS)
    other, again = made("nvfp4", kind, weight)
    again.restore(state)
    assert torch.equal(other.weight_packed, linear.weight_packed)
    for gradient in gradients[6:]:
        for one in (tuned, again):
            one.step(gradient, 1.0)
    assert torch.equal(other.weight_packed, linear.weight_packed)
    assert all(torch.equal(t, again.state()[name]) for name, t in tuned.state().items())
    assert differing(linear, start) > 0


def test_moments_are_those_of_adam() -> None:
    kept = Moments(store(), 5, torch.empty(2, 3))
    gradient = torch.randn(2, 3)
    mean, root = kept.take(gradient)
    assert torch.allclose(mean, gradient) and torch.allclose(root, gradient.abs())
    assert torch.allclose(kept.state()["first"].float(), (1 - BETAS[0]) * gradient, rtol=1e-2)
    kept.forget(gradient > 0)
    assert torch.equal(kept.state()["first"] == 0, gradient > 0) and kept.state()["second"].all()


def test_latents_are_what_codes_are_rounded_from() -> None:
    linear, tuned = made("nvfp4", "latents", torch.randn(ROWS, FEATURES))
    for _ in range(30):
        tuned.step(torch.ones(ROWS, FEATURES), 1.0)
    value = tuned.state()["value"]
    element = linear.format.element
    assert torch.equal(codes(element, value), linear.quantized_weight().codes)
    assert value.abs().max() <= element.max
