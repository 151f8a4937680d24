"""QuantLinear for transformers, which loads, offloads and saves parameters that lie as on disk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq.checkpoint.dialect import Conversion
from ptq.checkpoint.dialect_ptq import DECOY, NOTE
from ptq.checkpoint.layer_checks import check_layer, check_types
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.reading.safetensors_layout import DTYPES, Entry
from ptq.runtime.quant_linear import FIXED, QuantLinear


class StoredLinear(QuantLinear):
    """A QuantLinear whose tensors are parameters as they lie on disk.

    Attributes:
        guarded: whether it is saved with what makes other loaders stop.
        conversion: of a dialect that stores other tensors than the layer computes with: those are
            its parameters until :meth:`settle`, and again in state_dict.
        loaded: whether :meth:`settle` has run.
    """

    guarded = False
    loaded = False
    conversion: Conversion | None = None

    def __init__(
        self, info: LayerInfo, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        memory = QuantLinear(in_features, out_features, info)
        super().__init__(in_features, out_features, info)
        for name in (*FIXED, "bias"):
            tensor = getattr(memory, name)
            delattr(self, name)
            if name == "weight_scale":
                fmt = self.format
                tensor = tensor if fmt.powers_of_two else tensor.view(fmt.scale_dtype)
            elif tensor is not None:
                tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
                tensor = tensor.to(dtype) if name == "bias" else tensor
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            )

    @property
    def global_scale(self) -> Tensor:
        divisor = self.weight_global_scale
        one = torch.ones((), device=self.weight_scale.device)
        return one if divisor is None else (1 / divisor).reshape(())

    @property
    def input_scale(self) -> Tensor | None:
        return (
            None if self.input_global_scale is None else (1 / self.input_global_scale).reshape(())
        )

    def expect(self, conversion: Conversion, stored: Mapping[str, Entry]) -> None:
        """Have a place for tensors as the dialect of ``conversion`` stores them.

        Args:
            stored: what lies on disk, by names without that of the layer.

        Raises:
            ValueError: one of them is missing, or of a type that no such layer has.
        """
        self.conversion = conversion
        self._parameters |= dict.fromkeys(FIXED)
        for leaf in conversion.types:
            if leaf not in stored or DTYPES.get(stored[leaf].dtype) is None:
                raise ValueError(
                    f"the checkpoint has no {leaf} of a layer in {self.format.name}, or one of "
                    "another type: it is damaged, copy or quantize it again"
                )
            entry = stored[leaf]
            empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            self._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def settle(self, name: str) -> None:
        """Everything is loaded: from now on the layer computes.

        Raises:
            ValueError: naming the layer as ``name``: its tensors are none of a checkpoint (what
                lies on disk is not looked at), or have to be converted and lie on disk.
        """
        if self.guarded:
            del self._parameters[DECOY], self._modules[NOTE.rpartition(".")[0]]
        tensors = {leaf: tensor.data for leaf, tensor in self.named_parameters(recurse=False)}
        away = any(tensor.is_meta for tensor in tensors.values())
        if self.conversion is not None:
            if away:
                raise ValueError(
                    f"{name}: {self.format.name} of compressed-tensors cannot be offloaded; give "
                    "it a place in device_map, or write the checkpoint with --dialect ptq"
                )
            check_types(self.conversion.types, tensors, name, self.format.name)
            try:
                tensors = self.conversion.read(tensors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            for leaf in self.conversion.types:
                del self._parameters[leaf]
            for leaf in FIXED:
                tensor = tensors.get(leaf)
                kept = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self._parameters[leaf] = kept
        self.loaded = True
        if not away:
            check_layer(tensors, self.info, name)

    def expect_guard(self) -> None:
        """Have a place for what makes other loaders stop, until everything is loaded; from then on
        it is only saved."""
        self.guarded = True
        empty = torch.empty(0, dtype=torch.uint8, device="meta")
        # not registered: an attribute of that name is there, what the layer computes with
        self._parameters[DECOY] = nn.Parameter(empty, requires_grad=False)
        parent, _, leaf = NOTE.rpartition(".")
        note = nn.Module()
        note._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        self.add_module(parent, note)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.conversion is not None and not self.loaded:
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.guarded:
            names = (f"{prefix}{leaf}" for leaf in (DECOY, NOTE))
            destination |= {name: torch.empty(0, dtype=torch.uint8) for name in names}
        if self.conversion is not None:
            names = [leaf for leaf in FIXED if f"{prefix}{leaf}" in destination]
            tensors = {leaf: destination.pop(f"{prefix}{leaf}") for leaf in names}
            stored = self.conversion.write(tensors)
            destination |= {f"{prefix}{leaf}": tensor for leaf, tensor in stored.items()}

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """The layer with its weight dequantized, rotated back and rounded to ``dtype``."""
        weight = self.rotation.exact(self.quantized_weight().dequantize()).to(dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear
