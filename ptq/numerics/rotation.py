"""Block-wise Hadamard rotation of the inputs of a layer (MR-GPTQ, arXiv 2509.23202, section 4).

    R = diag(Q, Q, …),  Q[i, j] = (-1)^popcount(i & j) / sqrt(size)

Q is symmetric, orthogonal and its own inverse, hence ``x @ W.T == rotate(x) @ rotate(W).T``: the
weight is rotated once, before it is quantized, and activations are rotated when they arrive.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float32
from scipy import linalg
from torch import Tensor


def hadamard(size: int) -> Float32[Tensor, "size size"]:
    """Sylvester's matrix of ±1, not normalised.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard block must be a power of two, got {size}")
    return torch.from_numpy(linalg.hadamard(size).astype(np.float32))


@lru_cache(maxsize=64)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard(size).to(dtype=dtype, device=device)


def largest_rotation(features: int, limit: int = 256) -> int:
    """The largest power of two that divides ``features`` and does not exceed ``limit``."""
    return min(features & -features, limit)


@dataclass(frozen=True)
class Rotation:
    """``size`` is the size of a block, a power of two; 1 is the identity and costs nothing."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.size & (self.size - 1):
            raise ValueError(
                f"a rotation must be a power of two (1 or 'none' for no rotation), got {self.size}"
            )

    def check(self, features: int) -> None:
        """Raise ValueError when blocks would straddle rows of ``features`` inputs."""
        if features % self.size:
            raise ValueError(
                f"a rotation of {self.size} does not divide {features} input features; "
                f"the largest that does is {largest_rotation(features)}"
            )

    def exact(self, x: Float[Tensor, "*s in"]) -> Float[Tensor, "*s in"]:
        """``x R`` in float32 (float64 for float64 inputs), not rounded to the dtype of ``x``.

        The products with ±1 are exact; the sums are scaled by size^-½ once, afterwards (the law of
        the kernels).
        """
        wide = x if x.dtype == torch.float64 else x.float()
        if self.size == 1:
            return wide
        self.check(x.shape[-1])
        blocks = wide.unflatten(-1, (-1, self.size)) @ _matrix(self.size, wide.dtype, x.device)
        return (blocks * self.size**-0.5).flatten(-2)

    def rotate(self, x: Float[Tensor, "*s in"]) -> Float[Tensor, "*s in"]:
        """``x R`` in the dtype of ``x``: activations, and, R being orthogonal, weights."""
        return x if self.size == 1 else self.exact(x).to(x.dtype)

    def rotate_hessian(self, h: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """The Hessian of rotated inputs, ``Rᵀ H R``."""
        return self.rotate(self.rotate(h).T).T
