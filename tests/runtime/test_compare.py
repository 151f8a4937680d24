"""A model beside its original: by name or in memory, the same figures."""

import pytest
import torch

from ptq.runtime.compare import compare
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import load_model, tokenize

CPU = torch.device("cpu")


def test_names_are_loaded_and_told(tiny_llama, tiny_text):
    found = compare(tiny_llama, tiny_llama, text=str(tiny_text), seq_len=64, device=CPU)
    assert (found.model, found.reference, found.text) == (
        str(tiny_llama),
        str(tiny_llama),
        str(tiny_text),
    )
    assert found.kl == 0 and found.top1_agreement == 1
    alone = compare(tiny_llama, text=str(tiny_text), seq_len=64, device=CPU)
    assert alone.kl is None and alone.nll == found.nll


def test_a_model_in_memory_is_used_as_it_is(tiny_llama, tiny_text):
    loaded = load_model(tiny_llama, device=CPU)
    with torch.no_grad():
        next(loaded.module.parameters()).mul_(1.5)
    tokens = tokenize(loaded, str(tiny_text))
    expected = evaluate(loaded.module, tokens, seq_len=64, max_tokens=640)
    options = {"text": str(tiny_text), "seq_len": 64, "max_tokens": 640}
    found = compare(loaded.module, tiny_llama, tokenizer=loaded.tokenizer, **options)
    assert found.nll == expected.nll and found.model == "LlamaForCausalLM"
    assert found.kl is not None and found.kl > 0
    with pytest.raises(ValueError, match="needs its tokenizer"):
        compare(loaded.module, **options)


def test_windows_are_reported(tiny_llama, tiny_text):
    seen: list[tuple[int, int]] = []
    compare(
        tiny_llama,
        text=str(tiny_text),
        seq_len=64,
        max_tokens=192,
        device=CPU,
        on_window=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
