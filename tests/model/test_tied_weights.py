"""Tied matrices: whichever is stored counts, and two that differ stay two."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptq.model.blueprint import Blueprint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.load import load
from ptq.text.windows import load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(3, 19)[None]
Make = Callable[..., Path]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def filled(path: Path) -> torch.nn.Module:
    source = CheckpointSource(path)
    source.check()
    model = source.skeleton()
    source.fill(model, "", "cpu")
    model.tie_weights()  # pyright: ignore[reportCallIssue]
    return model


@pytest.fixture
def tied(make_tiny_model: Make, tmp_path: Path) -> Callable[..., Path]:
    """A tied model of which other tensors are stored: ``tied(drop, **more)``."""

    def make(*drop: str, **more: torch.Tensor) -> Path:
        path = Path(
            shutil.copytree(make_tiny_model("llama", tie_word_embeddings=True), tmp_path / "m")
        )
        tensors = load_file(path / "model.safetensors")
        assert EMBEDDING in tensors and HEAD not in tensors
        kept = {n: t for n, t in (tensors | more).items() if n not in drop}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


@pytest.fixture
def embedding(make_tiny_model: Make) -> torch.Tensor:
    path = make_tiny_model("llama", tie_word_embeddings=True)
    return load_file(path / "model.safetensors")[EMBEDDING]


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_any_member_may_be_the_stored_one(
    tied: Callable[..., Path], embedding: torch.Tensor, stored: str, caplog
) -> None:
    more = {} if stored == "embedding" else {HEAD: embedding.clone()}
    path = tied(*([EMBEDDING] if stored == "head" else []), **more)
    with caplog.at_level(logging.WARNING):
        model = filled(path)
    assert not caplog.text
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(path)))
    with pytest.raises(ValueError, match="tied"):
        CheckpointSource(path).head()


def test_two_different_matrices_stay_two(
    tied: Callable[..., Path], embedding: torch.Tensor, caplog
) -> None:
    head = embedding.flip(0).contiguous()
    path = tied(**{HEAD: head})
    with caplog.at_level(logging.WARNING):
        model = filled(path)
    assert "hold two different matrices" in caplog.text
    assert torch.equal(model.get_parameter(HEAD), head)
    assert torch.equal(model.get_parameter(EMBEDDING), embedding)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(path)))
    assert CheckpointSource(path).head()[0] == Blueprint.of(path).head()[0] == "lm_head"


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_the_result_has_two_as_well(
    tied: Callable[..., Path],
    embedding: torch.Tensor,
    tiny_text: Path,
    tmp_path: Path,
    lm_head: bool,
    memory: bool,
) -> None:
    path = tied(**{HEAD: embedding.flip(0).contiguous()})
    recipe = Recipe(
        format="mxfp8", algorithm="rtn", lm_head=lm_head, samples=2, seq_len=16, rotation=1,
        calibration=str(tiny_text),
    )  # fmt: skip
    if memory:
        model = AutoModelForCausalLM.from_pretrained(path)
        quantize_model(model, tmp_path / "q", recipe=recipe, tokenizer=load_tokenizer(path))
    else:
        quantize_model(path, tmp_path / "q", recipe=recipe, device="cpu")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    before, after = logits(AutoModelForCausalLM.from_pretrained(path)), logits(load(tmp_path / "q"))
    assert (after - before).norm() < 0.1 * before.norm()


def test_one_that_is_missing_altogether_is_named(tied: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="no tensor for parameter"):
        filled(tied(EMBEDDING))
