"""The operators as torch knows them: schemas, implementations on tensors that were checked, fakes
for torch.compile.

Opaque on purpose: inductor cannot fuse into a dot kernel, and would trace the choice of tiles. With
``TRITON_INTERPRET=1`` the same launchers also serve CPU tensors, so that every operator is tested
without a GPU.
"""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

from ptq.kernels import dispatch, launch
from ptq.kernels.dispatch import Tile

LIBRARY = torch.library.Library("ptq", "FRAGMENT")
# In the interpreter one small tile serves all shapes; on a device the tables decide.
INTERPRETED_TILE = {
    "w4a16": Tile(kernel="w4a16", block_m=16, block_n=64, split=2, order="fragments"),
    "grouped": Tile(kernel="w4a16", block_m=16, block_n=64, order="fragments"),
    "w4a4": Tile(kernel="w4a4", block_m=16, block_n=64, split=2),
    "w4a4_blocked": Tile(kernel="w4a4_tma", block_m=128, block_n=128),
}


def define(schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an operator of the ``ptq`` namespace: for CUDA, for CPU when kernels are
    interpreted, and its fake."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    LIBRARY.impl(name, on_device(implementation), "CUDA")
    if launch.INTERPRETED:
        LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"ptq::{name}", fake, lib=LIBRARY)


def on_device(implementation: Callable[..., object]) -> Callable[..., object]:
    """``implementation`` with the device of its first tensor as the current one, where Triton
    launches."""

    @wraps(implementation)
    def run(*args: object, **options: object) -> object:
        device = next(value.device for value in args if isinstance(value, Tensor))
        with torch.cuda.device(device):
            return implementation(*args, **options)

    return run


def tile_for(
    operation: str, device: torch.device, element: str, scale: str, tokens: int, n: int, k: int
) -> Tile:
    if launch.INTERPRETED:
        return INTERPRETED_TILE[operation]
    arch = dispatch.architecture(device)
    if arch is None:
        raise ValueError(
            f"no kernels for {torch.cuda.get_device_name(device)}; they need compute capability "
            "8.0 or more"
        )
    return dispatch.choose(
        arch,
        operation,
        dispatch.FORMATS[element, scale],
        tokens,
        n,
        k,
        dispatch.multiprocessors(device),
    )


def features(x: Tensor, prologue: str) -> int:
    return x.shape[-1] // 2 if prologue == "silu_mul" else x.shape[-1]


# ---------------------------------------------------------------- rotation and quantization of inputs


@lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """±1 of Sylvester's matrix: the parity of the bits that row and column have in common."""
    index = torch.arange(size, device=device)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(size.bit_length()):
        parity ^= (common >> bit) & 1
    return (1 - 2 * parity).to(dtype)


def _block(x: Tensor, rotation: int, matrix: Tensor | None) -> tuple[Tensor | None, float]:
    if matrix is not None:
        return matrix, 1.0
    return (
        (None, 1.0) if rotation == 1 else (_hadamard(rotation, x.dtype, x.device), rotation**-0.5)
    )


