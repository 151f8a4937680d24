"""What a result may replace: nothing that is not a checkpoint of ours."""

import json
from pathlib import Path

import pytest

from ptq.checkpoint.destination import check_destination, is_ours


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "original"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def checkpoint(path: Path, quantization: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out is empty"),
        ("  ", "--out is empty"),
        (".", "working directory"),
        ("..", "working directory"),
        ("/", "working directory"),
        ("models", "contains the directory of the model"),
        ("models/original", "is the directory of the model"),
        ("models/../models/original/", "is the directory of the model"),
        ("models/original/out", "lies in the directory of the model"),
        ("link", "is the directory of the model"),
        ("link/out", "lies in the directory of the model"),
    ],
)
def test_the_source_and_what_surrounds_the_user_are_safe(
    model: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, out: str, message: str
) -> None:
    root = model.parent.parent
    monkeypatch.chdir(root)
    (root / "link").symlink_to(model)
    with pytest.raises(ValueError, match=message):
        check_destination(out, model, overwrite=overwrite)
    assert (model / "config.json").is_file()


def test_new_and_empty_directories_are_taken(model: Path, tmp_path: Path) -> None:
    assert check_destination(tmp_path / "new", model, overwrite=False) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert check_destination(tmp_path / "link", model, overwrite=False) == tmp_path / "empty"


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "ptq"}, {"quant_method": "x", "ptq": {}}]
)
def test_only_with_overwrite_is_a_checkpoint_of_ours_replaced(
    model: Path, tmp_path: Path, quantization: dict
) -> None:
    old = checkpoint(tmp_path / "old", quantization)
    assert is_ours(old)
    assert check_destination(old, model, overwrite=True) == old
    with pytest.raises(FileExistsError, match=r"not empty: choose another directory, or --over"):
        check_destination(old, model, overwrite=False)


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"quantization_config": {}}'])
def test_what_is_not_ours_stays(model: Path, tmp_path: Path, config: str | None) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    if config is not None:
        (foreign / "config.json").write_text(config)
    with pytest.raises(
        ValueError, match=r"not a checkpoint that ptq wrote \(it holds chapter1.tex"
    ):
        check_destination(foreign, model, overwrite=True)


def test_files_and_devices_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", "/dev/null"):
        with pytest.raises(FileExistsError, match="not a directory"):
            check_destination(out, model, overwrite=True)


def test_a_link_is_resolved_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new" / "place")
    assert check_destination(tmp_path / "link", model, overwrite=False) == tmp_path / "new/place"
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="a link that leads back to itself"):
        check_destination(tmp_path / "a", model, overwrite=False)


def test_where_no_directory_can_be_made_is_said_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        check_destination(tmp_path / "file" / "out" / "deep", model, overwrite=False)
    with pytest.raises(NotADirectoryError, match="/dev/null is not a directory"):
        check_destination("/dev/null/out", model, overwrite=False)
    with pytest.raises(ValueError, match="is a mount point"):
        check_destination("/proc", model, overwrite=True)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match="no permission to write in"):
        check_destination(tmp_path / "out", model, overwrite=False)


def test_a_checkpoint_of_the_same_recipe_may_be_what_the_run_would_write(
    model: Path, tmp_path: Path
) -> None:
    """Whether it is, the writer finds out, who knows the calibration data."""
    ours = checkpoint(tmp_path / "ours", {"quant_method": "ptq", "recipe": {"format": "nvfp4"}})
    other = checkpoint(tmp_path / "other", {"ptq": {"recipe": {"format": "mxfp4"}}})
    foreign = checkpoint(tmp_path / "foreign", {"recipe": {"format": "nvfp4"}})
    recipe = {"format": "nvfp4"}
    assert check_destination(ours, model, overwrite=False, recipe=lambda: recipe) == ours
    for place in (other, foreign):
        with pytest.raises(FileExistsError, match="--overwrite"):
            check_destination(place, model, overwrite=False, recipe=lambda: recipe)
