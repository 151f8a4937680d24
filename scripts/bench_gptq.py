"""Time the column loop of GPTQ against the textbook loop, in one run: python scripts/bench_gptq.py
[--out 1024 --in 4096].

The textbook loop rounds a column of the stored (out, in) weight and pays its error back within a
block of 128 columns at once and to the rest after the block. Both loops round with the same
function and get the same factor and scales; the factorisation, which they share, is timed apart.
Prints the best of ``--repeats`` and the ratio.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ptq.numerics.descent import coordinate_descent
from ptq.numerics.errors import output_error
from ptq.numerics.factor import factorize
from ptq.numerics.formats import FORMATS
from ptq.numerics.gptq import gptq
from ptq.numerics.scales import Grid, Scales


def textbook(
    weight: Tensor, factor: Tensor, scales: Scales, perm: Tensor, block: int = 128
) -> Tensor:
    """Codes of the per-column loop on the stored layout."""
    fmt, step = scales.format, scales.step()
    group = perm // fmt.size(weight.shape[1])
    w = weight[:, perm].clone()
    values = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            s = step[:, group[j]]
            values[:, j] = fmt.element.round(w[:, j] / s)
            error = (w[:, j] - values[:, j] * s) / factor[j, j]
            w[:, j + 1 : stop] -= torch.outer(error, factor[j, j + 1 : stop])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return fmt.element.encode(values)[:, torch.argsort(perm)]


def best(action: Callable[[], object], repeats: int) -> float:
    """Least CPU time in seconds, divided by threads: on a busy machine a wall says who else was
    there."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append((time.process_time() - start) / torch.get_num_threads())
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--in", dest="features", type=int, default=4096)
    parser.add_argument("--format", default="nvfp4", choices=FORMATS)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.out, args.features, generator=generator)
    x = torch.randn(2 * args.features, args.features, generator=generator)
    x = x @ torch.randn(args.features, args.features, generator=generator) / args.features**0.5
    hessian = x.T @ x / len(x)
    fmt = FORMATS[args.format]
    size = fmt.size(args.features)
    grid = Grid(fmt, fmt.global_scale(weight.abs().amax(), 1.5), "absmax")

    print(
        f"{args.out} x {args.features}, {fmt.name}, {torch.get_num_threads()} threads, best of "
        f"{args.repeats}"
    )
    factoring = best(lambda: factorize(hessian, size, order="act", damping=0.01), args.repeats)
    act = factorize(hessian, size, order="act", damping=0.01)
    grouped = factorize(hessian, size, order="group", damping=0.01)
    scales = grid.scales(weight)
    start = gptq(weight, hessian, grid, factor=act)
    slow = best(lambda: textbook(weight, act.upper, scales, act.perm), args.repeats)
    print(f"factorisation in float64, once for all layers of an input {factoring:7.2f} s")
    print(f"textbook loop, static scales                              {slow:7.2f} s")
    sweep = partial(gptq, weight, hessian, grid, in_loop="trial", factor=grouped)
    rows: list[tuple[str, Callable[[], object]]] = [
        ("gptq, static scales", lambda: gptq(weight, hessian, grid, factor=act)),
        (
            "gptq, trial scales (14 candidates a group)",
            sweep,
        ),
        (
            "coordinate descent, 1 sweep",
            lambda: coordinate_descent(weight, hessian, start, sweeps=1),
        ),
    ]
    for name, action in rows:
        seconds = best(action, args.repeats)
        print(f"{name:57s} {seconds:7.2f} s, {slow / seconds:5.1f} x the textbook loop")
    codes = textbook(weight, act.upper, scales, act.perm)
    differing = float((codes != start.codes).any(1).float().mean())
    print(f"rows with a differing code: {differing:.1%}; error {error(weight, start, hessian):.3e}")


def error(weight: Tensor, quantized: object, hessian: Tensor) -> float:
    return float(output_error(weight, quantized.dequantize(), hessian))  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
