"""Leaf functions of the kernels, in Triton: from codes and scale bytes to numbers, and back.

Elements are named as in ``ptq.numerics.formats``: ``e2m1`` (0bSEEM) and ``int4`` (two's
complement); scale bytes are ``e4m3`` or ``e8m0``. Two codes share a byte, the even column in the
low nibble. Every rounding here is explicit (an added power of two, integer operations) and every
cast is exact, for two reasons: Triton's interpreter truncates inexact casts to bf16 and fp8 without
a word, and one written order of operations is what makes kernels and their torch twins equal bit
for bit.

Inline assembly lives in this file only. Each block has a plain twin below it that yields the same
order of elements; the tests model the instructions bit by bit on torch integers. Flush-to-zero must
stay off: code 1 of E2M1 and small scales are subnormal operands of the products that decode them.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: SIM108, SIM300

import triton
import triton.language as tl

# 2^126: what E2M1 bits, put where an exponent and a mantissa meet, have to be multiplied by (fp32
# and bf16 share the exponent).
E2M1_TO_FLOAT = tl.constexpr(2.0**126)
# 2^120: the same for E4M3 bits. 2^(126 + 120 - 8) does not exist in fp32, so decoding both at once
# takes two factors of 2^119.
E4M3_TO_FLOAT = tl.constexpr(2.0**120)
HALF_OF_BOTH = tl.constexpr(2.0**119)
# What a word of eight codes is unpacked to.
EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)


@triton.jit
def as_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


# ---------------------------------------------------------------- numbers to codes and to 16 bits


@triton.jit
def round_half(x, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 → the nearest number of HALF, ties to even. The interpreter truncates casts to bf16:
    there it is done on the bits."""
    if INTERPRETED and HALF == tl.bfloat16:
        bits = as_bits(x)
        result = as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.bfloat16)
    else:
        result = x.to(HALF)
    return result


@triton.jit
def round_fp8(x, INTERPRETED: tl.constexpr):
    """fp32 → E4M3, nearest even, saturating. The interpreter's own cast loses carries: there an
    exact cast follows a rounding."""
    if INTERPRETED:
        magnitude = tl.minimum(tl.abs(x), 448.0)
        exponent = as_bits(tl.maximum(magnitude, 0.015625)) & 0x7F800000
        rounder = as_float(exponent + (20 << 23))
        magnitude = (magnitude + rounder) - rounder
        x = tl.where(x < 0.0, -magnitude, magnitude)
    return x.to(tl.float8e4nv)


@triton.jit
def encode_e2m1(x):
    """fp32 → code 0bSEEM in an int32: nearest, ties to even, saturating. A negative number that
    rounds to zero gives code 8."""
    magnitude = tl.minimum(tl.abs(x), 6.0)
    exponent = as_bits(tl.maximum(magnitude, 1.0)) & 0x7F800000  # (127 + e) << 23 with e in 0 … 2
    # the bits of 1.5 · 2^(e + 22): adding it rounds to multiples of 2^(e - 1)
    rounder = exponent + 0x0B400000
    steps = as_bits(magnitude + as_float(rounder)) - rounder
    return (steps + ((exponent - 0x3F800000) >> 22)) | ((as_bits(x) >> 28) & 8)


@triton.jit
def round_to_e2m1(magnitude):
    """Not negative fp32 → the nearest E2M1 number, ties to the even code, saturating, as fp32."""
    magnitude = tl.minimum(magnitude, 6.0)
    exponent = as_bits(tl.maximum(magnitude, 1.0)) & 0x7F800000
    rounder = as_float(exponent + 0x0B400000)  # as in encode_e2m1
    return (magnitude + rounder) - rounder


@triton.jit
def encode_int4(x):
    """fp32 → two's complement nibble in an int32: nearest integer within ±7, ties to even."""
    return as_bits(tl.clamp(x, -7.0, 7.0) + 12582912.0) & 15


@triton.jit
def encode(x, ELEMENT: tl.constexpr):
    if ELEMENT == "e2m1":
        code = encode_e2m1(x)
    else:
        code = encode_int4(x)
    return code


@triton.jit
def pack_pairs(even, odd):
    """Two int32 codes → one byte, the even column in the low nibble."""
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit
def encode_pairs_by_cvt(even, odd):
    """Two fp32 → one byte of E2M1 codes by the instruction of sm_100 and sm_120, which keeps the
    sign of zeros."""
    return tl.inline_asm_elementwise(
        "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
        "=r,r,r",
        [even, odd],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    ).to(tl.uint8)


# ---------------------------------------------------------------- scales


