"""One option for every unit, so that what they lose is least and what they cost stays within a
limit: the knapsack problem with choices, solved as a mixed integer program by HiGHS."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Table = Sequence[Sequence[float]]  # by unit and option
GAP = 1e-5  # of the sum of losses: how far from the least a solution may be


def choose(losses: Table, costs: Table, limit: float) -> list[int]:
    """The option of every unit, by its index, for the least sum of losses whose costs sum up to
    ``limit`` at most.

    The two change roles freely: with costs for losses it is the cheapest choice below a loss.

    Args:
        losses, costs: finite and not negative, of any unit; every unit has one option at least.

    Raises:
        ValueError: the cheapest options together cost more than ``limit``.
    """
    useful = [_undominated(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    least = [min(cost) for cost in costs]
    slack = limit - sum(least)
    if slack < -1e-9 * max(abs(limit), sum(least)):
        raise ValueError(f"the limit of {limit:g} is less than the {sum(least):g} of the cheapest")
    chosen = [options[0] for options in useful]  # the cheapest, which is always possible
    open_units = [u for u, options in enumerate(useful) if len(options) > 1]
    if not open_units or slack <= 0:
        return chosen
    unit_of = np.concatenate([[i] * len(useful[u]) for i, u in enumerate(open_units)])
    loss = np.concatenate([[losses[u][o] for o in useful[u]] for u in open_units])
    more = np.concatenate([[costs[u][o] - least[u] for o in useful[u]] for u in open_units])
    places = np.arange(len(loss))
    each = csr_array((np.ones(len(loss)), (unit_of, places)), shape=(len(open_units), len(loss)))
    found = milp(
        c=loss / max(loss.max(), 1e-300),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(csr_array(more[None] / slack), ub=1.0),
        ],
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message  # the cheapest choice is always possible
    start = 0
    for unit in open_units:
        taken = found.x[start : start + len(useful[unit])]
        chosen[unit] = useful[unit][int(taken.argmax())]
        start += len(useful[unit])
    return chosen


def _undominated(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The options that lose less than every cheaper one, by cost ascending."""
    kept: list[int] = []
    for option in sorted(range(len(losses)), key=lambda o: (costs[o], losses[o], o)):
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(option)
    return kept
