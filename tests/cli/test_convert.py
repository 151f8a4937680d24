"""``ptq convert``: a checkpoint in another dialect, or one line that says why not."""

from pathlib import Path

from command_line import Run


def test_it_says_what_it_wrote(ptq: Run, make_run, tmp_path: Path) -> None:
    make_run("llama", "nvfp4")(tmp_path / "in", dialect="ptq")
    done = ptq("convert", str(tmp_path / "in"), str(tmp_path / "out"))
    assert done.code == 0
    assert "compressed-tensors (transformers " in " ".join(done.out.split())
    assert ptq("verify", str(tmp_path / "out")).code == 0
    again = ptq("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "ptq")
    assert again.code == 2 and "--overwrite" in again.err
    quiet = ptq("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--overwrite", "-q")
    assert quiet.code == 0 and not quiet.out


def test_what_cannot_be_said_is_refused(ptq: Run, make_run, tmp_path: Path) -> None:
    make_run("llama", "nvfp4", rotation=16)(tmp_path / "in", dialect="ptq")
    done = ptq("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "compressed-tensors")
    assert done.code == 2 and "cannot write compressed-tensors" in done.err
    assert not (tmp_path / "out").exists()
    assert ptq("convert", str(tmp_path), str(tmp_path / "out"), "--to", "x").code == 2


def test_the_target_chooses_the_dialect_or_refuses(ptq: Run, make_run, tmp_path: Path) -> None:
    make_run("llama", "nvfp4")(tmp_path / "in", dialect="ptq")
    done = ptq("convert", str(tmp_path / "in"), str(tmp_path / "out"), "--target", "vllm")
    assert done.code == 0 and "compressed-tensors (vLLM: right)" in " ".join(done.out.split())
    done = ptq("convert", str(tmp_path / "in"), str(tmp_path / "no"), "--target", "trtllm")
    assert done.code == 2 and "nothing to write for --target trtllm: " in done.err
    assert not list(tmp_path.glob("no*"))
