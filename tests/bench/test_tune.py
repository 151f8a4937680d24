"""Tables of tiles: rules of thumb, candidates, and what timing would replace."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptq.bench import tune
from ptq.kernels import tiles
from ptq.kernels.tiles import Table, Tile

ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_that_were_not_timed_are_the_rules_of_thumb(arch: int) -> None:
    """A change of the rules has to be written into the tables, by ``tune.write``; timed rows are
    free to differ."""
    shipped = [row for row in tiles.table(arch).rows if not row.microseconds]
    assert set(shipped) <= set(tune.untimed(arch).rows)
    for operation in ("w4a16", "w4a4") if arch >= 100 else ("w4a16",):
        candidates = list(tune.candidates(arch, operation, "nvfp4", 16, 4096, 14336))
        assert len(candidates) > 8
        assert all(14336 % (tile.split * tile.block_k) == 0 for tile in candidates)


def test_every_shape_has_a_tile_to_time() -> None:
    """640 is no multiple of the 256 columns that a W4A4 tile takes at a time."""
    assert all(tile.split == 1 for tile in tune.candidates(120, "w4a4", "nvfp4", 1, 256, 640))
    assert list(tune.candidates(120, "w4a4", "nvfp4", 1, 256, 640))


def test_a_timed_row_replaces_its_own_and_no_other() -> None:
    table = tune.untimed(90)
    row = replace(table.rows[0], tile=Tile(kernel="dense"), microseconds=1.5)
    timed = tune.updated(table, row, "a GPU")
    assert set(timed.rows) ^ set(table.rows) == {row, table.rows[0]}
    assert "timed on a GPU" in timed.source


def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CONFIGS", tmp_path)
    table = tune.untimed(120)
    path = tune.write(table)
    assert Table.from_dict(json.loads(path.read_text())) == table
    assert path == tmp_path / "sm120.json" and list(tmp_path.iterdir()) == [path]


def test_only_token_counts_of_the_tables_are_tuned() -> None:
    shapes = [(64, 128), (64, 128), (32, 64)]
    work = tune.problems(100, shapes, ["nvfp4", "nvint4"], [1, 8])
    assert len(work) == len(set(work)) == 2 * 2 * 2 + 2 * 2
    assert {operation for operation, fmt, *_ in work if fmt == "nvint4"} == {"w4a16"}
    with pytest.raises(ValueError, match="no row for 3 tokens; tune 1, 8"):
        tune.problems(100, shapes, ["nvfp4"], [1, 3])
