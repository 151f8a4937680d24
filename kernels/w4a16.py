"""Kernel 2: 4-bit weights times 16-bit activations, y = (x · Ŵᵀ) · t + bias, for few and for
several hundred tokens.

The weights are the left operand (Ŵ xᵀ), so that few tokens fill the narrow side of the tensor core,
and they are read as the checkpoint stores them: words of four bytes (N, K/8), scale bytes
(N, K/group). Inline assembly turns eight codes into 16-bit numbers with 15 integer operations,
which leaves them in another order; a dot sums over K, so x is permuted alike instead. ``order``:

    natural     the conversion instructions of sm_100 and sm_120 keep the columns where they are
                (E2M1 only)
    words       0 4 1 5 2 6 3 7 inside every eight columns; for mma.sync and tcgen05
    fragments   further, the order in which row-major loads already are a register operand of wgmma:
                weights never pass through shared memory (sm_90)

A TILED weight lies in units (``kernels/weight_tiles.py``), and its columns keep their order when
they are unpacked: ``words`` then permutes nothing, and ``fragments`` only what it adds. ORDERED
says that x came in ``fragments`` order already.

K is split over programs when there are few tiles (``kernels/epilogue.py``).
"""
# ruff: noqa: SIM108
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from ptq.kernels.codec import operand_factor, weight_operand, weight_operand_plain
from ptq.kernels.epilogue import finish
from ptq.kernels.scale_words import bytes_of_words, load_shifted

# ---------------------------------------------------------------- orders of rows and columns


