"""Names of checkpoints and of models: one to one, and what is made of several tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.expert_layouts import ExpertNames, Part
from ptq.model.parameter_names import NameMap, Origin, dtype_plan

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
)
def test_names_of_model_and_checkpoint_map_one_to_one(family: str, tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint(family))
    mine = [
        name
        for name in source.skeleton().state_dict()
        if family != "gemma3" or name != "lm_head.weight"
    ]
    assert sorted(map(source.checkpoint_name, mine)) == source.names()
    assert [source.module_name(source.checkpoint_name(name)) for name in mine] == mine


def test_mixtral_keeps_the_names_of_the_hub(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("mixtral"))
    name = source.checkpoint_name("model.layers.1.mlp.experts.3.w2.weight_scale")
    assert name == "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"
    assert source.module_name(name) == "model.layers.1.mlp.experts.3.w2.weight_scale"


@pytest.mark.parametrize("family", MOE)
def test_names_are_those_of_checkpoints(family: str, tiny_checkpoint: Callable[[str], Path]):
    source = CheckpointSource(tiny_checkpoint(family))
    experts = [n for n in source.skeleton().state_dict() if ".experts." in n]
    assert experts and all(source.checkpoint_name(n) in source.names() for n in experts)
    leaf = "w1" if family == "mixtral" else "gate_proj"
    assert any(n.endswith(f"mlp.experts.1.{leaf}.weight") for n in experts)


def test_experts_are_called_what_the_hub_calls_them(tiny_model: Build):
    path = "model.layers.0.mlp.experts"
    assert NameMap(tiny_model("mixtral")).expert_names(path) == ExpertNames("w1", "w3", "w2")
    assert NameMap(tiny_model("qwen3_moe")).expert_names(path) == ExpertNames()
    assert not NameMap(tiny_model("mixtral")).stacked(path)


def test_a_fused_parameter_comes_from_the_experts_in_the_order_of_their_numbers(tiny_model: Build):
    names = NameMap(tiny_model("qwen3_moe", num_experts=12))
    stem = "model.layers.0.mlp.experts"
    stored = [f"{stem}.{e}.{k}_proj.weight" for e in range(12) for k in ("down", "up", "gate")]
    origins = names.origins(sorted(stored))
    assert set(origins) == {f"{stem}.gate_up_proj", f"{stem}.down_proj"}
    gate, up = (members for _, members in origins[f"{stem}.gate_up_proj"].sources)
    assert gate == tuple(f"{stem}.{e}.gate_proj.weight" for e in range(12))
    assert up == tuple(f"{stem}.{e}.up_proj.weight" for e in range(12))
    made = origins[f"{stem}.down_proj"].load(lambda name: torch.full((64, 32), len(name)), names)
    assert made[f"{stem}.down_proj"].shape == (12, 64, 32)


def test_names_that_the_model_does_not_have_make_up_nothing(tiny_model: Build):
    names = NameMap(tiny_model("llama"))
    assert names.origins(["model.layers.0.nonesuch.weight", "vision.patch.weight"]) == {}


def test_direct_is_the_tensor_that_is_the_whole_parameter():
    one = Origin((("a", ("a",)),), target="a")
    assert one.direct == "a" and one.names == ("a",)
    assert Origin(one.sources, target="a", part=Part(transposed=True)).direct == "a"
    assert Origin(one.sources, target="a", part=Part(expert=0)).direct is None
    assert Origin(one.sources, target="a", part=Part(rows=(0, 2, 1))).direct is None
    assert Origin((("", ("a_blocks", "a_scales")),), target="a").direct is None
    assert Origin(one.sources, target="a", part=Part(expert=0)).whole() == one


def test_what_transformers_keeps_in_float32_is_kept(tiny_model: Build):
    plan = dtype_plan(tiny_model("deepseek_v3"), torch.bfloat16)
    assert plan("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert plan("model.layers.1.self_attn.o_proj.weight") is None
    assert dtype_plan(tiny_model("llama"), torch.bfloat16)("model.norm.weight") is None
