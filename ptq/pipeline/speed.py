"""How fast this machine is at what a run does, measured in about a second before it begins.

Nothing here is a constant of a machine: products, attention, rounding of inputs and solving are
timed as they will run, on this device, with as many threads as this process has. What other
programs take is not foreseen: of every measurement the fastest is kept.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ptq.numerics.algorithms import SWEEPING
from ptq.numerics.factor import factorize
from ptq.numerics.rotation import Rotation
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Job, solve

TOKENS = 2048  # that products, and passes over inputs, are timed with
WIDEST = 2048  # features of a product that is timed: a wider one is as fast
LONGEST = 1024  # of the sequences whose attention is timed; longer ones are in proportion
# A layer that is solved, with few rows and with many: what a column costs, and what a weight costs.
FEATURES, FEW, MANY = 256, 64, 576
FACTORED = 512  # features of a Hessian that is factorised
REPEATS = 3

clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds on this machine.

    Attributes:
        flop: of an operation in a product of inputs and a weight, float32.
        element: of a pass over a number of a hidden state: an addition, a product.
        attention: of an operation in attention, softmax included.
        rounded: of an input that is quantized and dequantized, or only rotated where the recipe
            leaves inputs as they are; 0 where neither is done.
        column, weight: of solving a layer: for every column of it, and for every weight.
        factor: of the factorisation of a Hessian, for every in³.
    """

    flop: float
    element: float
    attention: float
    rounded: float
    column: float
    weight: float
    factor: float


def measure(recipe: Recipe, device: torch.device, hidden: int, head: int, length: int) -> Speed:
    """The speed of ``device`` at what ``recipe`` does to a model.

    Args:
        hidden: features of its hidden states.
        head: features of an attention head.
        length: tokens in a sequence.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    width = max(min(hidden, WIDEST), 16)
    x = normal(TOKENS, width)
    element = _fastest(lambda: x * x, device) / x.numel()
    length = min(length, LONGEST)
    q = normal(1, 4, length, head)
    attend = nn.functional.scaled_dot_product_attention
    attention = _fastest(lambda: attend(q, q, q, is_causal=True), device)
    layer = replace(recipe, ignore=(), rules=())
    return Speed(
        flop=product_seconds(device, width),
        element=element,
        attention=attention / attention_flops(4 * head, length) / length,
        rounded=_rounded(layer, normal(TOKENS // 4, FEATURES), device),
        **_solving(layer, normal, device),
    )


def product_seconds(device: torch.device, width: int = 1024) -> float:
    """Seconds for an operation of a product of float32 inputs and a square weight of that width."""
    x, weight = (torch.ones(rows, width, device=device) for rows in (TOKENS, width))
    return _fastest(lambda: x @ weight, device) / (2 * TOKENS * width**2)


def attention_flops(features: int, length: int) -> int:
    """Operations of attention for each token of a sequence, heads with so many features in all."""
    return 4 * features * length


def _rounded(recipe: Recipe, x: torch.Tensor, device: torch.device) -> float:
    if recipe.quantize_inputs:
        return _fastest(lambda: emulated(x, recipe), device) / x.numel()
    size = max(recipe.rotations(FEATURES))
    if size == 1:
        return 0.0
    rotation = Rotation(size)
    return _fastest(lambda: rotation.exact(x), device) / x.numel()


def _solving(
    recipe: Recipe, normal: Callable[..., torch.Tensor], device: torch.device
) -> dict[str, float]:
    x, held = normal(4 * FEATURES, FEATURES), normal(FEATURES, FEATURES)
    hessian, holdout = (t.T @ t / len(t) for t in (x, held))

    def job(rows: int) -> Job:
        return Job(
            names=("layer",),
            weights=(normal(rows, FEATURES) / FEATURES,),
            hessian=hessian if recipe.measures else None,
            holdout=holdout if recipe.measures else None,
            amax={size: normal(1).abs().amax() for size in recipe.rotations(FEATURES)},
            sample=x[:0],
            tokens=len(x),
            recipe=recipe,
        )

    few, many = (_fastest(partial(solve, job(rows)), device) for rows in (FEW, MANY))
    weight = max(many - few, 0.0) / ((MANY - FEW) * FEATURES)
    column = max(few / FEATURES - weight * FEW, 0.0)
    factor = 0.0
    if recipe.algorithm in SWEEPING:
        large = normal(2 * FACTORED, FACTORED)
        square = large.T @ large / len(large)
        group, damping = recipe.fmt.size(FACTORED), recipe.damping
        seconds = _fastest(
            lambda: factorize(square, group, order=recipe.order, damping=damping), device
        )
        factor = seconds / FACTORED**3
    return {"column": column, "weight": weight, "factor": factor}


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds that ``work`` takes; once before, not counted."""
    least = math.inf
    for attempt in range(REPEATS + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = clock() - start
        if attempt:
            least = min(least, seconds)
    return least
