"""The program that opens a checkpoint in an engine: it always leaves an answer, on one line if it
is an error."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ptq.runtime import engine_probe


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The answer of a probe."""

    def answer(probe) -> dict:
        monkeypatch.setitem(engine_probe.PROBES, "p", probe)
        result = str(tmp_path / "result.pt")
        jobs = [{"path": "a-directory", "tokens": [3, 4], "result": result}]
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        engine_probe.main("p", str(tmp_path / "jobs.json"))
        return torch.load(result, weights_only=True)

    for name in engine_probe.SETTINGS:
        monkeypatch.setenv(name, "0")
    return answer


def test_logits_are_float32(ask) -> None:
    found = ask(lambda path, ids: torch.ones(len(ids), 5, dtype=torch.bfloat16))
    assert found["logits"].dtype == torch.float32 and found["logits"].shape == (2, 5)


@pytest.mark.parametrize("error", [ValueError("\n\n a \n b"), SystemExit(3), AssertionError()])
def test_whatever_it_dies_of_is_one_line(ask, error: BaseException) -> None:
    def dies(path: str, ids: list[int]):
        raise error

    said = ask(dies)["error"]
    assert said.startswith(type(error).__name__) and "\n" not in said and "b" not in said[10:]


def test_it_imports_nothing_of_ptq_by_itself() -> None:
    """Or transformers alone would not be asked."""
    source = Path(engine_probe.__file__).read_text()
    top = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert [line for line in top if "ptq" in line] == [] and len(top) == 6
    assert engine_probe.__name__ in sys.modules
