"""QuantLinear: a linear layer that keeps its weight as codes and scales, rotates its inputs and may
quantize them.

    y = x' Ŵᵀ + bias,   x' = rotate(x), rounded to the dtype of x          (16-bit inputs)
                        x' = quantize_inputs(x), float32                   (quantized inputs)

The product and the bias are float32; the result is rounded once, to the dtype of x.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.kernels import gpu
from ptq.kernels.operands import Encoding, PackedWeight
from ptq.kernels.weight_tiles import tileable, tiled, untiled
from ptq.numerics.activations import default_rule, round_inputs
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.tensor import QuantizedTensor, Scales, dequantize_packed, group, pack, unpack
from ptq.runtime.gradients import Listener, Product, learns
from ptq.runtime.kernel_choice import Visits, kernel_obstacle, tell_once, visits
from ptq.runtime.kernel_weight import KernelWeight, stacked
from ptq.runtime.precision import full_precision
from ptq.runtime.reference_product import chunk_rows, few, product, remade
from ptq.runtime.shared_inputs import Inputs, Readers, same

FIXED = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


class QuantLinear(nn.Module):
    """A quantized linear layer. Its buffers are its whole state; in memory, global scales multiply.

    Attributes:
        weight_packed: uint8 (out, in / 2), two codes a byte, or (out, in) for elements of more than
            4 bits. Where kernels stream units (``ptq/kernels/weight_tiles.py``) it lies in those
            once :meth:`prepare` was called; state_dict, moving and loading know rows only.
        weight_scale: the bits of scales (out, in / group_size), uint8 of E4M3 or E8M0, int16 of
            bfloat16; in units too.
        weight_global_scale: float32 scalar that multiplies; None stands for 1 (all but E4M3).
        input_global_scale: float32 scalar that multiplies, for a calibrated range of inputs; None
            takes one per token.
        bias: (out,) or None; the only buffer that follows the dtype of the model.
        input_rule: scale rule of quantized inputs; ``"default"`` is the format's own.
        nested: bits of the narrower format that the codes hold; changes nothing here.
        cache: keep the dequantized weight (4 bytes an element) between calls: the same bits, in
            less time. Replace the buffers of a caching layer (or use load_state_dict), never write
            into them.
        fp8_prefill: in kernels, multiply many tokens in fp8 (:mod:`ptq.runtime.fp8_prefill`).
        listener: is told the derivatives by the weight.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    input_global_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        info: LayerInfo,
        *,
        device: torch.device | str = "meta",
    ) -> None:
        """Make a layer with uninitialised buffers, as ``info`` describes it.

        Raises:
            ValueError: ``in_features`` is not a multiple of the group size or of the rotation.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.rotation = FORMATS[info.format], Rotation(info.rotation)
        self.quantize_inputs, self.input_rule = info.quantize_inputs, info.input_rule
        self.nested = info.nested
        self.cache = self.fp8_prefill = False
        self.listener: Listener | None = None
        # inputs of this dtype go through the Triton kernels
        self.kernel_dtype: torch.dtype | None = None
        self.wanted_dtype: torch.dtype | None = None
        self.visits: Visits | None = None
        # (what it was made of, what kernels multiply with)
        self._kernel_weight: tuple[tuple[object, ...], KernelWeight] | None = None
        # the layers that read the same inputs, and which of them this is
        self.readers: tuple[Readers, int] | None = None
        # (the packed weight it was made of, the float32 weight, its chunks for many tokens and few)
        self._dequantized: tuple[Tensor, Tensor, dict[bool, list[Tensor]]] | None = None
        groups = group(torch.empty(1, in_features, device="meta"), self.format).shape[1]
        self.rotation.check(in_features)

        def codes(columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(out_features, columns, dtype=dtype, device=device)

        def scalar(exists: bool) -> Tensor | None:
            return torch.empty((), dtype=torch.float32, device=device) if exists else None

        has_global_scale = self.format.has_global_scale
        self.register_buffer("weight_packed", codes(in_features // self.format.per_byte))
        self.register_buffer("weight_scale", codes(groups, self.format.bits_dtype))
        self.register_buffer("weight_global_scale", scalar(has_global_scale))
        self.register_buffer("input_global_scale", scalar(info.static_inputs and has_global_scale))
        self.register_buffer(
            "bias", torch.empty(out_features, device=device) if info.bias else None
        )

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        rotation: Rotation,
        bias: Tensor | None,
        *,
        quantize_inputs: bool,
        input_global_scale: Tensor | None,
        input_rule: str | None = None,
        nested: int = 0,
    ) -> "QuantLinear":
        """The layer of a ``weight`` (out, in) that was quantized after ``rotation``; takes the
        tensors as they are."""
        fmt, (out_features, in_features) = weight.format, weight.codes.shape
        info = LayerInfo(
            format=fmt.name,
            rotation=rotation.size,
            quantize_inputs=quantize_inputs,
            static_inputs=input_global_scale is not None,
            input_rule=input_rule or "default",
            bias=bias is not None,
            nested=nested,
        )
        layer = cls(in_features, out_features, info)
        layer.weight_packed, layer.weight_scale = pack(weight.codes, fmt), weight.scales.bits
        t = weight.scales.global_scale
        layer.weight_global_scale = t if fmt.has_global_scale or t.item() != 1 else None
        if layer.input_global_scale is not None and input_global_scale is not None:
            layer.input_global_scale = input_global_scale.float().reshape(())
        layer.bias = None if bias is None else bias.detach()
        return layer

    @property
    def info(self) -> LayerInfo:
        """What a checkpoint has to say about this layer, and the constructor wants to know."""
        return LayerInfo(
            format=self.format.name,
            rotation=self.rotation.size,
            quantize_inputs=self.quantize_inputs,
            static_inputs=self.input_global_scale is not None,
            input_rule=self.input_rule,
            bias=self.bias is not None,
            nested=self.nested,
        )

    @property
    def scales(self) -> Scales:
        """Of the weight: bits (out, groups), and the global scale, which multiplies."""
        return Scales(self.in_rows().scale_bits, self.global_scale, self.format)

    @property
    def global_scale(self) -> Tensor:
        """Of the weight, float32; it multiplies."""
        t = self.weight_global_scale
        one = torch.ones((), dtype=torch.float32, device=self.weight_packed.device)
        return one if t is None else t

    @property
    def input_scale(self) -> Tensor | None:
        """Global scale of the inputs, which multiplies; None takes one per token."""
        return self.input_global_scale

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight as kernels take it, in rows or in units."""
        return PackedWeight(
            packed=self.weight_packed,
            scale_bits=self.weight_scale.view(self.format.bits_dtype),
            global_scale=self.global_scale,
            element=self.format.element.name,
            scale=self.format.scale_name,
        )

    def in_rows(self) -> PackedWeight:
        """The weight as checkpoints have it; a copy where it lies in units."""
        weight = self.packed_weight
        return untiled(weight) if weight.tiled else weight

    def _lay(self, weight: PackedWeight) -> None:
        """Let the buffers be those of ``weight``, the same numbers in rows or in units. The tensors
        that they were stay as they are: a state_dict of somebody else's may hold them."""
        self._kernel_weight = self._dequantized = self.readers = None
        bits = weight.scale_bits.view(self.weight_scale.dtype)
        for name, tensor in (("weight_packed", weight.packed), ("weight_scale", bits)):
            parameter = name in self._parameters
            setattr(self, name, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)

    @property
    def input_encoding(self) -> Encoding:
        """What kernels quantize inputs to."""
        rule = default_rule(self.format) if self.input_rule == "default" else self.input_rule
        return Encoding(self.format.element.name, self.format.scale_name, rule)

    def quantized_weight(self) -> QuantizedTensor:
        """The weight (out, in) as codes and scales, in the rotated basis."""
        rows = self.in_rows()
        scales = Scales(rows.scale_bits, self.global_scale, self.format)
        return QuantizedTensor(unpack(rows.packed, self.format), scales)

    def __getattr__(self, name: str) -> Any:
        """``weight``: what the layer multiplies its inputs with, (out, in) in float32, dequantized
        and rotated back anew at every call, for code of models that reads the weight of a linear
        layer beside calling it."""
        if name == "weight" and name not in self._parameters:
            return self.rotation.exact(self.quantized_weight().dequantize())
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """``(*s, in)`` → ``(*s, out)``, in the dtype of ``x``; gradients reach ``x`` and the bias,
        see :mod:`ptq.runtime.gradients`."""
        if self.kernel_dtype is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as nn.Linear
        if torch.is_grad_enabled() and learns(x, self.bias):
            return Product.apply(x, self.bias, self)
        if self.readers is None or torch.compiler.is_compiling():
            return self.product(self.prepared(x), x)
        readers, index = self.readers
        return readers(self, index, x)

    # The two places that choose between the kernels and the reference.

    def prepared(self, x: Tensor) -> Inputs:
        """What the weight is multiplied with, of ``x`` (*s, in): rotated, and quantized if inputs
        are; (tokens, in) float32 numbers in the reference path."""
        if x.dtype == self.kernel_dtype:
            return self.kernel_weight().inputs(x)[0]
        if self.kernel_dtype is not None:
            tell_once(
                f"quantized layers get {x.dtype} inputs and were prepared for {self.kernel_dtype}: "
                "they unpack their weights every time, which is slow; give the model the dtype of "
                "its inputs with .to(dtype)"
            )
        return self._wide(x)

    def product(self, inputs: Inputs, x: Tensor) -> Tensor:
        """``(*s, out)``, from what :meth:`prepared` made of ``x``."""
        if x.dtype == self.kernel_dtype:
            return self.kernel_weight().multiply(inputs, x.shape[:-1], x.dtype)
        assert isinstance(inputs, Tensor)
        return self._reference(inputs, x)

    def prepare(self, dtype: torch.dtype) -> str | None:
        """Use the Triton kernels for inputs of ``dtype`` from now on, where they can run; after the
        layer was moved or cast, for its new device and dtype.

        Looks at the device and at the scales once, so that nothing has to be asked in ``forward``.

        Returns:
            Why the reference path stays in use, or None.
        """
        self.kernel_dtype = self._kernel_weight = self.readers = None
        self.wanted_dtype, self.visits = dtype, (brought := visits(self))
        if self.packed_weight.tiled:
            self._lay(self.in_rows())
        weight = self.packed_weight
        device = weight.packed.device if brought is None else brought.device
        bits = weight.scale_bits if brought is None else brought.largest_scale
        reason = kernel_obstacle(self.info, self.in_features, device, dtype=dtype, scale_bits=bits)
        if reason is None:
            self.kernel_dtype = dtype
            if brought is not None:
                return None
            if not self.quantize_inputs and gpu.reads_units(device) and tileable(weight):
                self._lay(tiled(weight))
            self.kernel_weight().fill(dtype)
        return reason

    def kernel_weight(self) -> KernelWeight:
        """What kernels multiply with, made anew when tensors of the layer were replaced."""
        kept, made_of = self._kernel_weight, self.made_of()
        if kept is None or not same(kept[0], made_of):
            kept = (made_of, self._make_kernel_weight(self.packed_weight))
            # what is kept for tensors that go away again would hold them
            if self.visits is None and not gpu.capturing(self.weight_packed.device):
                self._kernel_weight = kept
        return kept[1]

    def made_of(self) -> tuple[object, ...]:
        """All that the layer's output depends on, besides its input and what never changes."""
        buffers = self._buffers if "weight_packed" in self._buffers else self._parameters
        tensors = (buffers[name] for name in (*FIXED, "bias"))
        return (*tensors, self.quantize_inputs, self.input_rule, self.fp8_prefill)

    def _make_kernel_weight(self, weight: PackedWeight) -> KernelWeight:
        return KernelWeight(
            weight=weight,
            bias=self.bias,
            rotation=self.rotation.size,
            encoding=self.input_encoding if self.quantize_inputs else None,
            input_scale=self.input_scale,
            fp8_prefill=self.fp8_prefill,
        )

    @staticmethod
    def stack(layers: "Sequence[QuantLinear]") -> KernelWeight:
        """What kernels multiply with for all of these ``layers`` at once, whose weights and biases
        become views of it; the caller has seen that all else about them is equal."""
        first = layers[0]
        biases = [bias for layer in layers if (bias := layer.bias) is not None]
        packed = stacked([[layer.weight_packed for layer in layers]])[0]
        bits = stacked([[layer.weight_scale for layer in layers]])[0].view(first.format.bits_dtype)
        for layer in layers:
            layer._kernel_weight = None
        weight = first._make_kernel_weight(
            replace(first.packed_weight, packed=packed, scale_bits=bits)
        )
        return replace(weight, bias=stacked([biases])[0] if biases else None)

    def _wide(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (tokens, in)
        if self.rotation.size == 1:
            return self._rounded(rows) if self.quantize_inputs else rows.float()
        with full_precision(x.device):
            return (
                self._rounded(rows) if self.quantize_inputs else self.rotation.rotate(rows).float()
            )

    def _rounded(self, rows: Tensor) -> Tensor:
        rule = None if self.input_rule == "default" else self.input_rule
        return round_inputs(rows, self.format, self.rotation, self.input_scale, rule)

    @property
    def changes_inputs(self) -> bool:
        """Whether inputs are rotated or quantized."""
        return self.quantize_inputs or self.rotation.size > 1

    def _reference(self, wide: Tensor, x: Tensor) -> Tensor:
        y, bias = product(wide, self._chunks(wide.shape[0]), self.out_features), self.bias
        if bias is not None:
            y += bias.float()
        y = y if x.dtype == torch.float32 else y.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """``(∂y Ŵ) R`` of ``∂y`` (*s, out): (*s, in). The product is in the dtype of ``gradient``
        where kernels dequantize to it, else in float32."""
        rows = gradient.reshape(-1, self.out_features)
        if gradient.dtype == self.kernel_dtype:
            from ptq.kernels.op_dequantize import dequantize  # imports Triton

            flat = rows @ dequantize(self.packed_weight, gradient.dtype)
        else:
            with full_precision(rows.device):
                flat, start = rows.new_zeros(len(rows), self.in_features, dtype=torch.float32), 0
                for chunk in self._chunks(len(rows)):
                    part = rows[:, start : start + len(chunk)].float()
                    flat, start = flat.addmm_(part, chunk), start + len(chunk)
        return self.rotation.rotate(flat).reshape(*gradient.shape[:-1], self.in_features)

    def _chunks(self, tokens: int) -> Iterable[Tensor]:
        """Rows (some, in) of the dequantized weight, in order, kept or remade; as many at a time
        for a number of tokens either way."""
        stored = self.weight_packed
        if not self.cache:
            rows = self.in_rows()
            scales = Scales(rows.scale_bits, rows.global_scale, self.format)
            return remade(rows.packed, scales, tokens)
        if self._dequantized is None or self._dequantized[0] is not stored:
            whole = dequantize_packed(self.in_rows().packed, self.scales)
            self._dequantized = (stored, whole, {})
        _, whole, chunks = self._dequantized
        kind = few(tokens, stored.device)
        if kind not in chunks:
            step = chunk_rows(self.out_features, self.in_features, tokens, stored.device)
            chunks[kind] = list(whole.split(step))
        return chunks[kind]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the dequantized weight that is kept between calls."""
        return 0 if self._dequantized is None else self._dequantized[1].nbytes

    def forget(self) -> None:
        """Drop what is kept between calls, to be made again when needed; calibration does so when
        it leaves a block."""
        self._dequantized = None

    def _apply(self, fn, recurse: bool = True):
        """Move with the model; only the bias changes its dtype: codes, scale bits and float32
        factors keep theirs."""
        if self.packed_weight.tiled:
            self._lay(self.in_rows())
        fixed = {id(t) for name in FIXED if (t := getattr(self, name)) is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = id(tensor) in fixed and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if kept else moved

        self._dequantized = self.readers = None
        wanted, device = self.wanted_dtype, self.weight_packed.device
        moved = super()._apply(keep_dtype, recurse)
        if wanted is not None:
            dtype = fn(torch.empty(0, dtype=wanted, device=device)).dtype
            # a model in float32 meets 16-bit inputs under autocast, and says what else it gets
            reason = self.prepare(dtype if dtype.itemsize == 2 else wanted)
            if reason is not None and gpu.available(self.weight_packed.device):
                tell_once(f"quantized layers run in the reference path: {reason}")
        return moved

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # the buffers may be written in place
        self._dequantized = self._kernel_weight = self.readers = None
        if self.packed_weight.tiled:
            self._lay(self.in_rows())
        super()._load_from_state_dict(*args, **kwargs)
        if self.wanted_dtype is not None:
            self.prepare(self.wanted_dtype)  # the scales may be out of the range of kernels

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_weight.tiled:
            rows = self.in_rows()
            destination[f"{prefix}weight_packed"] = rows.packed
            destination[f"{prefix}weight_scale"] = rows.scale_bits.view(self.weight_scale.dtype)

    def __getstate__(self) -> dict[str, Any]:
        tensors = {
            kind: {n: _alone(t) for n, t in self.__dict__[kind].items()}
            for kind in ("_buffers", "_parameters")
        }
        # what is kept between calls is neither copied nor pickled
        kept = ("_dequantized", "_kernel_weight", "readers")
        return self.__dict__ | tensors | dict.fromkeys(kept)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.wanted_dtype is not None:
            self.prepare(self.wanted_dtype)  # the device may be another one

    def extra_repr(self) -> str:
        inputs = f", inputs={self.format.name}" if self.quantize_inputs else ""
        rotation = f", rotation={self.rotation.size}" if self.rotation.size > 1 else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"format={self.format.name}{rotation}{inputs}"
        )


def _alone(tensor: Tensor | None) -> Tensor | None:
    """The tensor, without the rest of a storage that it shares with other layers: pickle would
    write it for each."""
    if tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def stored_layer(
    old: nn.Module, info: LayerInfo, tensors: Mapping[str, Tensor], name: str
) -> QuantLinear:
    """The layer that ``tensors`` describe, for the place of the linear layer ``old``.

    Args:
        tensors: by the names of the buffers, in memory form; taken as they are.
        name: of the layer, for messages.

    Raises:
        ValueError: ``old`` is not linear, has other shapes or a bias more or less, or a tensor is
            missing.
    """
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{name} is a quantized linear layer in the checkpoint and {type(old).__name__} in the "
            "model"
        )
    if (old.bias is not None) != info.bias:
        raise ValueError(
            f"{name} has {'a' if info.bias else 'no'} bias in the checkpoint, and differs in the "
            "model"
        )
    layer = QuantLinear(old.in_features, old.out_features, info)
    for leaf in (*FIXED, "bias"):
        expected = layer._buffers[leaf]
        if expected is None and leaf == "weight_global_scale":
            # E8M0 scales with a factor, as other writers have it
            layer.weight_global_scale = tensors.get(leaf)
        elif expected is not None:
            if leaf not in tensors:
                raise ValueError(
                    f"{name} has no {leaf} in the checkpoint: it is incomplete, copy or quantize "
                    "it again"
                )
            if tensors[leaf].shape != expected.shape:
                raise ValueError(
                    f"{name}.{leaf} has shape {tuple(tensors[leaf].shape)} in the checkpoint, "
                    f"{tuple(expected.shape)} in the model: the config.json is of another model"
                )
            setattr(layer, leaf, tensors[leaf])
    return layer.train(old.training)
