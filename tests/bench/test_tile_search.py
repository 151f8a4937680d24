"""The search for a tile, with a clock and times that are made up."""

from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path

import pytest

from ptq.bench import tune as rules
from ptq.bench.shapes import EXPERT
from ptq.bench.tile_search import allowed, neighbours, tune
from ptq.bench.tile_timing import Unbuildable
from ptq.bench.tuning_log import TuningLog, Work
from ptq.kernels.tiles import BUCKETS, Row, Tile

ARCHITECTURES = (80, 90, 100, 120)
WORK = Work("w4a16", "nvfp4", 64, 6144, 4096)
START = Tile(kernel="w4a16", block_m=64, order="fragments")
BEST = replace(START, block_n=64, stages=6, split=4, warps=8)


class Bench:
    """A GPU on which a launch takes longer the more a tile differs from BEST; each tile takes ten
    seconds to build and time."""

    def __init__(self, best: Tile = BEST) -> None:
        self.best, self.now, self.timed = best, 0.0, list[tuple[Work, Tile]]()
        self.broken: Callable[[Tile], bool] = lambda tile: False
        self.interrupt_after = 10**9

    def clock(self) -> float:
        return self.now

    def prepare(self, work: Work) -> Callable[[Tile], float]:
        def seconds(tile: Tile) -> float:
            if len(self.timed) >= self.interrupt_after:
                raise KeyboardInterrupt
            self.now += 10
            self.timed.append((work, tile))
            if self.broken(tile):
                raise Unbuildable("out of resource: shared memory")
            if tile.kernel == "dense":
                return 1e-3
            names = ("block_m", "block_n", "block_k", "warps", "split")
            off = sum(abs(log2(getattr(tile, n) / getattr(self.best, n))) for n in names)
            return 1e-5 * (1 + off + abs(tile.stages - self.best.stages) / 10)

        return seconds


@pytest.fixture
def log(tmp_path: Path) -> TuningLog:
    return TuningLog(tmp_path / "log.jsonl", "a GPU")


def run(bench: Bench, log: TuningLog, *, seconds: float = 1e6, work=((WORK, [START]),)):
    rows: list[Row] = []
    left = tune(90, work, bench.prepare, log, rows.append, seconds=seconds, clock=bench.clock)
    return left, {(r.operation, r.tokens, r.n): r for r in rows}


def test_it_walks_to_the_fastest(log: TuningLog) -> None:
    bench = Bench()
    left, rows = run(bench, log)
    row = rows["w4a16", 64, 6144]
    assert left == 0 and (row.tile, row.microseconds) == (BEST, 10.0)
    assert len(bench.timed) == len(set(bench.timed)) < 80, "each once, and not the whole space"
    again = Bench()
    assert run(again, log) == (0, rows) and not again.timed, "all is in the log"


def test_a_tile_that_cannot_be_built_is_logged_and_passed_by(log: TuningLog) -> None:
    bench = Bench()
    bench.broken = lambda tile: tile.warps == 8
    _, rows = run(bench, log)
    assert rows["w4a16", 64, 6144].tile == replace(BEST, warps=4)
    reread = TuningLog(log.path, "a GPU")
    assert any(seconds is None for seconds in reread.known(WORK).values())
    nothing = Bench()
    nothing.broken = lambda tile: True
    other = Work("w4a16", "nvfp4", 64, 64, 4096)
    assert run(nothing, log, work=[(other, [START])]) == (0, {})


def test_an_interruption_keeps_the_best_and_the_next_call_goes_on(log: TuningLog) -> None:
    bench, rows = Bench(), list[Row]()
    bench.interrupt_after = 7
    with pytest.raises(KeyboardInterrupt):
        tune(
            90,
            [(WORK, [START])],
            bench.prepare,
            log,
            rows.append,
            seconds=1e6,
            clock=bench.clock,
        )
    first = {tile for _, tile in bench.timed}
    assert len(first) == 7 and rows[0].tile in first
    assert rows[0].microseconds == 42.0, "the start and one side halved"
    second = Bench()
    left, found = run(second, TuningLog(log.path, "a GPU"))
    assert left == 0 and found["w4a16", 64, 6144].tile == BEST
    assert first.isdisjoint(tile for _, tile in second.timed)


def test_time_is_shared_and_bounded(log: TuningLog) -> None:
    """300 seconds, ten for a tile, three problems: ten tiles each, one more where it overruns."""
    bench = Bench()
    work = [(replace(WORK, n=n), [START]) for n in (64, 128, 256)]
    left, rows = run(bench, log, seconds=300, work=work)
    counts = [sum(one.n == n for one, _ in bench.timed) for n in (64, 128, 256)]
    assert left == 3 and len(rows) == 3 and bench.now <= 310 and min(counts) >= 9
    left, _ = run(Bench(), log, seconds=1e6, work=work)
    assert left == 0
    late = Bench()
    assert run(late, log, seconds=1e-9, work=[(replace(WORK, n=512), [START])])[0] == 1
    assert len(late.timed) == 1, "the tile in use is timed before anything is compared with it"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_tried_can_run(arch: int) -> None:
    """From every start, all sides that a kernel leaves free are changed, and none that it fixes."""
    layers = (("qkv", 6144, 4096), (f"{EXPERT}down", 2880, 2880))
    work = rules.problems(arch, layers, ["nvfp4", "mxfp4"], BUCKETS)
    operations = {one.operation for one in work}
    assert operations == {"w4a16", "grouped"} | ({"w4a4"} if arch >= 100 else set()) | (
        {"w4a4_blocked"} if arch == 100 else set()
    )
    table, changed = rules.untimed(arch), dict[str, set[str]]()
    for one in work:
        for start in rules.starts(table, one):
            assert start.kernel == "dense" or allowed(arch, one, start), (one, start)
            for tile in neighbours(arch, one, start):
                names = [n for n in vars(tile) if getattr(tile, n) != getattr(start, n)]
                assert len(names) == 1
                changed.setdefault(one.operation, set()).update(names)
    every = {"block_m", "block_n", "block_k", "warps", "stages", "split"}
    assert changed["w4a16"] == every and changed["grouped"] == every - {"split"}
    if arch >= 100:
        assert changed["w4a4"] == every
    if arch == 100:
        assert changed["w4a4_blocked"] == every - {"split"}
