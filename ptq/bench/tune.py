"""Where the tile tables of ``kernels/configs`` come from: timings on the GPU at hand, or, without
one, rules of thumb.

``ptq bench --tune`` rewrites the table of this GPU, by the search of :mod:`ptq.bench.tile_search`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ptq.bench.shapes import EXPERT, Layer
from ptq.bench.tuning_log import Work
from ptq.kernels import tiles
from ptq.kernels.gpu import FP4_ARCHITECTURES, MULTIPROCESSORS
from ptq.kernels.tiles import BUCKETS, Row, Table, Tile, split_rule

W4A16_FORMATS = ("nvfp4", "mxfp4", "nvint4", "mxint4")
FP4 = ("nvfp4", "mxfp4")
# The shape that stands for all others in an untimed table: rules of thumb depend on the number of
# tiles alone.
SHAPE = (6144, 4096)
# One that has tiles enough on sm_90 even if they are twice as wide: gate and up of Llama-3.1-8B.
WIDE_SHAPE = (28672, 4096)
# Up to how many tokens the packed weight is multiplied directly; beyond, it is dequantized for the
# library's matmul.
FUSED_UP_TO = {80: 128, 90: 256, 100: 256, 120: 128}


# ---------------------------------------------------------------- rules of thumb


def w4a16_tile(arch: int, fmt: str, tokens: int) -> Tile:
    """The rule of thumb for 16-bit inputs: registers, shared memory and instructions per weight by
    compilation, no timings."""
    if tokens > FUSED_UP_TO[arch]:
        return Tile(kernel="dense")
    order = (
        "fragments" if arch == 90 else "natural" if arch >= 100 and fmt.endswith("fp4") else "words"
    )
    if tokens <= 16:
        return Tile(kernel="w4a16", block_m=16, order=order)
    # on sm_80 a tile of 64 tokens unpacks every weight in two warps, and spills
    if tokens <= 32 or arch == 80:
        return Tile(kernel="w4a16", block_m=32, order=order, stages=4 if arch == 90 else 3)
    if arch == 120:
        return Tile(kernel="w4a16", block_m=64, block_k=64, order=order)
    if tokens <= 64 or arch == 100:
        # integers of 4 bits with four stages spill on sm_100 (MXINT4, experts: 16 bytes)
        stages = 3 if arch == 100 and order == "words" else 4
        return Tile(kernel="w4a16", block_m=64, order=order, stages=stages)
    return Tile(kernel="w4a16", block_m=128, order=order, warps=8, stages=3)


def w4a4_tile(arch: int, tokens: int) -> Tile:
    """The rule of thumb for 4-bit inputs with row-major scales; on sm_100 the weights must be the
    left operand of a narrow tile."""
    if tokens <= 64:
        block_m = max(16, tokens)
        stages = 4 if arch == 100 or block_m < 64 else 3
        return Tile(kernel="w4a4", block_m=block_m, block_k=256, swap=arch == 100, stages=stages)
    if arch == 100:
        return Tile(kernel="w4a4", block_m=128, warps=8, stages=4)
    if tokens <= 128:
        return Tile(kernel="w4a4", block_m=64, stages=3)
    # one program fits by registers either way, so it may as well have twice the columns
    return Tile(kernel="w4a4", block_m=128, block_k=256, warps=8, stages=3)


def blocked_tile(tokens: int) -> Tile:
    """The persistent kernel of sm_100: the widest tile that leaves no multiprocessor idle, and as
    many stages as fit."""
    if tokens <= 512:
        return Tile(kernel="w4a4_tma", block_m=128, block_n=128, block_k=256, stages=4)
    return Tile(kernel="w4a4_tma", block_m=128, block_n=256, block_k=256, warps=8, stages=3)


def wide_tile(fmt: str, tokens: int) -> Tile:
    """16-bit inputs on sm_90, where so wide a tile gives every multiprocessor one without a split:
    3.5 instructions a weight of NVFP4 instead of 4.4; with a split MXFP4 spills."""
    return replace(w4a16_tile(90, fmt, tokens), block_n=256)


def untimed(arch: int) -> Table:
    """The table by rules of thumb."""
    n, k = SHAPE

    def row(operation: str, fmt: str, tokens: int, tile: Tile) -> Row:
        if tile.kernel in ("w4a16", "w4a4") and operation != "grouped":
            tile = replace(tile, split=split_rule(tile, tokens, n, k, MULTIPROCESSORS[arch]))
        return Row(operation=operation, format=fmt, tokens=tokens, n=n, k=k, tile=tile)

    rows = []
    if arch == 90:
        n, k = WIDE_SHAPE
        rows += [
            Row(operation="w4a16", format=f, tokens=t, n=n, k=k, tile=wide_tile(f, t))
            for f in W4A16_FORMATS
            for t in (128, 256)
        ]
        n, k = SHAPE
    for fmt in W4A16_FORMATS:
        rows += [row("w4a16", fmt, tokens, w4a16_tile(arch, fmt, tokens)) for tokens in BUCKETS]
    for fmt in W4A16_FORMATS:
        # experts have no dense path: beyond the fused range the widest fused tile goes on
        rows += [
            row("grouped", fmt, tokens, w4a16_tile(arch, fmt, min(tokens, FUSED_UP_TO[arch])))
            for tokens in BUCKETS
        ]
    if arch >= 100:
        for fmt in FP4:
            rows += [row("w4a4", fmt, tokens, w4a4_tile(arch, tokens)) for tokens in BUCKETS]
    if arch == 100:
        for fmt in FP4:
            rows += [row("w4a4_blocked", fmt, tokens, blocked_tile(tokens)) for tokens in BUCKETS]
    return Table(
        architecture=arch,
        source="rules of thumb, nothing timed",
        triton=version("triton"),
        rows=tuple(rows),
    )


# ---------------------------------------------------------------- what is timed


def starts(table: Table, work: Work) -> list[Tile]:
    """Tiles that a search begins with: the one that the table has for it, the rule of thumb, and
    for 16-bit inputs the library's product."""
    arch = table.architecture
    shape = (work.operation, work.format, work.tokens, work.n, work.k)
    used = tiles.choose_from(table, *shape)
    ruled = _rule(arch, work)
    if ruled.kernel in ("w4a16", "w4a4") and work.operation != "grouped":
        sms = MULTIPROCESSORS[arch]
        ruled = replace(ruled, split=split_rule(ruled, work.tokens, work.n, work.k, sms))
    found = [] if used is None else [used]
    found.append(ruled)
    if work.operation == "w4a16":
        found.append(Tile(kernel="dense"))
        if ruled.kernel == "dense":  # a search needs a tile to go on from
            widest = w4a16_tile(arch, work.format, FUSED_UP_TO[arch])
            found.append(widest)
    return list(dict.fromkeys(found))


