"""What experts that saw few tokens borrow from the others (G30)."""

from collections.abc import Callable

import pytest
import torch
import transformers

from ptq.calib.hessian import Hessian
from ptq.calib.rare_experts import Pool, pool_key, top_up
from ptq.model.memory_source import MemorySource

FEATURES = 24


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def test_pools_are_formed_by_layer_and_projection(
    tiny_model: Callable[..., transformers.PreTrainedModel],
):
    source = MemorySource(tiny_model("qwen2_moe"))
    _, block = source.blocks()[0]
    assert (
        pool_key(block, "mlp.experts.3.up_proj")
        == pool_key(block, "mlp.experts.0.up_proj")
        == "mlp.experts.*.up_proj"
    )
    assert pool_key(block, "mlp.shared_expert.up_proj") is None
    assert pool_key(block, "self_attn.q_proj") is None


def test_the_pool_weighs_experts_by_their_tokens():
    experts, everything = [], Hessian(FEATURES)
    for i, count in enumerate((3, 0, 40)):
        experts.append(Hessian(FEATURES))
        experts[-1].update(tokens(count, seed=i))
        everything.update(tokens(count, seed=i))
    torch.testing.assert_close(Pool(experts).mean(), everything.mean(), rtol=1e-12, atol=1e-12)
    assert experts[0].tokens == 3


def test_the_pool_of_experts_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="no tokens reached any expert"):
        Pool([Hessian(FEATURES)]).mean()


def test_a_rare_expert_tends_to_its_own_hessian_as_tokens_come_in():
    own, pool = torch.eye(FEATURES), 5 * torch.eye(FEATURES)
    diagonal = [float(top_up(own, pool, n, FEATURES)[0, 0]) for n in (0, 6, 12, FEATURES, 1000)]
    assert diagonal == [5.0, 4.0, 3.0, 1.0, 1.0]
    assert top_up(None, pool, 0, FEATURES) is pool
    assert torch.equal(own, torch.eye(FEATURES))
