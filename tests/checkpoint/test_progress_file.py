"""progress.json: what an interrupted run had finished, for the same run only."""

import json
from pathlib import Path

import pytest

from ptq.checkpoint.progress_file import NAME, Block, ProgressFile
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.safetensors_files import write_file

IDENTITY = {"recipe": {"format": "nvfp4", "seed": 0}, "source": "abc"}


@pytest.fixture
def blocks(tmp_path: Path) -> dict[str, Block]:
    layers = {"a.q": LayerInfo(format="nvfp4", rotation=16)}
    digests = {name: write_file(tmp_path / f"{name}.st", [name.encode()]) for name in "ab"}
    return {
        name: Block(f"{name}.st", digest, {"w": "1f"}, layers, ())
        for name, digest in digests.items()
    }


def test_blocks_survive_the_file(tmp_path: Path, blocks: dict[str, Block]) -> None:
    file = ProgressFile(tmp_path, IDENTITY)
    assert file.read() == {}
    file.write(blocks)
    assert file.read() == file.intact() == blocks


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_block_whose_file_changed_is_forgotten(
    tmp_path: Path, blocks: dict[str, Block], damage: bytes | None
) -> None:
    file = ProgressFile(tmp_path, IDENTITY)
    file.write(blocks)
    (tmp_path / "b.st").unlink() if damage is None else (tmp_path / "b.st").write_bytes(damage)
    assert set(file.intact()) == {"a"} and set(file.read()) == {"a", "b"}


def test_another_run_is_refused_with_what_differs(tmp_path: Path, blocks: dict[str, Block]) -> None:
    ProgressFile(tmp_path, IDENTITY).write(blocks)
    other = IDENTITY | {"recipe": {"format": "nvfp4", "seed": 7}}
    with pytest.raises(ValueError, match=r"different run \(recipe.seed was 0 and is 7\)"):
        ProgressFile(tmp_path, other).read()


@pytest.mark.parametrize("text", ["", "{", '{"version": 99}'])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=r"delete .* to start over|delete it to start over"):
        ProgressFile(tmp_path, IDENTITY).read()


def test_the_file_is_json_that_people_can_read(tmp_path: Path, blocks: dict[str, Block]) -> None:
    ProgressFile(tmp_path, IDENTITY).write(blocks)
    data = json.loads((tmp_path / NAME).read_text())
    assert data["identity"] == IDENTITY and data["blocks"]["a"]["file"] == "a.st"


def test_a_block_is_of_the_weights_that_it_was_made_of(
    tmp_path: Path, blocks: dict[str, Block]
) -> None:
    file = ProgressFile(tmp_path, IDENTITY)
    file.check(blocks["a"], {"w": "1f"})
    for weights in ({"w": "2e"}, {}, {"w": "1f", "v": "2e"}):
        with pytest.raises(ValueError, match=r"different run \([vw] is not the weight that it was"):
            file.check(blocks["a"], weights)


def test_a_few_differences_stand_for_many(tmp_path: Path) -> None:
    ProgressFile(tmp_path, IDENTITY | {"weights": {f"w{i}": "1f" for i in range(9)}}).write({})
    other = ProgressFile(tmp_path, IDENTITY | {"weights": {f"w{i}": "2e" for i in range(9)}})
    with pytest.raises(ValueError, match=r"w2 is not the weight that it was; and 6 more\): delete"):
        other.read()
