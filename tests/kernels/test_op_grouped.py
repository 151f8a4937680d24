"""Matmuls per expert against float64, for every format, with empty and crowded experts and rows for
nobody."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels.op_grouped import (
    grouped_w4a4,
    grouped_w4a16,
    launch_grouped_w4a4,
    launch_grouped_w4a16,
)
from ptq.kernels.op_inputs import rotate_quantize
from ptq.kernels.operands import Encoding
from ptq.kernels.operator import INTERPRETED
from ptq.kernels.tiles import Tile
from ptq.kernels.weight_tiles import tiled
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import Rotation

if not INTERPRETED:
    pytest.skip("for the interpreter; test_on_gpu.py is for devices", allow_module_level=True)
N, K, TOKENS = 72, 288, 6  # no multiple of any tile
NVFP4 = Encoding("e2m1", "e4m3")
COUNTS = [[3, 0, 20, 1], [0, 0, 0, 5], [16, 16, 17, 0], [1, 1, 1, 1, 1, 0, 0]]


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)


@pytest.fixture
def stack(random_weight, stacked):
    """``make(fmt, experts) -> (dense weights in float64, the packed ones, bias)``."""

    def make(fmt: Format, count: int):
        experts = [random_weight(fmt, N, K, t=0.1 * (e + 1)) for e in range(count)]
        dense = [weight.dequantize().double() for weight, _ in experts]
        return dense, stacked([packed for _, packed in experts]), torch.randn(count, N)

    return make


def reference(
    inputs: torch.Tensor, counts: Sequence[int], dense: list[torch.Tensor], bias: torch.Tensor
):
    """One matmul after the other, of inputs that are sorted by expert."""
    parts = inputs.double().split(list(counts))
    return torch.cat([x @ w.T + b.double() for x, w, b in zip(parts, dense, bias, strict=True)])


def assignments(counts: Sequence[int], *, gather: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which token each assignment reads, and what the operator is told of it."""
    total = sum(counts)
    rows = torch.randint(0, TOKENS, (total,), dtype=torch.int32) if gather else None
    return torch.arange(total) if rows is None else rows, rows


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("gather", [False, True])
def test_every_expert_multiplies_its_own_tokens(fmt: Format, counts, gather, stack) -> None:
    dense, weight, bias = stack(fmt, len(counts))
    token, rows = assignments(counts, gather=gather)
    x = torch.randn(TOKENS if gather else len(token), K).bfloat16()
    y = grouped_w4a16(x, offsets_of(counts), weight, bias, rows)
    assert y.dtype == torch.bfloat16
    assert error(y, reference(x[token], counts, dense, bias)) < 2.0**-8


@pytest.mark.parametrize("gather", [False, True])
def test_experts_in_units_multiply_as_their_rows_do(
    fmt: Format, gather, random_weight, stacked
) -> None:
    counts = [3, 0, 20, 1]
    weight = stacked([random_weight(fmt, 128, 256, t=0.1 * (e + 1))[1] for e in range(4)])
    token, rows = assignments(counts, gather=gather)
    x = torch.randn(TOKENS if gather else len(token), 256).bfloat16()
    of_rows, of_units = (
        grouped_w4a16(x, offsets_of(counts), w, None, rows) for w in (weight, tiled(weight))
    )
    assert error(of_units, of_rows.double()) < 2.0**-8  # another order of columns in the sum


