"""SHA256SUMS: what sha256sum reads and writes, and every way in which a copy differs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ptq.checkpoint.checksums import SUMS, differences, read_sums, write_sums
from ptq.checkpoint.safetensors_files import write_file

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them with a name that needs escapes, and their sums."""
    names = ("model.safetensors", "config.json", "a\\b\nc ü.py")
    sums = {name: write_file(tmp_path / name, [name.encode() * 9]) for name in names}
    write_sums(tmp_path, sums)
    return tmp_path


def test_the_text_is_that_of_coreutils(tmp_path: Path) -> None:
    write_sums(tmp_path, {"b": ABC, "a\\\n": ABC})
    assert (tmp_path / SUMS).read_text() == f"\\{ABC}  a\\\\\\n\n{ABC}  b\n"
    assert read_sums(tmp_path) == {"b": ABC, "a\\\n": ABC}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum of coreutils")
def test_sha256sum_checks_what_we_write_and_we_what_it_writes(folder: Path) -> None:
    command = ["sha256sum", "--strict", "-c", SUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    ours = read_sums(folder)
    (folder / SUMS).unlink()
    (line,) = differences(folder)
    remedy = line.partition("write it: ")[2]
    assert subprocess.run(remedy, shell=True).returncode == 0
    assert read_sums(folder) == ours


def test_a_copy_has_no_differences(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert list(differences(folder)) == []
    links = tmp_path_factory.mktemp("links")  # as the cache of the hub has them
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    (links / ".gitattributes").write_text("")
    (links / ".cache").mkdir()
    (links / ".cache" / "x").write_text("")
    assert list(differences(links)) == []


def test_every_difference_is_a_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    raw = bytearray((folder / "config.json").read_bytes())
    raw[5] ^= 1
    (folder / "config.json").write_bytes(raw)
    (folder / "more").mkdir()
    (folder / "more" / "x.py").write_text("")
    (folder / "broken").symlink_to("nowhere")
    lines = list(differences(folder))
    assert [line.split(":")[0] for line in lines] == [
        "config.json is changed",
        "model.safetensors is missing",
        "broken is not in SHA256SUMS",
        "more/x.py is not in SHA256SUMS",
    ]


def test_a_pipe_is_not_opened(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert list(differences(folder)) == ["config.json is missing"]


def test_no_sums_are_a_difference(folder: Path) -> None:
    (folder / SUMS).unlink()
    (line,) = differences(folder)
    assert "SHA256SUMS is missing" in line and "\n" not in line


@pytest.mark.parametrize(
    "line", [f"{ABC}  ../x", f"{ABC}  /etc/passwd", f"{ABC[1:]}  x", f"{ABC}x", "", f"{ABC}  x\0"]
)
def test_what_is_no_sum_of_a_file_here_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / SUMS).write_text(f"{ABC}  ok\n{line}\n")
    with pytest.raises(ValueError, match="SHA256SUMS, line 2, is no sum of a file of this dir"):
        read_sums(tmp_path)
