"""Attention layers with scales read what an FP8 cache returns."""

import pytest
import torch
from families import FAMILIES, random_model

from ptq.model.attention import cached_attentions, tap
from ptq.numerics.key_values import round_key_values
from ptq.runtime.key_values import round_cached, take_scales

TOKENS = torch.arange(1, 17)[None]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_keys_and_values_are_rounded_before_they_are_kept(use_cache: bool) -> None:
    model, again = (random_model(FAMILIES["Llama"]).eval() for _ in range(2))
    again.load_state_dict(model.state_dict())
    scales = torch.tensor([0.01]), torch.tensor([0.02])
    for attention in cached_attentions(model).values():
        round_cached(attention, *scales)
    for attention in cached_attentions(again).values():
        tap(
            attention,
            lambda k, v: (round_key_values(k, scales[0]), round_key_values(v, scales[1])),
        )
    plain = random_model(FAMILIES["Llama"]).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    result = model(TOKENS, use_cache=use_cache).logits
    assert torch.equal(result, again(TOKENS, use_cache=use_cache).logits)
    assert not torch.equal(result, plain(TOKENS, use_cache=use_cache).logits)


def test_scales_come_in_pairs_of_one_positive_number() -> None:
    model = random_model(FAMILIES["Llama"])
    name, one = "model.layers.0.self_attn", torch.ones(1)
    assert take_scales(model, {}) == 0
    assert take_scales(model, {f"{name}.k_scale": one, f"{name}.v_scale": one}) == 1
    assert f"{name}.k_scale" in model.state_dict()
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.self_attn\.v_scale"):
        take_scales(model, {"model.layers.1.self_attn.k_scale": one})
    with pytest.raises(ValueError, match="belongs to no attention layer"):
        take_scales(model, {"model.k_scale": one, "model.v_scale": one})
    for bad in (torch.zeros(1), torch.tensor([float("nan")]), one.double(), torch.ones(2)):
        with pytest.raises(ValueError, match="one positive float32 number"):
            take_scales(model, {f"{name}.k_scale": bad, f"{name}.v_scale": one})
