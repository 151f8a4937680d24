"""The folder of a run: nothing of others is touched, and every failure can be repeated from."""

import builtins
import errno
import io
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.work_folder import PREVIOUS, PUBLISHING, WorkFolder
from ptq.checkpoint.writer import CheckpointWriter

Command = Callable[..., CheckpointWriter]
Files = dict[str, bytes | None]
OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")
POINTS = int(os.environ.get("PTQ_FAULTS", "60"))  # that are tried of each kind; 0 tries all


@pytest.fixture(scope="module")
def command(make_run: Callable) -> Command:
    """``command(out, …)`` does what ``ptq quantize`` does with a writer, with blocks that were
    quantized before."""
    run = make_run("llama")
    finished: list[tuple] = []

    class Collector:
        def has(self, name: str) -> bool:
            return False

        def add(self, *block: object) -> None:
            finished.append(block)

    run.blocks(Collector())
    rest = list(run.source.rest())

    def write(out: Path, *, stop_after: int | None = None, **options: object) -> CheckpointWriter:
        writer = run.writer(out, **options)
        if writer.done is not None:
            writer.settle()
            return writer
        with writer:
            for index, block in enumerate(finished):
                if index == stop_after:
                    raise KeyboardInterrupt
                if not writer.has(block[0]):
                    writer.add(*block)
            writer.finish(rest)
        return writer

    return write


def files(folder: Path) -> Files:
    """Everything in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    command(out)
    return files(out)


@pytest.fixture
def interrupted(command: Command, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted after its first block."""
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "out", stop_after=1)
    return tmp_path / "out.partial"


def foreign(folder: Path, name: str = "thesis/chapter1.tex") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")
    return path


# ---------------------------------------------------------------- siblings


@pytest.mark.parametrize("overwrite", [False, True])
def test_siblings_that_are_not_ours_stay(
    command: Command, whole: Files, tmp_path: Path, overwrite: bool
) -> None:
    kept = [
        foreign(tmp_path, f"out.{name}/data") for name in ("previous", "bak", "finished", "tmp")
    ]
    if overwrite:
        command(tmp_path / "out")
    command(tmp_path / "out", overwrite=overwrite)
    assert files(tmp_path / "out") == whole
    assert all(path.read_text() == "years of work" for path in kept)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "progress"])
