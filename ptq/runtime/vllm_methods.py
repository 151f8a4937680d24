"""Linear layers and experts of ptq in vLLM: what is loaded, and what runs.

On CUDA layers run in Triton kernels of :mod:`ptq.kernels`, as after ``ptq.load``; elsewhere they
are emulated, the same numbers, to verify and not to serve. Inputs of W4A4 are rounded whatever the
device, so that what is measured is what was written.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.runtime.kernel_choice import tell_once
from ptq.runtime.load import CACHE_BYTES
from ptq.runtime.merged_layers import Cut, Merged, Shard, gate_by, merged_experts
from ptq.runtime.quant_linear import QuantLinear

if TYPE_CHECKING:
    from ptq.runtime.vllm_config import PtqConfig

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
# what vLLM calls the parts of a layer, besides their numbers
SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}
PROJECTIONS = ("w1", "w2", "w3")  # and of an expert: gate, down, up


def _place(layer: nn.Module, name: str, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
    """An empty parameter at which vLLM finds the loader of tensors of that name."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = loader  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_parameter(name, parameter)


@torch.library.custom_op("ptq::vllm_linear", mutates_args=())
def _linear(x: Tensor, name: str, rows: int) -> Tensor:
    """A layer in the reference path, which torch.compile does not look into."""
    return get_forward_context().no_compile_layers[name].ptq(x)


