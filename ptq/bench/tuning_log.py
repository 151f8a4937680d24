"""The log of a tuning: every tile that was timed, so that an interrupted one goes on where it was.

A file of one JSON object to a line. The first names what the times belong to (GPU, Triton, the
source of the kernels); times of another are refused. A line is written before a tile is built as
well: one that ends the process twice (the compiler may abort) is left out from then on.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from ptq.kernels import tiles
from ptq.kernels.tiles import Tile

OPERATIONS = ("w4a16", "grouped", "w4a4", "w4a4_blocked")
STATES = {"begun": set[str](), "timed": {"seconds"}, "failed": {"reason"}}
TRIALS = 2  # a tile that was begun so often and never ended is left out


@dataclass(frozen=True)
class Work:
    """What one row of a table is for: ``n`` × ``k`` is the weight, (out, in); ``tokens`` are those
    of every expert where there are several."""

    operation: str
    format: str
    tokens: int
    n: int
    k: int


class TuningLog:
    """What was timed so far, and the file that it is appended to.

    Attributes:
        seconds: by work and tile; None where a tile cannot be built.
        finished: work that has no candidate left.
    """

    def __init__(self, path: Path, device: str) -> None:
        """Read what ``path`` has, if it exists, or begin it.

        Raises:
            ValueError: a line that no tuning wrote, or times of another GPU, Triton or kernels.
        """
        self.path = path
        self.header = {"log": 1, "device": device, "triton": version("triton")}
        self.header["kernels"] = kernel_sources()
        self.seconds: dict[Work, dict[Tile, float | None]] = {}
        self.finished: set[Work] = set()
        self._begun: dict[tuple[Work, Tile], int] = {}
        if path.is_file():
            self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.header)

    def known(self, work: Work) -> dict[Tile, float | None]:
        """Seconds by tile, None for those that cannot be built."""
        return self.seconds.setdefault(work, {})

    def begin(self, work: Work, tile: Tile) -> None:
        """Say that a tile is to be built and timed now."""
        self._append(self._line(work, tile, "begun"))

    def timed(self, work: Work, tile: Tile, seconds: float) -> None:
        """Keep a time."""
        self.known(work)[tile] = seconds
        self._append(self._line(work, tile, "timed", seconds=seconds))

    def failed(self, work: Work, tile: Tile, reason: str) -> None:
        """Keep that a tile cannot be built."""
        self.known(work)[tile] = None
        self._append(self._line(work, tile, "failed", reason=reason))

    def finish(self, work: Work) -> None:
        """Keep that nothing is left to be timed for it."""
        self.finished.add(work)
        self._append({**asdict(work), "state": "finished"})

    @staticmethod
    def _line(work: Work, tile: Tile, state: str, **more: object) -> dict[str, object]:
        return {**asdict(work), "state": state, **more, "tile": asdict(tile)}

    def _append(self, entry: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, raw in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(raw)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
                if number == 1:
                    self._compare(entry)
                else:
                    self._take(entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: {error}; move the file away to time everything "
                    "anew"
                ) from error
        if not whole:
            self.path.write_bytes(b"")
            self._append(self.header)
        elif len(whole) < len(data):  # the last line was cut off with the process that wrote it
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for (work, tile), times in self._begun.items():
            if times >= TRIALS:
                self.known(work).setdefault(tile, None)

    def _compare(self, header: dict[str, object]) -> None:
        for name, value in self.header.items():
            if header.get(name) != value:
                raise ValueError(f"was made with {name} {header.get(name)}, here it is {value}")

    def _take(self, entry: dict[str, object]) -> None:
        state = str(entry.pop("state", None))
        work = Work(**{field.name: entry.pop(field.name) for field in fields(Work)})  # pyright: ignore[reportArgumentType]
        numbers = (work.tokens, work.n, work.k)
        if work.operation not in OPERATIONS or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"no such work: {work}")
        if state == "finished" and not entry:
            self.finished.add(work)
            return
        if state not in STATES or set(entry) != {"tile", *STATES[state]}:
            raise ValueError(f"state {state!r} with {sorted(entry)}")
        tile = _tile(entry["tile"])
        if state == "begun":
            self._begun[work, tile] = self._begun.get((work, tile), 0) + 1
            return
        self._begun.pop((work, tile), None)
        seconds = entry.get("seconds")
        if state == "timed" and not (
            type(seconds) is float and math.isfinite(seconds) and seconds > 0
        ):
            raise ValueError(f"seconds {seconds!r}")
        self.known(work)[tile] = seconds if isinstance(seconds, float) else None


def _tile(data: object) -> Tile:
    """The tile that ``asdict`` described. Raises ValueError for anything else."""
    blank = asdict(Tile(kernel=""))
    if not isinstance(data, dict) or set(data) != set(blank):
        raise ValueError(f"no tile: {data}")
    for name, value in data.items():
        if type(value) is not type(blank[name]) or (type(value) is int and value < 1):
            raise ValueError(f"{name} {value!r} of a tile")
    return Tile(**data)


def kernel_sources() -> str:
    """A hash of the source of the kernels, which times belong to."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