@triton.jit
def round_to_e4m3(x):
    """fp32 → the nearest E4M3 number of 2^-9 … 448, ties to even, as fp32."""
    x = tl.clamp(x, 0.001953125, 448.0)
    # numbers below 2^-6 share the step of that binade
    exponent = as_bits(tl.maximum(x, 0.015625)) & 0x7F800000
    rounder = as_float(exponent + (20 << 23))  # 2^(e + 20): its unit in the last place is 2^(e - 3)
    return (x + rounder) - rounder


@triton.jit
def encode_e4m3(x):
    """fp32 that is an E4M3 number, not negative → its byte in an int32."""
    normal = (as_bits(x) >> 20) - (120 << 3)
    return tl.where(x >= 0.015625, normal, (x * 512.0).to(tl.int32))


@triton.jit
def decode_e4m3(byte):
    """E4M3 byte (never negative, never NaN) → fp32."""
    return as_float(byte.to(tl.int32) << 20) * E4M3_TO_FLOAT


@triton.jit
def encode_e8m0(amax, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Largest magnitude of a group → E8M0 byte 1 … 254: its exponent − EXPONENT, one more if its
    mantissa bits exceed MANTISSA."""
    bits = as_bits(amax)
    byte = (bits >> 23) - EXPONENT + ((bits & 0x7FFFFF) > MANTISSA).to(tl.int32)
    return tl.minimum(tl.maximum(byte, 1), 254)


@triton.jit
def decode_e8m0(byte):
    """E8M0 byte → fp32; byte 0 is the subnormal 2^-127."""
    exponent = byte.to(tl.int32)
    return as_float(tl.where(exponent == 0, 0x00400000, exponent << 23))


@triton.jit
def decode_scale(byte, SCALE: tl.constexpr):
    if SCALE == "e4m3":
        scale = decode_e4m3(byte)
    else:
        scale = decode_e8m0(byte)
    return scale


# ---------------------------------------------------------------- codes to numbers


@triton.jit
def unpack_codes(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes [ROWS, COLUMNS/2] → codes [ROWS, COLUMNS] in int32, in the order of the columns."""
    return tl.join(packed & 15, packed >> 4).reshape(ROWS, COLUMNS).to(tl.int32)


@triton.jit
def unpack_words(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 words [ROWS, COLUMNS/8] → codes [ROWS, COLUMNS] in int32, in the order of the
    columns."""
    places = tl.arange(0, 8) * 4
    return ((words[:, :, None] >> places[None, None, :]) & 15).reshape(ROWS, COLUMNS)


@triton.jit
def unpack_unit_words(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ELEMENT: tl.constexpr):
    """As :func:`unpack_words`, of words arranged as in units."""
    column = tl.arange(0, 8)
    pair = 4 * (column // 2)
    half = 16 * (column % 2)
    if ELEMENT == "e2m1":
        # four bits for each pair: where its sign is, and where the bits below it begin
        sign = ((0xDECF >> pair) & 15) + half
        magnitude = ((0x9036 >> pair) & 15) + half
        signs = (words[:, :, None] >> sign[None, None, :]) & 1
        code = (signs << 3) | ((words[:, :, None] >> magnitude[None, None, :]) & 7)
    else:
        code = ((words[:, :, None] >> (pair + half)[None, None, :]) & 15) ^ 8
    return code.reshape(ROWS, COLUMNS)


@triton.jit
def decode(code, ELEMENT: tl.constexpr):
    """int32 code → fp32 value, exact."""
    if ELEMENT == "e2m1":
        value = as_float(((code & 8) << 28) | ((code & 7) << 22)) * E2M1_TO_FLOAT
    else:
        value = ((code ^ 8) - 8).to(tl.float32)
    return value


@triton.jit
def spread_scales(values, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """values [ROWS, COLUMNS] times scales [ROWS, COLUMNS/GROUP], each scale over its group of
    consecutive columns."""
    return (values.reshape(ROWS, COLUMNS // GROUP, GROUP) * scales[:, :, None]).reshape(
        ROWS, COLUMNS
    )


@triton.jit
def operand_scale(
    byte, ELEMENT: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr, CVT: tl.constexpr
):
    """Scale bytes → the 16-bit factors that turn unpacked codes into value · scale /
    :func:`operand_factor`.

    E8M0 is for bf16 only, and with E2M1 for bytes up to 136 (a scale of 512): beyond, the factor
    leaves bf16.
    """
    if HALF == tl.float16:
        # value · 2^-8, subnormals included
        scale = (byte.to(tl.uint16) << 7).to(tl.float16, bitcast=True)
        if ELEMENT == "e2m1" and not CVT:
            scale = scale * 16384.0
    elif SCALE == "e8m0":
        if ELEMENT == "e2m1" and not CVT:
            scale = ((byte.to(tl.uint16) + 118) << 7).to(tl.bfloat16, bitcast=True)
        else:
            exponent = byte.to(tl.uint16)
            scale = (
                tl.where(exponent == 0, 0x0040, exponent << 7)
                .to(tl.uint16)
                .to(tl.bfloat16, bitcast=True)
            )
    else:
        bits = (byte.to(tl.uint16) << 4).to(tl.bfloat16, bitcast=True)
        if ELEMENT == "e2m1" and not CVT:
            scale = bits * HALF_OF_BOTH * HALF_OF_BOTH
        else:
            scale = bits * E4M3_TO_FLOAT
    return scale


@triton.jit
def in_word_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Eight tensors [ROWS, COLUMNS/8], one per nibble of a word → [ROWS, COLUMNS], every eight
    columns in the order 0 4 1 5 2 6 3 7."""
    first = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    second = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    # [ROWS, COLUMNS/8, one of a pair, which pair of two, which two] → the last three turned around
    return tl.join(first, second).permute(0, 1, 3, 4, 2).reshape(ROWS, COLUMNS)


@triton.jit
def in_column_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As :func:`in_word_order`, the columns in their own order."""
    return in_word_order(c0, c2, c4, c6, c1, c3, c5, c7, ROWS, COLUMNS)


# Assembly that makes eight halves of a word $8. It ends with four words w0 … w3 of two each, to be
# taken apart: those of columns i and i + 4 where integer operations unpack, of 2i and 2i + 1 where
# the conversion instruction does.
_FOUR_APART = """mov.b32 {$0, $4}, w0; mov.b32 {$1, $5}, w1;
    mov.b32 {$2, $6}, w2; mov.b32 {$3, $7}, w3; }"""
_NEIGHBOURS = """mov.b32 {$0, $1}, w0; mov.b32 {$2, $3}, w1;
    mov.b32 {$4, $5}, w2; mov.b32 {$6, $7}, w3; }"""


def _int4_under(mantissa: str) -> str:
    return f"""{{ .reg .b32 t, u<4>, w<4>; xor.b32 t, $8, 0x88888888; shr.u32 u1, t, 4;
    shr.u32 u2, t, 8; shr.u32 u3, t, 12;
    lop3.b32 w0, t, 0x000F000F, {mantissa}, 0xEA; lop3.b32 w1, u1, 0x000F000F, {mantissa}, 0xEA;
    lop3.b32 w2, u2, 0x000F000F, {mantissa}, 0xEA; lop3.b32 w3, u3, 0x000F000F, {mantissa}, 0xEA;
    {_FOUR_APART}"""


def _e2m1_by_cvt(half: str) -> str:
    return f"""{{ .reg .b8 b<4>; .reg .b32 w<4>; mov.b32 {{b0, b1, b2, b3}}, $8;
    cvt.rn.{half}x2.e2m1x2 w0, b0; cvt.rn.{half}x2.e2m1x2 w1, b1;
    cvt.rn.{half}x2.e2m1x2 w2, b2; cvt.rn.{half}x2.e2m1x2 w3, b3;
    {_NEIGHBOURS}"""


E2M1_TO_BF16 = tl.constexpr(
    f"""{{ .reg .b32 h, w<4>; shr.u32 h, $8, 8;
    and.b32 w0, $8, 0x000F000F; and.b32 w1, $8, 0x00F000F0;
    and.b32 w2, h, 0x000F000F; and.b32 w3, h, 0x00F000F0;
    mul.lo.u32 w0, w0, 4160; mul.lo.u32 w1, w1, 260;
    mul.lo.u32 w2, w2, 4160; mul.lo.u32 w3, w3, 260;
    and.b32 w0, w0, 0x81C081C0; and.b32 w1, w1, 0x81C081C0;
    and.b32 w2, w2, 0x81C081C0; and.b32 w3, w3, 0x81C081C0;
    {_FOUR_APART}"""
)
E2M1_TO_FP16 = tl.constexpr(
    f"""{{ .reg .b32 s<3>, m<4>, w<4>;
    shl.b32 s0, $8, 12; shl.b32 s1, $8, 8; shl.b32 s2, $8, 4;
    shl.b32 m0, $8, 9; shl.b32 m1, $8, 5; shl.b32 m2, $8, 1; shr.u32 m3, $8, 3;
    and.b32 m0, m0, 0x0E000E00; and.b32 m1, m1, 0x0E000E00;
    and.b32 m2, m2, 0x0E000E00; and.b32 m3, m3, 0x0E000E00;
    lop3.b32 w0, s0, 0x80008000, m0, 0xEA; lop3.b32 w1, s1, 0x80008000, m1, 0xEA;
    lop3.b32 w2, s2, 0x80008000, m2, 0xEA; lop3.b32 w3, $8, 0x80008000, m3, 0xEA;
    {_FOUR_APART}"""
)
INT4_TO_BF16 = tl.constexpr(_int4_under("0x43004300"))
INT4_TO_FP16 = tl.constexpr(_int4_under("0x64006400"))

# Of words arranged as in units (``kernels/weight_tiles.py``). Shifts to the left are written as
# products: they have a pipe of their own, and the logical operations fill theirs.
UNIT_E2M1_TO_BF16 = tl.constexpr(
    f"""{{ .reg .b32 t<6>, w<4>; mul.lo.u32 t0, $8, 8; mul.lo.u32 t1, $8, 64;
    mul.lo.u32 t2, $8, 2; shr.u32 t3, $8, 3; mul.lo.u32 t4, $8, 4;
    and.b32 w0, $8, 0x81C081C0; and.b32 w1, t0, 0x81C081C0;
    and.b32 t1, t1, 0x01C001C0; and.b32 t3, t3, 0x01C001C0;
    lop3.b32 w2, t2, 0x80008000, t1, 0xEA; lop3.b32 w3, t4, 0x80008000, t3, 0xEA;
    {_NEIGHBOURS}"""
)
UNIT_E2M1_TO_FP16 = tl.constexpr(
    f"""{{ .reg .b32 t<6>, w<4>; mul.lo.u32 t0, $8, 8; mul.lo.u32 t1, $8, 64;
    mul.lo.u32 t2, $8, 512; mul.lo.u32 t3, $8, 2; mul.lo.u32 t4, $8, 4;
    and.b32 w0, t0, 0x0E000E00; and.b32 w1, t1, 0x0E000E00;
    and.b32 w2, t2, 0x0E000E00; and.b32 w3, $8, 0x0E000E00;
    lop3.b32 w0, $8, 0x80008000, w0, 0xEA; lop3.b32 w1, t0, 0x80008000, w1, 0xEA;
    lop3.b32 w2, t3, 0x80008000, w2, 0xEA; lop3.b32 w3, t4, 0x80008000, w3, 0xEA;
    {_NEIGHBOURS}"""
)


def _unit_int4_under(mantissa: str) -> str:
    return f"""{{ .reg .b32 u<4>, w<4>; shr.u32 u1, $8, 4; shr.u32 u2, $8, 8; shr.u32 u3, $8, 12;
    lop3.b32 w0, $8, 0x000F000F, {mantissa}, 0xEA; lop3.b32 w1, u1, 0x000F000F, {mantissa}, 0xEA;
    lop3.b32 w2, u2, 0x000F000F, {mantissa}, 0xEA; lop3.b32 w3, u3, 0x000F000F, {mantissa}, 0xEA;
    {_NEIGHBOURS}"""


UNIT_INT4_TO_BF16 = tl.constexpr(_unit_int4_under("0x43004300"))
UNIT_INT4_TO_FP16 = tl.constexpr(_unit_int4_under("0x64006400"))
E2M1_TO_BF16_BY_CVT = tl.constexpr(_e2m1_by_cvt("bf16"))
E2M1_TO_FP16_BY_CVT = tl.constexpr(_e2m1_by_cvt("f16"))


@triton.jit
def eight_halves(words, ASSEMBLY: tl.constexpr, HALF: tl.constexpr):
    """int32 words → eight tensors in HALF, one per nibble.

    One word is one element of the assembly (pack=1): which elements share a pack is the compiler's
    choice, and it does choose others than neighbours (measured on an H200: three rows of four were
    wrong when four bytes were taken for a word).
    """
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=h,=h,=h,=h,=h,=h,=h,=h,r",
        [words],
        dtype=EIGHT_BF16 if HALF == tl.bfloat16 else EIGHT_FP16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack_operand(
    words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ELEMENT: tl.constexpr, HALF: tl.constexpr
):
    """int32 words of eight codes [ROWS, COLUMNS/8] → 16-bit numbers [ROWS, COLUMNS], in the order
    0 4 1 5 2 6 3 7.

    E2M1 becomes value · 2^-126 (bf16) or 2^-14 (fp16): the code's exponent and mantissa are moved
    to where those of the wider format meet. INT4 becomes value + 136 (bf16) or + 1032 (fp16): the
    nibble, made unsigned, under the mantissa of a constant. For bf16 one multiplication, with a
    pipe of its own, moves sign and magnitude at once (13 operations a word, not 15; on sm_90
    418 instructions a step, not 448); in fp16 their copies would meet.
    """
    if ELEMENT == "e2m1":
        assembly: tl.constexpr = E2M1_TO_BF16 if HALF == tl.bfloat16 else E2M1_TO_FP16
    else:
        assembly: tl.constexpr = INT4_TO_BF16 if HALF == tl.bfloat16 else INT4_TO_FP16
    c0, c1, c2, c3, c4, c5, c6, c7 = eight_halves(words, assembly, HALF)
    return in_word_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS)


@triton.jit
def unpack_unit(
    words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ELEMENT: tl.constexpr, HALF: tl.constexpr
):
    """As :func:`unpack_operand`, of words arranged as in units; the columns keep their order."""
    if ELEMENT == "e2m1":
        assembly: tl.constexpr = UNIT_E2M1_TO_BF16 if HALF == tl.bfloat16 else UNIT_E2M1_TO_FP16
    else:
        assembly: tl.constexpr = UNIT_INT4_TO_BF16 if HALF == tl.bfloat16 else UNIT_INT4_TO_FP16
    c0, c1, c2, c3, c4, c5, c6, c7 = eight_halves(words, assembly, HALF)
    return in_column_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS)


@triton.jit
def unpack_operand_by_cvt(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr):
    """int32 words of E2M1 codes → values in HALF, columns in order, by the conversion instruction
    of sm_100 and sm_120."""
    assembly: tl.constexpr = E2M1_TO_BF16_BY_CVT if HALF == tl.bfloat16 else E2M1_TO_FP16_BY_CVT
    c0, c1, c2, c3, c4, c5, c6, c7 = eight_halves(words, assembly, HALF)
    return in_column_order(c0, c1, c2, c3, c4, c5, c6, c7, ROWS, COLUMNS)


@triton.jit
def operand_factor(ELEMENT: tl.constexpr, HALF: tl.constexpr, CVT: tl.constexpr):
    """What :func:`weight_operand` divides by: a power of two that saves an instruction there and
    costs none in the epilogue."""
    whole: tl.constexpr = HALF == tl.bfloat16 and (ELEMENT == "int4" or CVT)
    return 1.0 if whole else 256.0


@triton.jit
def weight_operand(
    words,
    scale_bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    CVT: tl.constexpr,
    TILED: tl.constexpr,
):
    """value · scale / :func:`operand_factor` in HALF, exact; columns in ``word_order``, with CVT or
    of a TILED weight in their own.

    For int4 one fused multiply-add removes the offset and applies the scale: 136 · scale (fp16:
    1032 · scale) has at most 8 (11) significant bits, so it is exact, and the fused operation
    rounds only its exact result.
    """
    tl.static_assert(ELEMENT == "e2m1" or not CVT)
    tl.static_assert(not (CVT and TILED))
    scales = operand_scale(scale_bytes, ELEMENT, SCALE, HALF, CVT)
    if CVT:
        numbers = unpack_operand_by_cvt(words, ROWS, COLUMNS, HALF)
    elif TILED:
        numbers = unpack_unit(words, ROWS, COLUMNS, ELEMENT, HALF)
    else:
        numbers = unpack_operand(words, ROWS, COLUMNS, ELEMENT, HALF)
    if ELEMENT == "e2m1":
        result = spread_scales(numbers, scales, ROWS, COLUMNS, GROUP)
    else:
        offset: tl.constexpr = 136.0 if HALF == tl.bfloat16 else 1032.0
        shape: tl.constexpr = [ROWS, COLUMNS // GROUP, GROUP]
        shift = (scales * -offset)[:, :, None].broadcast_to(shape)
        factor = scales[:, :, None].broadcast_to(shape)
        result = tl.fma(numbers.reshape(shape), factor, shift).reshape(ROWS, COLUMNS)
    return result


@triton.jit
def weight_operand_plain(
    words,
    scale_bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TILED: tl.constexpr,
):
    """value · scale in fp32, columns in order: the twin of :func:`weight_operand` but for order and
    factor."""
    if TILED:
        codes = unpack_unit_words(words, ROWS, COLUMNS, ELEMENT)
    else:
        codes = unpack_words(words, ROWS, COLUMNS)
    values = decode(codes, ELEMENT)
    return spread_scales(values, decode_scale(scale_bytes, SCALE), ROWS, COLUMNS, GROUP)
