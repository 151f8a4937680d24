"""A layer of quantized experts in two matmuls, whatever the routing: the weights of all of them in
one tensor.

    assignments (token, slot) are sorted by expert: those of e are rows offsets[e] … offsets[e+1]−1
    y[i]       = down(gating([gate; up](x[token of i])))  one grouped launch for gate and up, one
                                                          for down
    out[token] = Σ over its slots of routing weight · y   float32, in the order of the slots,
                                                          rounded once

The loop of :class:`ptq.model.experts.Experts` asks the device which experts were chosen and
launches three matmuls for each. Here nothing is asked and no shape depends on the routing, so CUDA
graphs and torch.compile take the whole layer. Layers round where those of the loop do; the loop
also rounds each product with a routing weight and each partial sum.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.kernels.operands import PackedWeight
from ptq.model.experts import Expert, Experts
from ptq.runtime.gradients import learns
from ptq.runtime.kernel_choice import hooked
from ptq.runtime.kernel_weight import rotated, stacked
from ptq.runtime.quant_linear import QuantLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The same projection of all experts, or gate and up under each other: what a grouped matmul
    reads.

    Attributes:
        like: one of the layers; its format, rotation and treatment of inputs are those of all.
        weight: of all experts, the first dimension.
        input_scale: float32 (experts,) where the range of inputs was calibrated, else None.
        bias: (experts, out) or None.
    """

    like: QuantLinear
    weight: PackedWeight
    input_scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, experts: Sequence[Sequence[QuantLinear]]) -> "Stack":
        """The stack of the layers of every expert, whose weights and biases become views of it."""
        firsts = [layers[0] for layers in experts]
        biases = [[b for layer in layers if (b := layer.bias) is not None] for layers in experts]
        codes = [[layer.weight_packed for layer in layers] for layers in experts]
        scales = [[layer.weight_scale for layer in layers] for layers in experts]
        like = firsts[0]
        weight = replace(
            like.packed_weight,
            packed=stacked(codes),
            scale_bits=stacked(scales).view(like.format.bits_dtype),
            global_scale=_global_scales(firsts),
        )
        return cls(
            like=like,
            weight=weight,
            input_scale=None if like.input_scale is None else _input_scales(firsts),
            bias=None if like.bias is None else stacked(biases),
        )

    def __call__(self, x: Tensor, offsets: Tensor, experts: Tensor, rows: Tensor | None) -> Tensor:
        """``y[i] = expert experts[i] of x[rows[i]]``, or of ``x[i]``, in the dtype of x.

        Args:
            offsets: int32 (experts + 1,), where the assignments of each begin.
            experts: (assignments,), ascending; those that do not exist make a row of zeros.
            rows: int32 (assignments,) or None.
        """
        from ptq.kernels import op_grouped, op_inputs  # imports Triton

        like, size = self.like, self.like.rotation.size
        if not like.quantize_inputs:
            x = rotated(x, size)[0]
            return op_grouped.grouped_w4a16(x, offsets, self.weight, self.bias, rows)
        t = None
        if self.input_scale is not None:
            # one per expert: tokens are quantized once for each of theirs
            x, rows = (x, None) if rows is None else (x.index_select(0, rows), None)
            t = self.input_scale[experts.clamp(max=len(self.input_scale) - 1)].unsqueeze(1)
        inputs = op_inputs.rotate_quantize(x, size, like.input_encoding, t)
        return op_grouped.grouped_w4a4(inputs, offsets, self.weight, self.bias, rows, x.dtype)


def _global_scales(layers: Sequence[QuantLinear]) -> Tensor:
    return torch.stack([layer.global_scale.reshape(()) for layer in layers]).float()


def _input_scales(layers: Sequence[QuantLinear]) -> Tensor:
    return torch.stack(
        [scale for layer in layers if (scale := layer.input_scale) is not None]
    ).float()


