"""Blocks and kinds by the names of layers."""

import pytest

from ptq.model.layer_names import block_label, block_of, kinds


@pytest.mark.parametrize(
    ("name", "block", "label"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "3"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11", "11"),
        ("lm_head", "lm_head", "lm_head"),
        ("model.layers.3.mlp.experts.7.up_proj", "model.layers.3", "3"),
    ],
)
def test_blocks(name: str, block: str, label: str) -> None:
    assert block_of(name) == block and block_label(block) == label


def test_kinds_are_as_short_as_tells_them_apart() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "h.0.attn.c_attn", "lm_head"]
    assert list(kinds(names).values()) == [
        "attn.c_proj", "mlp.c_proj", "mlp.c_proj", "c_attn", "lm_head",
    ]  # fmt: skip


def test_experts_are_one_kind() -> None:
    names = ["l.0.mlp.experts.0.up", "l.0.mlp.experts.1.up", "l.1.mlp.up", "l.0.mlp.shared.up"]
    assert list(kinds(names).values()) == ["experts.up", "experts.up", "mlp.up", "shared.up"]


def test_a_name_that_ends_another() -> None:
    assert kinds(["l.0.up", "l.0.mlp.up"]) == {"l.0.up": "up", "l.0.mlp.up": "mlp.up"}


def test_names_of_numbers() -> None:
    assert kinds(["0", "l.3"]) == {"0": "0", "l.3": "l"}
