"""A model in memory as a source: what a checkpoint of it would say, and whose the weights are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]


def test_a_model_in_memory_has_the_same_interface(tiny_model: Build, tiny_checkpoint: Save):
    memory, disk = MemorySource(tiny_model("llama")), CheckpointSource(tiny_checkpoint("llama"))
    assert memory.names() == disk.names()
    assert all(torch.equal(memory.tensor(n), disk.tensor(n)) for n in disk.names())
    assert [n for n, _ in memory.blocks()] == [n for n, _ in disk.blocks()]
    assert dict(memory.rest()).keys() == dict(disk.rest()).keys()
    assert memory.fingerprint == MemorySource(tiny_model("llama")).fingerprint
    assert memory.fingerprint != MemorySource(tiny_model("llama", rms_norm_eps=1e-3)).fingerprint


def test_tensors_are_those_of_the_start_whatever_layers_were_replaced_by(tiny_model: Build):
    source = MemorySource(tiny_model("llama"))
    name, block = source.blocks()[0]
    before = source.tensor(f"{name}.mlp.up_proj.weight").clone()
    fingerprint = source.fingerprint
    block.set_submodule("mlp.up_proj", nn.Linear(64, 96, bias=False))
    assert torch.equal(source.tensor(f"{name}.mlp.up_proj.weight"), before)
    assert torch.equal(dict(source.kept(name, set()))[f"{name}.mlp.up_proj.weight"], before)
    assert source.fingerprint == fingerprint
    assert source.digests(None) == source.digests("model.layers.0") == {}
    with pytest.raises(ValueError, match="the model in memory has no tensor nonesuch"):
        source.tensor("nonesuch")


def test_release_leaves_the_model_of_the_caller_alone(tiny_model: Build):
    source = MemorySource(tiny_model("llama"))
    name, block = source.blocks()[0]
    weight = block.get_parameter("mlp.up_proj.weight")
    source.fill(block, name, "cpu")
    source.release(block)
    assert block.get_parameter("mlp.up_proj.weight") is weight and not weight.is_meta


def test_the_head_stays_the_head_after_it_was_replaced(tiny_model: Build):
    source = MemorySource(tiny_model("llama"))
    new = nn.Identity()
    assert source.head()[0] == "lm_head"
    source.skeleton().set_submodule("lm_head", new)
    assert source.head() == ("lm_head", new)


def test_transposed_layers_are_stored_as_they_were():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config)
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(layer, Conv1D)
    stored = layer.weight.detach().clone()
    source = MemorySource(model)
    assert torch.equal(source.tensor("transformer.h.0.mlp.c_fc.weight"), stored)
    assert "Conv1D" in str(source.foreign())


def test_experts_that_stand_alone_in_checkpoints_are_found_by_others(tiny_model: Build):
    assert MemorySource(tiny_model("llama")).foreign() is None
    assert MemorySource(tiny_model("mixtral")).foreign() is None  # one by one in checkpoints
