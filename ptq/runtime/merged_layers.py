"""Layers of a checkpoint as an engine runs them: those of one input under each other, and of each
the part that a rank of tensor parallelism holds. Nothing here knows an engine.

An engine makes one layer of q, k and v, or of gate and up, and hands over their tensors as they lie
on disk, one by one. Each becomes a QuantLinear by the readers of :mod:`ptq.checkpoint`; neighbours
that are alike become one, and those that differ in format, rotation, or global scale stay apart:

    y = [y_q, y_k, y_v],   every part with its own rotation, scales and treatment of x
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional

from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.layer_checks import GLOBALS, layer_types
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import in_ptq_form, layer_from_disk
from ptq.model.expert_layouts import ExpertNames, Layout
from ptq.model.experts import Experts, Gate
from ptq.numerics.formats import FORMATS
from ptq.runtime.packed_experts import pack_experts
from ptq.runtime.quant_linear import QuantLinear, stored_layer

WEIGHT = "weight"  # of a layer that is not quantized, and an empty one that stops other loaders


@dataclass(frozen=True)
class Cut:
    """The part of a layer (out, in) that a rank holds; None is all.

    Attributes:
        rows, columns: the first, and one past the last; what is beyond the end is not there.
        inputs: of the whole layer.
    """

    inputs: int
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a matrix (out, a fixed number for each column); others are whole, and so are
        the columns of one with a number a row."""
        if tensor.ndim != 2:
            return tensor
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        if self.columns is not None and tensor.shape[1] > 1:
            width = tensor.shape[1]
            start, stop = (bound * width // self.inputs for bound in self.columns)
            tensor = tensor[:, start:stop]
        return tensor

    @property
    def whole(self) -> bool:
        """Whether it is the layer."""
        return self.rows is None and self.columns is None

    def check(self, info: LayerInfo, name: str) -> None:
        """ValueError if it would part a scale group, or a block of the rotation, of ``name``."""
        if self.columns is None:
            return
        size = max(FORMATS[info.format].group_size, info.rotation)
        if any(bound % size for bound in self.columns):
            raise ValueError(
                f"{name} has {self.inputs} inputs in "
                f"{'blocks of the rotation' if info.rotation == size else 'groups'} of {size}, "
                f"which {self.inputs // (self.columns[1] - self.columns[0])} ranks cannot share: "
                "lower tensor_parallel_size"
            )


class Shard:
    """One layer of a checkpoint: its tensors as they arrive, and the layer that they are.

    Args:
        name: in the checkpoint, for messages.
        info: what config.json says of it; None if it is not quantized.
        device: where it is to compute.
    """

    def __init__(
        self,
        name: str,
        info: LayerInfo | None,
        dialect: Dialect,
        cut: Cut,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.info, self.dialect, self.cut = name, info, dialect, cut
        self.device = device
        self.stored: dict[str, Tensor] = {}
        if info is not None:
            cut.check(info, name)

    @property
    def types(self) -> dict[str, torch.dtype]:
        """The tensors that may arrive, and a type that each may have."""
        if self.info is None:
            return {WEIGHT: torch.bfloat16}
        conversion = self.dialect.conversion(self.info)
        needed = layer_types(self.info) if conversion is None else conversion.types
        optional = GLOBALS if conversion is None else conversion.optional
        found = {WEIGHT: torch.uint8} | dict.fromkeys(optional, torch.float32)
        return found | {leaf: types[0] for leaf, types in needed.items()}

    def take(self, leaf: str, tensor: Tensor) -> None:
        """Keep a tensor as it lies on disk, or the part that is needed where a part can be read."""
        if not tensor.numel():
            return  # a guard of the ptq dialect
        if self.info is None or self.dialect.conversion(self.info) is None:
            tensor = self.cut.of(tensor).to(self.device)
        self.stored[leaf] = tensor

    def layer(self, dtype: torch.dtype) -> nn.Module:
        """The layer without its bias, in evaluation mode; the tensors are kept no longer.

        Raises:
            ValueError: a tensor is missing, or what :func:`layer_from_disk` refuses.
        """
        stored, self.stored, info = self.stored, {}, self.info
        if info is None:
            if WEIGHT not in stored:
                raise ValueError(f"the checkpoint has no {self.name}.{WEIGHT}: it is incomplete")
            weight = stored[WEIGHT].to(dtype)
            linear = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            return linear.eval()
        whole = self.dialect.conversion(info) is not None
        tensors = in_ptq_form(stored, self.dialect, info, self.name)
        memory = layer_from_disk(tensors, info, self.name)
        if whole:
            memory = {leaf: self.cut.of(tensor) for leaf, tensor in memory.items()}
        # a part of a larger tensor would keep all of it
        memory = {leaf: tensor.to(self.device).contiguous() for leaf, tensor in memory.items()}
        rows, bytes = memory["weight_packed"].shape
        inputs = bytes * FORMATS[info.format].per_byte
        place = nn.Linear(inputs, rows, bias=False, device="meta")
        return stored_layer(place, info, memory, self.name).eval()


class Merged(nn.Module):
    """Layers of the same inputs, their outputs under each other: ``(*s, in)`` → ``(*s, rows)``.

    Attributes:
        rows: outputs; those that no part makes are zero.
        made: how many the parts make.
    """

    def __init__(self, parts: Iterable[nn.Module], rows: int, bias: Tensor | None = None) -> None:
        """``bias`` (rows,) becomes that of the parts, which round once."""
        super().__init__()
        self.parts, self.rows, self.biased = nn.ModuleList(_joined(parts)), rows, bias is not None
        start = 0
        for part in self.parts:
            count = int(part.out_features)  # pyright: ignore[reportArgumentType] - all are linear
            if bias is not None:
                own = bias.detach()[start : start + count]
                dense = isinstance(part, nn.Linear)
                setattr(part, "bias", nn.Parameter(own, requires_grad=False) if dense else own)  # noqa: B010 - a parameter of one kind of layer, a buffer of the other
            start += count
        self.made = start

    @property
    def quantized(self) -> list[QuantLinear]:
        """The parts that are."""
        return [part for part in self.parts if isinstance(part, QuantLinear)]

    @property
    def emulated(self) -> bool:
        """Whether a part is in the reference path."""
        return any(part.kernel_dtype is None for part in self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        found = [part(x) for part in self.parts]
        y = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return functional.pad(y, (0, self.rows - self.made)) if self.made < self.rows else y


def _joined(parts: Iterable[nn.Module]) -> list[nn.Module]:
    """``parts``, with one layer for neighbours that are alike."""
    runs: list[list[nn.Module]] = []
    for part in parts:
        if runs and _alike(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [run[0] if len(run) == 1 else _stacked(run) for run in runs]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    if not isinstance(one, QuantLinear) or not isinstance(other, QuantLinear):
        return False
    if one.info != other.info or not torch.equal(one.global_scale, other.global_scale):
        return False
    a, b = one.input_scale, other.input_scale
    return (a is None or b is None or torch.equal(a, b)) and (a is None) == (b is None)


def _stacked(layers: Sequence[nn.Module]) -> QuantLinear:
    """One layer of those that are alike in all but their rows."""
    linears = [layer for layer in layers if isinstance(layer, QuantLinear)]
    first, rows = linears[0], sum(layer.out_features for layer in linears)
    result = QuantLinear(first.in_features, rows, first.info)
    result.weight_packed = torch.cat([layer.weight_packed for layer in linears])
    result.weight_scale = torch.cat([layer.weight_scale for layer in linears])
    result.weight_global_scale = first.weight_global_scale
    result.input_global_scale = first.input_global_scale
    return result.eval()


PROJECTIONS = ExpertNames("w1", "w3", "w2")  # gate, up and down, as engines call them


def merged_experts(
    shards: Mapping[tuple[int, str], Shard],
    *,
    hidden: int,
    intermediate: int,
    gating: Gate,
    dtype: torch.dtype,
) -> tuple[Experts, str | None]:
    """Experts of layers of a checkpoint, grouped where kernels run; and why they are not, if so.

    Args:
        shards: by number of the expert and name of the projection in ``PROJECTIONS``.
        gating: (tokens, 2 · intermediate), gate before up → (tokens, intermediate).
        dtype: of inputs.
    """
    count = len(shards) // 3
    layout = Layout(names=PROJECTIONS, count=count, hidden=hidden, intermediate=intermediate)
    with init_empty_weights():
        experts = Experts(layout, gating, dtype).eval()
    for (expert, projection), shard in shards.items():
        layer = shard.layer(dtype)
        if isinstance(layer, QuantLinear):
            layer.prepare(dtype)
        experts.set_submodule(f"{expert}.{projection}", layer)
    holder = nn.ModuleDict({"experts": experts})
    reason = pack_experts(holder)["experts"]
    found = holder["experts"]
    assert isinstance(found, Experts)
    return found, reason


def gate_by(activation: Callable[[Tensor], Tensor]) -> Gate:
    """``activation(gate) · up`` of both, gate before up."""

    def gating(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return activation(gate) * up

    return gating
