"""What quantization costs a layer, from its Hessian alone."""

import torch
from jaxtyping import Float
from torch import Tensor


def quadratic_form(
    delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, "out"]:
    """``δ H δᵀ`` of every row, summed in float64: the mean squared output of that row, for ``H =
    E[x xᵀ]``.

    The product δH is computed in the dtype of the Hessian.
    """
    delta = delta.to(hessian.dtype)
    return ((delta @ hessian).double() * delta).sum(1)


def output_error(
    weight: Float[Tensor, "out in"],
    quantized: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> Float[Tensor, ""]:
    """``‖(W - Ŵ) X‖² / ‖W X‖²``, read off the Hessian; 0 when the layer's output is zero and stays
    so."""
    return relative(
        quadratic_form(weight - quantized, hessian).sum(), quadratic_form(weight, hessian).sum()
    )


def relative(error: Float[Tensor, "*s"], signal: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``error / signal``; 0 where both are zero."""
    return torch.where(signal > 0, error / signal, torch.where(error > 0, torch.inf, 0.0))


def sqnr(x: Float[Tensor, "*s"], quantized: Float[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Signal over quantization noise in decibels, ``10 log₁₀(Σ x² / Σ (x - x̂)²)``, in float64."""
    x, noise = x.double(), (x - quantized).double()
    return 10 * torch.log10(x.square().sum() / noise.square().sum())
