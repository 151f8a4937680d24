"""Leaf functions against ``ptq.numerics.formats``, and the inline assembly as integer algebra on
torch words."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ptq.kernels import codec
from ptq.kernels.operands import PackedWeight
from ptq.kernels.weight_tiles import tiled
from ptq.numerics.formats import E2M1, FORMATS, INT4, NVFP4

if isinstance(codec.encode, triton.JITFunction) and not torch.cuda.is_available():
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _encode_all(x_ptr, e2m1_ptr, int4_ptr, e4m3_ptr, rounded_ptr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    tl.store(e2m1_ptr + place, codec.encode_e2m1(x))
    tl.store(int4_ptr + place, codec.encode_int4(x))
    tl.store(e4m3_ptr + place, codec.encode_e4m3(codec.round_to_e4m3(tl.abs(x))))
    tl.store(rounded_ptr + place, codec.round_to_e2m1(tl.abs(x)))


@triton.jit
def _decode_all(byte_ptr, e2m1_ptr, int4_ptr, e4m3_ptr, e8m0_ptr):
    place = tl.arange(0, 256)
    byte = tl.load(byte_ptr + place)
    tl.store(e2m1_ptr + place, codec.decode(byte.to(tl.int32) & 15, "e2m1"))
    tl.store(int4_ptr + place, codec.decode(byte.to(tl.int32) & 15, "int4"))
    tl.store(e4m3_ptr + place, codec.decode_scale(byte & 127, "e4m3"))
    tl.store(e8m0_ptr + place, codec.decode_scale(byte, "e8m0"))


@triton.jit
def _reorder_all(words_ptr, plain_ptr, words_order_ptr, columns_order_ptr):
    """Codes of 16 rows of 8 words: unpacked plainly, and from one tensor for each nibble."""
    row = tl.arange(0, 16)[:, None]
    words = tl.load(words_ptr + row * 8 + tl.arange(0, 8)[None, :])
    c0, c1, c2, c3 = words & 15, (words >> 4) & 15, (words >> 8) & 15, (words >> 12) & 15
    high = words >> 16
    c4, c5, c6, c7 = high & 15, (high >> 4) & 15, (high >> 8) & 15, (high >> 12) & 15
    place = row * 64 + tl.arange(0, 64)[None, :]
    tl.store(plain_ptr + place, codec.unpack_words(words, 16, 64))
    ordered = codec.in_word_order(c0, c1, c2, c3, c4, c5, c6, c7, 16, 64)
    tl.store(words_order_ptr + place, ordered)
    ordered = codec.in_column_order(c0, c1, c2, c3, c4, c5, c6, c7, 16, 64)
    tl.store(columns_order_ptr + place, ordered)


def _numbers() -> torch.Tensor:
    """262 144 numbers: a grid over ±8, small ones, a wide range, every tie and its neighbours."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 1.5, 4.5, 5.5, 6.5])
    ties = torch.cat(
        [
            ties,
            -ties,
            torch.tensor(
                [1.0625, 1.1875, 17.0, 19.0, 432.0, 448.0, 500.0, 2.0**-10, 1.5 * 2.0**-9, 0.0]
            ),
        ]
    )
    dense = torch.linspace(-8, 8, 65536 - 4096)
    first = torch.cat([dense, ties, torch.randn(4096 - len(ties)) * 1e-2])
    return torch.cat(
        [
            first,
            torch.nextafter(first, torch.tensor(9.0)),
            torch.logspace(-14, 9.5, 131072, base=2.0),
        ]
    ).to(DEVICE)


