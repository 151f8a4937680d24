"""The end of every matmul kernel: sum over programs that share a tile's K, scale, bias, one
rounding, store.

Split-K is deterministic and one launch: every program writes its partial sums to a workspace and
draws a ticket of its tile; the one that draws the last adds all parts in a fixed order and resets
the ticket, so that CUDA graphs can replay the launch. Sums are never added atomically to a 16-bit
output.
"""
# ruff: noqa: SIM108
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from ptq.kernels.codec import round_half


@triton.jit
def store_output(
    acc,
    out_ptr,
    bias_ptr,
    m,
    n,
    m_mask,
    n_mask,
    factor,
    N,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[m, n] = acc · factor + bias[n], rounded once; m, n and their masks broadcast to the shape
    of acc."""
    y = acc * factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    y = round_half(y, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + m.to(tl.int64) * N + n, y, mask=m_mask & n_mask)


@triton.jit
def finish(
    acc,
    out_ptr,
    bias_ptr,
    workspace_ptr,
    ticket_ptr,
    tile,
    part,
    m,
    n,
    m_mask,
    n_mask,
    factor,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    FLIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store the fp32 tile ``acc`` (ROWS, COLUMNS), first adding those of the SPLIT programs that
    share it.

    The workspace holds ROWS · COLUMNS · SPLIT fp32 per tile, the tickets an int32 per tile, 0
    before and after. Of a narrow tile, columns that are masked are neither written nor read (of one
    token in a tile of 16, that is most), and it lies there column by column, each in one piece.
    FLIGHT parts of it are read at a time, in their order. In wider tiles masks take registers: 32 ×
    128 spilled 40 bytes on sm_90.
    """
    if SPLIT == 1:
        store_output(acc, out_ptr, bias_ptr, m, n, m_mask, n_mask, factor, N, HAS_BIAS, INTERPRETED)
    else:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        NARROW: tl.constexpr = COLUMNS <= 16
        if NARROW:
            inside = column * ROWS + row
        else:
            inside = row * COLUMNS + column
        mask = m_mask.broadcast_to(ROWS, COLUMNS)  # rows: all are written, so all may be read
        place = workspace_ptr + tile.to(tl.int64) * (SPLIT * ROWS * COLUMNS) + inside
        if NARROW:
            tl.store(place + part * (ROWS * COLUMNS), acc, mask=mask)
        else:
            tl.store(place + part * (ROWS * COLUMNS), acc)
        # all threads' partial sums are written before one of them draws the ticket
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            if NARROW:
                for first in range(0, SPLIT, FLIGHT):
                    for other in tl.static_range(FLIGHT):
                        part_place = place + (first + other) * (ROWS * COLUMNS)
                        total += tl.load(part_place, mask=mask, other=0.0, cache_modifier=".cg")
            elif ROWS * COLUMNS <= 4096:
                for other in tl.static_range(SPLIT):
                    total += tl.load(place + other * (ROWS * COLUMNS), cache_modifier=".cg")
            else:
                for other in range(0, SPLIT):
                    total += tl.load(place + other * (ROWS * COLUMNS), cache_modifier=".cg")
            store_output(
                total, out_ptr, bias_ptr, m, n, m_mask, n_mask, factor, N, HAS_BIAS, INTERPRETED
            )
            tl.atomic_xchg(ticket_ptr + tile, 0, sem="relaxed")
