"""A weight and inputs with some structure, for the laws of algorithms."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs, Hessian): correlated inputs of unequal size, fewer outputs than inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(128, 128, generator=generator) / 6
    x = (
        torch.randn(1024, 128, generator=generator)
        @ mix
        * torch.exp(torch.randn(128, generator=generator) * 0.7)
    )
    x = x + 0.3 * torch.randn(1024, 128, generator=generator)
    return torch.randn(48, 128, generator=generator), x, x.double().T @ x.double() / len(x)
