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
from ptq.kernels.operands import NO_PROLOGUE, Encoding, PackedWeight, Prologue, QuantizedInputs
from ptq.numerics.rotation import Rotation
from ptq.runtime.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class KernelWeight:
    """y = x' Ŵᵀ + bias, with x' the inputs rotated, in 16 bits or quantized.

    Attributes:
        weight: (out, in).
        bias: (out,) or None.
        rotation: size of the blocks in which inputs are rotated.
        encoding: what inputs are quantized to; None keeps 16 bits.
        input_scale: float32 scalar, the global scale of quantized inputs; None takes one per token.
    """

    weight: PackedWeight
    bias: Tensor | None
    rotation: int
    encoding: Encoding | None
    input_scale: Tensor | None

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
    ) -> tuple[Tensor | QuantizedInputs, Tensor]:
        """What the weight is multiplied with, of ``x`` (*s, in); and what the prologue made of x,
        if it is to keep it."""
        from ptq.kernels import op_inputs, op_matmul  # imports Triton

        if self.encoding is None:
            return rotated(x, self.rotation, prologue)
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
        self, inputs: Tensor | QuantizedInputs, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """(*shape, out) in ``dtype``, from what :meth:`inputs` made of (*shape, in)."""
        from ptq.kernels import op_matmul  # imports Triton

        if isinstance(inputs, Tensor):
            return op_matmul.w4a16_matmul(inputs, self.weight, self.bias)
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
