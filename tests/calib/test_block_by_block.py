"""A model run and differentiated a block at a time, against one pass of the whole model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from ptq.calib.block_by_block import BlockByBlock
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))


def opened(path: Path, activations: str = "ram") -> BlockByBlock:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return BlockByBlock(MemorySource(model), torch.device("cpu"), activations)


def other(path: Path) -> torch.nn.Module:
    """A model beside the original."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("activations", ["ram", "disk"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3", "qwen3_moe"])
def test_gradients_and_divergence_are_those_of_the_whole_model(
    make_tiny_model, tokens: Tensor, kind: str, activations: str
) -> None:
    path = make_tiny_model(kind)
    original, student = opened(path, activations), other(path)
    blocks = BlockByBlock(MemorySource(student), torch.device("cpu"), activations)
    with original.around(), blocks.around():
        for each in (original, blocks):
            each.learn_form(tokens)
        reference, batch = original.begin(tokens), blocks.begin(tokens)
        for _ in blocks.blocks:
            original.forward(reference)
            blocks.forward(batch)
        total, gradient = blocks.divergence(tokens, reference.last, batch.last, differentiate=True)
        plain = blocks.divergence(tokens, reference.last, batch.last, differentiate=False)
        assert plain == (total, None)
        for module in (module for _, module in blocks.blocks):
            module.requires_grad_(True)
        assert gradient is not None
        for index in reversed(range(len(blocks.blocks))):
            gradient = blocks.back(batch, index, gradient)
        for each in (reference, batch):
            each.states.close()
    whole = copy.deepcopy(student)
    whole.zero_grad()
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        wanted = teacher(tokens).logits.log_softmax(-1)
    loss = kl_div(whole(tokens).logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    mine, theirs = (dict(model.model.layers.named_parameters()) for model in (student, whole))
    for name, parameter in theirs.items():
        # an expert that no token chose has none
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = mine[name].grad
        found = torch.zeros_like(parameter) if found is None else found
        scale = float(expected.abs().max())
        assert torch.allclose(found, expected, atol=1e-4 * scale), name


def test_logits_are_those_of_the_model(make_tiny_model, tokens: Tensor) -> None:
    path = make_tiny_model("qwen2")
    blocks = opened(path)
    with blocks.around():
        blocks.learn_form(tokens)
        batch = blocks.begin(tokens)
        for _ in blocks.blocks:
            blocks.forward(batch)
        with torch.no_grad():
            found = blocks.recorder.logits(tokens, batch.last)
            expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens)
    assert torch.equal(found, expected.logits)


def test_what_is_around_the_blocks_is_filled_while_it_is_needed(
    tiny_llama: Path, tokens: Tensor
) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    blocks = BlockByBlock(source, torch.device("cpu"))
    with blocks.around():
        name, module = blocks.blocks[0]
        source.fill(module, name, "cpu")
        blocks.learn_form(tokens)
        assert not source.skeleton().get_input_embeddings().weight.is_meta
    assert source.skeleton().get_input_embeddings().weight.is_meta


def test_gradients_that_are_not_finite_name_their_block(tiny_llama: Path, tokens: Tensor) -> None:
    blocks = opened(tiny_llama)
    with blocks.around():
        blocks.learn_form(tokens)
        batch = blocks.begin(tokens)
        blocks.forward(batch)
        with pytest.raises(FloatingPointError, match=r"model\.layers\.0: gradients contain NaN"):
            blocks.back(batch, 0, torch.full_like(batch.last, torch.inf))
        batch.states.close()
