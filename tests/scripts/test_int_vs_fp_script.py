"""The document on INT against FP is what its script writes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    file = root / "scripts" / "int_vs_fp.py"
    spec = importlib.util.spec_from_file_location("int_vs_fp_script", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_document_is_current(script: ModuleType) -> None:
    assert script.DOCUMENT.read_text("utf-8") == script.document()


def test_rows_agree_within_their_tolerance_only(script: ModuleType) -> None:
    near = script.Row("x", 2.0, 2.01, 0.02, "because")
    far = script.Row("x", 2.0, 2.1, 0.02, "because")
    assert near.cells() == "| x | 2.00 | 2.01 | agree | because |"
    assert far.cells() == "| x | 2.00 | 2.10 | **differs** | because |"


def test_wins_of_table_3_are_recounted_from_the_cells(script: ModuleType) -> None:
    kl = script.published(script.KL)
    assert {len(cells) for cells in kl.values()} == {12}
    for pair in script.PAIRS:
        counts = tuple(script.wins(kl, pair, prefix) for prefix in ("", "R_"))
        assert counts == script.WINS[pair[0].name]
