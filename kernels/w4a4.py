"""Kernel 3: 4-bit weights times 4-bit activations on the block-scaled tensor cores of Blackwell
(sm_100, sm_120).

    y = (Σ_groups  s_x · s_w · Σ code_x · code_w) · t_x · t_w + bias

``w4a4_kernel`` reads row-major scale bytes by pointers: few tokens, and every shape on sm_120.
``w4a4_tma_kernel`` is persistent, loads by TMA and wants scales in 128 × 4 blocks
(``swizzle_scales``), for many tokens on sm_100. With fewer than 128 tokens on sm_100 the weights
must be the left operand (SWAP): the other way round Triton falls back to bf16 without a word.
Elsewhere than on Blackwell ``tl.dot_scaled`` is emulated and spills; no table sends
these kernels there.

In Triton's interpreter ``dot_scaled`` is wrong for E4M3 scales, so there the operands are decoded
and multiplied in fp32.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from ptq.kernels.codec import decode, decode_scale, round_half, spread_scales, unpack_codes
from ptq.kernels.epilogue import finish
from ptq.kernels.scale_words import bytes_of_words, load_shifted


@triton.jit
def _decoded(
    packed,
    scale_bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Operand of an interpreted matmul: value · scale in fp32."""
    values = decode(unpack_codes(packed, ROWS, COLUMNS), "e2m1")
    return spread_scales(values, decode_scale(scale_bytes, SCALE), ROWS, COLUMNS, GROUP)


