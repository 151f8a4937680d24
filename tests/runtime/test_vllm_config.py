"""What the plugin answers to vLLM about a checkpoint, with a stand-in for vLLM."""

from importlib import import_module
from typing import Any

import pytest
import torch

from ptq.checkpoint.dialect_ptq import NOTE
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.quantization_config import LayerInfo, summarize

BLOCK = "model.layers.0"
DENSE = [f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkvo"]
EXPERTS = [
    f"{BLOCK}.block_sparse_moe.experts.{i}.{leaf}" for i in range(2) for leaf in ("w1", "w2", "w3")
]
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def stored(
    layers: dict[str, LayerInfo],
    others: tuple[str, ...] = ("lm_head",),
    dialect: str = "ptq",
    **more,
) -> dict[str, Any]:
    said = summarize(layers, others, recipe={}, provenance={}, **more)
    return DIALECTS[dialect].config(said, layers, others)


NVFP4 = {name: LayerInfo(format="nvfp4") for name in (*DENSE, *EXPERTS)}


@pytest.fixture
def configured(stand_in_vllm):
    """``configured(quantization_config)``: as vLLM makes it for a model."""

    def make(said: dict) -> Any:
        made = import_module("ptq.runtime.vllm_config").PtqConfig.from_config(said)
        made.packed_modules_mapping = MERGED
        return made

    return make


def test_it_says_what_vllm_asks_every_method(configured) -> None:
    made = configured(stored(NVFP4))
    assert made.get_name() == "ptq" and made.get_min_capability() == 80
    assert torch.bfloat16 in made.get_supported_act_dtypes() and made.get_config_filenames() == []


def test_what_it_does_not_know_is_an_error(configured) -> None:
    with pytest.raises(ValueError, match="keys that this ptq does not know: news; update ptq"):
        configured(stored(NVFP4) | {"news": 1})


def test_tensors_for_other_programs_are_left_out(configured) -> None:
    mapper = configured(stored(NVFP4)).get_checkpoint_weight_mapper()
    names = [f"{DENSE[0]}.weight_packed", f"{DENSE[0]}.{NOTE}", f"{DENSE[0]}.h32_input.weight"]
    assert mapper.apply_list([*names, f"{BLOCK}.input_layernorm.weight"]) == [
        names[0],
        f"{BLOCK}.input_layernorm.weight",
    ]


def test_layers_get_what_is_said_of_their_parts(configured, stand_in_vllm) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layers = dict(NVFP4)
    layers[DENSE[1]] = LayerInfo(format="mxfp8", rotation=32)
    del layers[DENSE[2]]
    made = configured(stored(layers, ("lm_head", DENSE[2], f"{BLOCK}.block_sparse_moe.gate")))
    linear = LinearBase([8], 64)

    def method(layer: Any, name: str) -> Any:
        return made.get_quant_method(layer, name)

    merged = method(linear, f"{BLOCK}.self_attn.qkv_proj")
    assert [*merged.infos] == DENSE[:3]
    assert merged.infos == {
        DENSE[0]: LayerInfo(format="nvfp4"),
        DENSE[1]: LayerInfo(format="mxfp8", rotation=32),
        DENSE[2]: None,
    }
    assert isinstance(method(linear, f"{BLOCK}.block_sparse_moe.gate"), UnquantizedLinearMethod)
    assert method(ParallelLMHead([8], 64), "lm_head") is None
    assert method(Attention(), f"{BLOCK}.self_attn.attn") is None
    experts = RoutedExperts(2, ("w1", "w2", "w3"))
    for name in ("experts", "experts.routed_experts"):
        found = method(experts, f"{BLOCK}.block_sparse_moe.{name}")
        assert sorted(found.names.values()) == EXPERTS and None not in found.infos.values()
    dense = {name: info for name, info in NVFP4.items() if name in DENSE}
    only = configured(stored(dense, ("lm_head", *EXPERTS)))
    assert only.get_quant_method(experts, f"{BLOCK}.block_sparse_moe.experts") is None


def test_a_quantized_head_is_a_layer(configured) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    made = configured(stored({**NVFP4, "lm_head": LayerInfo(format="mxfp8")}, ()))
    assert made.get_quant_method(ParallelLMHead([8], 64), "lm_head").infos["lm_head"] is not None


def test_scales_of_keys_and_values_are_vllms_own(configured) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    made = configured(stored(NVFP4, kv_cache="fp8"))
    assert isinstance(
        made.get_quant_method(Attention(), f"{BLOCK}.self_attn.attn"), BaseKVCacheMethod
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation": "swigluoai"}, "activation swigluoai, which .*: use ptq.load, or ptq serve"),
        ({"biased": True}, "experts with biases"),
        ({"weighted": True}, "experts whose inputs are weighted"),
        ({"spread": True}, "leave out --enable-expert-parallel"),
    ],
)
def test_experts_that_it_does_not_run_are_one_line(configured, settings: dict, reason: str) -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    experts = RoutedExperts(2, ("w1", "w2", "w3"), **settings)
    with pytest.raises(ValueError, match=reason) as error:
        configured(stored(NVFP4)).get_quant_method(experts, f"{BLOCK}.block_sparse_moe.experts")
    assert "\n" not in str(error.value)


def test_names_follow_those_of_the_model(configured) -> None:
    """vLLM calls parts of some models otherwise than their checkpoints do."""
    from vllm.model_executor.models.utils import WeightsMapper

    layers = {
        "a.layers.0.up": LayerInfo(format="nvfp4"),
        "a.layers.1.up": LayerInfo(format="mxfp4"),
    }
    made = configured(stored(layers, ("a.head",)))
    made.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"a.": "b.c."}))
    assert made.info("b.c.head") is None
    assert made.info("b.c.layers.0.up") == layers["a.layers.0.up"]
    assert made.info("b.c.layers.1.up") == layers["a.layers.1.up"]


def test_the_machine_decides_what_is_taken_over(configured, stand_in_vllm) -> None:
    cls = type(configured(stored(NVFP4)))
    dense = {name: info for name, info in NVFP4.items() if name in DENSE}
    said = stored(dense, dialect="compressed-tensors")
    assert cls.override_quantization_method(said, None) == "ptq"
    assert cls.override_quantization_method(stored(NVFP4), None) == "ptq"
    stand_in_vllm.platform.is_cpu = lambda: False
    stand_in_vllm.platform.get_device_capability = lambda: (9, 0)
    assert cls.override_quantization_method(said, None, hf_config=None) is None
    assert cls.override_quantization_method(said, "ptq") == "ptq"
