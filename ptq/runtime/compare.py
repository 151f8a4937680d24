"""A model beside its original on a text: both loaded, the text cut into windows, the figures.

What ``ptq eval`` and :func:`ptq.evaluate` do; the figures are those of
:mod:`ptq.runtime.evaluate`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ptq.runtime.evaluate import Evaluation, evaluate
from ptq.runtime.loaded_model import Loaded, load_model, tokenize

Model = str | Path | nn.Module


def compare(
    model: Model,
    reference: Model | None = None,
    *,
    text: str = "builtin",
    field: str | None = None,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    bits: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of ``model`` on ``text``, and how far it is from ``reference`` if there is one.

    Args:
        model, reference: a directory, a hub id or ``demo``, which is loaded; or a model in memory,
            which stays as it is.
        text: a .txt, .jsonl or .parquet file, or ``builtin``; ``field`` its column.
        seq_len: tokens in a window; None is 2048, or the model's positions.
        max_tokens: of the text, at most; None is all.
        bits: of the weights of ``model``, a checkpoint with nested codes; see
            :func:`ptq.runtime.load.load`.
        tokenizer: of a model in memory.
        device, dtype: of what is loaded; see :func:`ptq.runtime.loaded_model.load_model`.
        on_window: told (windows done, windows in all) after each window.

    Raises:
        FileNotFoundError, ValueError: no such model or text, two vocabularies, a text too short,
            a model in memory without a tokenizer.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def opened(given: Model, bits: int | None = None) -> Loaded:
        if not isinstance(given, nn.Module):
            return load_model(given, device=place, dtype=dtype, bits=bits)
        if bits is not None:
            raise ValueError("bits are chosen where a checkpoint is loaded: give its directory")
        if tokenizer is None:
            raise ValueError("a model in memory needs its tokenizer: give tokenizer=…")
        return Loaded(type(given).__name__, given.eval(), tokenizer)

    subject = opened(model, bits)
    against = None if reference is None else opened(reference)
    result = evaluate(
        subject.module,
        tokenize(subject, text, against, field),
        reference=None if against is None else against.module,
        seq_len=subject.window(seq_len),
        max_tokens=max_tokens,
        on_window=on_window,
    )
    names = {"model": subject.name, "reference": against and against.name, "text": text}
    return replace(result, **names)
