"""rotate_quantize against ``ptq.numerics.activations.quantize_inputs``: the same codes, scale bytes
and row scales, bit for bit."""

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels import gpu, op_inputs
from ptq.kernels.op_inputs import (
    hadamard,
    quantize_and_keep,
    rotate,
    rotate_and_keep,
    rotate_fp8,
    rotate_quantize,
)
from ptq.kernels.operands import Encoding, Prologue
from ptq.kernels.operator import INTERPRETED
from ptq.kernels.quantize import rms_norm, silu_mul, swizzle_scales
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import Rotation
from ptq.numerics.tensor import unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)


NVFP4 = Encoding("e2m1", "e4m3")


def encoding(fmt: Format, rule: str = "default") -> Encoding:
    return Encoding(fmt.element.name, fmt.scale_name, rule)


def exact_inputs(tokens: int, features: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Small integers times a power of two per token: every order of summation gives the same
    rotation."""
    x = torch.randint(-8, 9, (tokens, features)) * torch.exp2(
        torch.randint(-6, 6, (tokens, 1)).float()
    )
    return x.to(dtype).to(DEVICE)


def same_codes(packed: torch.Tensor, codes: torch.Tensor, fmt: Format) -> bool:
    """Equal but for the sign of zero, which a kernel may keep in E2M1 (F4)."""
    kernel = unpack(packed.cpu(), fmt)
    if fmt.element.name == "e2m1":
        kernel = torch.where(kernel == 8, 0, kernel)
    return torch.equal(kernel, codes.cpu())


@pytest.mark.parametrize("rotation", [1, 16, 32, 64, 128])
@pytest.mark.parametrize(("tokens", "features"), [(1, 128), (17, 384), (33, 640)])
def test_codes_and_scales_equal_the_oracle(
    fmt: Format, rotation: int, tokens: int, features: int
) -> None:
    x = exact_inputs(tokens, features)
    t = torch.tensor(0.0123, device=DEVICE)
    for known in (t, None) if fmt.has_global_scale else (None,):
        inputs = rotate_quantize(x, rotation, encoding(fmt), known)
        expected = quantize_inputs(
            x.cpu(), fmt, Rotation(rotation), None if known is None else known.cpu()
        )
        assert torch.equal(inputs.scale_bits.cpu(), expected.scales.bits)
        assert same_codes(inputs.packed, expected.codes, fmt)
        if fmt.has_global_scale:
            assert torch.equal(inputs.global_scale.cpu(), expected.scales.global_scale)
        else:
            assert inputs.global_scale is None


@pytest.mark.parametrize("rotation", [1, 128])
@pytest.mark.parametrize(("name", "tokens"), [("nvfp4", 1), ("nvfp4", 19), ("nvint4", 33)])
def test_a_global_scale_per_token_may_be_given(name: str, rotation: int, tokens: int) -> None:
    """Each row is what it would be alone with its scale: of an expert, for instance."""
    fmt, x = FORMATS[name], exact_inputs(tokens, 384)
    scales = torch.logspace(-4, 1, tokens, device=DEVICE)[:, None]
    inputs = rotate_quantize(x, rotation, encoding(fmt), scales)
    assert inputs.global_scale is scales
    for row, t, packed, bits in zip(
        x.cpu(), scales.cpu()[:, 0], inputs.packed.cpu(), inputs.scale_bits.cpu(), strict=True
    ):
        expected = quantize_inputs(row[None], fmt, Rotation(rotation), t)
        assert torch.equal(bits[None], expected.scales.bits)
        assert same_codes(packed[None], expected.codes, fmt)
    with pytest.raises(ValueError, match="one per token"):
        rotate_quantize(x, rotation, encoding(fmt), scales.repeat(2, 1))


@pytest.mark.parametrize("rule", ["ocp", "ceil", "theta"])
@pytest.mark.parametrize("name", ["mxfp4", "mxint4"])
def test_every_scale_rule_at_every_mantissa(name: str, rule: str) -> None:
    """Each group has one number; together they pass every mantissa edge of the rules, zero and both
    ends."""
    fmt = FORMATS[name]
    edges = torch.tensor([1.0, 1.1875, 1.25, 1.5, 1.75, 1.8125, 1.9921875])  # bf16 numbers
    near = torch.cat(
        [
            edges,
            edges * (1 + 2.0**-7),
            edges * (1 - 2.0**-7),
            torch.tensor([0.0, 2.0**-133, 2.0**-126, 3.0e38, 0.7]),
        ]
    )
    x = torch.zeros(len(near), 32).bfloat16()
    x[:, 5] = (near * torch.where(torch.arange(len(near)) % 2 == 0, 1.0, -1.0)).bfloat16()
    inputs = rotate_quantize(x.to(DEVICE), 1, encoding(fmt, rule))
    expected = quantize_inputs(x, fmt, Rotation(1), None, rule)
    assert torch.equal(inputs.scale_bits.cpu(), expected.scales.bits)
    assert same_codes(inputs.packed, expected.codes, fmt)


@pytest.mark.parametrize(("tokens", "features"), [(1, 2080), (35, 640)])
def test_four_six_equals_the_oracle(tokens: int, features: int) -> None:
    """Without a rotation nothing is inexact but what the law rounds, so random numbers agree too:
    all magnitudes, ends of the range, scales below 2^-6, groups of zeros."""
    x = (torch.randn(tokens, features) * torch.logspace(-4, 4, features)).bfloat16()
    x[:, 32:48] = 0
    x[0, 64:80] = torch.linspace(0, 1e30, 16)
    fp4 = Encoding("e2m1", "e4m3", "four_six")
    for t in (torch.tensor(0.0123), torch.tensor(1e-6), None):
        known = None if t is None else t.to(DEVICE)
        inputs = rotate_quantize(x.to(DEVICE), 1, fp4, known)
        expected = quantize_inputs(x, FORMATS["nvfp4"], Rotation(1), t, "four_six")
        assert torch.equal(inputs.scale_bits.cpu(), expected.scales.bits)
        assert same_codes(inputs.packed, expected.codes, FORMATS["nvfp4"])
    plain = rotate_quantize(x.to(DEVICE), 1, NVFP4)
    assert not torch.equal(inputs.scale_bits, plain.scale_bits)
    # a global scale per token that was given is used as one that was computed
    again = rotate_quantize(x.to(DEVICE), 1, fp4, inputs.global_scale)
    assert all(torch.equal(a, b) for a, b in zip(again.flat, inputs.flat, strict=True))


def test_four_six_after_a_rotation_and_in_blocks() -> None:
    x, t = exact_inputs(130, 320), torch.tensor(0.1, device=DEVICE)
    fp4 = Encoding("e2m1", "e4m3", "four_six")
    inputs = rotate_quantize(x, 16, fp4, t, swizzle=True)
    expected = quantize_inputs(x.cpu(), FORMATS["nvfp4"], Rotation(16), t.cpu(), "four_six")
    assert torch.equal(inputs.scale_bits.cpu(), swizzle_scales(expected.scales.bits))
    assert same_codes(inputs.packed, expected.codes, FORMATS["nvfp4"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_inputs_differ_next_to_ties_only(fmt: Format, dtype: torch.dtype) -> None:
    """With inexact sums the order of additions shows: a code may differ where the number lies
    within 1e-5 of a tie."""
    x = (torch.randn(19, 512) * torch.logspace(-1, 1, 512)).to(dtype)
    t = torch.tensor(0.02)
    inputs = rotate_quantize(x.to(DEVICE), 128, encoding(fmt), t.to(DEVICE))
    expected = quantize_inputs(x, fmt, Rotation(128), t)
    same = inputs.scale_bits.cpu() == expected.scales.bits
    assert same.float().mean() > 0.995
    z = (
        Rotation(128).exact(x).unflatten(1, (-1, fmt.group_size))
        / expected.scales.step()[..., None]
    )
    a, b = (
        fmt.element.round((z * (1 + 1e-5)).contiguous()),
        fmt.element.round((z * (1 - 1e-5)).contiguous()),
    )
    value = fmt.element.decode(unpack(inputs.packed.cpu(), fmt)).view_as(z)
    assert ((value == a) | (value == b))[same].all()


def test_the_kernel_multiplies_by_any_block(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hadamard blocks are symmetric; one that is not shows that it is x · B, and not x · Bᵀ."""
    block = torch.randint(-3, 4, (16, 16)).bfloat16()
    monkeypatch.setattr(op_inputs, "hadamard", lambda size, dtype, device: block.to(device))
    x, t = exact_inputs(5, 96), torch.tensor(0.5)
    inputs = rotate_quantize(x, 16, encoding(fmt), t.to(DEVICE))
    y = (x.cpu().float().unflatten(1, (-1, 16)) @ block.float()).flatten(1) * 16**-0.5
    expected = quantize_inputs(y, fmt, Rotation(1), t)
    assert torch.equal(inputs.scale_bits.cpu(), expected.scales.bits)
    assert same_codes(inputs.packed, expected.codes, fmt)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_block_is_that_of_the_oracle(size: int) -> None:
    """±1 in Sylvester's order, symmetric and exact in 16 bits."""
    block = hadamard(size, torch.bfloat16, torch.device("cpu"))
    eye = torch.eye(size)
    assert torch.equal(block.float() * size**-0.5, Rotation(size).exact(eye))
    assert torch.equal(block, block.T)


def test_a_block_made_in_a_recording_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the graph replays, nothing has filled it."""
    op_inputs._hadamard.cache_clear()
    arguments = (16, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(gpu, "capturing", lambda device: True)
    recorded = hadamard(*arguments)
    monkeypatch.setattr(gpu, "capturing", lambda device: False)
    kept = hadamard(*arguments)
    assert kept is not recorded and kept is hadamard(*arguments)


@pytest.mark.parametrize(("tokens", "features"), [(3, 64), (130, 320)])
def test_blocked_scales_are_those_of_the_twin(tokens: int, features: int) -> None:
    x = exact_inputs(tokens, features)
    t = torch.tensor(0.1, device=DEVICE)
    plain = rotate_quantize(x, 16, NVFP4, t)
    blocked = rotate_quantize(x, 16, NVFP4, t, swizzle=True)
    bits = blocked.scale_bits.cpu()
    assert torch.equal(blocked.packed, plain.packed)
    assert torch.equal(bits, swizzle_scales(plain.scale_bits.cpu()))
    # F25, spelled out: row 33, group 2 is at 1·16 + 1·4 + 2 of the first block
    if tokens > 33:
        assert bits.flatten()[1 * 16 + 1 * 4 + 2] == plain.scale_bits[33, 2]


@pytest.mark.parametrize("rotation", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotating_alone_rounds_once(rotation: int, dtype: torch.dtype) -> None:
    x = exact_inputs(7, 384, dtype)
    assert torch.equal(
        rotate(x.view(1, 7, 384), rotation).cpu(),
        Rotation(rotation).rotate(x.cpu().view(1, 7, 384)),
    )


@pytest.mark.parametrize("rotation", [1, 32, 128])
def test_fp8_inputs_have_a_scale_per_token(rotation: int) -> None:
    x = exact_inputs(19, 384)
    x[3] = 0
    fp8, scale = rotate_fp8(x, rotation)
    y = Rotation(rotation).exact(x.cpu())
    amax = y.abs().amax(-1, keepdim=True)
    expected = torch.where(amax > 0, amax / 448, torch.ones(()))
    assert torch.equal(scale.cpu(), expected)
    assert torch.equal(
        fp8.cpu().float(), (y * (1 / expected)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    )


def test_rotation_one_is_no_launch() -> None:
    x = exact_inputs(3, 64)
    assert rotate(x, 1) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prologues_round_like_separate_operations(dtype: torch.dtype) -> None:
    """exp and rsqrt may differ by an ulp from torch's, and sums in order; the roundings to 16 bits
    are the same."""
    x, gain = torch.randn(6, 320).to(dtype), torch.randn(320).to(dtype)
    device = {"x": x.to(DEVICE), "gain": gain.to(DEVICE)}
    normed = rotate(device["x"], 1, Prologue("rms_norm", device["gain"], 1e-5)).cpu()
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    expected = rms_norm(x, gain, 1e-5)
    assert ((normed.double() - expected.double()).abs() <= ulp * expected.double().abs()).all()
    assert (normed != expected).float().mean() < 0.01
    gate_up = torch.randn(6, 640).to(dtype)
    acted = rotate(gate_up.to(DEVICE), 1, Prologue("silu_mul")).cpu()
    expected = silu_mul(gate_up)
    assert (
        (acted.double() - expected.double()).abs() <= ulp * expected.double().abs() + 1e-7
    ).all()
    assert (acted != expected).float().mean() < 0.01


def test_a_prologue_and_the_rotation_in_one_launch() -> None:
    """The normalised rows are exact here (all of one magnitude), so fused and separate launches
    must agree on every code."""
    x = torch.where(torch.rand(5, 256) < 0.5, -2.0, 2.0).bfloat16().to(DEVICE)
    gain = torch.randint(1, 4, (256,)).bfloat16().to(DEVICE)
    prologue = Prologue("rms_norm", gain)
    for t in (torch.tensor(0.01, device=DEVICE), None):
        fused = rotate_quantize(x, 32, NVFP4, t, prologue=prologue)
        normed = rms_norm(x.cpu(), gain.cpu(), 0.0).to(DEVICE)
        apart = rotate_quantize(normed, 32, NVFP4, t)
        assert all(torch.equal(a, b) for a, b in zip(fused.flat, apart.flat, strict=True))


def test_zeros_give_zero_codes_and_the_smallest_scale(fmt: Format) -> None:
    inputs = rotate_quantize(torch.zeros(3, 64).bfloat16().to(DEVICE), 32, encoding(fmt))
    assert not inputs.packed.any() and (inputs.scale_bits == 1).all()
    assert inputs.global_scale is None or (inputs.global_scale == 1).all()


def test_no_tokens_no_work() -> None:
    inputs = rotate_quantize(
        torch.zeros(0, 64).bfloat16().to(DEVICE), 16, NVFP4, torch.ones((), device=DEVICE)
    )
    assert inputs.packed.shape == (0, 32) and inputs.scale_bits.shape == (0, 4)


def test_mistakes_are_named() -> None:
    x = torch.zeros(2, 96).bfloat16()
    with pytest.raises(ValueError, match="rotation of 64"):
        rotate_quantize(x, 64, NVFP4)
    with pytest.raises(ValueError, match="choose from default, ceil, ocp, theta"):
        rotate_quantize(x, 32, Encoding("e2m1", "e8m0", "absmax"))
    with pytest.raises(ValueError, match="'four_six' does not exist; choose from default, absmax"):
        rotate_quantize(x, 32, Encoding("int4", "e4m3", "four_six"))
    with pytest.raises(ValueError, match="no kernel for e4m3"):
        rotate_quantize(x, 1, Encoding("e4m3", "e8m0"))
    with pytest.raises(ValueError, match="gain"):
        rotate(x, 16, Prologue("rms_norm"))
    with pytest.raises(ValueError, match="gain"):
        rotate(x, 1, Prologue(gain=x[0]))
    with pytest.raises(ValueError, match="'gelu' does not exist"):
        rotate(x, 16, Prologue("gelu"))
    for operator in (rotate, rotate_fp8):
        with pytest.raises(ValueError, match="float32"):
            operator(x.float(), 16)
        with pytest.raises(ValueError, match="rotation of 64"):
            operator(x, 64)


@pytest.mark.parametrize("rotation", [1, 32])
def test_what_a_prologue_makes_can_be_kept(rotation: int) -> None:
    """One launch gives the normalised inputs and what is made of them, as two launches would."""
    x, gain = torch.randn(3, 5, 320).bfloat16().to(DEVICE), torch.randn(320).bfloat16().to(DEVICE)
    plain, keep = Prologue("rms_norm", gain, 1e-5), Prologue("rms_norm", gain, 1e-5, keep=True)
    normed = rotate(x, 1, plain)
    rotated, kept = rotate_and_keep(x, rotation, keep)
    assert torch.equal(kept, normed) and torch.equal(rotated, rotate(normed, rotation))
    assert torch.equal(rotate(x, rotation, keep), rotated)
    for t in (torch.tensor(0.01, device=DEVICE), None):
        inputs, kept = quantize_and_keep(x, rotation, NVFP4, t, keep)
        assert torch.equal(kept, normed)
        apart = rotate_quantize(x, rotation, NVFP4, t, prologue=plain)
        assert all(torch.equal(a, b) for a, b in zip(inputs.flat, apart.flat, strict=True))
    nothing = rotate_and_keep(x[:0], rotation, keep)
    assert all(t.shape == (0, 5, 320) for t in nothing)
    with pytest.raises(ValueError, match="nothing to keep"):
        rotate(x, rotation, Prologue(keep=True))
