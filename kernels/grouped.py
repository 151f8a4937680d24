"""Kernels 2 and 3 for a list of experts: rows offsets[e] … offsets[e+1] − 1 of the output use the
weights of expert e.

Rows offsets[EXPERTS] … M − 1 belong to nobody and become zeros. Grid (cdiv(N, BLOCK_N), an upper
bound of Σ cdiv(count, BLOCK_M)): how many rows an expert got stays on the device, each program
finds its expert by a prefix sum over the counts, and programs beyond the last tile leave at once.
With GATHER row i of the output reads row rows[i] of the inputs, otherwise row i. POWER: a power of
two above EXPERTS.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: SIM108

import triton
import triton.language as tl

from ptq.kernels.codec import operand_factor
from ptq.kernels.epilogue import store_output
from ptq.kernels.w4a4 import accumulate as accumulate_w4a4
from ptq.kernels.w4a16 import accumulate as accumulate_w4a16
from ptq.kernels.w4a16 import fragment_rows, packed_start, scale_start


@triton.jit
def _locate(
    offsets_ptr, tile, M, EXPERTS: tl.constexpr, POWER: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(expert, its first row in this tile, where its rows end) of tile number ``tile``.

    Nobody is expert EXPERTS; tiles beyond its rows have a greater one.
    """
    ids = tl.arange(0, POWER)
    real = ids <= EXPERTS
    begins = tl.load(offsets_ptr + ids, mask=real, other=0)
    ends = tl.load(offsets_ptr + ids + 1, mask=ids < EXPERTS, other=0)
    ends = tl.where(ids == EXPERTS, M, ends)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    passed = real & (tl.cumsum(tiles, 0) <= tile)
    expert = tl.sum(passed.to(tl.int32), 0)
    before = tl.sum(tl.where(passed, tiles, 0), 0)
    first = (
        tl.load(offsets_ptr + expert, mask=expert <= EXPERTS, other=0) + (tile - before) * BLOCK_M
    )
    end = tl.load(offsets_ptr + expert + 1, mask=expert < EXPERTS, other=M)
    return expert, first, end


@triton.jit
def _store_zeros(out_ptr, first, end, tile_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows first … end − 1 of a tile of ``out``."""
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32).to(out_ptr.dtype.element_ty)
    place = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, zeros, mask=(m < end)[:, None] & (n < N)[None, :])


@triton.jit
def grouped_w4a16_kernel(
    x_ptr,
    rows_ptr,
    offsets_ptr,
    packed_ptr,
    scale_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    EXPERTS: tl.constexpr,
    POWER: tl.constexpr,
    GATHER: tl.constexpr,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ORDER: tl.constexpr,
    TILED: tl.constexpr,
    ORDERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """16-bit inputs; weights (EXPERTS, N, K/2) and their scale bytes as in ``w4a16_kernel``."""
    tile_n = tl.program_id(0)
    expert, first, end = _locate(offsets_ptr, tl.program_id(1), M, EXPERTS, POWER, BLOCK_M)
    if expert == EXPERTS:
        _store_zeros(out_ptr, first, end, tile_n, N, BLOCK_M, BLOCK_N)
    if expert < EXPERTS:
        m = first + tl.arange(0, BLOCK_M)
        m_mask = m < end
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if GATHER:
            x_row = tl.load(rows_ptr + m, mask=m_mask, other=0)
        else:
            x_row = m
        weight_row = expert.to(tl.int64) * N + n
        acc = accumulate_w4a16(
            x_ptr + x_row.to(tl.int64) * K,
            m_mask,
            packed_ptr + packed_start(weight_row, K, TILED),
            scale_ptr + scale_start(weight_row, K, GROUP, TILED),
            n < N,
            0,
            K,
            ELEMENT,
            SCALE,
            GROUP,
            ORDER,
            TILED,
            ORDERED,
            EVEN_N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            1,
            STAGES,
            SCALE_LOAD,
            INTERPRETED,
        )
        row = tl.arange(0, BLOCK_N)
        if ORDER == "fragments":
            row = fragment_rows(row, BLOCK_N)
        out_n = tile_n * BLOCK_N + row
        factor = tl.load(global_scale_ptr + expert)
        if not INTERPRETED:
            factor = factor * operand_factor(ELEMENT, x_ptr.dtype.element_ty, ORDER == "natural")
        store_output(
            acc,
            out_ptr,
            bias_ptr + expert * N,
            m[None, :],
            out_n[:, None],
            m_mask[None, :],
            (out_n < N)[:, None],
            factor,
            N,
            HAS_BIAS,
            INTERPRETED,
        )


@triton.jit
def grouped_w4a4_kernel(
    x_ptr,
    x_scale_ptr,
    x_global_ptr,
    rows_ptr,
    offsets_ptr,
    packed_ptr,
    scale_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    EXPERTS: tl.constexpr,
    POWER: tl.constexpr,
    GATHER: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    X_SCALE_LOAD: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """4-bit inputs (rows of codes, of scale bytes and of global scales are gathered alike); as in
    ``w4a4_kernel``."""
    tile_n = tl.program_id(0)
    expert, first, end = _locate(offsets_ptr, tl.program_id(1), M, EXPERTS, POWER, BLOCK_M)
    if expert == EXPERTS:
        _store_zeros(out_ptr, first, end, tile_n, N, BLOCK_M, BLOCK_N)
    if expert < EXPERTS:
        m = first + tl.arange(0, BLOCK_M)
        m_mask = m < end
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        if GATHER:
            x_row = tl.load(rows_ptr + m, mask=m_mask, other=0)
        else:
            x_row = m
        acc = accumulate_w4a4(
            x_ptr,
            x_scale_ptr,
            packed_ptr,
            scale_ptr,
            x_row.to(tl.int64)[:, None],
            (expert.to(tl.int64) * N + n)[:, None],
            m_mask[:, None],
            n_mask[:, None],
            0,
            K,
            SCALE,
            GROUP,
            SWAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            1,
            STAGES,
            X_SCALE_LOAD,
            SCALE_LOAD,
            INTERPRETED,
        )
        factor = tl.zeros((BLOCK_M,), tl.float32) + tl.load(global_scale_ptr + expert)
        if INPUT_SCALE == "token":
            factor = factor * tl.load(x_global_ptr + x_row, mask=m_mask, other=0.0)
        elif INPUT_SCALE == "tensor":
            factor = factor * tl.load(x_global_ptr)
        if SWAP:
            store_output(
                acc,
                out_ptr,
                bias_ptr + expert * N,
                m[None, :],
                n[:, None],
                m_mask[None, :],
                n_mask[:, None],
                factor[None, :],
                N,
                HAS_BIAS,
                INTERPRETED,
            )
        else:
            store_output(
                acc,
                out_ptr,
                bias_ptr + expert * N,
                m[:, None],
                n[None, :],
                m_mask[:, None],
                n_mask[None, :],
                factor[:, None],
                N,
                HAS_BIAS,
                INTERPRETED,
            )
