"""What a model is made of: linear layers under other names, routers, the output head."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.model.memory_source import MemorySource
from ptq.model.structure import find_head, is_router, linearize

Build = Callable[..., transformers.PreTrainedModel]


def test_a_linearized_model_computes_the_same():
    model = nn.Sequential(Conv1D(6, 4), nn.Sequential(Conv1D(3, 6))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = model(x)
        weight = model.get_parameter("0.weight").data_ptr()
        assert linearize(model) == {"0.weight", "1.0.weight"}
        torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], nn.Linear) and not model[0].training
    assert model.get_parameter("0.weight").data_ptr() == weight  # a view
    assert linearize(model) == set()


def test_only_the_named_modules_are_linearized():
    model = nn.ModuleDict({"a": Conv1D(6, 4), "b": Conv1D(3, 6)})
    assert linearize(model, {"b"}) == {"b.weight"}
    assert isinstance(model["a"], Conv1D) and isinstance(model["b"], nn.Linear)


@pytest.mark.parametrize(
    "family, routers",
    [
        ("llama", set()),
        ("mixtral", {"mlp.gate"}),
        ("qwen2_moe", {"mlp.gate", "mlp.shared_expert_gate"}),
        ("deepseek_v3", {"mlp.gate"}),
    ],
)
def test_routers_and_gates_of_shared_experts_are_told_from_projections(
    family: str, routers: set[str], tiny_model: Build
):
    _, block = MemorySource(tiny_model(family)).blocks()[1]
    assert {n for n, _ in block.named_modules() if is_router(block, n)} == routers


def test_routers_by_name():
    block = nn.ModuleDict(
        {
            "moe": nn.ModuleDict(
                {"router": nn.ModuleDict({"layer": nn.Linear(4, 4)}), "experts": nn.Identity()}
            ),
            "gated": nn.ModuleDict(
                {"gate": nn.ModuleDict({"wg": nn.Linear(4, 4)}), "experts": nn.Identity()}
            ),
            "mlp": nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)}),
        }
    )
    found = {
        n for n, m in block.named_modules() if isinstance(m, nn.Linear) and is_router(block, n)
    }
    assert found == {"moe.router.layer", "gated.gate.wg"}


def test_the_head_is_found_and_a_tied_one_refused(tiny_model: Build):
    assert find_head(tiny_model("llama")) == "lm_head"
    with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is tied to the embedding"):
        find_head(tiny_model("llama", tie_word_embeddings=True))
    with pytest.raises(ValueError, match="Linear has no linear output head"):
        find_head(nn.Linear(2, 2))
