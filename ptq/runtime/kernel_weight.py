"""What Triton kernels multiply with: a packed weight, of one layer or of several under each other,
and how their inputs are rotated and quantized.

Made once for a layer, so that nothing but kernels is launched per token (a fill for a global scale
that E8M0 formats do not have was one launch a layer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ptq.kernels import coverage, gpu
from ptq.kernels.operands import (
    NO_PROLOGUE,
    Encoding,
    Fp8Inputs,
    Fp8Weight,
    PackedWeight,
    Prologue,
    QuantizedInputs,
)
from ptq.numerics.rotation import Rotation
from ptq.runtime.precision import full_precision

# From so many tokens on fp8 is faster than 16 bits, where a copy is at hand: on an H200 a block of
# Llama-3.1-8B takes 110 µs instead of 127 at 64 tokens, 107 instead of 218 at 128, to which come 12
# and 15 for rounding the inputs (kernels/BENCHMARKS.md; weights in rows).
FP8_TOKENS = 65


@dataclass(frozen=True, kw_only=True)
class KernelWeight:
    """y = x' Ŵᵀ + bias, with x' the inputs rotated, in 16 bits or quantized.

    Attributes:
        weight: (out, in).
        bias: (out,) or None.
        rotation: size of the blocks in which inputs are rotated.
        encoding: what inputs are quantized to; None keeps 16 bits.
        input_scale: float32 scalar, the global scale of quantized inputs; None takes one per token.
        fp8_prefill: multiply many tokens in fp8, with a copy of the weight that stays in memory.
    """

    weight: PackedWeight
    bias: Tensor | None
    rotation: int
    encoding: Encoding | None
    input_scale: Tensor | None
    fp8_prefill: bool = False

    @property
    def fp8(self) -> Fp8Weight | None:
        """The copy in fp8, a byte a number; None where many tokens are multiplied in 16 bits."""
        sizes = self.weight.out_features, self.weight.in_features
        if not self.fp8_prefill or self.encoding is not None or any(size % 16 for size in sizes):
            return None
        return self._fp8

    @cached_property
    def _fp8(self) -> Fp8Weight:
        from ptq.kernels.op_dequantize import fp8_weight  # imports Triton

        return fp8_weight(self.weight)

    @property
    def blocked(self) -> PackedWeight:
        """The weight with its scale bytes as many tokens on sm_100 want them."""
        capturing = gpu.capturing(self.weight.packed.device)
        return self._in_blocks() if capturing else self._blocked

    @cached_property
    def _blocked(self) -> PackedWeight:
        return self._in_blocks()

    def _in_blocks(self) -> PackedWeight:
        from ptq.kernels.quantize import swizzle_scales

        return replace(self.weight, scale_bits=swizzle_scales(self.weight.scale_bits))

    def fill(self, dtype: torch.dtype) -> None:
        """Make what is kept between calls with inputs of ``dtype``, before a CUDA graph can record
        the first of them."""
        from ptq.kernels import op_inputs  # imports Triton

        device = self.weight.packed.device
        if self.rotation not in coverage.ROTATIONS:
            rotated(torch.empty(1, self.rotation, dtype=dtype, device=device), self.rotation)
        elif self.rotation > 1:
            op_inputs.hadamard(self.rotation, dtype, device)

    def inputs(
        self, x: Tensor, prologue: Prologue = NO_PROLOGUE
    ) -> tuple[Tensor | QuantizedInputs | Fp8Inputs, Tensor]:
        """What the weight is multiplied with, of ``x`` (*s, in); and what the prologue made of x,
        if it is to keep it."""
        from ptq.kernels import op_inputs, op_matmul  # imports Triton

        if self.encoding is None:
            if x.numel() < FP8_TOKENS * x.shape[-1] or self.fp8 is None:
                return rotated(x, self.rotation, prologue)
            return in_fp8(x, self.rotation, prologue)
        rows = x.reshape(-1, x.shape[-1])
        inputs, kept = op_inputs.quantize_and_keep(
            rows,
            self.rotation,
            self.encoding,
            self.input_scale,
            prologue,
            swizzle=op_matmul.wants_blocked_scales(self.weight, len(rows)),
        )
        return inputs, kept.view_as(x) if prologue.keep else kept

    def multiply(
        self, inputs: Tensor | QuantizedInputs | Fp8Inputs, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """(*shape, out) in ``dtype``, from what :meth:`inputs` made of (*shape, in)."""
        from ptq.kernels import op_matmul  # imports Triton

        if isinstance(inputs, Tensor):
            return op_matmul.w4a16_matmul(inputs, self.weight, self.bias)
        if isinstance(inputs, Fp8Inputs):
            copy = self.fp8
            assert copy is not None  # or nobody had made such inputs
            y = op_matmul.fp8_matmul(inputs, copy, self.bias, dtype)
            return y.reshape(*shape, self.weight.out_features)
        weight = self.blocked if inputs.scale_bits.ndim == 5 else self.weight
        y = op_matmul.w4a4_matmul(inputs, weight, self.bias, dtype)
        return y.reshape(*shape, weight.out_features)


def rotated(x: Tensor, size: int, prologue: Prologue = NO_PROLOGUE) -> tuple[Tensor, Tensor]:
    """16-bit inputs (*s, in) rotated in blocks of ``size``, and what the prologue made of them, if
    it is to keep it; rounded once. Blocks that the kernels do not have are the library's."""
    from ptq.kernels import op_inputs  # imports Triton

    if size in coverage.ROTATIONS:
        if prologue.keep:
            return op_inputs.rotate_and_keep(x, size, prologue)
        return op_inputs.rotate(x, size, prologue), x
    y = op_inputs.rotate(x, 1, prologue)
    with full_precision(x.device):
        return Rotation(size).rotate(y), y


def in_fp8(x: Tensor, size: int, prologue: Prologue) -> tuple[Fp8Inputs, Tensor]:
    """As :func:`rotated`, rounded to fp8, with a factor for each token. What is kept, and what the
    library rotates, is rounded to 16 bits first."""
    from ptq.kernels import op_inputs  # imports Triton

    if prologue.keep:
        x, prologue = op_inputs.rotate(x, 1, replace(prologue, keep=False)), NO_PROLOGUE
    if size in coverage.ROTATIONS:
        return Fp8Inputs(*op_inputs.rotate_fp8(x, size, prologue)), x
    y = rotated(x, size, prologue)[0]
    return Fp8Inputs(*op_inputs.rotate_fp8(y, 1)), x


@torch.no_grad()
def stacked(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """(experts, rows, …): the tensors of each expert under each other, which become views of it, so
    that nothing is held twice."""
    first, rows = tensors[0][0], sum(len(tensor) for tensor in tensors[0])
    whole = first.new_empty(len(tensors), rows, *first.shape[1:])
    for expert, parts in enumerate(tensors):
        start = 0
        for tensor in parts:
            part = whole[expert, start : start + len(tensor)]
            part.copy_(tensor)
            tensor.data = part  # frees what it was
            start += len(part)
    return whole
