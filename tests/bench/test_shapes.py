"""The linear layers of a decoder block, by name of the model or from its configuration."""

import json
from pathlib import Path

import pytest

from ptq.bench import shapes


def test_shapes_are_those_of_the_models() -> None:
    """The layers that users serve."""
    assert shapes.block_layers("llama-3.1-8b") == (
        ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336),
    )  # fmt: skip
    assert shapes.block_layers("llama-3.1-70b") == (
        ("qkv", 10240, 8192), ("o", 8192, 8192), ("gate_up", 57344, 8192), ("down", 8192, 28672),
    )  # fmt: skip
    assert shapes.block_layers("qwen3-32b")[1] == ("o", 5120, 8192)


SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


LAYERS = (("qkv", 128, 64), ("o", 64, 64), ("gate_up", 256, 64), ("down", 64, 128))


EXPERT_LAYERS = (*LAYERS[:2], ("expert gate_up", 64, 64), ("expert down", 64, 32))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (SIZES, LAYERS),
        ({**SIZES, "num_key_value_heads": None}, (("qkv", 192, 64), *LAYERS[1:])),
        ({**SIZES, "head_dim": 32}, (("qkv", 256, 64), ("o", 64, 128), *LAYERS[2:])),
        ({"hidden_size": 7, "text_config": SIZES}, LAYERS),
        ({"thinker_config": {"text_config": SIZES}}, LAYERS),
        ({**SIZES, "num_experts": 4, "moe_intermediate_size": 32}, EXPERT_LAYERS),
        ({**SIZES, "num_local_experts": 4, "intermediate_size": 32}, EXPERT_LAYERS),
    ],
    ids=[
        "plain",
        "no grouped keys",
        "head size",
        "text_config",
        "thinker_config",
        "experts",
        "Mixtral",
    ],
)
def test_shapes_of_a_config(
    tmp_path: Path, config: dict[str, object], layers: tuple[shapes.Layer, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shapes.block_layers(str(tmp_path)) == layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "hidden_size is None"),
        ("{", "not JSON"),
        ("[]", "it should be an object"),
        (json.dumps({**SIZES, "intermediate_size": "wide"}), "intermediate_size is 'wide'"),
        (json.dumps({**SIZES, "kv_lora_rank": 512}), "compresses keys and values"),
    ],
)
def test_a_config_without_such_shapes_is_an_error(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        shapes.block_layers(str(tmp_path))
