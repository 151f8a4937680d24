"""Gradients through quantized layers, for what is trained around them: LoRA, norms, embeddings.

A layer computes y = round(x R) Ŵᵀ + b. Its codes and scales are fixed. What flows back to x is
(∂y Ŵ) R, as R is symmetric and orthogonal; the rounding of inputs counts as the identity
(straight-through), because its true derivative is zero almost everywhere.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ptq.runtime.quant_linear import QuantLinear


def learns(*tensors: Tensor | None) -> bool:
    """Whether gradients of one of these tensors are wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Product(torch.autograd.Function):
    """``(*s, in)`` → ``(*s, out)`` by a layer, in kernels or the reference path; nothing but the
    layer is kept for the way back, where its weight is dequantized anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: "QuantLinear") -> Tensor:
        ctx.layer, ctx.dtypes = layer, (x.dtype, None if bias is None else bias.dtype)
        return layer.product(layer.prepared(x), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        (gradient,), (dtype, bias_dtype) = grad_outputs, ctx.dtypes
        for_x = ctx.layer.input_gradient(gradient).to(dtype) if ctx.needs_input_grad[0] else None
        for_bias = None
        if ctx.needs_input_grad[1]:
            for_bias = gradient.flatten(0, -2).float().sum(0).to(bias_dtype)
        return for_x, for_bias, None
