"""The built-in text: which files of the standard library it is made of, and what is held out."""

import hashlib
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from ptq.text import builtin, documents
from ptq.text.builtin import is_held_out


def test_builtin_text_needs_no_file_and_leaves_out_the_held_out_files():
    root = Path(sysconfig.get_paths()["stdlib"])
    names = builtin.calibration_files()
    assert len(names) > 300
    assert not [n for n in names if is_held_out(n) or "test" in n or "site-packages" in n]
    assert any(is_held_out(p.relative_to(root).as_posix()) for p in root.glob("*.py"))


def test_builtin_documents_follow_the_seed(monkeypatch: pytest.MonkeyPatch):
    names = builtin.calibration_files()  # looked for once: there are thousands
    monkeypatch.setattr(builtin, "calibration_files", lambda: names)
    first, again, other = (documents.read("builtin", field=None, seed=s) for s in (0, 0, 1))
    assert first.description["source"] == "builtin"
    beginnings = [list(islice(part.texts, 3)) for part in (first, again, other)]
    assert beginnings[0] == beginnings[1] != beginnings[2]


def test_one_file_in_25_is_held_out():
    share = sum(is_held_out(f"module_{i}.py") for i in range(10_000)) / 10_000
    assert 0.03 < share < 0.05
    digest = hashlib.sha256(b"json/decoder.py").digest()
    assert is_held_out("json/decoder.py") == (int.from_bytes(digest[:4], "big") % 25 == 0)


def test_very_short_and_very_long_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, size in {"short": 199, "least": 200, "most": 400_000, "long": 400_001}.items():
        (tmp_path / f"{name}.py").write_text("x" * size)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    names = ["short.py", "least.py", "most.py", "long.py"]
    assert [len(text) for text in builtin.texts(names)] == [200, 400_000]


def test_calibration_files_are_relative_to_their_root_and_sorted(tmp_path: Path):
    kept = ["a.py", "json/decoder.py", "z.py"]
    for name in [*kept, "test_a.py", "test/b.py", "dist-packages/c.py", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert not any(map(is_held_out, kept))
    assert builtin.calibration_files(tmp_path) == kept
