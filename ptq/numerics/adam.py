"""Adam (arXiv 1412.6980) for tensors whose moments are kept in bfloat16, and its schedule.

torch's own optimizers keep moments in the dtype of the parameter and hold all parameters at once;
here the moments take half of that, and who calls holds one tensor at a time.
"""

import math

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

BETAS = (0.9, 0.95)
# Derivatives of a mean over thousands of tokens by single weights lie far below 1e-8.
EPSILON = 1e-16
WARM_UP, LAST = 5, 0.05  # steps; of the largest rate, what the cosine ends at


def moments(
    gradient: Float32[Tensor, "*s"],
    first: BFloat16[Tensor, "*s"],
    second: BFloat16[Tensor, "*s"],
    *,
    count: int,
) -> tuple[
    Float32[Tensor, "*s"],
    Float32[Tensor, "*s"],
    BFloat16[Tensor, "*s"],
    BFloat16[Tensor, "*s"],
]:
    """(mean, root, first, second): what a step is made of, ``value - rate * mean / root``, and the
    moments after ``gradient``, the first being ``count`` 1. Mean and root are of moments that are
    not rounded yet; an entry whose gradients were all 0 has the mean 0."""
    mean = torch.lerp(first.float(), gradient, 1 - BETAS[0])
    square = torch.lerp(second.float(), gradient.square(), 1 - BETAS[1])
    root = (square / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
    return mean / (1 - BETAS[0] ** count), root, mean.bfloat16(), square.bfloat16()


def rate(step: int, steps: int) -> float:
    """The share of the largest learning rate at a step, from 0: a linear warm-up, then half a
    cosine down to ``LAST`` at the last one."""
    warm_up = min(WARM_UP, max(steps // 4, 1))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up + 1) / max(steps - warm_up, 1)
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * done))
