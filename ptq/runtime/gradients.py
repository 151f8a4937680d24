"""Gradients through quantized layers, for what is trained around them: LoRA, norms, embeddings.

A layer computes y = round(x R) Ŵᵀ + b. Its codes and scales are fixed. What flows back to x is
(∂y Ŵ) R, as R is symmetric and orthogonal; the rounding of inputs counts as the identity
(straight-through), because its true derivative is zero almost everywhere.

Who wants the derivative by Ŵ, (∂y)ᵀ round(x R), gives the layer a :class:`Listener`.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ptq.runtime.quant_linear import QuantLinear


class Listener(Protocol):
    """Who is told the derivatives by the weights of layers that run in the reference path."""

    def inputs(self, layer: "QuantLinear", x: Tensor) -> Tensor:
        """What ``layer.prepared(x)`` gives, (tokens, in) float32."""
        ...

    def gradient(self, layer: "QuantLinear", rows: Tensor, inputs: Tensor) -> None:
        """The derivative by what ``layer`` returned, (tokens, out) float32, and what it multiplied
        its weight with."""
        ...


def learns(*tensors: Tensor | None) -> bool:
    """Whether gradients of one of these tensors are wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Product(torch.autograd.Function):
    """``(*s, in)`` → ``(*s, out)`` by a layer, in kernels or the reference path; nothing but the
    layer is kept for the way back, where its weight is dequantized anew; with a listener its
    inputs too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: "QuantLinear") -> Tensor:
        ctx.layer, ctx.dtypes = layer, (x.dtype, None if bias is None else bias.dtype)
        listener = layer.listener
        inputs = layer.prepared(x) if listener is None else listener.inputs(layer, x)
        ctx.inputs = None if listener is None else inputs
        return layer.product(inputs, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        (gradient,), (dtype, bias_dtype) = grad_outputs, ctx.dtypes
        for_x = ctx.layer.input_gradient(gradient).to(dtype) if ctx.needs_input_grad[0] else None
        if ctx.inputs is not None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            ctx.layer.listener.gradient(ctx.layer, rows, ctx.inputs)
        for_bias = None
        if ctx.needs_input_grad[1]:
            for_bias = gradient.flatten(0, -2).float().sum(0).to(bias_dtype)
        return for_x, for_bias, None
