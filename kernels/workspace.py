"""Memory that split-K sums in: scratch and tickets, as ``epilogue.py`` reads them.

Both live as long as the process, one set per device and stream: a captured CUDA graph may replay at
any time.
"""

import torch
from torch import Tensor

from ptq.kernels.tiles import Tile

# 16 MiB: enough for every row of the tables up to 64 tokens
ELEMENTS, TICKETS = 1 << 22, 1 << 14
_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
_outgrown: list[tuple[Tensor, Tensor]] = []  # captured graphs may still write there


def workspace(device: torch.device, elements: int, tickets: int) -> tuple[Tensor, Tensor]:
    """fp32 scratch and int32 tickets, all zero, of the current stream; allocated on first use: run
    once before capturing."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    pair = _workspaces.get((device, stream))
    if pair is None or len(pair[0]) < elements or len(pair[1]) < tickets:
        if pair is not None:
            _outgrown.append(pair)
        elements, tickets = max(elements, ELEMENTS), max(tickets, TICKETS)
        scratch = torch.empty(elements, dtype=torch.float32, device=device)
        pair = (scratch, torch.zeros(tickets, dtype=torch.int32, device=device))
        _workspaces[device, stream] = pair
    return pair


def split_workspace(out: Tensor, tile: Tile, tiles: int) -> tuple[Tensor, Tensor]:
    """The workspace of a launch with so many output tiles; if K is not split, ``out`` stands for
    pointers that nobody follows."""
    if tile.split == 1:
        return out, out
    return workspace(out.device, tiles * tile.split * tile.block_m * tile.block_n, tiles)
