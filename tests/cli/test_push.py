"""``ptq push``: the address of what was uploaded, or one line that says why not."""

from pathlib import Path

from command_line import Run

from ptq.checkpoint import hub


def test_it_says_where_it_is(ptq: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "check_push", lambda repository: None)
    monkeypatch.setattr(hub, "push", lambda path, repository, private: f"{repository} {private}")
    done = ptq("push", str(tmp_path), "me/model", "--private")
    assert (done.code, done.out.strip()) == (0, "me/model True")


def test_nobody_logged_in(ptq: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    done = ptq("push", str(tmp_path), "me/model")
    assert done.code == 2 and "hf auth login" in done.err
    out = str(tmp_path / "out")
    done = ptq("quantize", "demo", "--format", "nvfp4", "-o", out, "--push-to-hub", "me/model")
    assert done.code == 2 and "hf auth login" in done.err and not Path(out).exists()
