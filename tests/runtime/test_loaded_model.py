"""From names to directories, devices and dtypes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptq.runtime.loaded_model import load_model, resolve_model, tokenize


def test_demo_is_the_bundled_model(demo_model: Path):
    assert resolve_model("demo").resolve() == demo_model.resolve()


def test_a_directory_is_itself(tiny_llama: Path):
    assert resolve_model(tiny_llama) == tiny_llama == resolve_model(str(tiny_llama))


@pytest.mark.parametrize("name", ["./nothing", "a/b/c/d", "no-such-owner/no-such-model"])
def test_what_is_nowhere_is_an_error(name: str):
    with pytest.raises(FileNotFoundError, match=name):
        resolve_model(name)


def test_models_on_a_cpu_compute_in_float32(make_tiny_model: Callable[..., Path]):
    path = make_tiny_model("llama", dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    assert next(load_model(path, device=cpu).module.parameters()).dtype is torch.float32
    assert (
        next(load_model(path, device=cpu, dtype=torch.bfloat16).module.parameters()).dtype
        is torch.bfloat16
    )


def test_windows_are_as_long_as_the_model_allows(tiny_llama: Path):
    model = load_model(tiny_llama, device=torch.device("cpu"))
    assert model.window(None) == 256 and model.window(100) == 100
    with pytest.raises(ValueError, match="256 positions"):
        model.window(257)


def test_text_becomes_tokens_without_a_start(tiny_llama: Path, tmp_path: Path):
    text = tmp_path / "t.txt"
    text.write_text("the walk", encoding="utf-8")
    model = load_model(tiny_llama, device=torch.device("cpu"))
    tokens = tokenize(model, str(text))
    assert tokens.dtype == torch.long and len(tokens) == 8
    assert model.decode(tokens.tolist()) == "the walk"


def test_ends_are_those_of_the_generation_settings(make_tiny_model: Callable[..., Path]):
    cpu = torch.device("cpu")
    assert load_model(make_tiny_model("llama"), device=cpu).ends == frozenset()
    assert load_model(make_tiny_model("llama", eos_token_id=7), device=cpu).ends == {7}


def test_the_end_of_a_turn_ends_a_text(make_tiny_model: Callable[..., Path], monkeypatch):
    """Chat templates end a turn with the tokenizer's token, which settings need not name."""
    model = load_model(make_tiny_model("llama", eos_token_id=7), device=torch.device("cpu"))
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", 9, raising=False)
    assert model.ends == {7, 9}


def test_a_conversation_becomes_tokens(tiny_llama: Path, monkeypatch):
    model = load_model(tiny_llama, device=torch.device("cpu"))
    assert not model.chats
    turns = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="no chat template"):
        model.encode_chat(turns)
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert model.chats and model.decode(model.encode_chat(turns)) == "hi>"
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[7]['content'] }}")
    with pytest.raises(ValueError, match=r"the chat template of .* refuses the conversation"):
        model.encode_chat(turns)


def test_missing_weights_are_not_made_up(make_tiny_model: Callable[..., Path], tmp_path: Path):
    """transformers would fill the gap with random numbers and a warning."""
    from safetensors.torch import load_file, save_file

    for file in make_tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, device=torch.device("cpu"))
