"""What an operator is: a schema for torch, an implementation on tensors that were checked, and a
fake for torch.compile.

Opaque on purpose: inductor cannot fuse into a dot kernel, and would trace the choice of tiles. With
``TRITON_INTERPRET=1`` the same launchers also serve CPU tensors, so that every operator is tested
without a GPU.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps

import torch
import triton
from torch import Tensor

from ptq.kernels import coverage, gpu, tiles
from ptq.kernels.codec import encode
from ptq.kernels.tiles import Tile

# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled or interpreted on the
# CPU.
INTERPRETED = not isinstance(encode, triton.JITFunction)
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
    interpreted, and its fake.

    Schemas are flat, Python functions are not: where a parameter of ``implementation`` is annotated
    with a record (a dataclass), its fields stand in the schema, one after the other. The fake has
    the same parameters.
    """
    name = schema.split("(", 1)[0]
    run, shape = (takes_flat(function, like=implementation) for function in (implementation, fake))
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    LIBRARY.impl(name, on_device(run), "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"ptq::{name}", shape, lib=LIBRARY)


def takes_flat(
    function: Callable[..., object], *, like: Callable[..., object]
) -> Callable[..., object]:
    """``function`` with flat arguments, which are gathered into the records that ``like`` is
    annotated with."""
    kinds = [parameter.annotation for parameter in inspect.signature(like).parameters.values()]
    widths = [len(fields(kind)) if is_dataclass(kind) else 0 for kind in kinds]

    def gathered(flat: Sequence[object]) -> list[object]:
        arguments, place = [], 0
        for kind, width in zip(kinds, widths, strict=True):
            if width:
                names = (field.name for field in fields(kind))
                values = flat[place : place + width]
                arguments.append(kind(**dict(zip(names, values, strict=True))))
            else:
                arguments.append(flat[place])
            place += max(width, 1)
        assert place == len(flat), f"{function.__name__} takes {place} values, not {len(flat)}"
        return arguments

    @wraps(function)
    def run(*flat: object) -> object:
        return function(*gathered(flat))

    return run


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
    """The tile of a launch; raises ValueError on a device that has no table."""
    if INTERPRETED:
        return INTERPRETED_TILE[operation]
    arch = gpu.architecture(device)
    if arch is None:
        raise ValueError(
            f"no kernels for {torch.cuda.get_device_name(device)}; they need compute capability "
            "8.0 or more"
        )
    fmt = coverage.FORMATS[element, scale]
    return tiles.choose(arch, operation, fmt, tokens, n, k, gpu.multiprocessors(device))
