"""Matmul kernels against float64, for every format, order of columns, number of splits and odd
shapes."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels import gpu, op_matmul, operator
from ptq.kernels.op_dequantize import dequantize_fp8
from ptq.kernels.op_inputs import rotate, rotate_fp8, rotate_quantize
from ptq.kernels.op_matmul import (
    NEW_ASSEMBLER,
    launch_w4a4,
    launch_w4a16,
    w4a4_matmul,
    w4a8_matmul,
    w4a16_matmul,
    wants_blocked_scales,
)
from ptq.kernels.operands import Encoding, PackedWeight, QuantizedInputs
from ptq.kernels.quantize import swizzle_scales
from ptq.kernels.tiles import Tile
from ptq.kernels.weight_tiles import tiled
from ptq.kernels.workspace import workspace
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import Rotation
from ptq.runtime.quant_linear import QuantLinear

if not operator.INTERPRETED:
    pytest.skip("for the interpreter; test_on_gpu.py is for devices", allow_module_level=True)
runtime_bounds = pytest.mark.skipif(
    not NEW_ASSEMBLER, reason="the interpreter of Triton 3.6 fails at run-time loop bounds"
)
FP4 = [FORMATS["mxfp4"], FORMATS["nvfp4"]]


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def run_w4a16(tile: Tile, x: torch.Tensor, packed: PackedWeight, bias=None) -> torch.Tensor:
    # fp32 out: the sums themselves are tested
    out = torch.full((len(x), packed.out_features), torch.nan)
    launch_w4a16(x, packed, bias, out, tile)
    return out


@pytest.mark.parametrize("order", ["natural", "words", "fragments"])
@pytest.mark.parametrize(
    ("m", "n", "k", "split"), [(1, 64, 256, 1), (17, 128, 512, 4), (33, 104, 608, 2)]
)
def test_w4a16_is_the_product_with_the_dequantized_weight(
    fmt: Format, order, m, n, k, split, random_weight
) -> None:
    weight, packed = random_weight(fmt, n, k)
    x = torch.randn(m, k).bfloat16()
    bias = torch.randn(n, 2).bfloat16()[:, 0]  # every other number of its memory
    tile = Tile(
        kernel="w4a16", block_m=16, block_n=64, block_k=128, split=split, order=order, stages=2
    )
    y = run_w4a16(tile, x, packed, bias)
    assert error(y, x.double() @ weight.dequantize().double().T + bias.double()) < 1e-6


@pytest.mark.parametrize("order", ["natural", "words", "fragments"])
@pytest.mark.parametrize(
    ("m", "n", "k", "split", "block_m"),
    [
        (1, 64, 256, 1, 16),
        (17, 192, 512, 4, 16),
        (3, 128, 640, 2, 16),
        (2, 128, 1024, 8, 16),
        (70, 192, 256, 2, 64),
    ],
)
def test_w4a16_of_a_weight_in_units_is_that_of_its_rows(
    fmt: Format, order, m, n, k, split, block_m, random_weight
) -> None:
    _, packed = random_weight(fmt, n, k)
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n)
    tile = Tile(kernel="w4a16", block_m=block_m, block_n=128, split=split, order=order, stages=2)
    y = run_w4a16(tile, x, tiled(packed), bias)
    assert error(y, run_w4a16(tile, x, packed, bias).double()) < 1e-6


def test_split_k_is_deterministic_and_leaves_its_tickets_at_zero(
    fmt: Format, random_weight
) -> None:
    _, packed = random_weight(fmt, 128, 2048)
    x = torch.randn(9, 2048).bfloat16()
    tile = Tile(kernel="w4a16", block_m=16, block_n=64, split=8, stages=2)
    first = run_w4a16(tile, x, packed)
    scratch, tickets = workspace(x.device, 1, 1)
    assert not tickets.any()
    scratch.fill_(torch.nan)  # nothing of an earlier run may be read
    assert torch.equal(run_w4a16(tile, x, packed), first)


def test_w4a16_in_float16(random_weight) -> None:
    weight, packed = random_weight(FORMATS["nvfp4"], 64, 512)
    x = torch.randn(5, 512).half()
    y = w4a16_matmul(x, packed)
    assert y.dtype == torch.float16
    reference = x.double() @ weight.dequantize().double().T
    assert error(y, reference) < 2.0**-11


@pytest.mark.parametrize(
    ("order", "block_n", "block_k", "k", "load"),
    [
        ("fragments", 64, 128, 256, "words"),
        ("natural", 128, 128, 320, "shifted"),  # ten groups in a row
        ("fragments", 64, 128, 96, "shifted"),  # three: rows begin at any byte
        ("natural", 64, 64, 256, "shifted"),  # two to a step
        ("words", 64, 128, 320, "bytes"),
    ],
)
def test_scales_are_the_same_in_whatever_pieces_they_are_read(
    order: str, block_n: int, block_k: int, k: int, load: str, random_weight, monkeypatch
) -> None:
    """Bit for bit, for sums of the same numbers in the same order."""
    _, packed = random_weight(FORMATS["mxfp4"], 100, k)
    monkeypatch.setattr(op_matmul, "NEW_ASSEMBLER", True)
    tile = Tile(kernel="w4a16", block_n=block_n, block_k=block_k, order=order, stages=2)
    x = torch.randn(5, k, dtype=torch.bfloat16)
    chosen = op_matmul.w4a16_constants(100, k, "e2m1", "e8m0", tile, bias=False)["SCALE_LOAD"]
    assert chosen == load
    read = run_w4a16(tile, x, packed)
    monkeypatch.setattr(op_matmul, "scale_load", lambda *_, **__: "bytes")
    assert torch.equal(run_w4a16(tile, x, packed), read)


@pytest.mark.parametrize("shape", [(2, 3, 256), (256,), (1, 256)])
def test_leading_dimensions_pass_through(shape, random_weight) -> None:
    _, packed = random_weight(FORMATS["nvint4"], 40, 256)
    x = torch.randn(shape).bfloat16()
    y = w4a16_matmul(x, packed, torch.randn(40))
    assert y.shape == (*shape[:-1], 40) and y.dtype == torch.bfloat16


def test_the_dense_path_is_the_same_product(fmt: Format, monkeypatch, random_weight) -> None:
    weight, packed = random_weight(fmt, 48, 256)
    x, bias = torch.randn(70, 256).bfloat16(), torch.randn(48).bfloat16()
    monkeypatch.setitem(operator.INTERPRETED_TILE, "w4a16", Tile(kernel="dense"))
    y = w4a16_matmul(x, packed, bias)
    assert error(y, x.double() @ weight.dequantize().double().T + bias.double()) < 4e-3


@pytest.mark.parametrize("rotation", [1, 32, 128])
def test_rotate_and_multiply_is_the_forward_of_a_layer(
    fmt: Format, rotation: int, random_weight
) -> None:
    """The operators in a row against ``QuantLinear.forward``, which rounds at the same places."""
    weight, packed = random_weight(fmt, 48, 256)
    x, bias = torch.randint(-8, 9, (5, 256)).bfloat16(), torch.randn(48).bfloat16()
    layer = QuantLinear.from_quantized(
        weight, Rotation(rotation), bias, quantize_inputs=False, input_global_scale=None
    )
    y = w4a16_matmul(rotate(x, rotation), packed, bias)
    expected = layer(x)
    assert y.dtype == expected.dtype
    assert ((y - expected).abs() <= 2.0**-7 * expected.abs() + 1e-6).all(), (
        "more than one unit in the last place"
    )
    assert (y != expected).float().mean() < 0.02


def test_the_fp8_path_is_the_product_of_its_roundings(fmt: Format, random_weight) -> None:
    weight, packed = random_weight(fmt, 48, 256)
    weight.scales.bits.clamp_(min=0x20 if fmt.has_global_scale else 124)
    x, t = torch.randn(2, 9, 256).bfloat16(), packed.global_scale
    y = w4a8_matmul(x, 32, packed, torch.zeros(48).bfloat16())
    inputs, tokens = rotate_fp8(x, 32)
    dense, rows = dequantize_fp8(packed)
    rounded = (inputs.double() * tokens.double()) @ (dense.double() * rows.double() * t.double()).T
    assert y.shape == (2, 9, 48) and error(y.flatten(0, 1), rounded) < 2.0**-8
    true = Rotation(32).exact(x.flatten(0, 1)).double() @ weight.dequantize().double().T
    assert error(y.flatten(0, 1), true) < 0.06, "E4M3 has three mantissa bits"


# ---------------------------------------------------------------- 4-bit inputs


def quantized(
    fmt: Format, tokens: int, k: int, t: torch.Tensor | None, *, swizzle: bool = False
) -> tuple[QuantizedInputs, torch.Tensor]:
    """Inputs as the kernel makes them, and the numbers they stand for."""
    x = torch.randint(-8, 9, (tokens, k)).bfloat16()
    inputs = rotate_quantize(x, 16, Encoding("e2m1", fmt.scale_name), t, swizzle=swizzle)
    return inputs, quantize_inputs(x, fmt, Rotation(16), t).dequantize()


def in_blocks(weight: PackedWeight) -> PackedWeight:
    return replace(weight, scale_bits=swizzle_scales(weight.scale_bits))


@pytest.mark.parametrize("fmt4", FP4, ids=lambda f: f.name)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "split"), [(1, 64, 512, 2), (33, 104, 352, 1)])
def test_w4a4_is_the_product_of_the_dequantized_operands(
    fmt4, swap, per_token, m, n, k, split, random_weight
) -> None:
    weight, packed = random_weight(fmt4, n, k)
    inputs, values = quantized(fmt4, m, k, None if per_token else torch.tensor(0.02))
    bias, out = torch.randn(n, 2)[:, 0], torch.full((m, n), torch.nan)
    tile = Tile(
        kernel="w4a4", block_m=16, block_n=64, block_k=128, split=split, swap=swap, stages=2
    )
    launch_w4a4(inputs, packed, bias, out, tile)
    assert error(out, values.double() @ weight.dequantize().double().T + bias.double()) < 1e-6


@pytest.mark.parametrize("fmt4", FP4, ids=lambda f: f.name)
@pytest.mark.parametrize(("block_k", "k"), [(128, 320), (256, 320), (256, 512), (64, 96)])
def test_both_scales_are_the_same_in_whatever_pieces_they_are_read(
    fmt4: Format, block_k: int, k: int, random_weight, monkeypatch
) -> None:
    _, x = random_weight(fmt4, 5, k)
    _, w = random_weight(fmt4, 72, k)
    inputs = QuantizedInputs(x.packed, x.scale_bits, None)
    tile = Tile(kernel="w4a4", block_n=64, block_k=block_k, swap=True, stages=2)

    def run() -> torch.Tensor:
        out = torch.full((5, 72), torch.nan)
        launch_w4a4(inputs, w, None, out, tile)
        return out

    read = run()
    monkeypatch.setattr(op_matmul, "scale_load", lambda *_, **__: "bytes")
    assert torch.equal(run(), read)


@runtime_bounds
@pytest.mark.parametrize("fmt4", FP4, ids=lambda f: f.name)
@pytest.mark.parametrize(("m", "n", "k"), [(130, 136, 256)])
def test_w4a4_with_blocked_scales(fmt4, m, n, k, random_weight) -> None:
    weight, packed = random_weight(fmt4, n, k)
    for t in (torch.tensor(0.02), None):
        inputs, values = quantized(fmt4, m, k, t, swizzle=True)
        bias, out = torch.randn(n), torch.full((m, n), torch.nan)
        tile = Tile(kernel="w4a4_tma", block_m=128, block_n=128, block_k=128, stages=2)
        launch_w4a4(inputs, in_blocks(packed), bias, out, tile)
        assert error(out, values.double() @ weight.dequantize().double().T + bias.double()) < 1e-6


@runtime_bounds
def test_bands_of_rows_change_the_order_of_tiles_alone(random_weight, monkeypatch) -> None:
    """Five rows of tiles in bands of two, the last with one: each tile is made once, by the same
    sum."""
    _, packed = random_weight(FORMATS["nvfp4"], 264, 128)
    inputs, _ = quantized(FORMATS["nvfp4"], 530, 128, torch.tensor(0.01), swizzle=True)
    tile, found = Tile(kernel="w4a4_tma", block_m=128, block_n=128, stages=2), []
    for rows in (1, 2, 16):
        monkeypatch.setattr(op_matmul, "GROUP_ROWS", rows)
        out = torch.full((530, 264), torch.nan)
        launch_w4a4(inputs, in_blocks(packed), None, out, tile)
        found.append(out)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_w4a4_operator(random_weight) -> None:
    weight, packed = random_weight(FORMATS["nvfp4"], 72, 256)
    inputs, values = quantized(FORMATS["nvfp4"], 5, 256, torch.tensor(0.02))
    y = w4a4_matmul(inputs, packed)
    assert y.dtype == torch.bfloat16
    assert error(y, values.double() @ weight.dequantize().double().T) < 2.0**-8
    with pytest.raises(ValueError, match="both"):
        w4a4_matmul(inputs, in_blocks(packed))
    _, integers = random_weight(FORMATS["nvint4"], 72, 256)
    with pytest.raises(ValueError, match="w4a4_matmul: tensor cores multiply e2m1 elements"):
        w4a4_matmul(inputs, integers)


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize(
    ("n", "k", "tokens", "pays"),
    [(72, 256, 65, True), (72, 256, 64, False), (70, 256, 65, False), (72, 288, 65, False)],
)
def test_blocked_scales_are_for_many_tokens_on_sm_100(
    arch, n, k, tokens, pays, monkeypatch, random_weight
) -> None:
    monkeypatch.setattr(gpu, "architecture", lambda device: arch)
    _, packed = random_weight(FORMATS["nvfp4"], n, k)
    assert wants_blocked_scales(packed, tokens) == (pays and arch == 100)


def test_shapes_that_do_not_fit_are_named(random_weight) -> None:
    _, packed = random_weight(FORMATS["nvfp4"], 8, 64)
    with pytest.raises(ValueError, match="do not fit"):
        w4a16_matmul(torch.zeros(1, 128).bfloat16(), packed)
    with pytest.raises(ValueError, match="float32"):
        w4a16_matmul(torch.zeros(1, 64), packed)
    _, powers = random_weight(FORMATS["mxfp4"], 8, 64)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        w4a16_matmul(torch.zeros(1, 64).half(), powers)
    with pytest.raises(ValueError, match="multiples of 16"):
        w4a8_matmul(torch.zeros(1, 64).bfloat16(), 16, packed)
