"""Scratch and tickets of split-K: kept, grown, and each recording of a graph has its own."""

import threading

import pytest
import torch

from ptq.kernels import gpu, workspace
from ptq.kernels.tiles import Tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "ELEMENTS", 64)
    monkeypatch.setattr(workspace, "TICKETS", 4)
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "_recording", workspace._Recording())


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch):
    """Call it with a number: that graph is recorded from now on; with None: none is."""

    def record(number: int | None) -> None:
        monkeypatch.setattr(gpu, "capturing", lambda device: number is not None)
        monkeypatch.setattr(gpu, "capture_id", lambda device: number)

    return record


def is_same(these: workspace.Pair, those: workspace.Pair) -> bool:
    return all(a is b for a, b in zip(these, those, strict=True))


def test_it_is_kept_until_it_is_too_small() -> None:
    scratch, tickets = workspace.workspace(CPU, 10, 1)
    assert (len(scratch), len(tickets)) == (64, 4) and not tickets.any()
    assert is_same(workspace.workspace(CPU, 64, 4), (scratch, tickets))
    larger, more = workspace.workspace(CPU, 65, 9)
    assert (len(larger), len(more)) == (65, 9) and not more.any()


def test_every_recording_has_its_own(recording) -> None:
    outside = workspace.workspace(CPU, 1, 1)
    recording(1)
    first = workspace.workspace(CPU, 1, 1)
    assert is_same(workspace.workspace(CPU, 1, 1), first), "one fill for all layers of a graph"
    recording(2)
    second = workspace.workspace(CPU, 1, 1)
    recording(None)
    assert is_same(workspace.workspace(CPU, 1, 1), outside)
    pairs = [outside, first, second]
    assert len({t.data_ptr() for pair in pairs for t in pair}) == 6


def test_threads_that_record_share_none(recording) -> None:
    recording(1)
    mine, others = workspace.workspace(CPU, 1, 1), []
    thread = threading.Thread(target=lambda: others.append(workspace.workspace(CPU, 1, 1)))
    thread.start()
    thread.join()
    assert not is_same(mine, others[0])
    assert is_same(workspace.workspace(CPU, 1, 1), mine)


def test_a_launch_that_does_not_split_needs_none() -> None:
    out, tile = torch.empty(2, 2), Tile(kernel="w4a16", block_m=16, block_n=64)
    assert all(t is out for t in workspace.split_workspace(out, tile, 3))
    assert not workspace._workspaces
    split = Tile(kernel="w4a16", block_m=16, block_n=64, split=2)
    scratch, tickets = workspace.split_workspace(out, split, 3)
    assert len(scratch) == 3 * 2 * 16 * 64 and len(tickets) == 4
