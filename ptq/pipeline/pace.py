"""How far a run of steps is, and how long the rest takes: whatever shows progress asks this.

Steps may take seconds or hours. Until the first is over the forecast says how long they take, then
the last few do, weighted by what each was expected to cost; within a step, time goes on.
"""

import time
from collections.abc import Callable, Sequence

RECENT = 8  # steps that the speed is taken from: other work on the machine comes and goes
OPEN = 0.95  # of a step, at most, counts as done while it runs


class Pace:
    """The time that steps take and that the rest will take.

    Args:
        costs: what every step is expected to take: seconds, or only shares of the whole.
        seconds: whether costs are seconds; if not, nothing is foretold before the first step is
            over.
        clock: the time in seconds.
        since: when the first step began, by that clock; None is now.
    """

    def __init__(
        self,
        costs: Sequence[float],
        *,
        seconds: bool = False,
        clock: Callable[[], float] = time.monotonic,
        since: float | None = None,
    ) -> None:
        usable = all(cost > 0 for cost in costs)
        self._costs = list(costs) if usable else [1.0] * len(costs)
        self._factor = 1.0 if seconds and usable else None  # seconds for each unit of cost
        self._clock = clock
        self.since = clock() if since is None else since
        self._recent: list[tuple[float, float]] = []  # (cost, seconds)
        self.done = 0

    @property
    def count(self) -> int:
        """How many steps there are."""
        return len(self._costs)

    def finish(self, done: int, *, known: bool = False) -> float:
        """The first ``done`` steps are over; return the seconds that the last took.

        ``known``: it was finished by an earlier run, and says nothing of the speed of this one.
        """
        now = self._clock()
        seconds, cost = now - self.since, sum(self._costs[self.done : done])
        self.since, self.done = now, min(done, self.count)
        if not known and cost:
            self._recent = [*self._recent, (cost, seconds)][-RECENT:]
            # what comes before the first block is in its time: others tell more
            told = self._recent[1:] if 1 < len(self._recent) < RECENT else self._recent
            self._factor = sum(s for _, s in told) / sum(c for c, _ in told)
        return seconds

    @property
    def share(self) -> float:
        """What is done of the whole, from 0 to 1: steps by their costs, and of the one that runs
        what its time so far suggests."""
        total = sum(self._costs)
        if not total:
            return 1.0
        inside, cost = 0.0, self._current
        if cost and self._factor:
            inside = min((self._clock() - self.since) / (self._factor * cost), OPEN)
        return (sum(self._costs[: self.done]) + inside * cost) / total

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest will take; None before anything is known. A step that takes longer
        than expected counts as about to end."""
        if self.done == self.count:
            return 0.0
        if self._factor is None:
            return None
        inside = max(self._factor * self._current - (self._clock() - self.since), 0.0)
        return inside + self._factor * sum(self._costs[self.done + 1 :])

    @property
    def _current(self) -> float:
        return self._costs[self.done] if self.done < self.count else 0.0
