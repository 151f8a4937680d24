"""Importing this module teaches transformers (5.16 to 5.23) to load what ptq writes, with
``from_pretrained``.

- ``ptq`` dialect: quantized layers become QuantLinear; fused experts become modules of linear
  layers, as in :func:`ptq.load`.
- ``compressed-tensors`` with a rotation: transformers does not read ``transform_config`` (its issue
  42887). Here the guard that makes a plain loader stop is removed, and the inputs of rotated layers
  are rotated at run time.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from ptq.checkpoint.dialect_compressed_tensors import COMPRESSED_TENSORS, GUARD
from ptq.checkpoint.dialect_ptq import DECOY, NOTE, PTQ
from ptq.checkpoint.dialects import parse
from ptq.checkpoint.layer_checks import check_layer
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.model.experts import FUSED, unfuse
from ptq.model.parameter_names import NameMap
from ptq.model.structure import linearize
from ptq.numerics.rotation import Rotation
from ptq.reading.safetensors_layout import read_header
from ptq.runtime.load import INPUTS, prepare_kernels, settle_inputs
from ptq.runtime.quant_linear import FIXED, QuantLinear

PACKED = ".weight_packed"


class StoredLinear(QuantLinear):
    """A QuantLinear whose tensors are parameters as they lie on disk, because that is what
    transformers loads, offloads and saves."""

    guarded = False

    def __init__(
        self, info: LayerInfo, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        memory = QuantLinear(in_features, out_features, info)
        super().__init__(in_features, out_features, info)
        for name in (*FIXED, "bias"):
            tensor = getattr(memory, name)
            delattr(self, name)
            if name == "weight_scale":
                tensor = (
                    tensor.view(self.format.scale_dtype) if self.format.has_global_scale else tensor
                )
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

    def drop_guard(self) -> None:
        """Everything is loaded."""
        if self.guarded:
            del self._parameters[DECOY], self._modules[NOTE.rpartition(".")[0]]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.guarded:
            names = (f"{prefix}{leaf}" for leaf in (DECOY, NOTE))
            destination |= {name: torch.empty(0, dtype=torch.uint8) for name in names}

    def check(self, name: str) -> None:
        """Raise ValueError, naming the layer as ``name``, if its tensors are none of a checkpoint.
        What lies on disk or is not loaded is not looked at."""
        tensors = {leaf: tensor for leaf, tensor in self.named_parameters(recurse=False)}
        if not any(tensor.is_meta for tensor in tensors.values()):
            check_layer(tensors, self.info, name)

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


class PtqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a ``ptq`` checkpoint, and choices of its reader.

    Args:
        inputs, cache: see :func:`ptq.load`; may be given to
            ``from_pretrained(quantization_config=PtqConfig(…))``.
        dequantize: make ordinary linear layers of the quantized ones.
        stored: as in config.json; ValueError for what this version does not know.
    """

    def __init__(
        self, inputs: str = "auto", cache: bool = False, dequantize: bool = False, **stored: object
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


class PtqQuantizer(HfQuantizer):
    """Loads, saves and dequantizes ``ptq`` checkpoints; does not quantize."""

    requires_calibration = True
    quantization_config: PtqConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Iterable[str] | None = None,
        **_,
    ) -> None:
        names = NameMap(model)
        unfused = unfuse(model, names.expert_names)
        self._fused = {f"{path}.{leaf}" for path in unfused for leaf in FUSED}
        stored, quantization = _tensor_names(checkpoint_files), self.quantization_config.parsed
        if quantization is None:
            raise ValueError(
                "PtqConfig says how to load a checkpoint that ptq quantized, and this is none: "
                "quantize it with `ptq quantize` first"
            )
        packed = {
            c.rpartition(".")[0] for n in stored if n.endswith(PACKED) for c in names.candidates(n)
        }
        for weight in linearize(model, packed):
            parent = model.get_submodule(weight.rpartition(".")[0].rpartition(".")[0])
            # or GPT-2's initialization would touch the weights of its layers
            parent.__dict__["_is_hf_initialized"] = True
        for target, name in _packed_layers(model, names, stored).items():
            old = model.get_submodule(target)
            assert isinstance(old, nn.Linear)
            info = quantization.layer(name, bias=old.bias is not None)
            layer = StoredLinear(
                info, old.in_features, old.out_features, dtype or torch.get_default_dtype()
            )
            if f"{name}.{NOTE}" in stored:
                layer.expect_guard()
            model.set_submodule(target, layer)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Without the merging of experts, which stay apart here. transformers up to 5.20 gives no
        ``model``."""
        return [
            c
            for c in weight_conversions
            if not (isinstance(c, WeightConverter) and self._makes_fused(c))
        ]

    def _makes_fused(self, converter: WeightConverter) -> bool:
        return any(
            name.endswith(target) for name in self._fused for target in converter.target_patterns
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> PreTrainedModel:
        config = self.quantization_config
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                module.drop_guard()
                module.check(name)
        if config.dequantize:
            return self._dequantize(model)
        settle_inputs(model, config.inputs)
        for module in model.modules():
            if isinstance(module, StoredLinear):
                module.cache = config.cache
        spread_over_devices = any(hasattr(module, "_hf_hook") for module in model.modules())
        if not spread_over_devices:
            prepare_kernels(model, model.dtype)
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                model.set_submodule(name, module.dense(dtype or model.dtype))
        return model

    def is_serializable(self, **_) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


def _tensor_names(checkpoint_files: Iterable[str] | None) -> list[str]:
    if not checkpoint_files:
        raise ValueError(
            "ptq checkpoints are loaded from safetensors files: give from_pretrained a directory"
        )
    return [name for file in checkpoint_files for name in read_header(Path(file))]


def _packed_layers(model: nn.Module, names: NameMap, stored: Iterable[str]) -> dict[str, str]:
    """{name in the model: name in the checkpoint} of packed layers; ValueError if one is not linear
    in the model."""
    modules, result = dict(model.named_modules()), {}
    for name in (n.removesuffix(PACKED) for n in stored if n.endswith(PACKED)):
        candidates = (c.removesuffix(PACKED) for c in names.candidates(name + PACKED))
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
            n: g.pop(GUARD) for n, g in groups.items() if isinstance(g, dict) and GUARD in g
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

    def to_dict(self) -> dict[str, Any]:
        result = super().to_dict() | self.kept
        for name, text in self.guards.items():
            result["config_groups"][name][GUARD] = text
        return result


# transformers compares names with what the user passes
RotatedConfig.__name__ = CompressedTensorsConfig.__name__


class RotatedQuantizer(CompressedTensorsHfQuantizer):
    """The quantizer of transformers, and the online rotation of ptq's checkpoints."""

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **rest):
        config = self.quantization_config
        if not isinstance(config, RotatedConfig) or not config.online():
            return super()._process_model_before_weight_loading(
                model, checkpoint_files=checkpoint_files, **rest
            )
        parsed, stored = COMPRESSED_TENSORS.parse(config.stored), _tensor_names(checkpoint_files)
        # refuses rotated experts, which are fused here
        layers = _packed_layers(model, NameMap(model), stored)
        super()._process_model_before_weight_loading(
            model, checkpoint_files=checkpoint_files, **rest
        )
        for target, name in layers.items():
            module = model.get_submodule(target)
            size = parsed.layer(name, bias=False).rotation
            if size > 1:
                module.register_forward_pre_hook(_Rotate(Rotation(size)))
            for tensor in stored:
                parent, _, leaf = tensor.removesuffix(".weight").rpartition(".")
                if parent == name and COMPRESSED_TENSORS.is_extra(tensor):
                    # so that the matrix is expected, and saved again
                    matrix = nn.Module()
                    empty = torch.empty(size, size, dtype=torch.float32, device="meta")
                    matrix.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
                    module.add_module(leaf, matrix)
        return None


class _Rotate:
    """A forward pre-hook: the inputs, rotated."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.rotation.rotate(args[0]), *args[1:])


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
