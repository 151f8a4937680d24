"""What rounding costs: against KL as it is measured, by hand, and for layers that decide
together."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.calib.sensitivity import ALL
from ptq.checkpoint.quantization_config import decided_together
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline.damage import Damaged, damages, nearest
from ptq.pipeline.emulated_inputs import emulated
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.runtime.evaluate import kl_divergence, kl_top

CHOICES = {name: Recipe.default(name, scheme="w4a4", balance=0.0) for name in ("nvfp4", "mxint8")}


def batches(count: int = 4) -> list[torch.Tensor]:
    return [torch.randint(3, 200, (count, 64), generator=torch.Generator().manual_seed(0))]


def measured(path: Path, choices=CHOICES, **given) -> list[Damaged]:
    source = CheckpointSource(path, dtype=torch.float32)
    plan = Plan.of(source, Recipe.default("nvfp4", scheme="w4a4", balance=0.0))
    layers = dict.fromkeys(plan.layers, choices)
    return damages(source, plan, batches(), layers, device="cpu", **given)


def test_layers_that_engines_fuse_are_one_and_all_are_there(tiny_llama: Path) -> None:
    found = measured(tiny_llama)
    leaves = [tuple(n.rpartition(".")[2] for n in unit.layers) for unit in found]
    one = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert leaves == one * 2
    assert found[2].weights == 2 * 64 * 128
    for unit in found:
        assert unit.scores.keys() == {"nvfp4", "mxint8"}
        assert 0 < unit.scores["mxint8"][0] < 0.05 * unit.scores["nvfp4"][0]


def test_others_may_decide_together_too(make_tiny_model) -> None:
    path = make_tiny_model("qwen3_moe", num_hidden_layers=1)
    apart, joined = measured(path), measured(path, together=decided_together)
    experts = [unit for unit in joined if any(".experts." in name for name in unit.layers)]
    assert len(apart) > len(joined) == 3 and len(experts) == 1
    single = [unit for unit in apart if any(".experts." in name for name in unit.layers)]
    assert experts[0].weights == sum(unit.weights for unit in single)
    total = sum(unit.scores["nvfp4"][0] for unit in single)
    assert experts[0].scores["nvfp4"][0] == pytest.approx(total)


def test_losses_are_kl_as_it_is_measured(tiny_llama: Path) -> None:
    """Of each unit alone, with its weights and inputs rounded, on the same tokens: the sum over all
    units within a fifth, for few tokens sample the Fisher matrix."""
    found = measured(tiny_llama, measures=(ALL, 25))
    tokens = batches()[0]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        original = model(tokens).logits.flatten(0, 1)
        sums = torch.zeros(2)
        for unit in found:
            rough = with_rounded(tiny_llama, unit.layers)(tokens).logits.flatten(0, 1)
            sums += torch.stack(
                [f(original, rough).mean().float() for f in (kl_divergence, kl_top)]
            )
    for index in range(2):
        predicted = sum(unit.scores["nvfp4"][index] for unit in found)
        assert predicted == pytest.approx(float(sums[index]), rel=0.2)


def with_rounded(path: Path, names: tuple[str, ...]) -> Callable:
    """The model with some layers in NVFP4."""
    model, recipe = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        CHOICES["nvfp4"],
    )
    for name in names:
        layer = model.get_submodule(name)
        layer.weight.data = nearest((name,), [layer.weight.data], recipe)[name]
        layer.register_forward_pre_hook(lambda _, args: (emulated(args[0], recipe),))
    return model


def test_only_layers_with_choices_take_part(tiny_llama: Path) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    plan = Plan.of(source, Recipe.default("nvfp4", scheme="w4a4", balance=0.0))
    some = {name: CHOICES for name in plan.layers if name.endswith(("q_proj", "down_proj"))}
    found = damages(source, plan, batches(), some, device="cpu")
    assert [unit.layers for unit in found] == [(name,) for name in some]


def test_experts_that_no_token_reaches_have_no_figures(make_tiny_model) -> None:
    source = CheckpointSource(make_tiny_model("qwen3_moe", num_experts=16), dtype=torch.float32)
    plan = Plan.of(source, Recipe.default("nvfp4", scheme="w4a4", balance=0.0))
    few = [torch.randint(3, 200, (1, 4), generator=torch.Generator().manual_seed(0))]
    found = damages(source, plan, few, dict.fromkeys(plan.layers, CHOICES), device="cpu")
    seen = {name for unit in found for name in unit.layers}
    assert seen < plan.layers.keys()
    assert all(unit.scores["nvfp4"][0] >= 0 for unit in found)
