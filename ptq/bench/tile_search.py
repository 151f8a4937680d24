"""The search for the fastest tile: from the one in use, one change at a time, within a time.

A change doubles or halves a side of the tile, the warps or the split, or adds or removes a stage.
All that differ from the best by one are timed, the best of them is where it goes on, until none is
faster. What was timed before (:mod:`ptq.bench.tuning_log`) is not timed again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ptq.bench.tile_timing import Timer, Unbuildable
from ptq.bench.tuning_log import TuningLog, Work
from ptq.kernels import coverage, gpu
from ptq.kernels.tiles import Row, Tile

log = logging.getLogger(__name__)

LARGEST = {"block_m": 256, "block_n": 256, "block_k": 256, "warps": 8, "split": 16}
SMALLEST = {"block_m": 16, "block_n": 64, "block_k": 64, "warps": 4, "split": 1}
STAGES = range(2, 8)
# fp32 sums a thread may hold; more leave no registers for anything else
SUMS = 128


def neighbours(arch: int, work: Work, tile: Tile) -> Iterator[Tile]:
    """Tiles that differ from ``tile`` in one thing and that its kernel can have."""
    if tile.kernel == "dense":
        return
    for name, most in LARGEST.items():
        value = getattr(tile, name)
        for other in (value // 2, value * 2):
            if SMALLEST[name] <= other <= most:
                changed = replace(tile, **{name: other})
                if allowed(arch, work, changed):
                    yield changed
    for stages in (tile.stages - 1, tile.stages + 1):
        if stages in STAGES:
            yield replace(tile, stages=stages)


def allowed(arch: int, work: Work, tile: Tile) -> bool:
    """Whether the kernel of ``tile`` can have it, and it is no waste: compilers say the rest."""
    group = next(
        coverage.GROUP_SIZE[scale]
        for (_, scale), name in coverage.FORMATS.items()
        if name == work.format
    )
    # of whole steps every part has as many, as in ``tiles.split_rule``
    uneven = work.k % (tile.split * tile.block_k) and not work.k % tile.block_k
    if tile.split > 1 and (work.operation in ("grouped", "w4a4_blocked") or uneven):
        return False
    if tile.block_m > 16 and tile.block_m >= 2 * max(work.tokens, 1):
        return False
    if tile.block_m * tile.block_n > SUMS * 32 * tile.warps and tile.kernel != "w4a4_tma":
        return False  # tcgen05 of the persistent kernel has its sums in a memory of their own
    if tile.kernel == "w4a4_tma":
        whole = not (tile.block_m % 128 or tile.block_n % 128)
        return whole and tile.block_k % (4 * group) == 0
    if tile.kernel == "w4a4" and arch == 100:
        # a left operand of less than 128 rows falls back to bf16
        return (tile.block_n if tile.swap else tile.block_m) >= 128
    units = arch in gpu.UNIT_ARCHITECTURES or tile.order == "fragments"
    return tile.kernel != "w4a16" or not units or tile.block_k % 128 == 0


def search(
    arch: int,
    work: Work,
    starts: Sequence[Tile],
    time: Callable[[Tile], float | None],
    more: Callable[[], bool],
) -> tuple[Tile | None, float, bool]:
    """(fastest tile, its seconds, whether no neighbour of it is left); no tile if none could be
    timed.

    Args:
        starts: timed first, whatever time there is for the first of them.
        time: seconds of a tile, or None where it cannot be built.
        more: whether there is time for another one.
    """
    seconds: dict[Tile, float | None] = {}

    def look(tiles: Sequence[Tile]) -> bool:
        """Time them; whether there was time for all."""
        for tile in tiles:
            if tile not in seconds:
                if seconds and not more():
                    return False
                seconds[tile] = time(tile)
        return True

    def best() -> tuple[Tile | None, float]:
        timed = {tile: s for tile, s in seconds.items() if s is not None}
        tile = min(timed, key=timed.__getitem__, default=None)
        return (None, 0.0) if tile is None else (tile, timed[tile])

    complete, around = look(list(starts)), None
    # from where most is to be gained: a product of the library has no neighbours of its own
    while complete and (centre := _centre(seconds)) not in (None, around):
        around = centre
        complete = look(list(neighbours(arch, work, centre)))
    return *best(), complete


def _centre(seconds: dict[Tile, float | None]) -> Tile | None:
    timed = {t: s for t, s in seconds.items() if s is not None and t.kernel != "dense"}
    return min(timed, key=timed.__getitem__, default=None)


def tune(
    arch: int,
    work: Sequence[tuple[Work, Sequence[Tile]]],
    prepare: Callable[[Work], Timer],
    log_file: TuningLog,
    keep: Callable[[Row], None],
    *,
    seconds: float,
    clock: Callable[[], float],
) -> int:
    """Search for each of ``work`` with its tiles to begin with; how many are left for another time.

    Every one gets an equal share of the ``seconds`` that are left by ``clock``; the last launch
    that is timed may overrun it. The best of what was timed goes to ``keep``, after an interruption
    too.
    """
    end, left = clock() + seconds, [item for item in work if item[0] not in log_file.finished]
    for done in [item for item in work if item[0] in log_file.finished]:
        _keep_best(done[0], log_file, keep)
    for index, (one, starts) in enumerate(left):
        now = clock()
        if now >= end:
            return len(left) - index
        until = now + (end - now) / (len(left) - index)
        timers: list[Timer] = []

        def time(tile: Tile, one: Work = one, timers: list[Timer] = timers) -> float | None:
            known = log_file.known(one)
            if tile not in known:
                if not timers:
                    timers.append(prepare(one))
                log_file.begin(one, tile)
                try:
                    log_file.timed(one, tile, timers[0](tile))
                except Unbuildable as error:
                    log.info("left out %s: %s", tile, error)
                    log_file.failed(one, tile, str(error))
            return known[tile]

        try:
            _, _, complete = search(arch, one, starts, time, lambda until=until: clock() < until)
        finally:
            _keep_best(one, log_file, keep)
        if complete:
            log_file.finish(one)
    return sum(item[0] not in log_file.finished for item in left)


def _keep_best(work: Work, log_file: TuningLog, keep: Callable[[Row], None]) -> None:
    """Give the row of the fastest tile to ``keep``, if one was timed."""
    timed = {tile: s for tile, s in log_file.known(work).items() if s is not None}
    if not timed:
        return
    tile = min(timed, key=timed.__getitem__)
    keep(
        Row(
            operation=work.operation,
            format=work.format,
            tokens=work.tokens,
            n=work.n,
            k=work.k,
            tile=tile,
            microseconds=round(timed[tile] * 1e6, 2),
        )
    )
