"""Uploads: what is complete goes up in one commit, everything else stays here."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ptq.checkpoint import hub
from ptq.checkpoint.hub import check_push, push


class Api:
    """A hub that remembers what it was asked."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[tuple[str, dict]] = []
        self.fails = fails

    def _ask(self, what: str, **given: object) -> None:
        self.asked.append((what, given))
        if what == self.fails:
            raise OSError("503\n\nno answer")

    def whoami(self) -> dict:
        self._ask("whoami")
        return {"name": "me"}

    def create_repo(self, repository: str, **given: object) -> None:
        self._ask("create_repo", repository=repository, **given)

    def upload_folder(self, **given: object) -> SimpleNamespace:
        self._ask("upload_folder", **given)
        return SimpleNamespace(commit_url="address/commit/1")


@pytest.fixture
def checkpoint(make_run, tmp_path: Path) -> Path:
    make_run("llama", "nvfp4")(tmp_path / "out")
    return tmp_path / "out"


def test_the_listed_files_go_up_in_one_commit(checkpoint: Path) -> None:
    (checkpoint / ".hidden").write_text("mine")
    api = Api()
    assert push(checkpoint, "me/model", private=True, api=api) == "address/commit/1"  # pyright: ignore
    (made, how), (uploaded, what) = api.asked
    assert made == "create_repo" and how["private"] and how["exist_ok"]
    assert uploaded == "upload_folder" and what["repo_id"] == "me/model"
    patterns = what["allow_patterns"]
    assert {"SHA256SUMS", "config.json", "README.md", "model.safetensors"} <= set(patterns)
    assert ".hidden" not in patterns


def test_nothing_incomplete_or_changed_goes_up(checkpoint: Path) -> None:
    api = Api()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        push(checkpoint / "nothing", "me/model", api=api)  # pyright: ignore
    (checkpoint / "ptq_report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"nothing is uploaded: .*ptq_report\.json"):
        push(checkpoint, "me/model", api=api)  # pyright: ignore
    checkpoint.rename(checkpoint.with_name("out.partial"))
    with pytest.raises(FileNotFoundError, match="unfinished"):
        push(checkpoint, "me/model", api=api)  # pyright: ignore
    assert api.asked == []


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
def test_a_hub_that_refuses_leaves_the_checkpoint_and_says_how_to_go_on(checkpoint, fails) -> None:
    with pytest.raises(OSError, match=r"out is complete .*: 503; try again with ptq push "):
        push(checkpoint, "me/model", api=Api(fails))  # pyright: ignore
    assert (checkpoint / "config.json").is_file()


def test_what_cannot_succeed_is_told_before_any_work(monkeypatch) -> None:
    for name, message in (("a b", "a b"), ("model", "give OWNER/NAME"), ("a/b/c", "a/b/c")):
        with pytest.raises(ValueError, match=rf"^--push-to-hub {name}: .*{message}"):
            check_push(name, Api())  # pyright: ignore
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"nobody is logged in .*hf auth login, or set HF_TOKEN"):
        check_push("me/model", Api())  # pyright: ignore
    monkeypatch.setattr(hub, "get_token", lambda: "t")
    with pytest.raises(OSError, match=r"503$"):
        check_push("me/model", Api("whoami"))  # pyright: ignore
    api = Api()
    check_push("me/model", api)  # pyright: ignore
    assert api.asked == [("whoami", {})]
