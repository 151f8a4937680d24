"""Memory that split-K sums in: scratch and tickets, as ``epilogue.py`` reads them.

A launch leaves its tickets at zero, so launches that follow each other may share a workspace, and
none that may overlap. Outside graphs that is one for each stream, for good. A CUDA graph replays at
any time on any stream, beside another one that was recorded on the same stream; so each recording
has its own, out of the graph's own memory, filled by a node of the graph. It lives there as long as
the graph does; here it is only known until the thread records the next one.
"""

import threading

import torch
from torch import Tensor

from ptq.kernels import gpu
from ptq.kernels.tiles import Tile

# 16 MiB: enough for every row of the tables up to 64 tokens
ELEMENTS, TICKETS = 1 << 22, 1 << 14
Pair = tuple[Tensor, Tensor]
_workspaces: dict[tuple[torch.device, int], Pair] = {}


class _Recording(threading.local):
    """The recording that this thread is in, or was in last, and its workspaces by stream: branches
    of one graph overlap."""

    number = -1

    def __init__(self) -> None:
        self.workspaces: dict[tuple[torch.device, int], Pair] = {}


_recording = _Recording()


def workspace(device: torch.device, elements: int, tickets: int) -> Pair:
    """fp32 scratch and int32 tickets, all zero, of the current stream, or of the graph that it
    records."""
    kept = _workspaces
    if gpu.capturing(device):
        number = gpu.capture_id(device)
        if number != _recording.number:
            _recording.number, _recording.workspaces = number, {}
        kept = _recording.workspaces
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    pair = kept.get((device, stream))
    if pair is None or len(pair[0]) < elements or len(pair[1]) < tickets:
        # one that is too small goes back to the allocator, which knows what the stream still does
        elements, tickets = max(elements, ELEMENTS), max(tickets, TICKETS)
        scratch = torch.empty(elements, dtype=torch.float32, device=device)
        pair = (scratch, torch.zeros(tickets, dtype=torch.int32, device=device))
        kept[device, stream] = pair
    return pair


def split_workspace(out: Tensor, tile: Tile, tiles: int) -> Pair:
    """The workspace of a launch with so many output tiles; if K is not split, ``out`` stands for
    pointers that nobody follows."""
    if tile.split == 1:
        return out, out
    return workspace(out.device, tiles * tile.split * tile.block_m * tile.block_n, tiles)
