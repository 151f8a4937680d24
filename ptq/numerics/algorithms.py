"""The algorithms that choose codes and scales, by name: a new one is a row of ``ALGORITHMS``.

Rows of a weight are independent given the Hessian of their inputs (G25). So an algorithm is
prepared once for all layers that read the same input, and then given rows, some at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from ptq.numerics.both_sides import Costs, both_sides
from ptq.numerics.descent import coordinate_descent
from ptq.numerics.factor import Factor, IndefiniteHessian, damped, factorize
from ptq.numerics.gptq import gptq
from ptq.numerics.nested import narrower, widen
from ptq.numerics.output_search import search_by_output
from ptq.numerics.rtn import rtn
from ptq.numerics.scale_refit import refit_scales, rows_that_gain
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor

MAX_DAMPING = 1.0
# Of descent on the wide codes of nested ones, however the narrow ones were made.
WIDE_SWEEPS = 4
# Algorithms that need not know what a layer reads.
BLIND = frozenset({"rtn"})
# Those that sweep over columns as GPTQ does, and so may choose scales inside the sweep.
SWEEPING = frozenset({"gptq", "decoupleq"})
# Rounds of scales and codes by turns, and sweeps of descent in each.
ROUNDS, ROUND_SWEEPS = 4, 4

Rows = Float[Tensor, "out in"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What all rows with one input have in common.

    Attributes:
        hessian: E[x xᵀ] (in, in) of that input, in the basis of the rows; None where nothing is
            known of it, which algorithms of ``BLIND`` do without if ``weighted`` and ``descent``
            are not asked for.
        grid: what weights may be rounded to.
        order, in_loop, weighted, damping: see :func:`ptq.numerics.gptq.gptq`; an algorithm that has
            no use for one does not look at it.
        descent: sweeps of coordinate descent on the codes afterwards.
        nested: bits of the format that the codes are to hold within them
            (:mod:`ptq.numerics.nested`), for which they are then chosen; 0 for none.
    """

    hessian: Float[Tensor, "in in"] | None
    grid: Grid
    order: str = "group"
    in_loop: str | None = None
    weighted: bool = False
    damping: float = 0.01
    descent: int = 0
    nested: int = 0

    @property
    def known(self) -> Float[Tensor, "in in"]:
        """The Hessian, for an algorithm that needs one."""
        assert self.hessian is not None
        return self.hessian


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An algorithm that has seen the problem and waits for rows.

    Attributes:
        name: for reports; ``rtn`` is round to nearest and nothing else.
        solve: (out, in) rows of any float dtype → their codes and scales; modifies nothing.
        damping: share of the Hessian's mean diagonal that was really added to it; 0 for none.
        weighed: the same for rows whose errors do not count alike, and what they cost
            (:mod:`ptq.numerics.both_sides`); None of an algorithm that cannot.
    """

    name: str
    solve: Callable[[Rows], QuantizedTensor]
    damping: float = 0.0
    weighed: Callable[[Rows, Costs], QuantizedTensor] | None = None


class Algorithm(Protocol):
    """Makes of the problem what rows share.

    Raises:
        ValueError: a Hessian without activity or not finite, or options that exclude each other.
    """

    def __call__(self, problem: Problem) -> Prepared: ...


def prepare_rtn(problem: Problem) -> Prepared:
    """Round to nearest."""

    def solve(rows: Rows) -> QuantizedTensor:
        return rtn(rows, problem.hessian, problem.grid, weighted=problem.weighted)

    return Prepared(name="rtn", solve=solve)


def prepare_gptq(problem: Problem) -> Prepared:
    """GPTQ. The damping is raised tenfold until the Hessian has a factor (G13), up to 1."""
    factor, damping = _factor(problem)

    def solve(rows: Rows) -> QuantizedTensor:
        return gptq(
            rows,
            problem.known,
            problem.grid,
            order=problem.order,
            in_loop=problem.in_loop,
            weighted=problem.weighted,
            factor=factor,
        )

    return Prepared(name="gptq", solve=solve, damping=damping)


def _factor(problem: Problem) -> tuple[Factor, float]:
    damping, group_size = problem.damping, problem.grid.format.size(len(problem.known))
    while True:
        try:
            factor = factorize(problem.known, group_size, order=problem.order, damping=damping)
            return factor, damping
        except IndefiniteHessian:
            if damping >= MAX_DAMPING:
                raise
            damping = min(10 * damping, MAX_DAMPING)


def prepare_decoupleq(problem: Problem) -> Prepared:
    """GPTQ, then scales and codes by turns in the manner of decoupleQ (arXiv 2404.12759), without
    zero points and without its fine-tuning. Scales are fitted to the damped Hessian; a row is kept
    only if that lowers its loss under the Hessian itself."""
    start = prepare_gptq(problem)
    hessian = damped(problem.known, start.damping)

    def solve(rows: Rows) -> QuantizedTensor:
        best, narrow = start.solve(rows), hessian.float()
        for _ in range(ROUNDS):
            scaled = refit_scales(rows, hessian, best)
            moved = coordinate_descent(
                rows, problem.known, scaled, sweeps=ROUND_SWEEPS, damped_hessian=narrow
            )
            best, gained = rows_that_gain(rows, problem.known, best, moved)
            if not gained:
                break
        return best

    return Prepared(name="decoupleq", solve=solve, damping=start.damping)


def prepare_llm_fp4(problem: Problem) -> Prepared:
    """Round to nearest, with scales searched by the error of the output, as LLM-FP4 (arXiv
    2310.16836) searches ranges; its formats are not those of here."""

    def solve(rows: Rows) -> QuantizedTensor:
        return search_by_output(rows, problem.known, problem.grid)

    return Prepared(name="llm-fp4", solve=solve)


ALGORITHMS: dict[str, Algorithm] = {
    "rtn": prepare_rtn,
    "gptq": prepare_gptq,
    "decoupleq": prepare_decoupleq,
    "llm-fp4": prepare_llm_fp4,
}
# What else a recipe says by itself where it names an algorithm: the rest belongs to the sweep.
CHOICES: dict[str, dict[str, object]] = {
    "rtn": {"scales": "mse", "descent": 0, "balance": 0.0, "fisher": 0},
    "llm-fp4": {"scales": "mse", "descent": 0, "balance_factors": "power_of_two", "fisher": 0},
}


def prepare(name: str, problem: Problem) -> Prepared:
    """The algorithm of that name, with the refinement that the problem asks for.

    Raises:
        ValueError: an unknown name, a format that does not nest, or what the algorithm raises.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; choose from {', '.join(ALGORITHMS)}")
    if problem.nested:
        return _nested(name, problem)
    prepared = ALGORITHMS[name](problem)
    damping = prepared.damping or problem.damping

    @cache
    def hessian() -> Tensor:
        return damped(problem.known, damping).float()

    def descend(rows: Rows, quantized: QuantizedTensor, sweeps: int = 1) -> QuantizedTensor:
        return coordinate_descent(
            rows, problem.known, quantized, sweeps=sweeps, damped_hessian=hessian()
        )

    if problem.descent:
        prepared = _refined(prepared, descend, problem.descent, damping)
    return _weighing(prepared, descend) if name in SWEEPING else prepared


