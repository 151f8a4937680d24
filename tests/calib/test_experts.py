"""Fused experts as modules of Linears: the same function, the hub's names, refusals by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from ptq.calib.experts import ExpertNames, Experts, fused_experts, pool_key, unfuse
from ptq.calib.source import MemorySource, Source

Build = Callable[..., transformers.PreTrainedModel]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_outputs_are_those_of_the_fused_experts(
    family: str, from_disk: bool, tiny_model: Build, tiny_checkpoint: Callable[[str], Path], batches: list[torch.Tensor]
):
    with torch.no_grad():
        expected = tiny_model(family)(batches[0]).logits
    source = Source(tiny_checkpoint(family)) if from_disk else MemorySource(tiny_model(family))
    model = source.skeleton()
    source.fill(model, "", "cpu")
    assert any(isinstance(m, Experts) for m in model.modules()) and not fused_experts(model)
    with torch.no_grad():
        assert torch.equal(model(batches[0]).logits, expected)


def test_the_default_implementation_differs_by_rounding_only(tiny_model: Build, batches: list[torch.Tensor]):
    fused = tiny_model("qwen3_moe")
    fused.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        expected = fused(batches[0]).logits
        split = MemorySource(tiny_model("qwen3_moe")).skeleton()(batches[0]).logits
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_names_are_those_of_checkpoints(family: str, tiny_checkpoint: Callable[[str], Path]):
    source = Source(tiny_checkpoint(family))
    experts = [n for n in source.skeleton().state_dict() if ".experts." in n]
    assert experts and all(source.checkpoint_name(n) in source.names() for n in experts)
    leaf = "w1" if family == "mixtral" else "gate_proj"
    assert any(n.endswith(f"mlp.experts.1.{leaf}.weight") for n in experts)


def test_real_weights_become_views_not_copies(tiny_model: Build):
    model = tiny_model("mixtral")
    fused = model.get_parameter("model.layers.0.mlp.experts.down_proj").data_ptr()
    unfuse(model, lambda _: ExpertNames())
    assert model.get_parameter("model.layers.0.mlp.experts.0.down_proj.weight").data_ptr() == fused


def test_experts_tell_which_tokens_they_run():
    experts = Experts(3, 4, 8, ExpertNames(), lambda x: x[..., :8], torch.float32)
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


class Fused(nn.Module):
    """What a class of fused experts looks like; each flag may deviate from the plain layout."""

    def __init__(self, **flags: bool):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
        self.__dict__.update(flags)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"is_transposed": True}, "transposed"),
        ({"has_bias": True}, "biases"),
        ({"is_concatenated": False}, "interleaved"),
        ({"has_gate": False}, "without a gate"),
        ({"has_post_expert_norm": True}, "norm after each expert"),
    ],
)
def test_other_layouts_are_refused_by_name(flags: dict[str, bool], why: str):
    model = nn.ModuleDict({"experts": Fused(**flags)})
    with pytest.raises(ValueError, match=rf"experts \(Fused\) holds fused experts .*{why}"):
        unfuse(model, lambda _: ExpertNames())


def test_gpt_oss_is_refused():
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
        vocab_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"GptOssExperts.*not supported"):
        MemorySource(transformers.GptOssForCausalLM(config))


def test_pools_are_formed_by_layer_and_projection(tiny_model: Build):
    source = MemorySource(tiny_model("qwen2_moe"))
    _, block = source.blocks()[0]
    assert (
        pool_key(block, "mlp.experts.3.up_proj") == pool_key(block, "mlp.experts.0.up_proj") == "mlp.experts.*.up_proj"
    )
    assert pool_key(block, "mlp.shared_expert.up_proj") is None
    assert pool_key(block, "self_attn.q_proj") is None
