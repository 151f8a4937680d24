"""Scale bytes read as words: the same bytes, from rows that begin anywhere."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ptq.kernels import operator
from ptq.kernels.scale_words import bytes_of_words, load_shifted, scale_load

if not operator.INTERPRETED:
    pytest.skip("for the interpreter; test_on_gpu.py is for devices", allow_module_level=True)


@triton.jit
def _shifted(
    in_ptr, out_ptr, first, N, ROWS: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr
):
    row = tl.arange(0, ROWS)
    read = load_shifted(in_ptr + row * ALL, first, row < N, ROWS, GROUPS, ALL)
    tl.store(out_ptr + row[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :], read)


@triton.jit
def _words(in_ptr, out_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    word = tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    read = bytes_of_words(tl.load(in_ptr + word), ROWS, WORDS)
    byte = tl.arange(0, ROWS)[:, None] * (4 * WORDS) + tl.arange(0, 4 * WORDS)[None, :]
    tl.store(out_ptr + byte, read)


# groups in a step and in a row, and where a view begins; a pair of bytes begins at an even one
ROWS_ANYWHERE = [(g, c, o) for g in (4, 8) for c in (45, 90) for o in (0, 1, 2, 3)]
ROWS_ANYWHERE += [(2, 45, o) for o in (0, 1, 2, 3)] + [(2, c, o) for c in (88, 90) for o in (0, 2)]


@pytest.mark.parametrize(("groups", "columns", "offset"), ROWS_ANYWHERE)
def test_rows_that_begin_at_any_byte(groups: int, columns: int, offset: int) -> None:
    """Also of a view that begins at no multiple of four; no byte is promised beyond the end of a
    row."""
    n, rows = 13, 16
    memory = torch.randint(0, 256, (offset + n * columns,), dtype=torch.uint8)
    scales = memory[offset:].view(n, columns)
    for first in range(0, columns, groups):
        out = torch.full((rows, groups), 7, dtype=torch.uint8)
        _shifted[(1,)](scales, out, first, n, ROWS=rows, GROUPS=groups, ALL=columns)
        wanted = scales[:, first : first + groups]
        assert torch.equal(out[:n, : wanted.shape[1]], wanted)
        assert not out[n:].any()


def test_a_word_is_taken_apart_from_its_lowest_byte() -> None:
    memory = torch.randint(0, 256, (16, 8), dtype=torch.uint8)
    out = torch.zeros_like(memory)
    _words[(1,)](memory.view(torch.int32), out, ROWS=16, WORDS=2)
    assert torch.equal(out, memory)


def test_when_a_thread_would_get_less_than_four_bytes() -> None:
    # 128 rows with four groups for 128 threads, and for 256
    assert scale_load(128, 128, 32, 4096, 4) == "bytes"
    assert scale_load(128, 128, 32, 4096, 8) == "words"
    assert scale_load(64, 128, 32, 4096, 4, tiled=True) == "words"
    # gpt-oss: 90 groups of 32 columns in a row, 180 of 16; and two groups to a step
    assert scale_load(128, 128, 32, 2880, 4) == "shifted"
    assert scale_load(128, 128, 16, 2880, 4) == "bytes"
    assert scale_load(64, 64, 32, 4096, 4) == "shifted"
