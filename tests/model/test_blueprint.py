"""A model from its configuration alone: the layers and groups that the model itself has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import FAMILIES
from torch import nn

from ptq.calib.walk import Watch, walk
from ptq.model.blueprint import Blueprint
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Configure = Callable[..., Path]


@pytest.fixture
def configured(tiny_model: Build, tmp_path: Path) -> Configure:
    """``configured(family)``: a directory with nothing but the config.json of the tiny model."""

    def save(family: str, **overrides: object) -> Path:
        tiny_model(family, **overrides).config.save_pretrained(tmp_path)
        return tmp_path

    return save


def gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)


def gpt_oss() -> transformers.GptOssConfig:
    return transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_groups_are_those_that_a_walk_finds(
    family: str, tiny_model: Build, configured: Configure, batches: list[torch.Tensor]
):
    blueprint = Blueprint.of(configured(family))
    blocks = walk(MemorySource(tiny_model(family)), batches, Watch(), device="cpu")
    seen = [[block.prefix + name for name in g.layers] for block in blocks for g in block.groups]
    inside = tuple(f"{name}." for name in blueprint.block_names)
    groups = [list(g) for g in blueprint.input_groups if g[0].startswith(inside)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, seen))
    outside = {n for g in blueprint.input_groups for n in g if not n.startswith(inside)}
    assert outside == {"lm_head"}


def test_every_linear_is_in_one_group_in_the_order_in_which_they_run(configured: Configure):
    blueprint = Blueprint.of(configured("llama"))
    leaves = [[name.rpartition(".")[2] for name in g] for g in blueprint.input_groups]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert leaves == [*block, *block, ["lm_head"]]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_where_the_model_asks_for_values_every_layer_is_a_group(family: str, configured: Configure):
    blueprint = Blueprint.of(configured(family))
    module = blueprint.model.get_submodule("model.layers.1")
    module.register_forward_pre_hook(lambda _, args: bool(args[0].sum() > 0) and None)
    linears = [n for n, m in blueprint.model.named_modules() if isinstance(m, nn.Linear)]
    assert blueprint.input_groups == [(name,) for name in linears]


def test_running_leaves_the_model_as_it_was(configured: Configure):
    blueprint = Blueprint.of(configured("mixtral"))
    assert blueprint.input_groups
    for name, module in blueprint.model.named_modules():
        assert "forward" not in module.__dict__ and not module._forward_pre_hooks, name


def test_no_weights_are_needed_and_none_are_made(configured: Configure):
    path = configured("qwen3_moe")
    assert [file.name for file in path.iterdir()] == ["config.json"]
    blueprint = Blueprint.of(path)
    assert blueprint.path == path and not blueprint.model.training
    assert all(parameter.is_meta for parameter in blueprint.model.parameters())
    name, block = blueprint.blocks()[1]
    assert name == "model.layers.1" and block is blueprint.model.get_submodule(name)
    assert isinstance(block.get_submodule("mlp.experts.3.up_proj"), nn.Linear)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_model_has_the_type_that_its_configuration_names(dtype: str, configured: Configure):
    path = configured("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    parameters = Blueprint.of(path).model.parameters()
    assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}


def test_the_head_is_the_one_of_the_model_and_a_tied_one_refused(configured: Configure):
    blueprint = Blueprint.of(configured("llama"))
    assert blueprint.head() == ("lm_head", blueprint.model.get_submodule("lm_head"))
    tied = Blueprint.of(configured("llama", tie_word_embeddings=True))
    with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is tied to the embedding"):
        tied.head()


@pytest.mark.parametrize(
    "config, why",
    [
        (transformers.LlamaConfig(hidden_size=32, intermediate_size=32, vocab_size=64), None),
        (gpt2(), "its Conv1D layers"),
        (gpt_oss(), "its experts are stored in one tensor"),
    ],
    ids=["llama", "gpt2", "gpt_oss"],
)
def test_foreign_says_what_it_says_of_the_model(
    config: transformers.PretrainedConfig, why: str | None, tmp_path: Path
):
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    foreign = Blueprint.of(tmp_path).foreign()
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert foreign == MemorySource(model).foreign()
    assert foreign is None if why is None else str(foreign).startswith(why)


def test_what_is_no_model_is_refused_as_reading_it_would_be(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has no config\\.json"):
        Blueprint.of(tmp_path)
