"""Attention layers are found in every family, and what they keep can be seen and changed."""

import pytest
import torch
from families import FAMILIES, random_model
from torch import nn

from ptq.model.attention import cached_attentions, check_key_values, stored_stem, tap
from ptq.model.structure import find_blocks, linearize

COMPRESSED = ("DeepSeek-V2", "DeepSeek-V3", "DeepSeek-V3.2")
TOKENS = torch.arange(1, 17)[None]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in COMPRESSED])
def test_every_key_and_value_of_a_family_comes_by(family: str) -> None:
    model = random_model(FAMILIES[family]).eval()
    linearize(model)
    blocks = [(name, model.get_submodule(name)) for name in find_blocks(model)]
    check_key_values(blocks)
    expected = model(TOKENS, use_cache=False).logits
    seen: list[tuple[int, ...]] = []

    def note(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((k.shape[0], k.shape[2], v.shape[2]))
        return k, v

    hooks = [tap(m, note) for _, block in blocks for m in cached_attentions(block).values()]
    assert len(hooks) == len(blocks)
    for use_cache in (False, True):
        seen.clear()
        assert torch.equal(model(TOKENS, use_cache=use_cache).logits, expected)
        assert seen == [(1, 16, 16)] * len(blocks)
    for hook in hooks:
        hook.remove()
    hooks = [
        tap(m, lambda k, v: (k, torch.zeros_like(v)))
        for _, block in blocks
        for m in cached_attentions(block).values()
    ]
    assert not torch.equal(model(TOKENS, use_cache=False).logits, expected)


@torch.no_grad()
def test_generation_sees_each_token_once() -> None:
    model = random_model(FAMILIES["Llama"]).eval()
    expected = model.generate(TOKENS, max_new_tokens=5, do_sample=False)  # pyright: ignore
    seen: list[int] = []
    for attention in cached_attentions(model).values():
        tap(attention, lambda k, v: (seen.append(k.shape[2]), (k, v))[1])
    assert torch.equal(model.generate(TOKENS, max_new_tokens=5, do_sample=False), expected)  # pyright: ignore
    layers = len(find_blocks(model))
    assert seen == [16] * layers + [1] * (4 * layers)


@pytest.mark.parametrize("family", COMPRESSED)
def test_compressed_keys_are_refused_by_name(family: str) -> None:
    model = random_model(FAMILIES[family])
    blocks = [(name, model.get_submodule(name)) for name in find_blocks(model)]
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn keeps compressed .*--kv-cache$"):
        check_key_values(blocks)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention layer"):
        check_key_values([("layers.0", nn.Linear(2, 2))])


def test_the_name_in_a_checkpoint_is_that_of_the_layers_inside() -> None:
    attention = nn.Module()
    attention.add_module("q_proj", nn.Linear(2, 2))
    name = "model.layers.0.self_attn"
    assert stored_stem(attention, name, lambda n: f"language_{n}") == f"language_{name}"
    assert stored_stem(attention, name, lambda n: "elsewhere") == name
