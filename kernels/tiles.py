"""Which kernel and which tile: by architecture, format and shape, from tables that ship with the
package (K3).

Pure Python: importing this needs neither Triton nor a device, and nothing is tuned at run time. A
table (``configs/sm90.json``) has rows for (kernel, format, tokens, out, in); tokens are rounded up
to a bucket, a shape without a row takes the nearest row of its bucket and is logged once. ``ptq
bench --tune`` rewrites the tables from timings.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from ptq.kernels.gpu import MULTIPROCESSORS

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut into programs.

    Attributes:
        kernel: ``w4a16``, ``dense`` (dequantize, then a library matmul), ``w4a4`` (by pointers) or
            ``w4a4_tma`` (persistent).
        order: of columns in the weight operand (``kernels/w4a16.py``): natural, words or fragments.
        swap: the weights are the left operand of a W4A4 matmul.
    """

    kernel: str
    block_m: int = 16
    block_n: int = 128
    block_k: int = 128
    split: int = 1
    warps: int = 4
    stages: int = 4
    order: str = "words"
    swap: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry of a table: the tile for a shape, and what it took when it was timed (0: it never
    was)."""

    operation: str
    format: str
    tokens: int
    n: int
    k: int
    tile: Tile
    microseconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of an architecture and where they come from."""

    architecture: int
    source: str
    triton: str
    rows: tuple[Row, ...]

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> "Table":
        """The table that :meth:`to_dict` described.

        Raises:
            ValueError: a key that a table does not have.
        """
        names = {f.name for f in fields(Tile)}
        rows = []
        for entry in data["rows"]:  # pyright: ignore[reportGeneralTypeIssues]
            unknown = (
                set(entry) - names - {"operation", "format", "tokens", "n", "k", "microseconds"}
            )
            if unknown:
                raise ValueError(
                    f"tile table: unknown keys {sorted(unknown)}; a row has a shape and "
                    f"{sorted(names)}"
                )
            tile = Tile(**{key: value for key, value in entry.items() if key in names})
            rows.append(
                Row(tile=tile, **{key: value for key, value in entry.items() if key not in names})
            )
        header = {key: data[key] for key in ("architecture", "source", "triton")}
        return cls(rows=tuple(rows), **header)  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; fields of a tile that have their default are left out."""
        blank, rows = Tile(kernel=""), []
        for row in self.rows:
            entry: dict[str, object] = {
                "operation": row.operation,
                "format": row.format,
                "tokens": row.tokens,
                "n": row.n,
                "k": row.k,
            }
            for field in fields(Tile):
                value = getattr(row.tile, field.name)
                if value != getattr(blank, field.name):
                    entry[field.name] = value
            rows.append({**entry, "microseconds": row.microseconds} if row.microseconds else entry)
        return {
            "architecture": self.architecture,
            "source": self.source,
            "triton": self.triton,
            "rows": rows,
        }


# ---------------------------------------------------------------- tiles


@lru_cache(maxsize=8)
def table(arch: int) -> Table:
    """The shipped table of an architecture.

    Raises:
        ValueError: there is none.
    """
    path = CONFIGS / f"sm{arch}.json"
    if not path.is_file():
        raise ValueError(
            f"no tile table for sm_{arch} in {CONFIGS}; make one with ptq bench --tune"
        )
    return Table.from_dict(json.loads(path.read_text(encoding="utf-8")))


def bucket(tokens: int) -> int:
    """The table's token count for ``tokens``: the next larger one, or the largest."""
    return next((b for b in BUCKETS if b >= tokens), BUCKETS[-1])


@lru_cache(maxsize=4096)
def choose(
    arch: int, operation: str, format: str, tokens: int, n: int, k: int, sms: int = 0
) -> Tile:
    """The tile for ``operation`` (w4a16, w4a4, grouped) on a weight of n × k; a neighbour's if the
    shape has no row.

    Raises:
        ValueError: the table has no row at all for this operation and format.
    """
    nearest = _nearest(table(arch).rows, operation, format, bucket(tokens), n, k)
    if nearest is None:
        raise ValueError(
            f"the tile table of sm_{arch} has no row for {operation} {format}; run ptq bench --tune"
        )
    if (nearest.n, nearest.k) != (n, k):
        _log_missing(arch, operation, format, n, k, nearest.n, nearest.k)
    return _fitted(nearest, tokens, n, k, sms or MULTIPROCESSORS[arch])


def choose_from(
    table: Table, operation: str, format: str, tokens: int, n: int, k: int
) -> Tile | None:
    """What :func:`choose` would take if this were the table; None if it has no row for it."""
    nearest = _nearest(table.rows, operation, format, bucket(tokens), n, k)
    return (
        None
        if nearest is None
        else _fitted(nearest, tokens, n, k, MULTIPROCESSORS[table.architecture])
    )


def _fitted(nearest: Row, tokens: int, n: int, k: int, sms: int) -> Tile:
    """The tile of a row for a shape that may be another."""
    tile = nearest.tile
    whole = nearest.operation == "grouped" or tile.kernel in ("dense", "w4a4_tma")
    if (nearest.n, nearest.k) == (n, k) or (tile.split == 1 and whole):
        return tile
    split = split_rule(tile, tokens, n, k, sms)
    # the widest have no registers left for masks, nor MXFP4 for the sum over a split
    widest = tile.kernel == "w4a16" and tile.block_n > 128
    if widest and (split > 1 or n % tile.block_n or k % tile.block_k):
        tile = replace(tile, block_n=128)
        split = split_rule(tile, tokens, n, k, sms)
    return replace(tile, split=split)


def _nearest(
    rows: Sequence[Row], operation: str, format: str, tokens: int, n: int, k: int
) -> Row | None:
    def distance(row: Row) -> float:
        return abs(math.log(row.n / n)) + abs(math.log(row.k / k))

    fits = [
        row
        for row in rows
        if (row.operation, row.format, row.tokens) == (operation, format, tokens)
    ]
    return min(fits, key=distance, default=None)


@lru_cache(maxsize=4096)
def _log_missing(
    arch: int, operation: str, format: str, n: int, k: int, row_n: int, row_k: int
) -> None:
    """Once per shape, thanks to the cache."""
    log.info(
        "no tile for %s %s %d×%d on sm_%d: using that of %d×%d",
        operation,
        format,
        n,
        k,
        arch,
        row_n,
        row_k,
    )


def split_rule(tile: Tile, tokens: int, n: int, k: int, sms: int) -> int:
    """How many programs share a tile's K: the smallest power of two that makes two programs per
    multiprocessor.

    Each keeps at least 4 steps of K, and there are at most 16. All have the same number of whole
    steps, unless K is no number of whole steps anyway, so that its end is masked.
    """
    tiles, split = -(-n // tile.block_n) * -(-tokens // tile.block_m), 1
    masked = k % tile.block_k != 0
    while (
        tiles * split < 2 * sms
        and split < 16
        and (masked or k % (2 * split * tile.block_k) == 0)
        and k // (2 * split * tile.block_k) >= 4
    ):
        split *= 2
    return split
