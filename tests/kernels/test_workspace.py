"""Scratch and tickets of split-K: kept, grown, and never taken from a graph that may replay."""

import pytest
import torch

from ptq.kernels import workspace
from ptq.kernels.tiles import Tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "ELEMENTS", 64)
    monkeypatch.setattr(workspace, "TICKETS", 4)
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "_outgrown", [])


def test_it_is_kept_until_it_is_too_small() -> None:
    scratch, tickets = workspace.workspace(CPU, 10, 1)
    assert (len(scratch), len(tickets)) == (64, 4) and not tickets.any()
    assert all(
        a is b for a, b in zip(workspace.workspace(CPU, 64, 4), (scratch, tickets), strict=True)
    )
    larger, more = workspace.workspace(CPU, 65, 9)
    assert (len(larger), len(more)) == (65, 9) and not more.any()
    assert workspace._outgrown == [(scratch, tickets)], "a captured graph may still write there"


def test_a_launch_that_does_not_split_needs_none() -> None:
    out, tile = torch.empty(2, 2), Tile(kernel="w4a16", block_m=16, block_n=64)
    assert all(t is out for t in workspace.split_workspace(out, tile, 3))
    assert not workspace._workspaces
    split = Tile(kernel="w4a16", block_m=16, block_n=64, split=2)
    scratch, tickets = workspace.split_workspace(out, split, 3)
    assert len(scratch) == 3 * 2 * 16 * 64 and len(tickets) == 4
