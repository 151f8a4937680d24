"""``ptq serve``: the command that it prints is the command that it runs."""

import os
import shlex
from pathlib import Path

import pytest
from command_line import Run

from ptq.runtime import serving


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What was executed."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
    return calls


def test_the_command_is_printed_and_run(ptq: Run, ran, tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(serving, "find_program", lambda name: f"/a place/{name}")
    result = ptq("serve", tiny_llama, "--port", 81, "--", "--max-model-len", 64)
    assert result.code == 0 and result.err == ""
    (program, command), *rest = ran
    assert rest == [] and program == "/a place/vllm"
    assert shlex.split(result.out) == command
    assert command[1:3] == ["serve", str(tiny_llama)]
    assert command[-4:] == ["--port", "81", "--max-model-len", "64"]


def test_a_dry_run_runs_nothing(ptq: Run, ran, tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(serving, "find_program", lambda name: None)
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    result = ptq("serve", tiny_llama, "--dry-run")
    assert ran == [] and "import ptq.hf" in result.out
    assert result.err == "served by transformers, slowly: vLLM is not installed\n"


def test_without_a_server_it_says_what_to_install(ptq: Run, ran, tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(serving, "find_program", lambda name: None)
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert "pip install 'transformers[serving]'" in ptq("serve", tiny_llama).error
    assert ran == []
