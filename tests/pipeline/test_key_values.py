"""A run with scales for keys and values: the same model from disk, by every reader, also after an
interruption."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ptq.hf  # noqa: F401
from ptq.checkpoint.convert import convert
from ptq.checkpoint.reader import Checkpoint
from ptq.model.attention import cached_attentions
from ptq.pipeline import run as pipeline
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.load import load
from ptq.runtime.loaded_model import demo_path

TOKENS = torch.arange(5, 45)[None]


def recipe(**more: object) -> Recipe:
    given = {"algorithm": "rtn", "samples": 2, "seq_len": 64, "kv_cache": "fp8", **more}
    return Recipe.default("nvfp4", **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("key_values") / "out"
    quantize_model(demo_path(), out, recipe=recipe(), dialect="ptq")
    return out


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.float()


def test_every_reader_rounds_keys_and_values(made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["kv_cache"] == "fp8"
    ours = load(made)
    expected = logits(ours)
    for attention in cached_attentions(ours).values():
        attention._forward_pre_hooks.clear()
    assert not torch.equal(logits(ours), expected)
    theirs = AutoModelForCausalLM.from_pretrained(made)
    assert torch.equal(logits(theirs), expected)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    convert(made, tmp_path / "other", "compressed-tensors")
    assert torch.equal(logits(load(tmp_path / "other")), expected)
    config = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    decompressed = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    before = logits(decompressed)
    for attention in cached_attentions(decompressed).values():
        attention._forward_pre_hooks.clear()
    assert not torch.equal(logits(decompressed), before)


def test_missing_scales_are_an_error(made: Path, tmp_path: Path) -> None:
    quantize_model(demo_path(), tmp_path / "out", recipe=recipe(kv_cache=None), dialect="ptq")
    assert not any(n.endswith(".k_scale") for n in Checkpoint(tmp_path / "out").names())
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["kv_cache"] = "fp8"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no scales of keys and values.*copy it again"):
        load(tmp_path / "out")
    config["quantization_config"]["kv_cache"] = "fp9"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown kv_cache 'fp9'"):
        load(tmp_path / "out")


def test_an_interrupted_run_ends_in_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", pipeline.install_key_values
    done: list[str] = []

    def stops(block: pipeline.CalibratedBlock) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(block.name)
        real(block)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "install_key_values", stops)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(demo_path(), out, recipe=recipe(), dialect="ptq")
    quantize_model(demo_path(), out, recipe=recipe(), dialect="ptq")
    assert (out / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="unknown kv_cache 'int8'; choose from fp8"):
        recipe(kv_cache="int8")