@triton.jit
def _dot_scaled(
    left,
    left_scale,
    right,
    right_scale,
    acc,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + left · rightᵀ of packed E2M1 codes (ROWS, K/2), (COLUMNS, K/2) and their scale bytes
    (·, K/GROUP)."""
    if INTERPRETED:
        left = _decoded(left, left_scale, ROWS, K, GROUP, SCALE)
        right = _decoded(right, right_scale, COLUMNS, K, GROUP, SCALE)
        acc += tl.dot(left, right.T, input_precision="ieee")
    else:
        acc = tl.dot_scaled(left, left_scale, "e2m1", right.T, right_scale, "e2m1", acc)
    return acc


@triton.jit
def _scales(
    scale_ptr,
    row,
    mask,
    first,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL: tl.constexpr,
    LOAD: tl.constexpr,
):
    """Scales (ROWS, GROUPS) of the groups from ``first`` on, of rows with ALL of them, read in the
    pieces that LOAD says (``kernels/scale_words.py``)."""
    kind: tl.constexpr = scale_ptr.dtype.element_ty
    if LOAD == "bytes":
        groups = first + tl.arange(0, GROUPS)[None, :]
        mask = mask & (groups < ALL)
        scales = tl.load(scale_ptr + row * ALL + groups, mask=mask, other=0.0)
    elif LOAD == "words":
        words = first // 4 + tl.arange(0, GROUPS // 4)[None, :]
        word_ptr = scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        mask = mask & (words < ALL // 4)
        read = tl.load(word_ptr + row * (ALL // 4) + words, mask=mask, other=0)
        scales = bytes_of_words(read, ROWS, GROUPS // 4).to(kind, bitcast=True)
    else:
        rows = (scale_ptr + row * ALL).reshape(ROWS)
        scales = load_shifted(rows, first, mask.reshape(ROWS), ROWS, GROUPS, ALL)
        scales = scales.to(kind, bitcast=True)
    return scales


@triton.jit
def accumulate(
    x_ptr,
    x_scale_ptr,
    packed_ptr,
    scale_ptr,
    x_row,
    w_row,
    x_mask,
    w_mask,
    part,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    X_SCALE_LOAD: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Σ over part ``part`` of SPLIT of K, without global scales: fp32 (BLOCK_M, BLOCK_N), turned
    around if SWAP.

    x_row, w_row: int64 (·, 1), which rows of the inputs and of the weight the tile has; x_mask,
    w_mask: those it reads.
    """
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        halves = (part * STEPS + step) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
        x_ok, w_ok = x_mask, w_mask
        if not EVEN_K:
            x_ok, w_ok = x_mask & (halves < K // 2), w_mask & (halves < K // 2)
        x = tl.load(x_ptr + x_row * (K // 2) + halves, mask=x_ok, other=0)
        w = tl.load(packed_ptr + w_row * (K // 2) + halves, mask=w_ok, other=0)
        first = (part * STEPS + step) * GROUPS
        x_scale = _scales(
            x_scale_ptr, x_row, x_mask, first, BLOCK_M, GROUPS, K // GROUP, X_SCALE_LOAD
        )
        w_scale = _scales(scale_ptr, w_row, w_mask, first, BLOCK_N, GROUPS, K // GROUP, SCALE_LOAD)
        if SWAP:
            acc = _dot_scaled(
                w, w_scale, x, x_scale, acc, BLOCK_N, BLOCK_M, BLOCK_K, GROUP, SCALE, INTERPRETED
            )
        else:
            acc = _dot_scaled(
                x, x_scale, w, w_scale, acc, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SCALE, INTERPRETED
            )
    return acc


@triton.jit
def w4a4_kernel(
    x_ptr,
    x_scale_ptr,
    x_global_ptr,
    packed_ptr,
    scale_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    workspace_ptr,
    ticket_ptr,
    M,
    N,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    X_SCALE_LOAD: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT). E4M3 scales are fp8 pointers (bytes when
    interpreted).

    INPUT_SCALE: the inputs have no global scale ("none"), one ("tensor") or one each ("token").
    """
    tile_m, tile_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = accumulate(
        x_ptr,
        x_scale_ptr,
        packed_ptr,
        scale_ptr,
        m.to(tl.int64)[:, None],
        n.to(tl.int64)[:, None],
        (m < M)[:, None],
        (n < N)[:, None],
        part,
        K,
        SCALE,
        GROUP,
        SWAP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPLIT,
        STAGES,
        X_SCALE_LOAD,
        SCALE_LOAD,
        INTERPRETED,
    )
    ROWS: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    COLUMNS: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    if SWAP:
        m, n = m[None, :], n[:, None]
    else:
        m, n = m[:, None], n[None, :]
    factor = tl.load(global_scale_ptr)
    if INPUT_SCALE == "token":
        factor = factor * tl.load(x_global_ptr + m, mask=m < M, other=0.0)
    elif INPUT_SCALE == "tensor":
        factor = factor * tl.load(x_global_ptr)
    FLIGHT: tl.constexpr = 4 if SPLIT * ROWS * COLUMNS > 8192 and SPLIT % 4 == 0 else SPLIT
    finish(
        acc,
        out_ptr,
        bias_ptr,
        workspace_ptr,
        ticket_ptr,
        tile_n * tl.num_programs(0) + tile_m,
        part,
        m,
        n,
        m < M,
        n < N,
        factor,
        N,
        ROWS,
        COLUMNS,
        SPLIT,
        FLIGHT,
        HAS_BIAS,
        INTERPRETED,
    )


@triton.jit
def _blocked_scales(descriptor, block, tile, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Scales (ROWS, 4 · TILES) out of 128 × 4 blocks, whose 512 bytes are [row % 32][row //
    32][group]."""
    blocks = descriptor.load([block, tile, 0, 0]).reshape(ROWS // 128, TILES, 32, 4, 4)
    return blocks.permute(0, 3, 2, 1, 4).reshape(ROWS, TILES * 4)


@triton.jit
def _store_half(
    acc,
    out_desc,
    out_ptr,
    bias_ptr,
    m,
    n,
    factor,
    N,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[m …, n …] = acc · factor[row] + bias[column], rounded once, by TMA."""
    y = acc * factor[:, None]
    if HAS_BIAS:
        columns = n + tl.arange(0, COLUMNS)
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out_desc.store([m, n], round_half(y, out_ptr.dtype.element_ty, INTERPRETED))


@triton.jit
def w4a4_tma_kernel(
    x_ptr,
    x_scale_ptr,
    x_global_ptr,
    packed_ptr,
    scale_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (PROGRAMS,). Both scales in 128 × 4 blocks; BLOCK_M and BLOCK_N multiples of 128,
    K/GROUP of 4, N of 8.

    Tiles run down M first, within bands of GROUP_ROWS of them, so that those that run at the same
    time are about as many rows as columns and read the least. Tails are TMA's: it reads zeros
    outside a tensor and does not write there.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K // 2], [K // 2, 1], [BLOCK_M, BLOCK_K // 2])
    w_desc = tl.make_tensor_descriptor(
        packed_ptr, [N, K // 2], [K // 2, 1], [BLOCK_N, BLOCK_K // 2]
    )
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])
    TILES: tl.constexpr = BLOCK_K // GROUP // 4
    ALL: tl.constexpr = K // GROUP // 4
    # a block is described as two halves of 256 bytes: no side of a TMA box may be longer
    x_blocks, w_blocks = (M + 127) // 128, (N + 127) // 128
    xs_desc = tl.make_tensor_descriptor(
        x_scale_ptr,
        [x_blocks, ALL, 2, 256],
        [ALL * 512, 512, 256, 1],
        [BLOCK_M // 128, TILES, 2, 256],
    )
    ws_desc = tl.make_tensor_descriptor(
        scale_ptr,
        [w_blocks, ALL, 2, 256],
        [ALL * 512, 512, 256, 1],
        [BLOCK_N // 128, TILES, 2, 256],
    )
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles, band = rows * columns, GROUP_ROWS * columns
    global_scale = tl.load(global_scale_ptr)
    for tile in tl.range(
        tl.program_id(0),
        tiles,
        PROGRAMS,
        flatten=True,
        warp_specialize=WARP_SPECIALIZE,
        disallow_acc_multi_buffer=True,
    ):
        first = tile // band * GROUP_ROWS
        height = tl.minimum(rows - first, GROUP_ROWS)
        tile_m, tile_n = first + tile % band % height, tile % band // height
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(
            0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES, disallow_acc_multi_buffer=True
        ):
            x = x_desc.load([tile_m * BLOCK_M, step * (BLOCK_K // 2)])
            w = w_desc.load([tile_n * BLOCK_N, step * (BLOCK_K // 2)])
            x_scale = _blocked_scales(
                xs_desc, tile_m * (BLOCK_M // 128), step * TILES, BLOCK_M, TILES
            )
            w_scale = _blocked_scales(
                ws_desc, tile_n * (BLOCK_N // 128), step * TILES, BLOCK_N, TILES
            )
            acc = _dot_scaled(
                x, x_scale, w, w_scale, acc, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SCALE, INTERPRETED
            )
        factor = tl.zeros((BLOCK_M,), tl.float32) + global_scale
        if INPUT_SCALE == "token":
            m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            factor = factor * tl.load(x_global_ptr + m, mask=m < M, other=0.0)
        elif INPUT_SCALE == "tensor":
            factor = factor * tl.load(x_global_ptr)
        # stored in two halves: one piece of 128 × 256 with a bias needs more registers than there
        # are
        left, right = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
        n = tile_n * BLOCK_N
        _store_half(
            left,
            out_desc,
            out_ptr,
            bias_ptr,
            tile_m * BLOCK_M,
            n,
            factor,
            N,
            BLOCK_N // 2,
            HAS_BIAS,
            INTERPRETED,
        )
        n += BLOCK_N // 2
        _store_half(
            right,
            out_desc,
            out_ptr,
            bias_ptr,
            tile_m * BLOCK_M,
            n,
            factor,
            N,
            BLOCK_N // 2,
            HAS_BIAS,
            INTERPRETED,
        )
