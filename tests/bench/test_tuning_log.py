"""The log of a tuning: read back as it was written, or refused by the line that is wrong."""

import json
from pathlib import Path

import pytest

from ptq.bench import tuning_log
from ptq.bench.tuning_log import TuningLog, Work
from ptq.kernels.tiles import Tile

WORK = Work("w4a16", "nvfp4", 16, 6144, 4096)
OTHER = Work("grouped", "mxfp4", 1, 64, 128)
FAST, SLOW = Tile(kernel="w4a16", stages=3), Tile(kernel="dense")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of two times, a tile that cannot be built, and finished work."""
    log = TuningLog(tmp_path / "sm90.tuning.jsonl", "a GPU")
    log.begin(WORK, FAST)
    log.timed(WORK, FAST, 1.25e-5)
    log.begin(WORK, SLOW)
    log.timed(WORK, SLOW, 3.5e-5)
    log.begin(OTHER, FAST)
    log.failed(OTHER, FAST, "out of resource: shared memory")
    log.finish(OTHER)
    return log.path


def test_what_was_written_comes_back(path: Path) -> None:
    before = path.read_bytes()
    log = TuningLog(path, "a GPU")
    assert log.known(WORK) == {FAST: 1.25e-5, SLOW: 3.5e-5}
    assert log.known(OTHER) == {FAST: None} and log.finished == {OTHER}
    assert path.read_bytes() == before


def test_a_line_that_was_cut_off_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:40])
    assert TuningLog(path, "a GPU").known(WORK) == {FAST: 1.25e-5, SLOW: 3.5e-5}
    assert path.read_bytes() == whole
    path.write_bytes(whole[:30])  # before the first line ended
    assert not TuningLog(path, "a GPU").seconds
    assert json.loads(path.read_text())["device"] == "a GPU"


def test_a_tile_that_ends_the_process_twice_is_left_out(path: Path) -> None:
    killer = Tile(kernel="w4a16", stages=6)
    TuningLog(path, "a GPU").begin(WORK, killer)
    log = TuningLog(path, "a GPU")
    assert killer not in log.known(WORK), "it may have been an interruption"
    log.begin(WORK, killer)
    assert TuningLog(path, "a GPU").known(WORK)[killer] is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seconds": 1.25e-05', '"seconds": NaN', "line 3: seconds nan"),
        ('"seconds": 1.25e-05', '"seconds": -1.0', "line 3: seconds -1.0"),
        ('"seconds": 1.25e-05', '"seconds": "fast"', "line 3: seconds 'fast'"),
        ('"seconds": 1.25e-05', '"s": 1.25e-05', "line 3: state 'timed' with ['s', 'tile']"),
        ('"tokens": 16', '"tokens": 0', "line 2: no such work"),
        ('"operation": "w4a16"', '"operation": "w8a8"', "line 2: no such work"),
        ('"warps": 4', '"warps": "4"', "line 2: warps '4' of a tile"),
        ('"warps": 4', '"wraps": 4', "line 2: no tile"),
        ('{"log": 1', '["log", 1', "line 1: "),
        ('"device": "a GPU"', '"device": "another"', "line 1: was made with device another"),
        ('"state": "timed"', '"state": "guessed"', "line 3: state 'guessed'"),
    ],
)
def test_other_lines_are_named(path: Path, old: str, new: str, message: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(
        text.replace(old, new, 1) if "line 3" not in message else _third(text, old, new)
    )
    with pytest.raises(ValueError, match="move the file away") as error:
        TuningLog(path, "a GPU")
    assert message in str(error.value) and str(path) in str(error.value)


def _third(text: str, old: str, new: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[2] = lines[2].replace(old, new)
    return "".join(lines)


def test_times_of_other_kernels_are_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tuning_log, "kernel_sources", lambda: "changed")
    with pytest.raises(ValueError, match="here it is changed; move"):
        TuningLog(path, "a GPU")
