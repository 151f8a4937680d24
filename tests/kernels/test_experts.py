"""Matmuls per expert against float64, for every format, with empty and crowded experts and rows for
nobody."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels import experts, launch, ops
from ptq.kernels.dispatch import Tile
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import Rotation

if not launch.INTERPRETED:
    pytest.skip("for the interpreter; test_gpu.py is for devices", allow_module_level=True)
N, K, TOKENS = 72, 288, 6  # no multiple of any tile
COUNTS = [[3, 0, 20, 1], [0, 0, 0, 5], [16, 16, 17, 0], [1, 1, 1, 1, 1, 0, 0]]


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)


@pytest.fixture
def stack(random_weight):
    """``make(fmt, experts) -> (dense weights in float64, (packed, scale bytes, global scales),
    bias)``."""

    def make(fmt: Format, count: int):
        made = [random_weight(fmt, N, K, t=0.1 * (e + 1)) for e in range(count)]
        tensors = (
            torch.stack([packed for _, packed in made]),
            torch.stack([weight.scales.bits for weight, _ in made]),
            torch.stack([weight.scales.global_scale for weight, _ in made]),
        )
        return [weight.dequantize().double() for weight, _ in made], tensors, torch.randn(count, N)

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
def test_every_expert_multiplies_its_own_tokens(
    fmt: Format, counts, gather, stack, scale_kind
) -> None:
    dense, weight, bias = stack(fmt, len(counts))
    token, rows = assignments(counts, gather=gather)
    x = torch.randn(TOKENS if gather else len(token), K).bfloat16()
    y = experts.grouped_w4a16(
        x, offsets_of(counts), *weight, fmt.element.name, scale_kind(fmt), bias, rows
    )
    assert (
        y.dtype == torch.bfloat16 and error(y, reference(x[token], counts, dense, bias)) < 2.0**-8
    )


@pytest.mark.parametrize("counts", [[3, 0, 17], [0, 5]], ids=str)
@pytest.mark.parametrize(("swap", "gather"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("name", "scales"),
    [("mxfp4", "taken"), ("nvfp4", "tensor"), ("nvfp4", "rows"), ("nvfp4", "taken")],
)
def test_quantized_inputs_find_their_expert(
    name, scales, swap, gather, counts, stack, scale_kind
) -> None:
    """Codes, scale bytes and global scales of inputs are gathered alike, whether given or taken per
    token."""
    fmt4 = FORMATS[name]
    kind, (dense, weight, bias) = scale_kind(fmt4), stack(fmt4, len(counts))
    token, rows = assignments(counts, gather=gather)
    x = torch.randint(-8, 9, (TOKENS if gather else len(token), K)).bfloat16()
    given = {
        "tensor": torch.tensor(0.02),
        "rows": torch.rand(len(x), 1) / 10 + 0.01,
        "taken": None,
    }[scales]
    inputs = ops.rotate_quantize(x, 16, "e2m1", kind, given)
    values = torch.cat([
        quantize_inputs(row[None], fmt4, Rotation(16), t).dequantize()
        for row, t in zip(x, [None] * len(x) if given is None else given.expand(len(x), 1)[:, 0], strict=True)
    ])  # fmt: skip
    out = torch.full((len(token), N), torch.nan)  # fp32 out: the sums themselves are tested
    tile = Tile(kernel="w4a4", block_m=16, block_n=64, swap=swap, stages=2)
    experts.launch_w4a4(*inputs, offsets_of(counts), *weight, bias, rows, out, kind, tile)
    assert error(out, reference(values[token], counts, dense, bias)) < 1e-6


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_beyond_the_last_offset_are_zeros(quantized: bool, stack) -> None:
    """Assignments to nobody are sorted last; 33 of them are three tiles."""
    _, weight, bias = stack(FORMATS["nvfp4"], 3)
    x, offsets, rows = (
        torch.randn(38, K).bfloat16(),
        offsets_of([2, 0, 3]),
        torch.arange(38, dtype=torch.int32),
    )
    out = torch.full((38, N), torch.nan)
    if quantized:
        inputs = ops.rotate_quantize(x, 16, "e2m1", "e4m3")
        tile = Tile(kernel="w4a4", block_m=16, block_n=64)
        experts.launch_w4a4(*inputs, offsets, *weight, bias, rows, out, "e4m3", tile)
    else:
        tile = Tile(kernel="w4a16", block_m=16, block_n=64)
        experts.launch_w4a16(x, offsets, *weight, bias, rows, out, "e2m1", "e4m3", tile)
    assert (out[5:] == 0).all() and out[:5].isfinite().all() and (out[:5] != 0).all()


def test_the_operator_with_quantized_inputs(stack) -> None:
    dense, weight, _ = stack(FORMATS["nvfp4"], 2)
    x, none = torch.randn(5, K).bfloat16(), torch.zeros(2, N)
    inputs = ops.rotate_quantize(x, 1, "e2m1", "e4m3")
    y = experts.grouped_w4a4(inputs, offsets_of([4, 1]), *weight, "e4m3")
    values = quantize_inputs(x, FORMATS["nvfp4"], Rotation(1)).dequantize()
    assert y.dtype == torch.bfloat16 and error(y, reference(values, [4, 1], dense, none)) < 2.0**-8
    assert experts.grouped_w4a16(x[:0], offsets_of([0, 0]), *weight, "e2m1", "e4m3").shape == (0, N)


def test_mistakes_are_named(stack) -> None:
    _, (packed, bits, t), _ = stack(FORMATS["nvfp4"], 2)
    x, offsets = torch.randn(3, K).bfloat16(), offsets_of([2, 1])
    with pytest.raises(ValueError, match="3 int32 offsets"):
        experts.grouped_w4a16(x, offsets.long(), packed, bits, t, "e2m1", "e4m3")
    with pytest.raises(ValueError, match="a global scale each"):
        experts.grouped_w4a16(x, offsets, packed, bits, t[0], "e2m1", "e4m3")
    with pytest.raises(ValueError, match="must be int32"):
        experts.grouped_w4a16(x, offsets, packed, bits, t, "e2m1", "e4m3", rows=torch.arange(3))
    with pytest.raises(ValueError, match="do not fit 64 inputs"):
        experts.grouped_w4a16(x[:, :64], offsets, packed, bits, t, "e2m1", "e4m3")
    blocked = ops.rotate_quantize(x, 16, "e2m1", "e4m3", swizzle=True)
    with pytest.raises(ValueError, match="128 × 4 blocks"):
        experts.grouped_w4a4(blocked, offsets, packed, bits, t, "e4m3")
