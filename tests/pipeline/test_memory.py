"""What there is of memory, and the part of it that statistics may take."""

from pathlib import Path

import pytest
import torch

from ptq.pipeline import memory
from ptq.pipeline.memory import SHARE, free_bytes, machine_bytes, statistics_limit

CPU = torch.device("cpu")


def test_a_container_has_what_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    host = machine_bytes(CPU)
    assert free_bytes(CPU) == host > 1e8
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_bytes(CPU) == host
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    assert (machine_bytes(CPU), free_bytes(CPU)) == (100_000_000, 70_000_000)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   1000 kB\n")
    assert free_bytes(CPU) == 1_024_000


def test_a_process_knows_what_it_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = memory.held_bytes()
    ballast = torch.ones(25_000_000)
    assert memory.held_bytes() - before > 0.9 * ballast.nbytes
    monkeypatch.setattr(memory, "STATM", tmp_path / "none")
    assert memory.held_bytes() == memory.PROGRAM


def test_this_machine_has_memory() -> None:
    assert 0 < free_bytes(CPU) <= machine_bytes(CPU)


def test_statistics_take_what_is_asked_or_a_part_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert statistics_limit(CPU, 5e9) == 5e9
    assert statistics_limit(CPU, None, 1e9) == SHARE * 1e9
    assert statistics_limit(CPU, None, -1e9) == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8e9)
    assert statistics_limit(CPU, None) == SHARE * 8e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert statistics_limit(CPU, None) == SHARE * 2e9
    assert statistics_limit(torch.device("cuda"), None, 8e9) == SHARE * 8e9
