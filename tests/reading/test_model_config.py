"""Keys that ptq reads have their types, and numbers that loops run over may be believed."""

import json
from pathlib import Path

import pytest

from ptq.reading.model_config import Stored, check_routing, check_sizes, read_model_config

STORED = Stored(tensors=100, largest=4096, bytes=10**6)


def test_all_keys_are_kept(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["X"], "own": [1, {"a": None}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is "),
        ("", "is not JSON"),
        ('{"architectures": "X"}', "architectures is 'X', it should be a valid"),
        ('{"model_type": 3}', "model_type is 3"),
        ('{"quantization_config": []}', "quantization_config is "),
        ('{"quantization_config": {"quant_method": 1}}', "quant_method is 1"),
        ('{"text_config": "x"}', "text_config is 'x'"),
    ],
)
def test_what_ptq_reads_has_its_type(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_model_config(tmp_path)
    assert "copy it again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 100, "num_experts": 4096, "vocab_size": 10**9, "flag": True},
        {"text_config": {"num_hidden_layers": 32}},
    ],
)
def test_sizes_that_may_be(config: dict) -> None:
    check_sizes(config, STORED, Path("config.json"))


@pytest.mark.parametrize(
    ("config", "stored", "message"),
    [
        ({"num_hidden_layers": 101}, STORED, "num_hidden_layers is 101, and the weight files hold"),
        ({"text_config": {"n_layers": 10**9}}, STORED, r"text_config\.n_layers is 10+"),
        ({"num_local_experts": 5000}, STORED, "num_local_experts is 5000, more than the 4096"),
        ({"num_hidden_layers": 1001}, None, "more than the 1000 that there can be"),
        ({"num_labels": 10**7}, STORED, "num_labels is "),
        ({"vocab_size": 10**20}, STORED, "vocab_size is "),
    ],
)
def test_sizes_that_cannot_be(config: dict, stored: Stored | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(config, stored, Path("config.json"))


@pytest.mark.parametrize("chosen", [1, 8])
def test_experts_for_a_token_that_may_be(chosen: int) -> None:
    check_routing({"num_experts": 8, "num_experts_per_tok": chosen}, Path("config.json"))
    check_routing({"num_experts": 0, "num_experts_per_tok": chosen}, Path("config.json"))


@pytest.mark.parametrize("chosen", [-2, 0, 9])
def test_experts_for_a_token_that_cannot_be(chosen: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok is {chosen} .* has 8 experts"):
        check_routing({"num_experts": 8, "num_experts_per_tok": chosen}, Path("config.json"))
