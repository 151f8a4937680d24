"""Balancing as a step of a run: it keeps the function of a block, and says what changed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.calib.walk import Steps, walk
from ptq.model.memory_source import MemorySource
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe

BATCHES = [torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_balanced_model_is_the_same_function(tiny_llama: Path, strength: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected = model(BATCHES[0]).logits
    source = MemorySource(model)
    plan = Plan.of(source, Recipe.default("nvfp4", balance=strength))
    balancing = Balancing(plan)
    for block in walk(source, BATCHES, plan.watch(), device="cpu", prepare=balancing):
        prefix = f"{block.name}."
        assert set(balancing.strengths) == {n for n in plan.layers if n.startswith(prefix)}
        assert set(balancing.strengths.values()) == {strength}
        norms = {f"{prefix}{n}_layernorm.weight" for n in ("input", "post_attention")}
        assert set(balancing.changes_of(block)) == norms
    with torch.no_grad():
        torch.testing.assert_close(model(BATCHES[0]).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_weakest_wish_of_those_that_read_the_same_counts(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    source = MemorySource(model)
    rules = (("k_proj", {"balance": 0.0}), ("up_proj", {"balance": 0.125}))
    plan = Plan.of(source, Recipe.default("nvfp4", balance=0.5, rules=rules))
    balancing = Balancing(plan)
    next(walk(source, BATCHES, plan.watch(), device="cpu", prepare=balancing))
    own = {n.rpartition(".")[2]: strength for n, strength in balancing.strengths.items()}
    assert {own[n] for n in ("q_proj", "k_proj", "v_proj")} == {0.0}
    assert {own[n] for n in ("gate_proj", "up_proj")} == {0.125}
    assert {own[n] for n in ("o_proj", "down_proj")} == {0.5}
    assert not any("input_layernorm" in name for name in balancing.changes)


def test_states_that_cannot_be_tried_on_are_said(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Steps, "trial", lambda self, block: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    source = MemorySource(model)
    plan = Plan.of(source, Recipe.default("nvfp4", balance=0.5))
    balancing = Balancing(plan)
    next(walk(source, BATCHES, plan.watch(), device="cpu", prepare=balancing))
    assert not balancing.strengths and not balancing.changes
    assert "model.layers.0: its hidden states have a form" in caplog.text
