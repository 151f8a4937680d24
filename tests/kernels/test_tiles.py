"""The choice of tiles: pure Python, for every architecture, on any machine."""

import json
import logging
from dataclasses import replace

import pytest

from ptq.kernels import coverage, gpu, tiles
from ptq.kernels.tiles import BUCKETS, Row, Table, Tile

ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_survive_json_and_serve_every_bucket(arch: int) -> None:
    table = tiles.table(arch)
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    for fmt in coverage.FORMATS.values():
        for operation in ("w4a16", "grouped"):
            for tokens in (*BUCKETS, 3, 100, 100_000):
                tile = tiles.choose(arch, operation, fmt, tokens, 4096, 14336)
                assert operation == "w4a16" or tile.kernel == "w4a16", "experts have no dense path"
    for fmt in ("nvfp4", "mxfp4") if arch >= 100 else ():
        assert all(
            tiles.choose(arch, "w4a4", fmt, tokens, 4096, 14336).kernel == "w4a4"
            for tokens in BUCKETS
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (6144, 4096),
        (4096, 14336),
        (57344, 8192),
        (8192, 28672),
        (1024, 1536),
        (4096, 4128),
        (5120, 2880),  # 22.5 steps of 128 columns
    ],
)
def test_splits_fill_the_device_and_leave_work_for_each(arch: int, n: int, k: int) -> None:
    rows = tiles.table(arch).rows
    timed = {(r.operation, r.format, r.tokens, r.n, r.k) for r in rows if r.microseconds}
    for tokens in (1, 16, 64):
        tile = tiles.choose(arch, "w4a16", "nvfp4", tokens, n, k)
        whole = k % (tile.split * tile.block_k) == 0 or k % tile.block_k != 0
        assert tile.split <= 16 and (tile.split == 1 or whole)
        assert tile.split == 1 or k // (tile.split * tile.block_k) >= 4
        if ("w4a16", "nvfp4", tokens, n, k) in timed:  # found on a device: judge what the rule says
            split = tiles.split_rule(tile, tokens, n, k, gpu.MULTIPROCESSORS[arch])
            tile = replace(tile, split=split)
        programs = -(-n // tile.block_n) * -(-tokens // tile.block_m) * tile.split
        grows = (
            (k % (2 * tile.split * tile.block_k) == 0 or k % tile.block_k != 0)
            and k // (2 * tile.split * tile.block_k) >= 4
            and tile.split < 16
        )
        assert programs >= 2 * gpu.MULTIPROCESSORS[arch] or not grows


def test_a_shape_without_a_row_takes_the_nearest_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    near, far = Tile(kernel="w4a16", block_n=64), Tile(kernel="w4a16", block_n=128)
    rows = tuple(
        Row(operation="w4a16", format="nvfp4", tokens=16, n=n, k=4096, tile=t)
        for n, t in ((5000, near), (90000, far))
    )
    monkeypatch.setattr(
        tiles, "table", lambda arch: Table(architecture=arch, source="", triton="", rows=rows)
    )
    tiles.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="ptq.kernels.tiles"):
        for tokens in (9, 13, 16):
            assert (
                replace(tiles.choose(91, "w4a16", "nvfp4", tokens, 6000, 4096, 132), split=1)
                == near
            )
    assert [record.message for record in caplog.records] == [
        "no tile for w4a16 nvfp4 6000×4096 on sm_91: using that of 5000×4096"
    ]
    with pytest.raises(ValueError, match="ptq bench --tune"):
        tiles.choose(91, "w4a16", "nvfp4", 64, 6000, 4096)
    tiles.choose.cache_clear()


@pytest.mark.parametrize(
    ("n", "k", "width", "split"),
    [
        (57344, 8192, 256, 1),  # 448 tiles are enough for 132 multiprocessors
        (14336, 4096, 128, 2),  # with a split the sums would not fit the registers
        (57344 + 128, 8192, 128, 1),  # nor would masks
        (57344, 8192 + 64, 128, 1),
    ],
)
def test_the_widest_tile_is_for_whole_sizes_that_need_no_split(n, k, width, split) -> None:
    tile = tiles.choose(90, "w4a16", "nvint4", 256, n, k)
    assert (tile.block_n, tile.split, tile.warps) == (width, split, 8)


def test_a_table_with_unknown_keys_is_refused() -> None:
    row = {
        "operation": "w4a16",
        "format": "nvfp4",
        "tokens": 1,
        "n": 1,
        "k": 1,
        "kernel": "w4a16",
        "blok_m": 3,
    }
    with pytest.raises(ValueError, match="blok_m"):
        Table.from_dict({"architecture": 90, "source": "", "triton": "", "rows": [row]})


def test_tiles_are_told_apart_by_value() -> None:
    assert replace(Tile(kernel="w4a16"), split=2) != Tile(kernel="w4a16") == Tile(kernel="w4a16")
