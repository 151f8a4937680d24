"""Fused experts as modules of Linears: the same function from every layout, refusals by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stacked_experts import StackedExperts
from torch import nn

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.expert_layouts import ExpertNames, Layout
from ptq.model.experts import Experts, fused_experts, routed_everywhere, unfuse
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_outputs_are_those_of_the_fused_experts(
    family: str,
    from_disk: bool,
    tiny_model: Build,
    tiny_checkpoint: Callable[[str], Path],
    batches: list[torch.Tensor],
):
    with torch.no_grad():
        expected = tiny_model(family)(batches[0]).logits
    source = (
        CheckpointSource(tiny_checkpoint(family)) if from_disk else MemorySource(tiny_model(family))
    )
    model = source.skeleton()
    source.fill(model, "", "cpu")
    assert any(isinstance(m, Experts) for m in model.modules()) and not fused_experts(model)
    with torch.no_grad():
        assert torch.equal(model(batches[0]).logits, expected)


def test_the_default_implementation_differs_by_rounding_only(
    tiny_model: Build, batches: list[torch.Tensor]
):
    fused = tiny_model("qwen3_moe")
    fused.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        expected = fused(batches[0]).logits
        split = MemorySource(tiny_model("qwen3_moe")).skeleton()(batches[0]).logits
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-5)


def test_real_weights_become_views_not_copies(tiny_model: Build):
    model = tiny_model("mixtral")
    fused = model.get_parameter("model.layers.0.mlp.experts.down_proj").data_ptr()
    unfuse(model, lambda _: ExpertNames())
    assert model.get_parameter("model.layers.0.mlp.experts.0.down_proj.weight").data_ptr() == fused


def small_experts() -> Experts:
    """Three experts on 4 features; the gate projection alone decides what goes on."""
    return Experts(
        Layout(names=ExpertNames(), count=3, hidden=4, intermediate=8),
        lambda x: x[..., :8],
        torch.float32,
    ).requires_grad_(False)


def test_with_every_token_everywhere_all_experts_see_all_tokens_and_outputs_stay() -> None:
    experts = small_experts()
    x, weights, chosen = (
        torch.randn(5, 4),
        torch.rand(5, 2),
        torch.tensor([[0, 2], [2, 0], [3, 2], [0, 0], [2, 3]]),
    )
    seen: dict[str, tuple[int, Any]] = {}

    def note(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name] = (len(args[0]), experts.routed)

    for name in ("0.gate_proj", "1.up_proj", "2.down_proj"):
        experts.get_submodule(name).register_forward_pre_hook(partial(note, name))
    expected = experts(x, chosen, weights)
    assert seen["0.gate_proj"][0] < 5 and "1.up_proj" not in seen
    with routed_everywhere(nn.ModuleList([experts])):
        torch.testing.assert_close(experts(x, chosen, weights), expected)
    assert {name: count for name, (count, _) in seen.items()} == {
        "0.gate_proj": 5,
        "1.up_proj": 5,
        "2.down_proj": 5,
    }
    assert all(torch.equal(routed, torch.arange(5)) for _, routed in seen.values())
    assert not experts.everywhere and experts.routed is None


def test_experts_tell_which_tokens_they_run():
    experts = small_experts()
    seen: dict[int, list[int]] = {}

    def note(expert: int) -> None:
        assert experts.routed is not None
        seen[expert] = experts.routed.tolist()

    for e in range(3):
        experts.get_submodule(f"{e}.gate_proj").register_forward_pre_hook(lambda *_, e=e: note(e))
    chosen = torch.tensor([[0, 2], [2, 0], [3, 2]])  # 3: nowhere
    out = experts(torch.randn(3, 4), chosen, torch.rand(3, 2))
    assert out.shape == (3, 4)
    assert {e: sorted(t) for e, t in seen.items()} == {0: [0, 1], 2: [0, 1, 2]}
    assert experts.routed is None


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"is_transposed": True},
        {"is_concatenated": False},
        {"has_bias": True},
        {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    ],
)
def test_every_layout_computes_what_the_stack_does(flags: dict[str, bool]):
    fused = StackedExperts(**flags)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = torch.stack([fused.expert(x, e) for e in range(2)])
        model = nn.ModuleDict({"experts": fused})
        layouts = unfuse(model, lambda _: ExpertNames())
        ones = torch.ones(3, 1)
        for e in range(2):
            torch.testing.assert_close(
                model["experts"](x, torch.full((3, 1), e), ones), expected[e]
            )
    assert layouts["experts"].biased is flags.get("has_bias", False)
    assert layouts["experts"].hidden == 4 and layouts["experts"].intermediate == 8


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"has_gate": False}, "without a gate"),
        ({"has_post_expert_norm": True}, "norm after each expert"),
    ],
)
def test_other_layouts_are_refused_by_name(flags: dict[str, bool], why: str):
    model = nn.ModuleDict({"experts": StackedExperts(**flags)})
    with pytest.raises(
        ValueError, match=rf"experts \(StackedExperts\) holds fused experts .*{why}"
    ):
        unfuse(model, lambda _: ExpertNames())