def _rotate_quantize_fake(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    element: str,
    scale: str,
    global_scale: Tensor | None,
    rule: str,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
    swizzle: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, k = x.shape[0], features(x, prologue)
    groups = k // dispatch.GROUP_SIZE[scale]
    packed = x.new_empty((rows, k // 2), dtype=torch.uint8)
    shape = ((rows + 127) // 128, (groups + 3) // 4, 32, 4, 4) if swizzle else (rows, groups)
    bits = x.new_empty(shape, dtype=torch.uint8)
    per_row = scale == "e4m3" and global_scale is None
    return packed, bits, x.new_empty((rows, 1) if per_row else (0, 1), dtype=torch.float32)


def _rotate_quantize(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    element: str,
    scale: str,
    global_scale: Tensor | None,
    rule: str,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
    swizzle: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    packed, bits, rows = _rotate_quantize_fake(
        x, rotation, block, element, scale, global_scale, rule, prologue, gain, epsilon, swizzle
    )
    if len(x):
        if swizzle and bits.numel() * dispatch.GROUP_SIZE[scale] != packed.numel() * 2:
            bits.zero_()  # scales of padding multiply zeros, so they must not be NaN
        computed = len(rows) > 0
        given = None if global_scale is None else global_scale.contiguous()
        matrix, factor = _block(x, rotation, block)
        launch.rotate_quantize(
            x,
            matrix,
            factor,
            gain,
            epsilon,
            rows if computed else given,
            (packed, bits),
            k=2 * packed.shape[1],
            element=element,
            scale=scale,
            rule=rule,
            prologue=prologue,
            computed=computed,
            swizzle=swizzle,
        )
    return packed, bits, rows


def _rotate_fake(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
) -> Tensor:
    return x.new_empty((x.shape[0], features(x, prologue)))


def _rotate(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
) -> Tensor:
    x = x.contiguous()
    out = _rotate_fake(x, rotation, block, prologue, gain, epsilon)
    _launch_rotation(x, rotation, block, prologue, gain, epsilon, None, out)
    return out


def _launch_rotation(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
    scales: Tensor | None,
    out: Tensor,
) -> None:
    """Rotate into ``out``: 16 bits without ``scales``, fp8 with."""
    matrix, factor = _block(x, rotation, block)
    if len(x):
        launch.rotate_quantize(
            x,
            matrix,
            factor,
            gain,
            epsilon,
            scales,
            out,
            k=out.shape[1],
            element="e2m1",
            scale="e4m3",
            rule="theta",
            prologue=prologue,
            computed=scales is not None,
            swizzle=False,
        )


def _rotate_fp8_fake(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty((rows, features(x, prologue)), dtype=torch.float8_e4m3fn), x.new_empty(
        (rows, 1), dtype=torch.float32
    )


def _rotate_fp8(
    x: Tensor,
    rotation: int,
    block: Tensor | None,
    prologue: str,
    gain: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, scales = _rotate_fp8_fake(x, rotation, block, prologue, gain, epsilon)
    _launch_rotation(x, rotation, block, prologue, gain, epsilon, scales, out)
    return out, scales


define(
    "rotate_quantize(Tensor x, int rotation, Tensor? block, str element, str scale, Tensor? "
    "global_scale, str rule, "
    "str prologue, Tensor? gain, float epsilon, bool swizzle) -> (Tensor, Tensor, Tensor)",
    _rotate_quantize,
    _rotate_quantize_fake,
)
define(
    "rotate_fp8(Tensor x, int rotation, Tensor? block, str prologue, Tensor? gain, float epsilon) "
    "-> (Tensor, Tensor)",
    _rotate_fp8,
    _rotate_fp8_fake,
)
define(
    "rotate(Tensor x, int rotation, Tensor? block, str prologue, Tensor? gain, float epsilon) -> "
    "Tensor",
    _rotate,
    _rotate_fake,
)


# ---------------------------------------------------------------- dense weights


def _dequantize_fake(
    packed: Tensor, scale_bits: Tensor, factor: Tensor, element: str, scale: str, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)


def _dequantize(
    packed: Tensor, scale_bits: Tensor, factor: Tensor, element: str, scale: str, dtype: torch.dtype
) -> Tensor:
    out = _dequantize_fake(packed, scale_bits, factor, element, scale, dtype)
    launch.dequantize(packed.contiguous(), scale_bits.contiguous(), factor, out, element, scale)
    return out


define(
    "dequantize(Tensor packed, Tensor scale_bits, Tensor factor, str element, str scale, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


# ---------------------------------------------------------------- matmuls


def _w4a16_fake(
    x: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    element: str,
    scale: str,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def _w4a16(
    x: Tensor,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    element: str,
    scale: str,
) -> Tensor:
    out = _w4a16_fake(x, packed, scale_bits, global_scale, bias, element, scale)
    if not len(x):
        return out
    tile = tile_for("w4a16", x.device, element, scale, len(x), len(packed), x.shape[1])
    if tile.kernel == "dense":
        weight = _dequantize(packed, scale_bits, global_scale, element, scale, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    packed, scale_bits = packed.contiguous(), scale_bits.contiguous()
    launch.w4a16(x.contiguous(), packed, scale_bits, global_scale, bias, out, element, scale, tile)
    return out


def _w4a4_fake(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    scale: str,
    dtype: torch.dtype,
) -> Tensor:
    return x_packed.new_empty((x_packed.shape[0], packed.shape[0]), dtype=dtype)


def _w4a4(
    x_packed: Tensor,
    x_scale_bits: Tensor,
    x_global_scale: Tensor | None,
    packed: Tensor,
    scale_bits: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    scale: str,
    dtype: torch.dtype,
) -> Tensor:
    out = _w4a4_fake(
        x_packed, x_scale_bits, x_global_scale, packed, scale_bits, global_scale, bias, scale, dtype
    )
    if not len(out):
        return out
    m, n, k = len(x_packed), len(packed), 2 * packed.shape[1]
    tile = tile_for(
        "w4a4_blocked" if scale_bits.ndim == 5 else "w4a4", x_packed.device, "e2m1", scale, m, n, k
    )
    packed, scale_bits = packed.contiguous(), scale_bits.contiguous()
    launch.w4a4(
        x_packed,
        x_scale_bits,
        x_global_scale,
        packed,
        scale_bits,
        global_scale,
        bias,
        out,
        scale,
        tile,
    )
    return out


define(
    "w4a16_matmul(Tensor x, Tensor packed, Tensor scale_bits, Tensor global_scale, Tensor? bias, "
    "str element, "
    "str scale) -> Tensor",
    _w4a16,
    _w4a16_fake,
)
define(
    "w4a4_matmul(Tensor x_packed, Tensor x_scale_bits, Tensor? x_global_scale, Tensor packed, "
    "Tensor scale_bits, "
    "Tensor global_scale, Tensor? bias, str scale, ScalarType dtype) -> Tensor",
    _w4a4,
    _w4a4_fake,
)
