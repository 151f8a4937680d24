"""Blocks from the last to the first, with what their layers read and gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptq.calib.backward import backward
from ptq.model.memory_source import MemorySource

LAYERS = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


@pytest.fixture
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (1, 24), generator=generator) for _ in range(3)]


@pytest.fixture
def source(tiny_llama: Path) -> MemorySource:
    return MemorySource(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))


def test_blocks_come_from_the_last_on(source: MemorySource, sequences: list[Tensor]) -> None:
    told: list[tuple[int, int]] = []
    found = {
        seen.block.name: {name: len(calls) for name, calls in seen.readings.items()}
        for seen in backward(
            source, sequences, LAYERS, device="cpu", on_block=lambda *step: told.append(step)
        )
    }
    assert list(found) == ["model.layers.1", "model.layers.0"]
    assert list(found.values()) == [{LAYERS[1]: 3}, {LAYERS[0]: 3}]
    assert told == [(i, 4) for i in range(1, 5)]


def test_it_ends_where_nobody_looks_further(source: MemorySource, sequences: list[Tensor]) -> None:
    told: list[tuple[int, int]] = []
    found = [
        seen.block.name
        for seen in backward(
            source, sequences, LAYERS, device="cpu", until=1, on_block=lambda *s: told.append(s)
        )
    ]
    assert found == ["model.layers.1"] and told == [(i, 3) for i in range(1, 4)]


def test_what_layers_read_need_not_be_kept(source: MemorySource, sequences: list[Tensor]) -> None:
    gradients = []
    for inputs in (True, False):
        for seen in backward(source, sequences, LAYERS[1:], device="cpu", inputs=inputs, until=1):
            (calls,) = seen.readings.values()
            assert [tuple(call.x.shape) for call in calls] == [(24, 64 if inputs else 0)] * 3
            gradients.append(torch.cat([call.gradient(0) for call in calls]))
    assert gradients[0].any() and torch.equal(*gradients)
