"""One option for every unit, so that what they lose is least and what they cost stays within a
limit: the knapsack problem with choices.

The relaxed problem, in which a unit may have parts of two options, is solved by taking steps along
the convex hulls of options in the order of gain over cost; the step that no longer fits has the
price λ of the limit. What an option loses at that price more than its unit's best one is a regret,
and regrets add up: no choice with more of it than the gap between the relaxed solution and a whole
one is better than that. So few choices remain, and units are added to them one after the other,
those left out that cost and lose more than another.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Table = Sequence[Sequence[float]]  # by unit and option
GAP = 1e-5  # of the sum of losses: how far from the least a solution may be
# Partial choices that are kept at a time; of more, the best in as many ranges of costs. Never
# reached below some ten units.
STATES = 4096


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
    chosen = [options[0] for options in useful]  # the cheapest
    slack = limit - sum(cost[o] for cost, o in zip(costs, chosen, strict=True))
    if slack < -1e-9 * max(abs(limit), limit - slack):
        raise ValueError(
            f"the limit of {limit:g} is less than the {limit - slack:g} of the cheapest"
        )
    if slack <= 0:
        return chosen
    price = _fill(losses, costs, useful, chosen, slack)
    if price is None:  # everything fits
        return chosen
    worths = [
        {o: loss[o] + price * cost[o] for o in options}
        for loss, cost, options in zip(losses, costs, useful, strict=True)
    ]
    bound = sum(min(worth.values()) for worth in worths) - price * limit
    least = sum(loss[o] for loss, o in zip(losses, chosen, strict=True))
    gap = least - bound
    if gap <= GAP * least:
        return chosen
    regret = [{o: value - min(worth.values()) for o, value in worth.items()} for worth in worths]
    return _searched(losses, costs, regret, limit, gap * (1 + 1e-9)) or chosen


def _undominated(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The options that lose less than every cheaper one, by cost ascending."""
    kept: list[int] = []
    for option in sorted(range(len(losses)), key=lambda o: (costs[o], losses[o], o)):
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(option)
    return kept


def _hull(losses: Sequence[float], costs: Sequence[float], options: Sequence[int]) -> list[int]:
    """Of undominated options by cost, those on the lower convex hull of loss over cost."""
    kept: list[int] = []
    for option in options:
        while len(kept) > 1 and _gain(losses, costs, kept[-2], kept[-1]) <= _gain(
            losses, costs, kept[-1], option
        ):
            kept.pop()
        kept.append(option)
    return kept


def _gain(losses: Sequence[float], costs: Sequence[float], before: int, after: int) -> float:
    """What a step loses less, over what it costs more."""
    return (losses[before] - losses[after]) / (costs[after] - costs[before])


def _fill(
    losses: Table, costs: Table, useful: Sequence[Sequence[int]], chosen: list[int], slack: float
) -> float | None:
    """Take steps along the hulls, those of the largest gain over cost first, as long as they fit,
    in ``chosen``; the gain of the first that does not, None where all do."""
    steps = []
    for unit, options in enumerate(useful):
        hull = _hull(losses[unit], costs[unit], options)
        for before, after in pairwise(hull):
            gain = _gain(losses[unit], costs[unit], before, after)
            steps.append((-gain, unit, before, after))
    price = None
    for negative, unit, before, after in sorted(steps):
        more = costs[unit][after] - costs[unit][before]
        if chosen[unit] == before and more <= slack:
            chosen[unit], slack = after, slack - more
        elif price is None:
            price = -negative
    return price


def _searched(
    losses: Table, costs: Table, regrets: Sequence[dict[int, float]], limit: float, gap: float
) -> list[int] | None:
    """The best choice within the limit whose regret is ``gap`` at most; None where there is none.

    Args:
        regrets: of the options of every unit.
    """
    options = [[o for o, value in regret.items() if value <= gap] for regret in regrets]
    order = sorted(range(len(options)), key=lambda unit: -len(options[unit]))
    cheapest = [min(costs[unit][o] for o in options[unit]) for unit in order]
    rest = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)  # of this unit and all after it
    cost, loss, regret = np.zeros(1), np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # by unit: from which state, by which option
    for place, unit in enumerate(order):
        some = options[unit]
        cost = (cost[:, None] + [costs[unit][o] for o in some]).ravel()
        loss = (loss[:, None] + [losses[unit][o] for o in some]).ravel()
        regret = (regret[:, None] + [regrets[unit][o] for o in some]).ravel()
        possible = np.flatnonzero((regret <= gap) & (cost + rest[place + 1] <= limit * (1 + 1e-12)))
        kept = possible[_best(cost[possible], loss[possible], regret[possible])]
        if not len(kept):
            return None
        cost, loss, regret = cost[kept], loss[kept], regret[kept]
        history.append((kept // len(some), kept % len(some)))
    state = int(loss.argmin())
    chosen = [0] * len(options)
    for unit, (before, option) in zip(reversed(order), reversed(history), strict=True):
        chosen[unit] = options[unit][int(option[state])]
        state = int(before[state])
    return chosen


def _best(cost: np.ndarray, loss: np.ndarray, regret: np.ndarray) -> np.ndarray:
    """The states, by index, of which none costs and loses less; of too many, those of least regret
    in equal ranges of cost."""
    by_cost = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[by_cost])
    falls = np.append(True, least[1:] < least[:-1])[: len(by_cost)]
    kept = by_cost[falls]
    if len(kept) <= STATES:
        return kept
    span = cost[kept[-1]] - cost[kept[0]]
    ranges = np.minimum((cost[kept] - cost[kept[0]]) / span * STATES, STATES - 1).astype(int)
    ranked = np.lexsort((regret[kept], ranges))
    first = np.unique(ranges[ranked], return_index=True)[1]
    return kept[ranked[first]]
