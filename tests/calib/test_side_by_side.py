"""Variants of a model side by side: each is what the whole model would be, and the model stays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from ptq.calib.fold import remember
from ptq.calib.side_by_side import SideBySide, linear_layers
from ptq.calib.walk import CalibratedBlock
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
NAMES = ("as it is", "halved")


@pytest.fixture
def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 100, (1, 12), generator=draw) for _ in range(3)]


@contextmanager
def alter(block: CalibratedBlock, variant: str) -> Iterator[None]:
    """Halves every linear layer of a block."""
    restore = remember(block.module)
    if variant == "halved":
        for layer in linear_layers(block).values():
            layer.weight = torch.nn.Parameter(layer.weight.detach() / 2, requires_grad=False)
    try:
        yield
    finally:
        restore()


def run(source, batches: list[Tensor], **given) -> dict[str, list[Tensor]]:
    with SideBySide(source, batches, NAMES, device="cpu", **given) as walk:
        assert [block.index for block in walk.run(alter)] == [0, 1, 2][: len(source.blocks())]
        found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        for _, logits in walk.logits():
            for name, values in logits:
                found[name].append(values)
    return found


# with a cap on logits, which comes after the output layer; and with experts
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_each_variant_is_the_whole_model(
    tiny_model: Build, family: str, batches: list[Tensor]
) -> None:
    model = tiny_model(family)
    expected = {"as it is": [model(x).logits for x in batches]}
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = run(MemorySource(model), batches)
    after = dict(model.named_parameters())  # experts have become modules of their own
    assert all(torch.equal(after.get(name, p), p) for name, p in before.items())
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    blocks = [n for n in names if n.startswith("model.layers.")]
    with torch.no_grad():
        for name in blocks:
            model.get_submodule(name).weight /= 2
        expected["halved"] = [model(x).logits for x in batches]
    for name in NAMES:
        for seen, wanted in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["halved"][0], found["as it is"][0], atol=1e-3)


def test_weights_are_read_block_by_block_and_let_go(
    tiny_llama: Path, batches: list[Tensor]
) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    filled: list[int] = []

    @contextmanager
    def watched(block: CalibratedBlock, variant: str) -> Iterator[None]:
        filled.append(sum(not next(m.parameters()).is_meta for _, m in source.blocks()))
        yield

    with SideBySide(source, batches, NAMES, device="cpu", activations="disk") as walk:
        assert len(list(walk.run(watched))) == 2
        list(walk.logits())
    assert filled == [1] * 4
    assert all(p.is_meta for p in source.skeleton().parameters())


def test_a_walk_goes_on_from_what_another_kept(tiny_llama: Path, batches: list[Tensor]) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    whole = run(source, batches)
    with SideBySide(source, batches, NAMES, device="cpu") as walk:
        next(walk.run(alter))
        kept = {(n, i): walk.hidden(n, i) for n in NAMES for i in range(3)}
    with SideBySide(source, batches, NAMES, device="cpu") as walk:
        rest = walk.run(alter, begin=1, states=lambda name, batch: kept[name, batch])
        assert [block.index for block in rest] == [1]
        for index, logits in walk.logits():
            for name, values in logits:
                assert torch.equal(values, whole[name][index])
