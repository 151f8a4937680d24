"""What errors of layers cost, block by block, against a derivative of the whole model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptq.calib.sensitivity import ALL, Layers, sensitivities
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource

NAMES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
]


@pytest.fixture
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (1, 24), generator=generator) for _ in range(3)]


def coarse(model: torch.nn.Module):
    """Weights and inputs rounded, by name: a choice of much error and one of little."""

    def errors(group: Layers, inputs: Sequence[Tensor]):
        x = torch.cat(list(inputs))
        for step in (0.5, 0.05):
            yield str(step), {name: rough(model, name, x, step) for name in group}

    return errors


def rough(model: torch.nn.Module, name: str, x: Tensor, step: float) -> Tensor:
    weight = model.get_submodule(name).weight.detach()
    return torch.round(x / step) * step @ weight.T - x @ weight.T


def gradients(
    path: Path, tokens: Tensor, generator: torch.Generator, top: int = ALL
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer reads, and the gradient by what it returns, from one pass of the model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> None:
        def hook(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.retain_grad()
            seen[name] = (args[0].detach(), out)

        model.get_submodule(name).register_forward_hook(hook)

    for name in NAMES:
        watch(name)
    logits = model(tokens).logits[0]
    log_p = (logits.topk(top, -1).values if top else logits).log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    (-log_p.gather(-1, drawn).sum()).backward()
    return {name: (x, out.grad) for name, (x, out) in seen.items()}


def test_scores_are_those_of_the_whole_models_gradient(
    tiny_llama: Path, sequences: list[Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    errors = coarse(model)
    told: list[tuple[int, int]] = []
    found = sensitivities(
        MemorySource(model), sequences, NAMES, lambda *_: errors, device="cpu", seed=5,
        measures=(ALL, 3), on_block=lambda *step: told.append(step),
    )  # fmt: skip
    assert told == [(i, 4) for i in range(1, 5)]
    groups = [tuple(NAMES[2:0:-1]), (NAMES[3],), (NAMES[0],)]
    assert list(found) == groups
    draws = [torch.Generator().manual_seed(5 + i) for i in range(len(sequences))]
    for index, top in enumerate((ALL, 3)):
        passes = [
            gradients(tiny_llama, t, draw, top) for t, draw in zip(sequences, draws, strict=True)
        ]
        for group in groups:
            for step in (0.5, 0.05):
                products = torch.stack(
                    [
                        sum(
                            (p[n][1] * rough(model, n, p[n][0], step)).sum(-1).flatten()
                            for n in group
                        )
                        for p in passes
                    ]
                )
                expected = 0.5 * float(products.square().mean())
                assert found[group][str(step)][index] == pytest.approx(expected, rel=1e-3)
            assert 0 < found[group]["0.05"][index] < 0.2 * found[group]["0.5"][index]


def test_weights_are_read_block_by_block_and_let_go(
    tiny_llama: Path, sequences: list[Tensor]
) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    at_once: list[int] = []

    def choose(block, groups):
        filled = [m for _, m in source.blocks() if not next(m.parameters()).is_meta]
        at_once.append(len(filled))
        return coarse(model)

    run = {"device": "cpu", "seed": 5}
    disk = sensitivities(source, sequences, NAMES, choose, activations="disk", **run)
    assert at_once == [1, 1] and all(p.is_meta for p in source.skeleton().parameters())
    memory = sensitivities(MemorySource(model), sequences, NAMES, lambda *_: coarse(model), **run)
    assert disk == memory


def test_the_model_is_left_as_it_was(make_tiny_model, sequences: list[Tensor]) -> None:
    """Balancing puts float32 layers in the places of those of 16 bits, and other parameters."""
    model = AutoModelForCausalLM.from_pretrained(
        make_tiny_model("llama", dtype=torch.bfloat16), dtype=torch.bfloat16
    )
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    seen: list[torch.dtype] = []

    def prepare(block, run) -> None:
        wide = torch.nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
        wide.weight = torch.nn.Parameter(block.module.mlp.up_proj.weight * 2, requires_grad=False)
        block.module.mlp.up_proj = wide
        norm = block.module.input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight * 2, requires_grad=False)

    def choose(block, groups):
        seen.append(block.module.mlp.up_proj.weight.dtype)
        return lambda group, inputs: iter(())

    run = {"device": "cpu", "prepare": prepare}
    sensitivities(MemorySource(model), sequences, NAMES, choose, **run)
    assert len(seen) == 2
    assert [id(m) for m in model.modules()] == modules
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
