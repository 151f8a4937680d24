"""Modules of transformers in fewer launches, where the layers that read them run in kernels.

    FusedNorm   RMSNorm, and the rotation (and quantization) for the layers that read it: one launch
    FusedMLP    down(SiLU(gate(x)) · up(x)): one launch for gate and up, one for SiLU, product and
                rotation, one for down

They stand in the place of a module and keep its parameters and layers under their names. Whether a
module is what they compute is not read off its class: both its parts and its own forward are run on
random numbers when it is replaced, and have to give the same bits. Where kernels do not run
(another device or dtype, gradients, torch.compile, hooks on layers) they compute as it did.

Bounds: exp, and sums of squares in another order, differ in the last bit of float32, so that here
and there an element of an RMSNorm or of SiLU · up is another neighbour in 16 bits: at most one ulp,
in less than 1 % of the elements (tests/kernels/test_op_inputs.py).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ptq.kernels import gpu
from ptq.kernels.operands import Prologue
from ptq.runtime.gradients import learns
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.shared_inputs import MADE, NORM, Made, Readers

SILU_MUL = Prologue("silu_mul")
# (gate, up, down), as engines name them
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Normalised in float32, rounded to the dtype of x, times the gain: Llama's."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return gain * normed.to(x.dtype)


class FusedNorm(nn.Module):
    """An RMSNorm in one launch, which also makes what its readers make of their inputs.

    Attributes:
        kernel_dtype: inputs of this dtype run in the kernel; None if none do.
        readers: the layers that read its output: the first of them to do so says it here.
    """

    weight: Tensor

    def __init__(self, weight: nn.Parameter, epsilon: float, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight, self.epsilon, self.kernel_dtype = weight, epsilon, dtype
        self.readers: Readers | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(*s, in)`` → the same, in the dtype of ``x``."""
        if x.dtype != self.kernel_dtype or learns(x, self.weight) or torch.compiler.is_compiling():
            return rms_norm(x, self.weight, self.epsilon)
        from ptq.kernels import op_inputs  # imports Triton

        readers = self.readers
        source = None if readers is None else readers.source
        if readers is None or source is None:
            y = op_inputs.rotate(x, 1, Prologue("rms_norm", self.weight, self.epsilon))
        else:
            prologue = Prologue("rms_norm", self.weight, self.epsilon, keep=True)
            inputs, y = source.inputs(x, prologue)
            setattr(y, MADE, Made(y, readers, source, inputs))
        setattr(y, NORM, self)
        return y

    def _apply(self, fn, recurse: bool = True):
        moved = super()._apply(fn, recurse)
        self.readers = None
        if not gpu.available(self.weight.device):
            self.kernel_dtype = None
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"readers": None}

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, epsilon={self.epsilon}"


class FusedMLP(nn.Module):
    """A gated MLP in three launches; all children of the module whose place it takes are its own.

    Attributes:
        names: of gate, up and down.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(*s, hidden)`` → the same, in the dtype of ``x``."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        if (readers := _stacked(gate, up, down, x)) is None:
            return down(silu(gate(x)) * up(x))
        assert isinstance(down, QuantLinear)
        weight, both = down.kernel_weight(), readers.together(x)
        inputs = weight.inputs(both, SILU_MUL)[0]
        return weight.multiply(inputs, x.shape[:-1], x.dtype)


def _stacked(gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor) -> Readers | None:
    """The stack of gate and up, if all three run in kernels for ``x`` and nobody watches them."""
    layers = [m for m in (gate, up, down) if isinstance(m, QuantLinear) and not watched(m)]
    if len(layers) < 3 or any(layer.kernel_dtype != x.dtype for layer in layers):
        return None
    first, second, _ = layers
    if first.readers is None or second.readers is None or first.readers[0] is not second.readers[0]:
        return None
    readers = first.readers[0]
    whole = readers.weight is not None and readers.count == 2 and readers.current(layers[:2])
    return readers if whole and not learns(x) and not torch.compiler.is_compiling() else None


def watched(module: nn.Module) -> bool:
    """Whether someone has to be told when the module runs: hooks of torch, or of accelerate."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


# ---------------------------------------------------------------- replacing


@torch.no_grad()
def fuse_norms(model: nn.Module, dtype: torch.dtype) -> int:
    """Put a FusedNorm in the place of every RMSNorm of ``model`` whose kernel gives the same; how
    many there are then."""
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedNorm):
            module.kernel_dtype = dtype if gpu.available(module.weight.device) else None
            module.readers = None
        elif (epsilon := _rms_norm_epsilon(module, dtype)) is not None:
            fused = FusedNorm(module.get_parameter("weight"), epsilon, dtype)
            model.set_submodule(name, fused.train(module.training))
        else:
            continue
        count += 1
    return count


def _rms_norm_epsilon(module: nn.Module, dtype: torch.dtype) -> float | None:
    """Of a module that is :func:`rms_norm` in ``dtype`` and in float32, bit by bit; else None."""
    named = "RMSNorm" in type(module).__name__ and not watched(module)
    weight = module._parameters.get("weight") if named else None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if weight is None or weight.ndim != 1 or not alone or not isinstance(epsilon, float):
        return None
    if len(weight) % 16 or not gpu.available(weight.device):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    x = _random(weight.device, 3, len(weight))
    for kind in (dtype, torch.float32):
        y, expected = module(x.to(kind)), rms_norm(x.to(kind), weight, epsilon)
        if y.dtype != expected.dtype or not torch.equal(y, expected):
            return None
    return epsilon if rms_norm(x.to(dtype), weight, epsilon).dtype == dtype else None


@torch.no_grad()
def fuse_mlps(model: nn.Module, dtype: torch.dtype) -> int:
    """Put a FusedMLP in the place of every gated MLP with SiLU whose layers run in kernels; how
    many there are then."""
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedMLP):
            count += 1
        elif name and (names := _gated(module, dtype)) is not None:
            model.set_submodule(name, FusedMLP(module, names))
            count += 1
    return count


def _gated(module: nn.Module, dtype: torch.dtype) -> tuple[str, str, str] | None:
    """The names of gate, up and down of a module that is ``down(SiLU(gate(x)) · up(x))``, bit by
    bit; else None."""
    names = next((n for n in GATED if all(leaf in module._modules for leaf in n)), None)
    if names is None or module._parameters or module._buffers or watched(module):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    gate, up, down = (module._modules[leaf] for leaf in names)
    if not (isinstance(gate, QuantLinear) and isinstance(up, QuantLinear)):
        return None
    if not isinstance(down, QuantLinear):
        return None
    x = _random(gate.weight_packed.device, 2, gate.in_features).to(dtype)
    if _stacked(gate, up, down, x) is None:
        return None
    # both through the same kernels: stacked or alone, the bits of a matmul may differ
    return names if torch.equal(module(x), down(silu(gate(x)) * up(x))) else None


def _random(device: torch.device, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(device)
