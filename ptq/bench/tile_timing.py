"""How long a matmul kernel takes with a tile, for ``ptq bench --tune``.

On weights as a loaded layer has them: in units where those are read, scales in blocks for the
persistent kernel.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import linear

from ptq.bench import timing
from ptq.bench.timing import Call, Problem
from ptq.bench.tuning_log import Work
from ptq.kernels import coverage
from ptq.kernels.operands import PackedWeight
from ptq.kernels.tiles import Tile

EXPERTS = 8  # in a launch of ``grouped``, all with as many tokens
REPEATS = 20
Timer = Callable[[Tile], float]


class Unbuildable(Exception):
    """The compiler cannot build a tile, or it does not fit the device."""


def timer(work: Work, device: torch.device) -> Timer:
    """A function from a tile to the median seconds of a launch; weights are made once, here.

    The function raises :class:`Unbuildable` for a tile that the compiler fails at or that needs
    more than the device has; an error of the device is raised as it is.
    """
    from triton.errors import TritonError

    element, scale = next(parts for parts, name in coverage.FORMATS.items() if name == work.format)
    copies = timing.copies_for(work.n * work.k // 2, device)
    problem = Problem(
        tokens=work.tokens,
        n=work.n,
        k=work.k,
        element=element,
        scale=scale,
        rotation=16,
        device=device,
        copies=max(copies, EXPERTS) if work.operation == "grouped" else copies,
    )
    with timing.current(device), torch.inference_mode():
        prepare = tile_calls(work.operation, problem)

    def seconds(tile: Tile) -> float:
        try:
            with timing.current(device), torch.inference_mode():
                times = timing.time_calls({"": prepare(tile)}, device, REPEATS)[""]
        except (TritonError, RuntimeError) as error:
            if not isinstance(error, TritonError) and "PassManager" not in str(error):
                raise  # of the device, not of the compiler
            raise Unbuildable(str(error).partition("\n")[0]) from error
        return statistics.median(times)

    return seconds


def tile_calls(operation: str, problem: Problem) -> Callable[[Tile], list[Call]]:
    """A function from a tile to one call per copy of the weight; of experts, one for every
    ``EXPERTS`` copies."""
    if operation == "grouped":
        return _grouped_calls(problem)
    from ptq.kernels.op_dequantize import dequantize
    from ptq.kernels.op_inputs import rotate_quantize
    from ptq.kernels.op_matmul import launch_w4a4, launch_w4a16
    from ptq.kernels.quantize import swizzle_scales

    x, weights = problem.inputs(), problem.weights()
    out = torch.empty(problem.tokens, problem.n, dtype=x.dtype, device=x.device)
    if operation in ("w4a4", "w4a4_blocked"):
        t, blocked = timing.input_global_scale(problem.device), operation == "w4a4_blocked"
        inputs = rotate_quantize(x, problem.rotation, problem.encoding, t, swizzle=blocked)
        if blocked:
            weights = [replace(w, scale_bits=swizzle_scales(w.scale_bits)) for w in weights]
        return lambda tile: [partial(launch_w4a4, inputs, w, None, out, tile) for w in weights]
    weights = [timing.served(weight) for weight in weights]

    def calls(tile: Tile) -> list[Call]:
        if tile.kernel == "dense":
            return [lambda w=w: linear(x, dequantize(w)) for w in weights]
        return [partial(launch_w4a16, x, w, None, out, tile) for w in weights]

    return calls


def _grouped_calls(problem: Problem) -> Callable[[Tile], list[Call]]:
    """One matmul per expert, tokens sorted by expert."""
    from ptq.kernels.op_grouped import launch_grouped_w4a16

    each = problem.weights()
    stacks = [
        timing.served(_stack(each[first : first + EXPERTS]))
        for first in range(0, len(each) - EXPERTS + 1, EXPERTS)
    ]
    x = torch.cat([problem.inputs() for _ in range(EXPERTS)])
    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32, device=x.device) * problem.tokens
    out = torch.empty(len(x), problem.n, dtype=x.dtype, device=x.device)
    return lambda tile: [
        partial(launch_grouped_w4a16, x, offsets, w, None, None, out, tile) for w in stacks
    ]


def _stack(weights: list[PackedWeight]) -> PackedWeight:
    return replace(
        weights[0],
        packed=torch.stack([w.packed for w in weights]),
        scale_bits=torch.stack([w.scale_bits for w in weights]),
        global_scale=torch.stack([w.global_scale for w in weights]),
    )
