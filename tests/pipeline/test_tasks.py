"""What is to be solved in a block, and by whom."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.calib.walk import CalibratedBlock, walk
from ptq.model.memory_source import MemorySource
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.tasks import Task, tasks

Make = Callable[..., Path]


def first_block(path: Path, recipe: Recipe) -> tuple[CalibratedBlock, Plan]:
    source = MemorySource(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    plan = Plan.of(source, recipe)
    data = [torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0))]
    return next(walk(source, data, plan.watch(), device="cpu")), plan


def names(made: list[Task]) -> list[tuple[str, ...]]:
    return [task.layers for task in made]


def test_layers_that_read_the_same_are_one_task_unless_their_recipes_differ(
    tiny_llama: Path,
) -> None:
    block, plan = first_block(tiny_llama, Recipe.default("nvfp4"))
    attention, mlp = "self_attn.", "mlp."
    assert names(tasks(block, block.groups, plan)) == [
        (attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        (attention + "o_proj",),
        (mlp + "gate_proj", mlp + "up_proj"),
        (mlp + "down_proj",),
    ]
    rules = (("k_proj", "mxfp8"), ("up_proj", "skip"))
    block, plan = first_block(tiny_llama, Recipe.default("nvfp4", rules=rules))
    assert names(tasks(block, block.groups, plan)) == [
        (attention + "q_proj", attention + "v_proj"),
        (attention + "k_proj",),
        (attention + "o_proj",),
        (mlp + "gate_proj",),
        (mlp + "down_proj",),
    ]


def test_a_task_costs_its_sweep_and_its_factorisation(tiny_llama: Path) -> None:
    block, plan = first_block(tiny_llama, Recipe.default("nvfp4"))
    costs = {task.layers[0]: task.cost for task in tasks(block, block.groups, plan)}
    assert costs["self_attn.q_proj"] == 64 * 64 * ((64 + 32 + 32) + 64)
    assert costs["mlp.down_proj"] == 128 * 128 * (64 + 128)


def test_results_are_named_in_full_and_count_their_tokens(tiny_llama: Path) -> None:
    block, plan = first_block(tiny_llama, Recipe.default("mxfp4", scheme="w4a4"))
    results = [result for task in tasks(block, block.groups, plan) for result in task.solve()]
    assert [r.name for r in results] == [n for n in plan.layers if n.startswith("model.layers.0.")]
    assert {r.report.tokens for r in results} == {7 * 32}  # an eighth is held out
    assert all(r.report.held_out_error is not None for r in results)


def test_experts_that_saw_little_are_solved_with_what_others_lend(make_tiny_model: Make) -> None:
    block, plan = first_block(make_tiny_model("mixtral"), Recipe.default("nvfp4"))
    experts = [task for task in tasks(block, block.groups, plan) if "experts" in task.layers[0]]
    rare = min(experts, key=lambda task: task.group.hessian.tokens)
    rare.group.hessian.tokens = 3
    reports = [result.report for result in rare.solve()]
    assert all(report.topped_up and report.tokens == 3 for report in reports)
    assert all(report.held_out_error is None for report in reports)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_tasks_can_be_solved_in_any_order(tiny_llama: Path, fmt: str) -> None:
    block, plan = first_block(tiny_llama, Recipe.default(fmt))
    made = tasks(block, block.groups, plan)
    forward = {r.name: r.weight.codes for task in made for r in task.solve()}
    backward = {r.name: r.weight.codes for task in made[::-1] for r in task.solve()}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
