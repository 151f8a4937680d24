"""Several processes, started by torchrun: who does what, and every result on every rank. A plain
loop on one process.

The only collectives outside ``Hessian.reduce``. gloo on the CPU, NCCL on GPUs, the same code.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import distributed


class Costed(Protocol):
    @property
    def cost(self) -> int: ...


J = TypeVar("J", bound=Costed)
R = TypeVar("R")


class LostRank(ConnectionError):
    """Another process of the run has died or hangs."""


@contextmanager
def launched(device: torch.device | None = None) -> Iterator[torch.device | None]:
    """The process group of a torchrun launch (``WORLD_SIZE`` > 1), and the device of this rank;
    nothing otherwise.

    Args:
        device: as asked for; a bare ``cuda`` becomes the GPU of this process's local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device is not None and device.type == "cuda":
        device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.index is None else device
        )
        torch.cuda.set_device(device)
    backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
    minutes = float(
        os.environ.get("PTQ_TIMEOUT_MINUTES", "60")
    )  # the slowest layer of the largest block
    distributed.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def together() -> Iterator[None]:
    """Collectives run in here; a failure of one says that another rank is gone, and how to go on.

    Raises:
        LostRank: torch reported that the connection to another rank broke, or that it did not
            answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if world()[1] == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise LostRank(
            f"rank {world()[0]} lost another process of the run ({reason}); see the message of the "
            "one that ended "
            "first. Finished blocks are kept: the same command continues after them"
        ) from error


def share(jobs: Sequence[J], solve: Callable[[J], R]) -> list[R]:
    """``[solve(job) for job in jobs]``, each job on one rank, all results on every rank in the
    order of the jobs.

    Jobs go to the least loaded rank by falling cost, the same way on every rank. Results travel
    through host memory.
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
    with together():
        distributed.all_gather_object(gathered, mine)
    everything = {index: result for part in gathered for index, result in part.items()}
    return [everything[index] for index in range(len(jobs))]


def from_first(value: R | None) -> R:
    """What rank 0 passes in, on every rank."""
    if world()[1] == 1:
        assert value is not None
        return value
    box = [value]
    with together():
        distributed.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]
