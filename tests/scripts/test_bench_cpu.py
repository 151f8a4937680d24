"""The benchmark of the CPU path: rows that say what they claim, errors in one line."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cpu", root / "scripts" / "bench_cpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_the_bundled_model(
    script: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "runs.jsonl"
    options = ["--tokens", "1", "--window", "32", "--repeats", "1", "--rows", "packed", "cached"]
    argv = ["bench_cpu.py", str(root / "ptq" / "demo"), *options, "--out", str(out)]
    monkeypatch.setattr(script, "SCHEMES", ("w4a16",))
    monkeypatch.setattr(sys, "argv", argv)
    assert script.main() == 0
    rows = {row["row"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert list(rows) == ["float32", "packed", "cached"]
    weights = rows["float32"]["linear_bytes"] / 4
    assert rows["packed"]["linear_bytes"] / weights == pytest.approx(4.5 / 8, rel=1e-3)
    assert rows["cached"]["linear_bytes"] / weights == pytest.approx(4.5 / 8 + 4, rel=1e-3)
    assert rows["float32"]["decode_ratio"] == rows["float32"]["eval_ratio"] == 1
    assert all(row["decode"] > 0 and row["eval"] > 0 for row in rows.values())
    assert "| packed |" in capsys.readouterr().out


def test_an_unknown_row_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(script, "SCHEMES", ())
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", str(tmp_path), "--rows", "fast"])
    assert script.main() == 2
    assert capsys.readouterr().err.startswith("error: unknown rows fast; choose from float32,")
