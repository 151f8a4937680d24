"""Files beside the weights: those of the model, and nothing that a link fetches from elsewhere."""

import os
from pathlib import Path

import pytest

from ptq.checkpoint.companions import companion_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with three companions among other files."""
    model = tmp_path / "model"
    model.mkdir()
    others = ("config.json", "model.safetensors", "README.md", "training_args.bin")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", *others):
        (model / name).write_text(name)
    return model


def names(model: Path) -> list[str]:
    return [path.name for path in companion_files(model)]


def test_companions_are_neither_weights_nor_written_anew(model: Path) -> None:
    assert names(model) == ["LICENSE", "chat_template.jinja", "tokenizer.json"]
    (model / "tokenizer_files").mkdir()
    os.mkfifo(model / "tokenizer_pipe")
    (model / "vocab.json").symlink_to(model / "nowhere")
    assert names(model) == ["LICENSE", "chat_template.jinja", "tokenizer.json"]
    assert names(model / "none") == []


def test_a_link_that_leads_out_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (model / "tokenizer.model").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"tokenizer\.model is a link to .*secret, outside of the"):
        companion_files(model)
    (model / "tokenizer.model").unlink()
    (model / "tokenizer.model").symlink_to("link")
    (model / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="secret"):
        companion_files(model)


def test_a_directory_may_be_a_link_itself_and_link_within(model: Path, tmp_path: Path) -> None:
    (model / "vocab.txt").symlink_to("config.json")
    (tmp_path / "alias").symlink_to(model)
    assert names(tmp_path / "alias") == names(model) == [
        "LICENSE", "chat_template.jinja", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    cached = tmp_path / "models--some--model"
    snapshot = cached / "snapshots" / "0123abcd"
    for folder in (snapshot, cached / "blobs", tmp_path / "models--other" / "blobs"):
        folder.mkdir(parents=True)
        (folder / "0f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0f")
    assert names(snapshot) == ["tokenizer.json"]
    (snapshot / "vocab.json").symlink_to("../../../models--other/blobs/0f")
    with pytest.raises(ValueError, match="outside of the model"):
        companion_files(snapshot)
