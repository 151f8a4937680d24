"""Tables of tiles: rules of thumb, candidates, and what timing would replace."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptq.bench import tune
from ptq.bench.tuning_log import Work
from ptq.kernels import tiles
from ptq.kernels.tiles import Table, Tile

ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_that_were_not_timed_are_the_rules_of_thumb(arch: int) -> None:
    """A change of the rules has to be written into the tables, by ``tune.write``; timed rows are
    free to differ."""
    shipped = [row for row in tiles.table(arch).rows if not row.microseconds]
    assert set(shipped) <= set(tune.untimed(arch).rows)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_search_begins_with_the_tile_in_use(arch: int) -> None:
    for tokens in tiles.BUCKETS:
        work = Work("w4a16", "nvfp4", tokens, 4096, 14336)
        first, *others = tune.starts(tiles.table(arch), work)
        assert first == tiles.choose(arch, "w4a16", "nvfp4", tokens, 4096, 14336)
        assert Tile(kernel="dense") in (first, *others)
        assert any(tile.kernel == "w4a16" for tile in (first, *others))


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
    layers = [("q", 64, 128), ("o", 64, 128), ("expert down", 32, 64)]
    work = tune.problems(100, layers, ["nvfp4", "nvint4"], [1, 128])
    assert len(work) == len(set(work))
    found = {(w.operation, w.format, w.tokens, w.n) for w in work}
    both = [("w4a16", 64), ("grouped", 32)]
    expected = {(op, fmt, t, n) for op, n in both for fmt in ("nvfp4", "nvint4") for t in (1, 128)}
    expected |= {("w4a4", "nvfp4", t, n) for t in (1, 128) for n in (64, 32)}
    assert found == expected | {("w4a4_blocked", "nvfp4", 128, 64)}
    with pytest.raises(ValueError, match="no row for 3 tokens; tune 1, 8"):
        tune.problems(100, layers, ["nvfp4"], [1, 3])
