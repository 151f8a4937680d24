"""Which experts come together, and what is kept to look at them again."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from ptq.calib.expert_rounds import expert_of, expert_sizes, split
from ptq.calib.walk import Watch, walk
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (0.0, ["a", "b", "c", "d"]),
        (3.0, ["ab", "c", "d"]),
        (4.0, ["ab", "c", "d"]),
        (5.5, ["ab", "cd"]),
        (float("inf"), ["abcd"]),
    ],
)
def test_what_fits_comes_together_in_order(limit: float, parts: list[str]) -> None:
    sizes = {"a": 1, "b": 2, "c": 4, "d": 1}
    assert split(sizes, limit) == [list(part) for part in parts]
    assert split({}, limit) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_have_the_size_of_their_groups(
    family: str, tiny_model: Build, batches: list[torch.Tensor]
) -> None:
    source = MemorySource(tiny_model(family))
    for block in walk(source, batches, Watch(), device="cpu"):
        linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        measured: dict[str, int] = {}
        for group in block.groups:
            expert = expert_of(block.module, next(iter(group.layers)))
            if expert is not None:
                measured[expert] = measured.get(expert, 0) + group.bytes
        assert expert_sizes(block.module, linears, CPU) == measured
        some = {n: m for n, m in linears.items() if n.endswith(("w2", "down_proj"))}
        assert all(s < measured[e] for e, s in expert_sizes(block.module, some, CPU).items())


def test_only_layers_of_experts_are_of_one(tiny_model: Build) -> None:
    _, block = MemorySource(tiny_model("qwen2_moe")).blocks()[0]
    assert expert_of(block, "mlp.experts.3.up_proj") == "mlp.experts.3"
    assert expert_of(block, "mlp.shared_expert.up_proj") is None
    assert expert_of(block, "self_attn.q_proj") is None and expert_of(block, "q_proj") is None


def test_inputs_are_kept_as_they_were_and_dropped(
    tiny_model: Build, batches: list[torch.Tensor]
) -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.register_forward_hook(  # a block that writes into them
        lambda module, args, result: args[0].mul_(0) and None
    )
    steps = walk(MemorySource(model), batches, Watch(), device="cpu", limit=lambda: 1.0)
    block = next(steps)
    assert block.later is not None
    assert all(bool(block.later.inputs[index].any()) for index in range(len(batches)))
    steps.close()
    with pytest.raises(KeyError):
        block.later.inputs[0]