def _weighing(prepared: Prepared, descend: Callable[..., QuantizedTensor]) -> Prepared:
    """The algorithm, for rows whose errors do not count alike, too."""

    def weighed(rows: Rows, costs: Costs) -> QuantizedTensor:
        return both_sides(rows, costs, prepared.solve, descend)

    return replace(prepared, weighed=weighed)


def _refined(
    prepared: Prepared, descend: Callable[..., QuantizedTensor], sweeps: int, damping: float
) -> Prepared:
    """The algorithm, and so many sweeps of descent afterwards."""

    def solve(rows: Rows) -> QuantizedTensor:
        return descend(rows, prepared.solve(rows), sweeps)

    # GPTQ keeps its name, as in reports written before; nothing else may pass for what it is not
    name = prepared.name if prepared.name == "gptq" else f"{prepared.name}+descent"
    return replace(prepared, name=name, solve=solve, damping=damping)


def _nested(name: str, problem: Problem) -> Prepared:
    """The algorithm on the narrow format, its codes then widened: wide codes have no say in narrow
    ones, and both lose less than if wide codes were chosen first and rounded again."""
    wide = problem.grid.format
    grid = replace(problem.grid, format=narrower(wide, problem.nested))
    prepared = prepare(name, replace(problem, grid=grid, nested=0))
    hessian, sweeps = None, 0
    if prepared.damping:  # round to nearest is that at both widths
        hessian, sweeps = damped(problem.known, prepared.damping).float(), WIDE_SWEEPS

    def solve(rows: Rows) -> QuantizedTensor:
        narrow = prepared.solve(rows)
        return widen(rows, narrow, wide, damped_hessian=hessian, sweeps=sweeps)

    return replace(prepared, solve=solve)