@pytest.mark.parametrize("counts", [[3, 0, 17], [0, 5]], ids=str)
@pytest.mark.parametrize(("swap", "gather"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("name", "scales"),
    [("mxfp4", "per token"), ("nvfp4", "one"), ("nvfp4", "rows"), ("nvfp4", "per token")],
)
def test_quantized_inputs_find_their_expert(name, scales, swap, gather, counts, stack) -> None:
    """Codes, scale bytes and global scales of inputs are gathered alike, whether known or taken per
    token."""
    fmt4 = FORMATS[name]
    dense, weight, bias = stack(fmt4, len(counts))
    token, rows = assignments(counts, gather=gather)
    x = torch.randint(-8, 9, (TOKENS if gather else len(token), K)).bfloat16()
    t = {
        "one": torch.tensor(0.02),
        "rows": torch.rand(len(x), 1) / 10 + 0.01,
        "per token": None,
    }[scales]
    inputs = rotate_quantize(x, 16, Encoding("e2m1", fmt4.scale_name), t)
    of_rows = [None] * len(x) if t is None else t.expand(len(x), 1)[:, 0]
    values = torch.cat(
        [
            quantize_inputs(row[None], fmt4, Rotation(16), scale).dequantize()
            for row, scale in zip(x, of_rows, strict=True)
        ]
    )
    out = torch.full((len(token), N), torch.nan)  # fp32 out: the sums themselves are tested
    tile = Tile(kernel="w4a4", block_m=16, block_n=64, swap=swap, stages=2)
    launch_grouped_w4a4(inputs, offsets_of(counts), weight, bias, rows, out, tile)
    assert error(out, reference(values[token], counts, dense, bias)) < 1e-6


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_beyond_the_last_offset_are_zeros(quantized: bool, stack) -> None:
    """Assignments to nobody are sorted last; 33 of them are three tiles."""
    _, weight, bias = stack(FORMATS["nvfp4"], 3)
    x, offsets = torch.randn(38, K).bfloat16(), offsets_of([2, 0, 3])
    rows, out = torch.arange(38, dtype=torch.int32), torch.full((38, N), torch.nan)
    if quantized:
        inputs = rotate_quantize(x, 16, NVFP4)
        tile = Tile(kernel="w4a4", block_m=16, block_n=64)
        launch_grouped_w4a4(inputs, offsets, weight, bias, rows, out, tile)
    else:
        tile = Tile(kernel="w4a16", block_m=16, block_n=64)
        launch_grouped_w4a16(x, offsets, weight, bias, rows, out, tile)
    assert (out[5:] == 0).all() and out[:5].isfinite().all() and (out[:5] != 0).all()


def test_the_operator_with_quantized_inputs(stack) -> None:
    dense, weight, _ = stack(FORMATS["nvfp4"], 2)
    x, none = torch.randn(5, K).bfloat16(), torch.zeros(2, N)
    y = grouped_w4a4(rotate_quantize(x, 1, NVFP4), offsets_of([4, 1]), weight)
    values = quantize_inputs(x, FORMATS["nvfp4"], Rotation(1)).dequantize()
    assert y.dtype == torch.bfloat16 and error(y, reference(values, [4, 1], dense, none)) < 2.0**-8
    assert grouped_w4a16(x[:0], offsets_of([0, 0]), weight).shape == (0, N)


def test_mistakes_are_named(stack) -> None:
    _, weight, _ = stack(FORMATS["nvfp4"], 2)
    x, offsets = torch.randn(3, K).bfloat16(), offsets_of([2, 1])
    with pytest.raises(ValueError, match="3 int32 offsets"):
        grouped_w4a16(x, offsets.long(), weight)
    with pytest.raises(ValueError, match="a global scale each"):
        grouped_w4a16(x, offsets, replace(weight, global_scale=weight.global_scale[0]))
    with pytest.raises(ValueError, match="must be int32"):
        grouped_w4a16(x, offsets, weight, rows=torch.arange(3))
    with pytest.raises(ValueError, match="do not fit 64 inputs"):
        grouped_w4a16(x[:, :64], offsets, weight)
    blocked = rotate_quantize(x, 16, NVFP4, swizzle=True)
    with pytest.raises(ValueError, match="128 × 4 blocks"):
        grouped_w4a4(blocked, offsets, weight)
    with pytest.raises(ValueError, match="grouped_w4a4: tensor cores multiply e2m1"):
        grouped_w4a4(blocked, offsets, replace(weight, element="int4"))