def test_encoding_is_that_of_the_formats() -> None:
    x = _numbers()
    e2m1, int4, e4m3 = (torch.zeros(len(x), dtype=torch.int32, device=DEVICE) for _ in range(3))
    rounded = torch.zeros(len(x), device=DEVICE)
    _encode_all[(len(x) // 4096,)](x, e2m1, int4, e4m3, rounded, 4096)
    # F4: a kernel may keep the sign of a number that rounds to zero
    e2m1 = torch.where(e2m1 == 8, 0, e2m1)
    assert torch.equal(e2m1.to(torch.uint8), E2M1.encode(x))
    assert torch.equal(rounded, E2M1.round(x.abs()))
    assert torch.equal(int4.to(torch.uint8), INT4.encode(x))
    assert torch.equal(e4m3.to(torch.uint8), NVFP4.encode_scale(x.abs()))


def test_decoding_every_code_and_every_scale_byte() -> None:
    byte = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    e2m1, int4, e4m3, e8m0 = (torch.zeros(256, device=DEVICE) for _ in range(4))
    _decode_all[(1,)](byte, e2m1, int4, e4m3, e8m0)
    assert torch.equal(e2m1, E2M1.decode(byte & 15))
    assert torch.equal(int4, INT4.decode(byte & 15))
    finite = (byte & 127) != 127
    assert torch.equal(e4m3[finite], NVFP4.decode_scale(byte & 127)[finite])
    assert torch.equal(e8m0[:255], FORMATS["mxfp4"].decode_scale(byte)[:255])


def test_eight_tensors_become_one_in_the_orders_that_are_promised() -> None:
    codes = torch.randint(0, 16, (16, 8, 8), device=DEVICE)
    words = (codes << (4 * torch.arange(8, device=DEVICE))).sum(-1)
    words = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    plain, by_words, by_columns = (
        torch.zeros(16, 64, dtype=torch.int32, device=DEVICE) for _ in range(3)
    )
    _reorder_all[(1,)](words, plain, by_words, by_columns)
    assert torch.equal(plain, codes.reshape(16, 64).int())
    assert torch.equal(by_columns, plain)
    assert torch.equal(by_words, codes[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(16, 64).int())


# ---------------------------------------------------------------- inline assembly, modelled


def _run(block: str, word: torch.Tensor) -> list[torch.Tensor]:
    """What the PTX makes of 32-bit words in an int64 tensor, eight halves: an interpreter of shl,
    shr, mul, and, xor, lop3 0xEA (a & b | c) and of taking a word apart."""
    registers: dict[str, torch.Tensor] = {"$8": word}

    def value(operand: str) -> torch.Tensor | int:
        return (
            int(operand, 16)
            if operand.startswith("0x")
            else int(operand)
            if operand.isdigit()
            else registers[operand]
        )

    for statement in block.strip("{} ").replace("\n", " ").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, rest = statement.split(None, 1)
        if name == "mov.b32":
            low, high, whole = re.findall(r"[$\w]+", rest)
            registers[low], registers[high] = registers[whole] & 0xFFFF, registers[whole] >> 16
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        match name.split(".")[0], [value(operand) for operand in operands]:
            case "shl", [a, n]:
                registers[target] = (a << n) & 0xFFFFFFFF
            case "shr", [a, n]:
                registers[target] = a >> n
            case "mul", [a, b]:
                registers[target] = (a * b) & 0xFFFFFFFF
            case "and", [a, b]:
                registers[target] = a & b
            case "xor", [a, b]:
                registers[target] = a ^ b
            case "lop3", [a, b, c, 0xEA]:
                registers[target] = (a & b) | c
            case other:
                raise AssertionError(f"no model for {other}")
    return [registers[f"${i}"] for i in range(8)]


def _number(half: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return half.to(torch.int32).to(torch.uint16).view(torch.int16).view(dtype).double()


@pytest.mark.parametrize(("kind", "element", "dtype", "scale", "offset"), [
    ("E2M1_TO_BF16", E2M1, torch.bfloat16, 2.0**126, 0.0),
    ("E2M1_TO_FP16", E2M1, torch.float16, 2.0**14, 0.0),
    ("INT4_TO_BF16", INT4, torch.bfloat16, 1.0, 136.0),
    ("INT4_TO_FP16", INT4, torch.float16, 1.0, 1032.0),
])  # fmt: skip
def test_the_assembly_decodes_every_nibble_at_every_place(
    kind, element, dtype, scale, offset
) -> None:
    word = torch.randint(0, 2**32, (50_000,), dtype=torch.int64)
    nibbles = [((word >> (4 * i)) & 15).to(torch.uint8) for i in range(8)]
    for i, half in enumerate(_run(getattr(codec, kind).value, word)):
        assert torch.equal(
            (_number(half, dtype) * scale - offset).float(), element.decode(nibbles[i])
        ), (kind, i)


@pytest.mark.parametrize(("kind", "element", "dtype", "scale", "offset"), [
    ("UNIT_E2M1_TO_BF16", E2M1, torch.bfloat16, 2.0**126, 0.0),
    ("UNIT_E2M1_TO_FP16", E2M1, torch.float16, 2.0**14, 0.0),
    ("UNIT_INT4_TO_BF16", INT4, torch.bfloat16, 1.0, 136.0),
    ("UNIT_INT4_TO_FP16", INT4, torch.float16, 1.0, 1032.0),
])  # fmt: skip
def test_the_assembly_for_units_decodes_columns_in_their_order(
    kind, element, dtype, scale, offset
) -> None:
    packed = torch.randint(0, 256, (64 * 40, 64), dtype=torch.uint8)
    weight = PackedWeight(
        packed=packed,
        scale_bits=torch.zeros(64 * 40, 8, dtype=torch.uint8),
        global_scale=torch.ones(()),
        element=element.name,
        scale="e4m3",
    )
    words = tiled(weight).packed.view(torch.int32).reshape(-1, 16).long() & 0xFFFFFFFF
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(-1, 16, 8)
    for column, half in enumerate(_run(getattr(codec, kind).value, words)):
        assert torch.equal(
            (_number(half, dtype) * scale - offset).float(), element.decode(codes[..., column])
        ), (kind, column)


def test_no_assembly_relies_on_which_elements_the_compiler_packs() -> None:
    """It takes others than neighbours where that saves a conversion of layouts."""
    files = Path(codec.__file__).parent.glob("*.py")
    packs = re.findall(r"\bpack=(\d+),", "".join(file.read_text("utf-8") for file in files))
    assert packs and set(packs) == {"1"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("nvfp4", torch.bfloat16),
        ("nvfp4", torch.float16),
        ("nvint4", torch.bfloat16),
        ("nvint4", torch.float16),
        ("mxfp4", torch.bfloat16),
    ],
)
def test_every_product_of_code_and_scale_is_exact_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """The premise of decoding into the operand of a 16-bit matmul, for all codes and scale bytes,
    with the factors in use."""
    fmt = FORMATS[name]
    bits = torch.arange(1, 0x7F if fmt.has_global_scale else 137, dtype=torch.uint8)
    value = fmt.element.decode(torch.arange(16, dtype=torch.uint8)).double()[:, None]
    scale = fmt.decode_scale(bits).double()[None, :]
    if fmt.element is E2M1:
        left, right = (2.0**-126, 2.0**118) if dtype == torch.bfloat16 else (2.0**-14, 2.0**6)
        # E8M0 bytes below 10 lose bits of subnormals; no weight is that small
        keep = scale >= 2.0**-118
        factor, operand = (scale * right).to(dtype), (value * left).to(dtype)
        assert torch.isfinite(factor).all() and torch.equal(factor.double(), scale * right)
        exact = operand.double() * factor.double()
        assert torch.equal(
            exact.to(dtype).double()[:, keep[0]], (value * scale * left * right)[:, keep[0]]
        )
    else:  # one fused multiply-add: its addend and its result are exact
        offset = 136.0 if dtype == torch.bfloat16 else 1032.0
        factor = scale if dtype == torch.bfloat16 else scale * 2.0**-8
        for exact in (factor, offset * factor, value * factor):
            assert torch.equal(exact.to(dtype).double(), exact)