def test_a_partial_that_is_not_ours_is_refused_and_stays(
    command: Command, tmp_path: Path, kind: str
) -> None:
    partial = tmp_path / "out.partial"
    match kind:
        case "folder":
            foreign(partial)
        case "file":
            partial.write_text("mine")
        case "link":
            foreign(tmp_path / "elsewhere")
            partial.symlink_to(tmp_path / "elsewhere")
        case "progress":
            foreign(partial, "progress.json")
    before = files(tmp_path)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"out\.partial") as caught:
            command(tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


def test_foreign_files_in_our_folder_stay_and_are_told(
    command: Command, whole: Files, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = [foreign(interrupted, name) for name in ("notes.txt", "block.safetensors", "sub/data")]
    command(interrupted.with_suffix(""))
    assert files(interrupted.with_suffix("")) == whole
    assert all(path.read_text() == "years of work" for path in kept)
    assert sorted(os.listdir(interrupted)) == ["block.safetensors", "notes.txt", "sub"]
    assert "it holds block.safetensors, notes.txt, sub" in caplog.text


def test_an_empty_folder_of_that_name_is_taken(
    command: Command, whole: Files, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    command(tmp_path / "out")
    assert files(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- the place of the result


def during(writer_add: Callable, happens: Callable[[], object]) -> Callable:
    def add(self: CheckpointWriter, *block: object) -> None:
        writer_add(self, *block)
        happens()

    return add


@pytest.mark.parametrize(
    ("stood", "comes"),
    [
        ("nothing", "file in it"),
        ("nothing", "file"),
        ("nothing", "link"),
        ("empty", "file in it"),
        ("checkpoint", "file in it"),
    ],
)
def test_what_comes_to_the_place_during_a_run_stays(
    command: Command,
    whole: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stood: str,
    comes: str,
) -> None:
    out, options = tmp_path / "out", {"overwrite": stood == "checkpoint"}
    if stood == "checkpoint":
        command(out)
    elif stood == "empty":
        out.mkdir()

    def happens() -> None:
        match comes:
            case "file in it":
                foreign(out)
            case "file":
                out.write_text("mine")
            case "link":
                foreign(tmp_path / "elsewhere")
                if not out.is_symlink():
                    out.symlink_to(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add", during(CheckpointWriter.add, happens))
        with pytest.raises(FileExistsError, match=r"was changed during the run|not a direct") as e:
            command(out, **options)
    assert "\n" not in str(e.value)
    after = files(tmp_path)
    assert any(content in (b"years of work", b"mine") for content in after.values())
    assert (out / "config.json").exists() == (stood == "checkpoint")
    if out.is_symlink() or out.is_file():
        out.unlink()
    else:
        (out / "thesis" / "chapter1.tex").rename(tmp_path / "saved")
        (out / "thesis").rmdir()
    made: list[object] = []
    monkeypatch.setattr(CheckpointWriter, "add", lambda self, *block: made.append(block))
    command(out, **options)
    assert made == []  # nothing was lost
    assert files(out) == whole and not (tmp_path / "out.partial").exists()


def test_a_file_that_comes_between_look_and_rename_stays(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    command(out)

    def late(source: Path, target: Path) -> None:
        if Path(target).name == PREVIOUS:
            foreign(out)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FileExistsError, match=r"changed during the run \(thesis, thesis/chapter1"):
        command(out, overwrite=True)
    assert (out / "thesis" / "chapter1.tex").exists() and Checkpoint(out).names()


# ---------------------------------------------------------------- the last moments


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_died_after_the_last_rename_is_done(
    command: Command, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        command(out)

    def die(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            command(out, overwrite=overwrite)
    left = set(os.listdir(tmp_path / "out.partial"))
    assert PUBLISHING in left and (PREVIOUS in left) == overwrite
    stamp = (out / "config.json").stat().st_mtime_ns
    writer = command(out, overwrite=overwrite)
    assert writer.done is not None and "had finished" in writer.done.reason
    assert (out / "config.json").stat().st_mtime_ns == stamp
    assert files(out) == whole and os.listdir(tmp_path) == ["out"]


def test_the_same_command_once_more_is_no_error(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(out)
    assert command(out).done is not None
    with pytest.raises(FileExistsError, match="--overwrite"):
        command(out, dialect="compressed-tensors" if Checkpoint(out).dialect == "ptq" else "ptq")
    with pytest.raises(FileExistsError, match="--overwrite"):
        command(out, recipe={"format": "other"})
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileExistsError, match="--overwrite"):  # not what it had written
        command(out)


def test_another_run_clears_what_a_complete_one_left(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda self: None)
        command(tmp_path / "out", recipe={"format": "other"})
    assert (tmp_path / "out.partial" / "progress.json").exists()
    command(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "other" not in json.dumps(config)


# ---------------------------------------------------------------- faults


class Killed(BaseException):
    """The process is gone: nothing that follows reaches the disk."""


class Faults:
    """Counts operations on files; the one of number ``at`` fails, or is the last that is not done.

    ``operation``: which are counted, None for all. ``kill``: from there on all fail, as of a
    process that is no more.
    """

    def __init__(self, patch: pytest.MonkeyPatch, operation: str | None, at: int, kill: bool):
        self.operation, self.at, self.kill, self.count, self.hit = operation, at, kill, 0, False
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        patch.setattr(os, "open", self.wrapped("open", os.open))
        opened = self.wrapped("open", io.open)

        def open_file(file: object, mode: str = "r", *rest: object, **more: object) -> object:
            made = opened(file, mode, *rest, **more)
            return self.writing(made) if "w" in mode else made

        patch.setattr(builtins, "open", open_file)

    def wrapped(self, name: str, original: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            self.step(name)
            return original(*args, **options)

        return call

    def writing(self, file: io.BufferedWriter) -> object:
        faults = self

        class Writing:
            def __enter__(self) -> "Writing":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                try:
                    faults.step("write")
                except BaseException:
                    file.write(bytes(data)[: len(data) // 2])
                    raise
                return file.write(data)

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        return Writing()

    def step(self, name: str) -> None:
        if self.hit:
            if self.kill:
                raise Killed
        elif self.operation in (None, name):
            if self.count == self.at:
                self.hit = True
                raise Killed if self.kill else OSError(errno.EIO, os.strerror(errno.EIO))
            self.count += 1


def count(command: Callable[[], object], operation: str | None) -> int:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, operation, -1, False)
        command()
    return faults.count


def points(total: int) -> list[int]:
    if not POINTS or total <= POINTS:
        return list(range(total))
    return sorted(random.Random(0).sample(range(total), POINTS))


@pytest.fixture(scope="module")
def old(make_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Another checkpoint, to be replaced."""
    out = tmp_path_factory.mktemp("old") / "out"
    make_run("llama", "mxfp4")(out)
    return files(out)


def put(content: Files, folder: Path) -> None:
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data or b"")


@pytest.mark.parametrize("operation", [*OPERATIONS, None])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_fault_at_any_operation_costs_nothing_but_a_second_run(
    command: Command,
    whole: Files,
    old: Files,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    operation: str | None,
    replacing: bool,
) -> None:
    """``None``: the process is killed there, at an operation of any kind. Otherwise that one
    fails once."""
    caplog.set_level(logging.ERROR)
    kill = operation is None

    def arrange(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        foreign(place, "out.previous/data")
        foreign(place, "beside")
        if replacing:
            put(old, place / "out")
        return place

    counted = arrange("count")
    total = count(lambda: command(counted / "out", overwrite=replacing), operation)
    for at in points(total):
        place = arrange(str(at))
        out = place / "out"
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, operation, at, kill)
            try:
                command(out, overwrite=replacing)
                failed = False
            except (OSError, Killed, ValueError):
                failed = True
        assert faults.hit, at
        if failed and out.exists():  # what stands there is whole
            assert files(out) in (old, whole), at
        if not failed:
            assert files(out) == whole, at
        if replacing and not out.exists():
            assert kill and files(place / "out.partial" / PREVIOUS) == old, at
        for folder in place.rglob("config.json"):
            inside = folder.parent
            if inside not in (out, place / "out.partial" / PREVIOUS):  # in no place yet
                assert inside == place / "out.partial" / "finished", at
        command(out, overwrite=replacing)
        assert files(out) == whole, at
        assert sorted(os.listdir(place)) == ["beside", "out", "out.previous"], at
        assert (place / "out.previous" / "data").read_text() == "years of work"
