"""What vLLM asks of a quantization method, answered for checkpoints of ptq.

Written against vLLM 0.32, on interfaces that it offers to plugins, but for one: a weight loader is
a plain function at a parameter.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialect_ptq import NOTE
from ptq.checkpoint.dialects import DIALECTS, dialect_of, parse
from ptq.checkpoint.quantization_config import LayerInfo, Quantization
from ptq.runtime.vllm_plugin import NAME, takes_over

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

BLACKWELL = (10, 0)
# tensors that say something to other programs: the note of the ptq dialect, and matrices of
# rotations in compressed-tensors
UNREAD = (re.compile(re.escape(f".{NOTE}") + "$"), re.compile(r"_input\.weight$"))
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in a config.json


class PtqConfig(QuantizationConfig):
    """The ``quantization_config`` of a checkpoint of ptq, in any of its dialects.

    Args:
        stored: as in config.json; ValueError for what this version of ptq does not know.
    """

    def __init__(self, stored: Mapping[str, object]) -> None:
        super().__init__()
        self.parsed, self._dialect = parse(stored), dialect_of(stored).name
        self.kept_bytes = 0  # of dequantized weights, on a CPU

    @property
    def dialect(self) -> Dialect:
        """Looked up, as vLLM pickles this object for processes that it starts."""
        return DIALECTS[self._dialect]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PtqConfig":
        return cls(config)

    def get_name(self) -> Any:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the kernels

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """``ptq`` for a checkpoint of another dialect that :func:`takes_over` says."""
        from vllm.platforms import current_platform

        capability = None if current_platform.is_cpu() else current_platform.get_device_capability()
        mine = takes_over(
            hf_quant_cfg,
            asked=user_quant,
            cpu=current_platform.is_cpu(),
            blackwell=capability is not None and tuple(capability) >= BLACKWELL,
            moe=_has_experts(hf_config),
        )
        return NAME if mine else None

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """Leaves out what is there for other programs."""
        from vllm.model_executor.models.utils import WeightsMapper

        return QuantizationConfig.get_checkpoint_weight_mapper() | WeightsMapper(
            orig_to_new_regex=dict.fromkeys(UNREAD)
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Names of layers become those of vLLM's model; patterns are about ends of names, and stay
        as they are."""

        def renamed(pattern: str) -> str:
            if pattern.startswith("re:") or "." not in pattern:
                return pattern
            return (hf_to_vllm_mapper.apply_list([pattern]) or [pattern])[0]

        said = self.parsed
        self.parsed: Quantization = replace(
            said,
            ignore=tuple(map(renamed, said.ignore)),
            overrides={
                key: {renamed(pattern): value for pattern, value in by.items()}
                for key, by in said.overrides.items()
            },
        )

    def merged(self, prefix: str) -> list[str]:
        """The names of the layers that vLLM's layer ``prefix`` is made of."""
        parent, dot, leaf = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]

    def info(self, name: str) -> LayerInfo | None:
        """What is said of a linear layer; None if it is not quantized. vLLM loads biases."""
        return None if self.parsed.ignores(name) else self.parsed.layer(name, bias=False)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from ptq.runtime.vllm_methods import PtqExperts, PtqLinear

        if isinstance(layer, Attention):
            return None if self.parsed.kv_cache is None else BaseKVCacheMethod(self)
        if isinstance(layer, RoutedExperts):
            return PtqExperts.of(self, layer, prefix)
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            infos = {name: self.info(name) for name in self.merged(prefix)}
            if any(info is not None for info in infos.values()):
                return PtqLinear(self, infos)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return None


def _has_experts(config: Any) -> bool:
    text = getattr(config, "text_config", None)
    return any(getattr(level, name, None) for level in (config, text) for name in EXPERTS)
