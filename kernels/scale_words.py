"""Scale bytes, four to a load.

Loads that bring less than four bytes to a thread are not made ahead of time: the loop waits for
each of them. A tile has few scale bytes: 64 rows with four groups of 32 columns are two bytes for
each of 128 threads. So where they are too few, or rows of them begin at no multiple of four, they
are read as words of four bytes, and taken apart in registers. ``scale_load`` says which:

    bytes       as they are
    words       four groups to a word
    shifted     the two words that a row's next four groups lie in, which may begin at any byte
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


def scale_load(
    rows: int, block_k: int, group: int, k: int, warps: int, *, tiled: bool = False
) -> str:
    """How the scales of a tile of ``rows`` × ``block_k`` numbers are read by so many ``warps``.

    Args:
        k: columns of the matrix.
        tiled: it lies in units (``kernels/weight_tiles.py``).
    """
    groups, in_row = block_k // group, (128 if tiled else k) // group
    if groups % 4 or in_row % 4:
        return "shifted"
    return "bytes" if rows * groups >= 4 * 32 * warps else "words"


@triton.jit
def bytes_of_words(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 (ROWS, WORDS) → uint8 (ROWS, 4 · WORDS), the lowest byte first."""
    places = tl.arange(0, 4) * 8
    parts = (words[:, :, None] >> places[None, None, :]) & 255
    return parts.reshape(ROWS, WORDS * 4).to(tl.uint8)


@triton.jit
def load_shifted(rows, first, mask, ROWS: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr):
    """uint8 (ROWS, GROUPS): the bytes from ``first`` on of rows of ALL bytes; what lies behind a
    row is what comes next in memory, or 0.

    rows: (ROWS,) pointers to the beginning of rows; mask: (ROWS,) which are read. A word that is
    read holds a byte of a row, so it lies within the allocation. With two groups to a step and an
    even number in a row, rows begin at even bytes.
    """
    address = rows.to(tl.int64) + first
    skipped = (address & 3).to(tl.int32)
    word_ptr = (address - skipped).to(tl.pointer_type(tl.int32))
    bits = (8 * skipped)[:, None].to(tl.uint32)
    if GROUPS == 2 and ALL % 2 == 0:
        # two bytes that begin at an even one lie in one word
        wanted = mask[:, None] & (first - skipped[:, None] < ALL)
        low = tl.load(word_ptr[:, None], mask=wanted, other=0)
        read = (low.to(tl.uint32, bitcast=True) >> bits).to(tl.int32, bitcast=True)
    else:
        if GROUPS <= 4:
            # one load of both words: where layouts change, the compiler does not move two
            word = tl.arange(0, 2)[None, :]
            starts = 4 * word - skipped[:, None]
            wanted = mask[:, None] & (first + starts < ALL) & (starts < GROUPS)
            both = tl.load(word_ptr[:, None] + word, mask=wanted, other=0)
            low, high = tl.split(both)
            low, high = low[:, None], high[:, None]
        else:
            word = tl.arange(0, GROUPS // 4)[None, :]
            starts = 4 * word - skipped[:, None]
            wanted = mask[:, None] & (first + starts < ALL)
            low = tl.load(word_ptr[:, None] + word, mask=wanted, other=0)
            wanted = mask[:, None] & (first + starts + 4 < ALL)
            high = tl.load(word_ptr[:, None] + word + 1, mask=wanted, other=0)
        # a shift by 32 is none
        low = low.to(tl.uint32, bitcast=True) >> bits
        high = (high.to(tl.uint32, bitcast=True) << 1) << (31 - bits)
        read = (low | high).to(tl.int32, bitcast=True)
    places = tl.arange(0, 4 if GROUPS >= 4 else GROUPS) * 8
    parts = (read[:, :, None] >> places[None, None, :]) & 255
    return parts.reshape(ROWS, GROUPS).to(tl.uint8)
