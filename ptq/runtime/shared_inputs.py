"""Layers that read the same inputs: what is made of these is made once, and multiplied at once.

    q, k, v of one x:   three rotations (and quantizations) and three matmuls     apart
                        one rotation and three products                           inputs shared
                        one rotation and one matmul                               weights stacked

A model calls its layers one after the other, each with x. The first of them leaves what it made of
x at the tensor itself, the others find it there: only what was made of that very tensor is ever
taken, so no knowledge of the model is needed, and a model that gives them different tensors
computes what it would have computed. Each takes its part once; after the last nothing is left. A
tensor that was written into since (its version says so; inference tensors have none) is new.

The layers stay in the model under their names. Where their weights are stacked, they are views of
the stack, so state_dict, saving and loading work as before. A layer that is moved, copied or
loaded anew computes alone from then on, until :func:`ptq.runtime.load.prepare_kernels`.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ptq.kernels.operands import Fp8Inputs, QuantizedInputs

if TYPE_CHECKING:
    from ptq.runtime.fused_modules import FusedNorm
    from ptq.runtime.kernel_weight import KernelWeight
    from ptq.runtime.quant_linear import QuantLinear

logger = logging.getLogger(__name__)

Inputs = Tensor | QuantizedInputs | Fp8Inputs
MADE, NORM = "_ptq_made", "_ptq_norm"  # attributes of a tensor of inputs


class Made:
    """What was made of a tensor, and who took it.

    Attributes:
        readers: whom it was made for.
        source: the weight that kernels are to multiply it with; None for the reference path.
        parts: the products of the layers; None if they were not made together.
    """

    __slots__ = ("inputs", "parts", "readers", "source", "taken", "version")

    def __init__(
        self, x: Tensor, readers: "Readers", source: "KernelWeight | None", inputs: Inputs
    ) -> None:
        self.readers, self.source = readers, source
        # A view of x would hold x, which holds this: 17 GB that nobody frees, of a model of 135M.
        self.inputs = inputs.data if isinstance(inputs, Tensor) else inputs
        self.version = _version(x)
        self.parts: list[Tensor | None] | None = None
        self.taken: set[int] = set()


def same(these: Sequence[object], those: Sequence[object]) -> bool:
    """Whether both are the same objects."""
    return all(a is b for a, b in zip(these, those, strict=True))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Readers:
    """Some layers that read the same inputs.

    Attributes:
        weight: of all, stacked, for kernels; None if each has its own.
        source: what makes inputs for kernels: ``weight``, or that of the first layer.
    """

    def __init__(self, layers: "Sequence[QuantLinear]") -> None:
        self.count = len(layers)
        self.weight: KernelWeight | None = None
        self.source: KernelWeight | None = None
        self.rows = [layer.out_features for layer in layers]
        self.made_of: list[tuple[object, ...]] = []
        for index, layer in enumerate(layers):
            layer.readers = (self, index)

    def freeze(self, layers: "Sequence[QuantLinear]") -> None:
        """From now on a layer whose tensors are replaced computes alone."""
        self.made_of = [layer.made_of() for layer in layers]

    def __call__(self, layer: "QuantLinear", index: int, x: Tensor) -> Tensor:
        """What ``layer``, the one of this index, gives for ``x``."""
        source = self.source if layer.kernel_dtype == x.dtype else None
        if not same(layer.made_of(), self.made_of[index]):
            return layer.product(layer.prepared(x), x)
        made = self._made(x, source, index)
        if made is None:
            made = Made(
                x, self, source, layer.prepared(x) if source is None else source.inputs(x)[0]
            )
            setattr(x, MADE, made)
            norm: FusedNorm | None = getattr(x, NORM, None)
            if norm is not None and norm.readers is None and source is not None:
                norm.readers = self
        made.taken.add(index)
        if len(made.taken) == self.count:
            delattr(x, MADE)
        if source is None or self.weight is None:
            return layer.product(made.inputs, x)
        if made.parts is None:
            if index:  # the first has read something else: the layers differ in what they read
                logger.info("layers of a stack read different inputs: they run one by one")
                self.weight = None
                return layer.product(made.inputs, x)
            both = self.weight.multiply(made.inputs, x.shape[:-1], x.dtype)
            made.parts = list(both.split(self.rows, dim=-1))
        part, made.parts[index] = made.parts[index], None
        assert part is not None  # an index that was taken makes anew
        return part

    def current(self, layers: "Sequence[QuantLinear]") -> bool:
        """Whether the tensors of ``layers``, all of its, are those that it knows."""
        return all(map(same, (layer.made_of() for layer in layers), self.made_of))

    def together(self, x: Tensor) -> Tensor:
        """(*s, out of all layers) in the dtype of ``x``, where their weights are stacked."""
        assert self.weight is not None
        made = self._made(x, self.weight, 0)
        inputs = self.weight.inputs(x)[0] if made is None else made.inputs
        norm: FusedNorm | None = getattr(x, NORM, None)
        if norm is not None and norm.readers is None:
            norm.readers = self
        return self.weight.multiply(inputs, x.shape[:-1], x.dtype)

    def _made(self, x: Tensor, source: "KernelWeight | None", index: int) -> Made | None:
        made: Made | None = getattr(x, MADE, None)
        if made is None or made.readers is not self or made.source is not source:
            return None
        return None if index in made.taken or made.version != _version(x) else made
