"""What is trained of a block: derivatives by latents and gains, steps, and what is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ptq.calib.hidden_states import HiddenStates
from ptq.numerics.formats import FORMATS
from ptq.numerics.latents import latents
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import unpack
from ptq.pipeline import tuned_codes
from ptq.pipeline.tuned_block import TunedBlock
from ptq.pipeline.tuned_codes import WAIT, Jumps, Latents, Moments, Trained, TunedCodes
from ptq.runtime.quant_linear import QuantLinear


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are: a step of the usual kind would move no code."""
    monkeypatch.setattr(tuned_codes, "SHARE", 0.002)
    monkeypatch.setattr(tuned_codes, "TRUST", 0.1)


CHOICES = [("nvfp4", True, 1, "four_six"), ("mxfp4", True, 32, None), ("nvint4", False, 16, None),
           ("mxfp4", False, 1, None), ("nvfp4", True, 16, None)]  # fmt: skip


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((1 + torch.rand(size)).bfloat16().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Gated(nn.Module):
    """A norm, two layers that read the same, and one that reads both."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.gate(h)) * self.up(h))


def quantize(layer: nn.Linear, name: str, inputs: bool, rotation: int, rule: str | None):
    fmt, turned = FORMATS[name], Rotation(rotation)
    weight = turned.exact(layer.weight.detach())
    grid = Grid(fmt, fmt.global_scale(weight.abs().amax()), "absmax")
    found = rtn(weight, torch.eye(weight.shape[1]), grid)
    static = fmt.global_scale(torch.tensor(4.0), 2.0) if inputs and fmt.has_global_scale else None
    made = QuantLinear.from_quantized(
        found, turned, layer.bias, quantize_inputs=inputs, input_global_scale=static,
        input_rule=rule,
    )  # fmt: skip
    return made, latents(weight, found)


def tuned(module: nn.Module, start: dict[str, Tensor], by: str) -> TunedBlock:
    store, keys = HiddenStates("ram", torch.device("cpu")), iter(range(100))
    codes: dict[str, TunedCodes] = {}
    for name, latent in start.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        codes[name] = (
            Jumps(layer, Moments(store, next(keys), latent))
            if by == "pv"
            else Latents(layer, Trained(store, next(keys), latent))
        )
    return TunedBlock(
        "block", module, codes, lambda _: torch.bfloat16, lambda v: Trained(store, next(keys), v)
    )


def made(name: str, inputs: bool, rotation: int, rule: str | None, by: str = "latents"):
    module, start = Gated(64, 96), {}
    for inner in ("gate", "up", "down"):
        layer, start[inner] = quantize(module.get_submodule(inner), name, inputs, rotation, rule)
        module.set_submodule(inner, layer)
    module.requires_grad_(False)
    return module, tuned(module, start, by), start


class Plain(nn.Module):
    """The same layer with its dequantized weight as a parameter; inputs are rounded straight
    through."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(layer.quantized_weight().dequantize())

    def forward(self, x: Tensor) -> Tensor:
        turned = self.layer.rotation.exact(x)
        rounded = self.layer.prepared(x.detach()).view(x.shape)
        return linear(turned + (rounded - turned).detach(), self.weight, self.layer.bias)


def back(module: nn.Module, x: Tensor, outer: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (module(x.view_as(x)) * outer).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("choice", CHOICES)
def test_derivatives_are_those_of_plain_autograd(choice) -> None:
    module, block, _ = made(*choice)
    plain = copy.deepcopy(module)
    for name in ("gate", "up", "down"):
        plain.set_submodule(name, Plain(plain.get_submodule(name)))
    plain.norm.weight.requires_grad_(True)
    x, outer = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    expected = back(plain, x, outer) + back(plain, -x, outer)
    with block.learning():
        found = back(module, x, outer) + back(module, -x, outer)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(module.norm.weight.grad, plain.norm.weight.grad, atol=1e-3)
    for name in ("gate", "up", "down"):
        wanted = plain.get_submodule(name).weight.grad
        assert torch.allclose(block._gradients[name], wanted, atol=1e-4 * float(wanted.abs().max()))
    with torch.no_grad():
        assert torch.allclose(plain(x), module(x), atol=1e-5)


def test_layers_that_read_the_same_share_what_is_made_of_it(monkeypatch) -> None:
    module, block, _ = made("nvfp4", True, 1, "four_six")
    calls = []
    prepared = QuantLinear.prepared
    monkeypatch.setattr(
        QuantLinear, "prepared", lambda self, x: calls.append(self) or prepared(self, x)
    )
    x = torch.randn(1, 5, 64)
    for _ in range(2):
        with block.learning():
            back(module, x, torch.ones_like(x))
        assert len(calls) == 2  # of gate and up once, and of down
        calls.clear()
        with torch.no_grad():
            module(x)
        assert len(calls) == 2
        calls.clear()
        block.update(1.0)  # other tensors, and still so


@pytest.mark.parametrize("by", ["latents", "pv"])
def test_steps_move_codes_and_gains_as_a_file_holds_them(by: str) -> None:
    module, block, _ = made("nvfp4", False, 1, None, by)
    before = block.result()
    assert block.changed() == 0 and block.weights == 3 * 64 * 96
    for _ in range(60):
        with block.learning():
            back(module, torch.ones(1, 4, 64), torch.ones(1, 4, 64))
        block.update(1.0)
    layer = block.layers["down"]
    after = block.result()
    assert 0 < block.changed() < block.weights
    assert before.keys() == after.keys() == {
        "norm.weight", "gate.weight_packed", "up.weight_packed", "down.weight_packed"
    }  # fmt: skip
    count = sum(
        int((unpack(before[n], layer.format) != unpack(after[n], layer.format)).sum())
        for n in before
        if n.endswith("packed")
    )
    assert count == block.changed()
    assert after["norm.weight"].dtype == torch.bfloat16
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    # it computes with what a file holds
    assert torch.equal(module.norm.weight, after["norm.weight"].float())


@pytest.mark.parametrize("by", ["latents", "pv"])
def test_what_no_token_reached_stays(by: str) -> None:
    module, block, _ = made("nvfp4", False, 1, None, by)
    before = block.state()
    for _ in range(WAIT + 1):
        with block.learning():
            module.up(torch.ones(1, 64).requires_grad_()).sum().backward()
        block.update(1.0)
    changed = {n for n, t in block.state().items() if not torch.equal(t, before[n])}
    assert changed == {f"up:{part}" for part in block._codes["up"].PARTS}


@pytest.mark.parametrize("by", ["latents", "pv"])
def test_training_goes_on_from_a_state(by: str) -> None:
    x, outer = torch.randn(1, 8, 64), torch.randn(1, 8, 64)

    def train(module: nn.Module, block: TunedBlock, steps: int) -> None:
        for _ in range(steps):
            with block.learning():
                back(module, x, outer)
            block.update(1.0)

    module, block, start = made("mxfp4", True, 32, None, by)
    other = copy.deepcopy(module)
    train(module, block, 12)
    state = {name: t.clone() for name, t in block.state().items()}
    train(module, block, 4)
    again = tuned(other, start, by)
    again.restore(state)
    train(other, again, 4)
    assert all(torch.equal(t, again.state()[name]) for name, t in block.state().items())
    assert all(torch.equal(t, again.result()[name]) for name, t in block.result().items())
    assert again.changed() == block.changed() > 0