def _rule(arch: int, work: Work) -> Tile:
    if work.operation == "w4a16":
        return w4a16_tile(arch, work.format, work.tokens)
    if work.operation == "grouped":
        return w4a16_tile(arch, work.format, min(work.tokens, FUSED_UP_TO[arch]))
    return w4a4_tile(arch, work.tokens) if work.operation == "w4a4" else blocked_tile(work.tokens)


def problems(
    arch: int, layers: Iterable[Layer], formats: Sequence[str], tokens: Sequence[int]
) -> list[Work]:
    """Everything that is tuned for these layers: of experts what runs one product for each, of
    others with 16-bit inputs and, where FP4 numbers are multiplied, with quantized ones; their
    scales in blocks where sm_100 wants them.

    Raises:
        ValueError: a token count without a row in the tables.
    """
    if other := sorted(set(tokens) - set(BUCKETS)):
        raise ValueError(
            f"the tile tables have no row for {other[0]} tokens; tune "
            f"{', '.join(map(str, BUCKETS))}"
        )
    kinds = {(name.startswith(EXPERT), n, k) for name, n, k in layers}
    return [
        Work(operation, fmt, count, n, k)
        for fmt in formats
        for count in tokens
        for expert, n, k in sorted(kinds)
        for operation in _operations(arch, fmt, count, expert=expert)
    ]


def _operations(arch: int, fmt: str, tokens: int, *, expert: bool) -> list[str]:
    found = ["grouped" if expert else "w4a16"]
    if arch in FP4_ARCHITECTURES and fmt in FP4:
        found.append("w4a4")
        if arch == 100 and tokens > 64 and not expert:  # as ``op_matmul.wants_blocked_scales``
            found.append("w4a4_blocked")
    return found


# ---------------------------------------------------------------- tables


def current(arch: int) -> Table:
    """The shipped table, or the rules of thumb where none is shipped."""
    return tiles.table(arch) if path(arch).is_file() else untimed(arch)


def updated(table: Table, row: Row, device: str) -> Table:
    """The table with a timed row in the place of the one for the same operation, format, tokens and
    shape."""
    rows = {(r.operation, r.format, r.tokens, r.n, r.k): r for r in (*table.rows, row)}
    source = f"timed on {device}; rows without microseconds are rules of thumb"
    return replace(table, source=source, triton=version("triton"), rows=tuple(rows.values()))


def path(arch: int) -> Path:
    """The file of an architecture's table."""
    return tiles.CONFIGS / f"sm{arch}.json"


def log_path(arch: int) -> Path:
    """The file of what was timed for it."""
    return tiles.CONFIGS / f"sm{arch}.tuning.jsonl"


def write(table: Table) -> Path:
    """Write a table, one row to a line, so that a change is one line of a diff; an interruption
    leaves the old one."""
    data = table.to_dict()
    rows = data.pop("rows")
    header = json.dumps(data, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(row) for row in rows)  # pyright: ignore[reportGeneralTypeIssues]
    target = path(table.architecture)
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".json.part")
    part.write_text(f'{header},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")
    return part.replace(target)