class PackedExperts(Experts):
    """Experts in grouped kernels; in the place of the :class:`Experts` whose layers it takes over,
    names and all.

    The layers stay: their weights are views of the stacks, so state_dict, saving and moving work as
    before. What the grouped kernels cannot take runs through the loop: inputs of another dtype than
    the kernels were prepared for, a device without kernels, and every forward with ``everywhere``
    set. Hooks on single layers are called by the loop only. Tensors of layers that are *replaced*
    by hand are seen after :meth:`pack`; moves and load_state_dict call it.
    """

    def __init__(self, experts: Experts) -> None:
        super(Experts, self).__init__()  # the layers exist already
        self.num_experts, self.gating = experts.num_experts, experts.gating
        self.routed, self.everywhere = None, experts.everywhere
        self.interleaved = _experts(experts)[0].interleaved
        for name, expert in experts.named_children():
            self.add_module(name, expert)
        self.train(experts.training)
        self.pack()
        self.register_load_state_dict_post_hook(_pack)

    def pack(self) -> None:
        """Stack the weights of the layers as they are now; where that is not possible any more, go
        back to the loop."""
        self._stacks: tuple[Stack, Stack] | None = None
        if (reason := obstacle(self)) is not None:
            logger.info("%d experts run one after the other: %s", self.num_experts, reason)
            return
        gate, up, down = projections(self)
        self._stacks = (
            Stack.of(list(zip(gate, up, strict=True))),
            Stack.of([[layer] for layer in down]),
        )

    @property
    def kernel_dtype(self) -> torch.dtype | None:
        """Inputs of this dtype run grouped; None if none do."""
        return None if self._stacks is None else self._stacks[0].like.kernel_dtype

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As :class:`Experts`: ``(tokens, hidden)``, an index of ``num_experts`` or more is
        nowhere."""
        elsewhere = self._stacks is None or hidden_states.dtype != self.kernel_dtype
        if self._stacks is None or elsewhere or self.everywhere or learns(hidden_states):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        gate_up, down = self._stacks
        slots = top_k_index.shape[1]
        order = top_k_index.flatten().argsort(stable=True)  # assignment = token · slots + slot
        experts = top_k_index.flatten()[order]
        bounds = torch.arange(self.num_experts + 1, dtype=experts.dtype, device=experts.device)
        offsets = torch.searchsorted(experts, bounds, out_int32=True)
        # (assignments, 2 · intermediate)
        both = gate_up(hidden_states, offsets, experts, (order // slots).int())
        if self.interleaved:
            both = both.unflatten(1, (2, -1)).mT.flatten(1)
        # (assignments, hidden), sorted by expert
        y = down(self.gating(both), offsets, experts, None)
        place = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        y = y[place].view(*top_k_index.shape, y.shape[1])
        weights = top_k_weights.float().masked_fill(top_k_index >= self.num_experts, 0)
        return (y * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def _apply(self, fn, recurse: bool = True):
        self._stacks = None  # the layers move one by one, and are no views of it any more
        moved = super()._apply(fn, recurse)
        self.pack()
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stacks": None}  # layers know the weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


def _pack(experts: nn.Module, _: object) -> None:
    assert isinstance(experts, PackedExperts)
    experts.pack()


def _experts(experts: Experts) -> list[Expert]:
    return [expert for expert in experts.children() if isinstance(expert, Expert)]


def projections(experts: Experts) -> list[list[QuantLinear]]:
    """The gate, up and down projections of all experts; empty if one of them is not quantized."""
    result = []
    for leaf in ("gate", "up", "down"):
        layers = [expert.get_submodule(getattr(expert.names, leaf)) for expert in _experts(experts)]
        result.append([layer for layer in layers if isinstance(layer, QuantLinear)])
    return result if all(len(layers) == experts.num_experts for layers in result) else []


def obstacle(experts: Experts) -> str | None:
    """Why these experts cannot run grouped, or None; reads global scales from the device."""
    layers = projections(experts)
    if not layers:
        return "some of their projections are not quantized"
    gate, up, down = layers
    every = [*gate, *up, *down]
    if any(layer.kernel_dtype is None for layer in every):
        return "their layers do not run in Triton kernels"
    if hooked(experts):
        return "accelerate's hooks say where each of their layers runs"
    if len({layer.info for layer in (*gate, *up)}) > 1 or len({layer.info for layer in down}) > 1:
        return "their projections differ in format, rotation, inputs or bias"
    if len({(layer.kernel_dtype, layer.weight_packed.device) for layer in every}) > 1:
        return "they are spread over devices or dtypes"
    if not torch.equal(_global_scales(gate), _global_scales(up)):
        return "gate and up of an expert have different global scales"
    if gate[0].input_scale is not None and not torch.equal(_input_scales(gate), _input_scales(up)):
        return "gate and up of an expert have different input scales"
    return None


def pack_experts(model: nn.Module) -> dict[str, str | None]:
    """Put PackedExperts in the place of every Experts of ``model`` that allows it; {name: why not,
    or None}."""
    result = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            module.pack()
            result[name] = obstacle(module)
        elif isinstance(module, Experts):
            result[name] = obstacle(module)
            if result[name] is None:
                model.set_submodule(name, PackedExperts(module))
    if any(reason is None for reason in result.values()):
        # the holes that the layers' own tensors leave are too small for stacks to fill them
        torch.cuda.empty_cache()
    return result
