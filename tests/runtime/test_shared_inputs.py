"""Layers that read the same tensor: whatever the order and the tensors, each gives what it gives
alone."""

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ptq.runtime.fusion import share_inputs
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.shared_inputs import MADE, Readers, same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def attention(quantized) -> nn.Module:
    """q, k and v of 64 features, with 32, 16 and 16 rows."""
    module = nn.Module()
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        module.add_module(name, quantized(nn.Linear(64, rows), "nvfp4", 16))
    return module


def layers(module: nn.Module) -> list[QuantLinear]:
    return [layer for layer in module.children() if isinstance(layer, QuantLinear)]


def alone(layer: QuantLinear, x: Tensor) -> Tensor:
    return layer.product(layer.prepared(x), x)


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).float().norm() / other.float().norm()) < 4e-3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, device=DEVICE).bfloat16()


@torch.no_grad()
def test_each_takes_its_part_once_and_nothing_is_left(kernels, attention, x) -> None:
    assert share_inputs(attention) == 1
    q, k, v = layers(attention)
    y = q(x)
    assert close(y, alone(q, x)) and hasattr(x, MADE)
    assert torch.equal(q(x), y), "what was taken is made again"
    assert close(v(x), alone(v, x)) and close(k(x), alone(k, x))
    assert not hasattr(x, MADE)


@torch.no_grad()
def test_a_tensor_that_was_written_into_is_a_new_one(kernels, attention, x) -> None:
    share_inputs(attention)
    q, k, _ = layers(attention)
    q(x)
    x.mul_(-3)
    assert close(k(x), alone(k, x))
    for layer in (q, k):  # the reference path, bit by bit
        wide = x.float()
        layer(wide)
        wide.add_(1)
        assert torch.equal(layer(wide), alone(layer, wide))


@torch.no_grad()
def test_what_not_all_have_taken_goes_with_the_tensor(quantized) -> None:
    """What was made of a tensor may be a view of it, kept at the tensor."""
    both = [quantized(nn.Linear(64, 16), "nvfp4", 1) for _ in range(2)]
    Readers(both).freeze(both)
    x = torch.randn(2, 3, 64)
    both[0](x)
    assert hasattr(x, MADE)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


@torch.no_grad()
def test_a_stack_whose_layers_read_different_tensors_is_given_up(
    kernels, attention, x, caplog
) -> None:
    """As in attention to another text."""
    share_inputs(attention)
    (q, k, v), other = layers(attention), x.flip(0)
    with caplog.at_level(logging.INFO, "ptq.runtime.shared_inputs"):
        assert close(q(x), alone(q, x))
        assert close(k(other), alone(k, other)) and close(v(other), alone(v, other))
        assert q.readers is not None and q.readers[0].weight is None
        assert torch.equal(q(x), alone(q, x))
    assert caplog.messages == ["layers of a stack read different inputs: they run one by one"]


@torch.no_grad()
@pytest.mark.parametrize("leaf", ["weight_packed", "bias"])
def test_a_layer_with_another_tensor_computes_with_it(kernels, attention, x, leaf) -> None:
    share_inputs(attention)
    q, k, _ = layers(attention)
    setattr(k, leaf, getattr(k, leaf).flip(0).contiguous())
    assert close(q(x), alone(q, x)) and torch.equal(k(x), alone(k, x))


@torch.no_grad()
def test_writing_into_a_layer_is_writing_into_the_stack(kernels, attention, x) -> None:
    share_inputs(attention)
    q, k, _ = layers(attention)
    k.weight_packed.zero_()
    q(x)
    assert torch.equal(k(x), k.bias.bfloat16().expand(2, 3, 16))  # pyright: ignore[reportOptionalMemberAccess]


def test_gradients_of_the_reference_path_pass_through_what_is_shared(attention) -> None:
    for layer in layers(attention):
        layer.kernel_dtype = None
    share_inputs(attention)
    gradients = []
    for sharing in (True, False):
        x = torch.ones(1, 64, device=DEVICE, requires_grad=True)
        for layer in layers(attention):
            (layer(x) if sharing else alone(layer, x)).sum().backward(retain_graph=True)
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_same_is_identity() -> None:
    a, b = SimpleNamespace(), SimpleNamespace()
    assert same((a, None, True), (a, None, True)) and not same((a,), (b,))
