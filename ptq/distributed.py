"""Share jobs among the ranks of a torchrun launch; a plain loop on one process. The only collectives outside ``Hessian.reduce``."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import distributed


class Costed(Protocol):
    @property
    def cost(self) -> int: ...


J = TypeVar("J", bound=Costed)
R = TypeVar("R")


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(jobs: Sequence[J], solve: Callable[[J], R]) -> list[R]:
    """``[solve(job) for job in jobs]``, each job on one rank, all results on every rank in the order of the jobs.

    Jobs go to the least loaded rank by falling cost, the same way on every rank.
    """
    rank, ranks = world()
    if ranks == 1:
        return [solve(job) for job in jobs]
    load = [0] * ranks
    owner = [0] * len(jobs)
    for index in sorted(range(len(jobs)), key=lambda i: -jobs[i].cost):
        owner[index] = load.index(min(load))
        load[owner[index]] += jobs[index].cost
    mine = {index: solve(jobs[index]) for index in range(len(jobs)) if owner[index] == rank}
    gathered: list[dict[int, R]] = [{} for _ in range(ranks)]
    distributed.all_gather_object(gathered, mine)
    everything = {index: result for part in gathered for index, result in part.items()}
    return [everything[index] for index in range(len(jobs))]