@triton.jit
def word_order(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of every eight in the order 0 4 1 5 2 6 3 7, as ``unpack_operand`` delivers them."""
    return x.reshape(ROWS, COLUMNS // 8, 2, 4).permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)


@triton.jit
def fragment_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of the other operand, in word order, as the dot meets them when the weights are
    in fragment order."""
    return (
        x.reshape(ROWS, COLUMNS // 128, 4, 8, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(ROWS, COLUMNS)
    )


@triton.jit
def fragment_weights(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Weights in word order → the order in which row-major 16-byte loads already are a left operand
    of ``wgmma``.

    A warp that reads 8 rows × 4 lanes × 16 bytes has lane = 4 · row + part, which is (row, part) of
    such a fragment. The dot sums over columns, so they may be permuted if the other operand is
    permuted alike; rows are put back when the result is stored. The compiler turns this into a
    renaming of registers: a courtesy, which the compile tests watch.
    """
    x = x.reshape(ROWS // 64, 2, 4, 8, COLUMNS // 128, 4, 8, 2, 2).permute(
        0, 2, 1, 3, 4, 6, 7, 5, 8
    )
    return x.reshape(ROWS, COLUMNS)


@triton.jit
def fragment_rows(x, ROWS: tl.constexpr):
    """Row numbers in the order of :func:`fragment_weights`."""
    return x.reshape(ROWS // 64, 2, 4, 8).permute(0, 2, 1, 3).reshape(ROWS)


# ---------------------------------------------------------------- where a weight lies


@triton.jit
def packed_start(row, K: tl.constexpr, TILED: tl.constexpr):
    """Bytes before row ``row`` (int64) of the codes."""
    if TILED:
        start = (row // 64) * (64 * K // 2) + (row % 64) * 64
    else:
        start = row * (K // 2)
    return start


@triton.jit
def scale_start(row, K: tl.constexpr, GROUP: tl.constexpr, TILED: tl.constexpr):
    """Bytes before row ``row`` (int64) of the scales."""
    if TILED:
        start = (row // 64) * (64 * K // GROUP) + (row % 64) * (128 // GROUP)
    else:
        start = row * (K // GROUP)
    return start


# ---------------------------------------------------------------- kernels


@triton.jit
def accumulate(
    x_rows,
    x_mask,
    packed_rows,
    scale_rows,
    n_mask,
    part,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ORDER: tl.constexpr,
    TILED: tl.constexpr,
    ORDERED: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Σ over part ``part`` of SPLIT of K: fp32 (BLOCK_N, BLOCK_M), weight rows in ORDER, divided by
    ``operand_factor``.

    x_rows, packed_rows, scale_rows: pointers to the beginning of every row of the tile.
    SCALE_LOAD: in what pieces scale bytes are read (``kernels/scale_words.py``).
    """
    half: tl.constexpr = x_rows.dtype.element_ty
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    columns = tl.arange(0, BLOCK_K)
    words = tl.arange(0, BLOCK_K // 8)
    groups = tl.arange(0, GROUPS)
    if TILED:
        # a step is BLOCK_K / 128 units of 64 rows
        tl.static_assert(BLOCK_K % 128 == 0)
        UNIT_GROUPS: tl.constexpr = 128 // GROUP
        WORD_STEP: tl.constexpr = (BLOCK_K // 128) * (64 * 16)
        SCALE_STEP: tl.constexpr = (BLOCK_K // 128) * (64 * UNIT_GROUPS)
        word = (words // 16) * (64 * 16) + words % 16
        scale = (groups // UNIT_GROUPS) * (64 * UNIT_GROUPS) + groups % UNIT_GROUPS
    else:
        WORD_STEP: tl.constexpr = BLOCK_K // 8
        SCALE_STEP: tl.constexpr = GROUPS
        word = words
        scale = groups
    BY_WORDS: tl.constexpr = SCALE_LOAD == "words"
    if BY_WORDS:
        tl.static_assert(GROUPS % 4 == 0)
        scale_words = tl.arange(0, GROUPS // 4)
        if TILED:
            UNIT_WORDS: tl.constexpr = UNIT_GROUPS // 4
            scale = (scale_words // UNIT_WORDS) * (64 * UNIT_WORDS) + scale_words % UNIT_WORDS
        else:
            scale = scale_words
        scale_rows = scale_rows.to(tl.pointer_type(tl.int32), bitcast=True)
        groups = scale_words * 4
    SCALE_PIECE: tl.constexpr = SCALE_STEP // 4 if BY_WORDS else SCALE_STEP
    x_place = x_rows[:, None] + columns[None, :] + part * (STEPS * BLOCK_K)
    word_rows = packed_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    word_place = word_rows[:, None] + word[None, :] + part * (STEPS * WORD_STEP)
    scale_place = scale_rows[:, None] + scale[None, :] + part * (STEPS * SCALE_PIECE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if EVEN_K:
            if EVEN_N:
                packed = tl.load(word_place + step * WORD_STEP)
            else:
                packed = tl.load(word_place + step * WORD_STEP, mask=n_mask[:, None], other=0)
            if SCALE_LOAD != "shifted":
                if EVEN_N:
                    scale_bytes = tl.load(scale_place + step * SCALE_PIECE)
                else:
                    mask = n_mask[:, None]
                    scale_bytes = tl.load(scale_place + step * SCALE_PIECE, mask=mask, other=0)
            x = tl.load(x_place + step * BLOCK_K, mask=x_mask[:, None], other=0.0)
        else:
            start = (part * STEPS + step) * BLOCK_K
            mask = n_mask[:, None] & (start // 8 + words[None, :] < K // 8)
            packed = tl.load(word_place + step * WORD_STEP, mask=mask, other=0)
            if SCALE_LOAD != "shifted":
                mask = n_mask[:, None] & (start // GROUP + groups[None, :] < K // GROUP)
                scale_bytes = tl.load(scale_place + step * SCALE_PIECE, mask=mask, other=0)
            mask = x_mask[:, None] & (start + columns[None, :] < K)
            x = tl.load(x_place + step * BLOCK_K, mask=mask, other=0.0)
        if SCALE_LOAD == "words":
            scale_bytes = bytes_of_words(scale_bytes, BLOCK_N, GROUPS // 4)
        elif SCALE_LOAD == "shifted":
            first = (part * STEPS + step) * GROUPS
            scale_bytes = load_shifted(scale_rows, first, n_mask, BLOCK_N, GROUPS, K // GROUP)
        if INTERPRETED:
            weight = weight_operand_plain(
                packed, scale_bytes, BLOCK_N, BLOCK_K, GROUP, ELEMENT, SCALE, TILED
            )
            if ORDER != "natural" and not TILED:
                weight = word_order(weight, BLOCK_N, BLOCK_K)
            x = x.to(tl.float32)
        else:
            weight = weight_operand(
                packed,
                scale_bytes,
                BLOCK_N,
                BLOCK_K,
                GROUP,
                ELEMENT,
                SCALE,
                half,
                ORDER == "natural",
                TILED,
            )
        if ORDER != "natural" and not TILED:
            x = word_order(x, BLOCK_M, BLOCK_K)
        if ORDER == "fragments":
            weight = fragment_weights(weight, BLOCK_N, BLOCK_K)
            if not ORDERED:
                x = fragment_columns(x, BLOCK_M, BLOCK_K)
        if INTERPRETED:
            acc += tl.dot(weight, x.T, input_precision="ieee")
        else:
            acc = tl.dot(weight, x.T, acc)
    return acc


@triton.jit
def w4a16_kernel(
    x_ptr,
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
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_LOAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT): those of one weight tile are neighbours, so
    it stays in L2."""
    tile_m, tile_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    wide = n.to(tl.int64)
    acc = accumulate(
        x_ptr + m.to(tl.int64) * K,
        m_mask,
        packed_ptr + packed_start(wide, K, TILED),
        scale_ptr + scale_start(wide, K, GROUP, TILED),
        n_mask,
        part,
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
        SPLIT,
        STAGES,
        SCALE_LOAD,
        INTERPRETED,
    )
    row = tl.arange(0, BLOCK_N)
    if ORDER == "fragments":
        row = fragment_rows(row, BLOCK_N)
    n = tile_n * BLOCK_N + row
    n_mask = n < N
    # as many parts in flight as registers hold: of 8, all but two made sm_120 spill (Triton 3.6)
    FEW: tl.constexpr = ORDER == "fragments" or SPLIT * BLOCK_M * BLOCK_N <= 8192 or SPLIT % 2 != 0
    FLIGHT: tl.constexpr = SPLIT if FEW else 2
    factor = tl.load(global_scale_ptr)
    if not INTERPRETED:
        factor = factor * operand_factor(ELEMENT, x_ptr.dtype.element_ty, ORDER == "natural")
    finish(
        acc,
        out_ptr,
        bias_ptr,
        workspace_ptr,
        ticket_ptr,
        tile_n * tl.num_programs(0) + tile_m,
        part,
        m[None, :],
        n[:, None],
        m_mask[None, :],
        n_mask[:, None],
        factor,
        N,
        BLOCK_N,
        BLOCK_M,
        SPLIT,
        FLIGHT,
        HAS_BIAS,
        INTERPRETED,
    )
