"""Importing this module teaches transformers (5.16 to 5.23) to load what ptq writes, with
``from_pretrained``.

- ``ptq`` dialect: quantized layers become QuantLinear; fused experts become modules of linear
  layers, as in :func:`ptq.load`.
- ``compressed-tensors`` that transformers would compute wrong, or not at all: with a rotation, as
  it does not read ``transform_config`` (its issue 42887), with experts in NVFP4, whose global scale
  it drops (48371), and with experts in MXFP8, which it does not merge. Those become QuantLinear
  too, whose weight is rotated back when it is dequantized and saved as it was loaded. All others
  are left to transformers, but for scales of keys and values, which it drops with a line in its
  report.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from ptq.checkpoint.dialect import PACKED, Dialect
from ptq.checkpoint.dialect_compressed_tensors import (
    COMPRESSED_TENSORS,
    GUARDS,
    is_rotation_tensor,
)
from ptq.checkpoint.dialect_ptq import NOTE, PTQ
from ptq.checkpoint.dialects import parse
from ptq.checkpoint.quantization_config import Quantization, is_expert, is_key_value_scale
from ptq.model.attention import cached_attentions
from ptq.model.experts import FUSED, unfuse
from ptq.model.parameter_names import NameMap
from ptq.model.structure import linearize
from ptq.reading.safetensors_layout import Entry, read_header
from ptq.runtime.key_values import SCALES, hook_rounding
from ptq.runtime.load import INPUTS, prepare_kernels, settle_inputs
from ptq.runtime.stored_linear import StoredLinear

E4M3 = "F8_E4M3"  # as files name it


class PtqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a ``ptq`` checkpoint, and choices of its reader.

    Args:
        inputs, cache: see :func:`ptq.load`; may be given to
            ``from_pretrained(quantization_config=PtqConfig(…))``. Without them inputs are what the
            checkpoint says, emulated where the device does not multiply them: what evaluates a
            model through transformers measures what was written.
        dequantize: make ordinary linear layers of the quantized ones.
        stored: as in config.json; ValueError for what this version does not know.
    """

    def __init__(
        self,
        inputs: str = "quantized",
        cache: bool = False,
        dequantize: bool = False,
        **stored: object,
    ) -> None:
        if inputs not in INPUTS:
            raise ValueError(f"unknown inputs {inputs!r}; choose one of {', '.join(INPUTS)}")
        self.quant_method = PTQ.name  # pyright: ignore[reportAttributeAccessIssue]
        self.inputs, self.cache, self.dequantize = inputs, cache, dequantize
        self.stored = stored
        self.parsed = parse(stored) if stored else None  # None in what a user passes

    def get_loading_attributes(self) -> dict[str, object]:
        return {"inputs": self.inputs, "cache": self.cache, "dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.stored)


class StoredLayers(HfQuantizer):
    """Puts StoredLinear in the place of quantized layers, and ordinary experts in that of fused
    ones; saves and dequantizes them."""

    requires_calibration = True
    _fused: frozenset[str] = frozenset()

    def place(
        self,
        model: PreTrainedModel,
        dialect: Dialect,
        quantization: Quantization,
        stored: Mapping[str, Entry],
        dtype: torch.dtype | None,
    ) -> None:
        """For the tensors ``stored``, by their names on disk; ``dtype`` is that of biases.

        Raises:
            ValueError: a packed layer is no linear one of the model, or lacks a tensor.
        """
        names = NameMap(model)
        unfused = unfuse(model, names.expert_names)
        self._fused = frozenset(f"{path}.{leaf}" for path in unfused for leaf in FUSED)
        quantized = dialect.quantized(stored)
        packed = {
            c.rpartition(".")[0] for n in quantized for c in names.candidates(f"{n}.{PACKED}")
        }
        for weight in linearize(model, packed):
            parent = model.get_submodule(weight.rpartition(".")[0].rpartition(".")[0])
            # or GPT-2's initialization would touch the weights of its layers
            parent.__dict__["_is_hf_initialized"] = True
        leaves: dict[str, dict[str, Entry]] = {}
        for name, entry in stored.items():
            parent, _, leaf = name.rpartition(".")
            leaves.setdefault(parent, {})[leaf] = entry
        layers = _packed_layers(model, names, quantized)
        for target, name in layers.items():
            old = model.get_submodule(target)
            assert isinstance(old, nn.Linear)
            info = quantization.layer(name, bias=old.bias is not None)
            layer = StoredLinear(
                info, old.in_features, old.out_features, dtype or torch.get_default_dtype()
            )
            if (conversion := dialect.conversion(info)) is not None:
                layer.expect(conversion, leaves[name])
            if f"{name}.{NOTE}" in stored:
                layer.expect_guard()
            model.set_submodule(target, layer)
        if quantization.kv_cache is not None:
            self._expect_key_values(model, names, stored)
        targets = {name: target for target, name in layers.items()}
        for name in filter(is_rotation_tensor, stored):
            # so that a matrix of a rotation is expected, and saved again
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            matrix = nn.Module()
            empty = torch.empty(stored[name].shape, dtype=torch.float32, device="meta")
            matrix.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
            model.get_submodule(targets.get(parent, parent)).add_module(leaf, matrix)

    def _expect_key_values(
        self, model: PreTrainedModel, names: NameMap, stored: Mapping[str, Entry]
    ) -> None:
        """Scales of keys and values for transformers to load, and to save again."""
        attentions = cached_attentions(model)
        for name in filter(is_key_value_scale, stored):
            owners = [candidate.rpartition(".")[0] for candidate in names.candidates(name)]
            owner = next((owner for owner in owners if owner in attentions), None)
            if owner is None:
                raise ValueError(f"{name} belongs to no attention layer of {type(model).__name__}")
            attention, leaf = attentions[owner], name.rpartition(".")[2]
            if not any(hasattr(attention, other) for other in SCALES):
                hook_rounding(attention)
            empty = torch.empty(1, dtype=torch.float32, device="meta")
            attention.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))

    def _makes_fused(self, converter: WeightConverter) -> bool:
        return any(
            name.endswith(target) for name in self._fused for target in converter.target_patterns
        )

    def without_merging(self, conversions: list[Any]) -> list[Any]:
        """Without the merging of experts, which stay apart here."""
        return [
            c for c in conversions if not (isinstance(c, WeightConverter) and self._makes_fused(c))
        ]

    def settle(
        self, model: PreTrainedModel, *, inputs: str, cache: bool, dequantize: bool
    ) -> PreTrainedModel:
        """Everything is loaded; arguments as those of PtqConfig."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear)}
        for name, layer in layers.items():
            layer.settle(name)
            layer.cache = cache
        if dequantize:
            return self._dequantize(model)
        settle_inputs(model, inputs)
        prepare_kernels(model, model.dtype)
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                model.set_submodule(name, module.dense(dtype or model.dtype))
        return model


class PtqQuantizer(StoredLayers):
    """Loads, saves and dequantizes ``ptq`` checkpoints; does not quantize."""

    quantization_config: PtqConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Iterable[str] | None = None,
        **_,
    ) -> None:
        stored, quantization = _entries(checkpoint_files), self.quantization_config.parsed
        if quantization is None:
            raise ValueError(
                "PtqConfig says how to load a checkpoint that ptq quantized, and this is none: "
                "quantize it with `ptq quantize` first"
            )
        self.place(model, PTQ, quantization, stored, dtype)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """transformers up to 5.20 gives no ``model``."""
        return self.without_merging(weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> PreTrainedModel:
        config = self.quantization_config
        return self.settle(
            model, inputs=config.inputs, cache=config.cache, dequantize=config.dequantize
        )

    def is_serializable(self, **_) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


def _entries(checkpoint_files: Iterable[str] | None) -> dict[str, Entry]:
    if not checkpoint_files:
        raise ValueError(
            "ptq checkpoints are loaded from safetensors files: give from_pretrained a directory"
        )
    return {n: e for file in checkpoint_files for n, e in read_header(Path(file)).items()}


def _packed_layers(model: nn.Module, names: NameMap, quantized: Iterable[str]) -> dict[str, str]:
    """{name in the model: name in the checkpoint} of layers that are ``quantized`` in the
    checkpoint; ValueError if one is not linear in the model."""
    modules, result = dict(model.named_modules()), {}
    for name in quantized:
        candidates = (c.rpartition(".")[0] for c in names.candidates(f"{name}.{PACKED}"))
        target = next((c for c in candidates if isinstance(modules.get(c), nn.Linear)), None)
        if target is None:
            raise ValueError(
                f"{name} is quantized in the checkpoint, and no linear layer of "
                f"{type(model).__name__}"
            )
        result[target] = name
    return result


class RotatedConfig(CompressedTensorsConfig):
    """A compressed-tensors configuration that keeps ``transform_config``, the guard and the section
    of ptq."""

    def __init__(
        self,
        config_groups: Mapping[str, Any] | None = None,
        transform_config: object = None,
        ptq: object = None,
        **rest,
    ) -> None:
        self.kept: dict[str, Any] = {
            k: v for k, v in (("transform_config", transform_config), ("ptq", ptq)) if v
        }
        groups: dict[str, Any] = deepcopy(dict(config_groups or {}))
        self.guards = {
            n: {key: g.pop(key) for key in GUARDS if key in g}
            for n, g in groups.items()
            if isinstance(g, dict)
        }
        self.stored = {"config_groups": groups, **rest, **self.kept}
        super().__init__(config_groups=groups or None, **rest)

    def online(self) -> bool:
        """Whether inputs have to be rotated at run time."""
        schemes = self.kept.get("transform_config", {}).get("config_groups", {})
        return any(
            not a["location"].startswith("weight_")
            for scheme in schemes.values()
            for a in scheme["apply"]
        )

    def spoils(self, stored: Mapping[str, Entry]) -> bool:
        """Whether transformers would drop the global scale of experts among these tensors, or
        stops at their 8-bit weights."""
        return any(
            is_expert(n)
            and (n.endswith(".weight_global_scale") or (n.endswith(".weight") and e.dtype == E4M3))
            for n, e in stored.items()
        )

    def to_dict(self) -> dict[str, Any]:
        result = super().to_dict() | self.kept
        for name, guards in self.guards.items():
            result["config_groups"][name] |= guards
        return result


# transformers compares names with what the user passes
RotatedConfig.__name__ = CompressedTensorsConfig.__name__


class RotatedQuantizer(CompressedTensorsHfQuantizer, StoredLayers):  # pyright: ignore
    """The quantizer of transformers, but for what it would compute wrong."""

    ours = False

    def _process_model_before_weight_loading(
        self, model, dtype=None, checkpoint_files=None, **rest
    ):
        config = self.quantization_config
        stored = _entries(checkpoint_files) if checkpoint_files else {}
        self.ours = isinstance(config, RotatedConfig) and (config.online() or config.spoils(stored))
        if not (self.ours and isinstance(config, RotatedConfig)):
            super()._process_model_before_weight_loading(
                model, dtype=dtype, checkpoint_files=checkpoint_files, **rest
            )
            if isinstance(config, RotatedConfig) and config.stored.get("kv_cache_scheme"):
                # transformers drops the scales of keys and values, with a line in its report
                self._expect_key_values(model, NameMap(model), stored)
            return None
        parsed = COMPRESSED_TENSORS.parse(config.stored)
        self.place(model, COMPRESSED_TENSORS, parsed, stored, dtype)
        return None

    def get_load_operations(self):
        return {} if self.ours else super().get_load_operations()

    def update_weight_conversions(self, weight_conversions, *model, **named):
        """transformers up to 5.20 gives no ``model``."""
        if self.ours:
            return self.without_merging(weight_conversions)
        return super().update_weight_conversions(weight_conversions, *model, **named)

    def _dequantize(self, model, dtype=None):
        if not self.ours:
            return HfQuantizer._dequantize(self, model, dtype)
        return super()._dequantize(model, dtype)

    def _process_model_after_weight_loading(self, model, **rest):
        if not self.ours:
            return super()._process_model_after_weight_loading(model, **rest)
        dequantize = self.quantization_config.dequantize
        return self.settle(model, inputs="quantized", cache=False, dequantize=dequantize)


# What reads a dialect in transformers: its configuration and its quantizer. Dialects without a row
# are read by transformers alone, or not at all.
HANDLERS: dict[str, tuple[type[QuantizationConfigMixin], type[HfQuantizer]]] = {
    PTQ.name: (PtqConfig, PtqQuantizer),
    COMPRESSED_TENSORS.name: (RotatedConfig, RotatedQuantizer),
}


def register() -> None:
    """Enter the dialects into transformers' registries; a second call changes nothing."""
    for name, (config, quantizer) in HANDLERS.items():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = config
        auto.AUTO_QUANTIZER_MAPPING[name] = quantizer
    if PtqConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (PtqConfig,)


register()