@_linear.register_fake
def _(x: Tensor, name: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("ptq::vllm_experts", mutates_args=())
def _experts(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> Tensor:
    """Experts that run one after the other, as :func:`_linear`."""
    return get_forward_context().no_compile_layers[name].ptq(x, ids.long(), weights)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _enter(layer: Any, name: str) -> None:
    """Have the layer found by name while a compiled model runs, as vLLM's own that it does not
    compile."""
    known = get_current_vllm_config().compilation_config.static_forward_context
    layer.ptq_name = f"{name}.ptq"
    if layer.ptq_name in known:
        raise ValueError(f"vLLM has two layers called {name}: ptq's plugin cannot tell them apart")
    known[layer.ptq_name] = layer


def _settle(config: "PtqConfig", layers: list[QuantLinear], dtype: torch.dtype) -> None:
    """Choose what multiplies, and say once what that is."""
    for layer in layers:
        reason, device = layer.prepare(dtype), layer.weight_packed.device
        if reason is None:
            continue
        if device.type != "cpu":
            tell_once(f"quantized layers run in the reference path, which is slow: {reason}")
            continue
        tell_once(
            "on a CPU ptq emulates quantized layers and, for w4a4, their inputs: the right "
            "numbers, slowly; serve with a GPU"
        )
        config.kept_bytes += 4 * layer.in_features * layer.out_features
        layer.cache = config.kept_bytes <= CACHE_BYTES


class PtqLinear(LinearMethodBase):
    """Some linear layers of a checkpoint, in the place of one of vLLM.

    Args:
        infos: of the layers, by name and in order; None of those that are not quantized.
    """

    def __init__(self, config: "PtqConfig", infos: Mapping[str, LayerInfo | None]) -> None:
        self.config, self.infos = config, infos

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes, inputs = output_partition_sizes, input_size_per_partition
        ranks, rank = int(getattr(layer, "tp_size", 1)), int(getattr(layer, "tp_rank", 0))
        if len(self.infos) == 1 and len(sizes) > 1:  # merged on disk already
            if ranks > 1:
                raise ValueError(
                    f"{next(iter(self.infos))} is one layer in the checkpoint and several in vLLM: "
                    "set tensor_parallel_size=1"
                )
            sizes = [sum(sizes)]
        if len(self.infos) != len(sizes):
            raise ValueError(
                f"vLLM merges {len(sizes)} layers in {', '.join(self.infos)}, and calls them "
                "otherwise: this architecture is not known to ptq's plugin; use ptq.load"
            )
        columns = (rank * inputs, (rank + 1) * inputs) if inputs != input_size else None
        parted = columns is None and sum(sizes) != output_size
        replicas = int(getattr(layer, "num_kv_head_replicas", 1))  # of keys and values
        shards = []
        for index, ((name, info), size) in enumerate(zip(self.infos.items(), sizes, strict=True)):
            part = rank // replicas if index else rank
            rows = (part * size, (part + 1) * size) if parted else None
            cut = Cut(input_size, rows, columns)
            shards.append(Shard(name, info, self.config.dialect, cut, _device()))
        names = {leaf: dtype for shard in shards for leaf, dtype in shard.types.items()}
        for leaf, dtype in names.items():
            _place(layer, leaf, dtype, partial(self._load, shards, leaf))
        layer.ptq_shards, layer.ptq_places = shards, [*names]  # pyright: ignore
        layer.ptq_rows, layer.ptq_dtype = sum(sizes), params_dtype  # pyright: ignore
        # what ranks make is summed, and a bias added once
        layer.ptq_biased = columns is None or rank == 0  # pyright: ignore
        _enter(layer, next(iter(self.infos)))

    @staticmethod
    def _load(
        shards: list[Shard], leaf: str, param: Tensor, loaded_weight: Tensor, shard_id: Any = None
    ) -> None:
        index = SHARDS.get(shard_id, shard_id) if not isinstance(shard_id, tuple) else None
        if not isinstance(index, int) or (shard_id is None and len(shards) > 1):
            raise ValueError(
                f"the checkpoint has {leaf} of several layers in one tensor, where "
                f"{shards[0].name} should be apart: this architecture is not known to ptq's "
                "plugin; use ptq.load"
            )
        shards[index].take(leaf, loaded_weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        bias = (
            layer.bias if layer.ptq_biased and not getattr(layer, "skip_bias_add", False) else None
        )
        parts = [shard.layer(layer.ptq_dtype) for shard in layer.ptq_shards]
        for name in layer.ptq_places:
            delattr(layer, name)
        layer.ptq = Merged(parts, layer.ptq_rows, bias)
        made = layer.ptq.made
        if made != layer.ptq_rows and not isinstance(layer, ParallelLMHead):  # which is padded
            raise ValueError(
                f"{', '.join(self.infos)} have {made} outputs in the checkpoint, and "
                f"{layer.ptq_rows} in vLLM: this architecture is not known to ptq's plugin with "
                f"tensor_parallel_size={layer.tp_size}; set it to 1, or use ptq.load"
            )
        del layer.ptq_shards, layer.ptq_places
        _settle(self.config, layer.ptq.quantized, layer.ptq_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        traced = torch.compiler.is_compiling() and layer.ptq.emulated
        y = _linear(x, layer.ptq_name, layer.ptq_rows) if traced else layer.ptq(x)
        return y if bias is None or layer.ptq.biased else y + bias


class PtqExperts(FusedMoEMethodBase):
    """The routed experts of a layer.

    Args:
        infos: of the projections, by number of the expert and vLLM's name.
        names: of them in the checkpoint.
    """

    def __init__(
        self,
        config: "PtqConfig",
        layer: Any,
        infos: Mapping[tuple[int, str], LayerInfo | None],
        names: Mapping[tuple[int, str], str],
    ) -> None:
        super().__init__(layer.moe_config)
        self.config, self.infos, self.names = config, infos, names

    @classmethod
    def of(cls, config: "PtqConfig", layer: Any, prefix: str) -> "PtqExperts | None":
        """None if none of them is quantized.

        Raises:
            ValueError: experts of a kind, or a distribution, that the plugin does not have.
        """
        place = prefix.removesuffix(".routed_experts")
        leaves = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
        names = {
            (expert, projection): f"{place}.{expert}.{leaf}"
            for expert in range(layer.global_num_experts)
            for projection, leaf in zip(PROJECTIONS, leaves, strict=True)
        }
        infos = {key: config.info(name) for key, name in names.items()}
        if all(info is None for info in infos.values()):
            return None
        activation = layer.moe_config.activation.value
        refused = {
            f"with the activation {activation}": activation not in ACTIVATIONS,
            "with biases": layer.moe_config.has_bias,
            "whose inputs are weighted": layer.apply_router_weight_on_input,
        }
        for what, is_so in refused.items():
            if is_so:
                raise ValueError(
                    f"{place} has experts {what}, which ptq's plugin for vLLM does not run: use "
                    "ptq.load, or ptq serve"
                )
        if layer.moe_config.moe_parallel_config.use_ep:
            raise ValueError(
                "ptq's plugin does not spread experts over ranks: leave out "
                "--enable-expert-parallel; tensor_parallel_size shares each of them"
            )
        return cls(config, layer, infos, names)

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        size = intermediate_size_per_partition
        part = (rank * size, (rank + 1) * size) if ranks > 1 else None
        shards = {}
        for key, info in self.infos.items():
            down = key[1] == "w2"
            cut = Cut(size * ranks, columns=part) if down else Cut(hidden_size, rows=part)
            shards[key] = Shard(self.names[key], info, self.config.dialect, cut, _device())
        places = {}
        for (_, projection), shard in shards.items():
            group = "w2" if projection == "w2" else "w13"
            places |= {f"{group}_{leaf}": (leaf, dtype) for leaf, dtype in shard.types.items()}
        for name, (leaf, dtype) in places.items():
            _place(layer, name, dtype, partial(self._load, shards, leaf))
        layer.ptq_shards, layer.ptq_places = shards, [*places]  # pyright: ignore
        layer.ptq_sizes, layer.ptq_dtype = (hidden_size, size), params_dtype  # pyright: ignore
        _enter(layer, next(iter(self.names.values())))

    @staticmethod
    def _load(
        shards: Mapping[tuple[int, str], Shard],
        leaf: str,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        shards[expert_id, shard_id].take(leaf, loaded_weight)
        return True if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        hidden, intermediate = layer.ptq_sizes
        gating = gate_by(ACTIVATIONS[layer.moe_config.activation.value])
        experts, reason = merged_experts(
            layer.ptq_shards,
            hidden=hidden,
            intermediate=intermediate,
            gating=gating,
            dtype=layer.ptq_dtype,
        )
        for name in layer.ptq_places:
            delattr(layer, name)
        del layer.ptq_shards, layer.ptq_places
        layers = [m for m in experts.modules() if isinstance(m, QuantLinear)]
        if reason is not None:
            _settle(self.config, layers, layer.ptq_dtype)
            if layers[0].weight_packed.is_cuda and not _eager():
                raise ValueError(
                    f"experts run one after the other here, which no CUDA graph can record: "
                    f"{reason}; add --enforce-eager"
                )
        layer.ptq = experts

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():  # on a CPU; else vLLM does not look into experts
            return _experts(x, topk_weights, topk_ids, layer.ptq_name)
        return layer.ptq(x, topk_ids.long(), topk_weights)


def _device() -> torch.device:
    """Where vLLM makes parameters at the moment."""
    return torch.empty(0).device


def _eager() -> bool:
    return bool(get_current_vllm_config().model_config.enforce_eager)
