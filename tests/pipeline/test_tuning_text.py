"""The windows that tuning trains on, and those that it is judged by."""

from pathlib import Path

import pytest
import torch

from ptq.model.blueprint import Blueprint
from ptq.pipeline import tuning_text
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.tuning_text import TuningText, batches_a_step, load_tuning_text
from ptq.text.windows import load_tokenizer


def load(model: Path, text: Path, **given: object) -> TuningText:
    choices = {"samples": 4, "seq_len": 32, "batch_size": 2, "tune": 5, "calibration": str(text)}
    plan = Plan.of(Blueprint.of(model), Recipe.default("nvfp4", **choices | given))
    return load_tuning_text(plan, load_tokenizer(model))


def rows(batches: object) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in batches for row in batch}  # pyright: ignore[reportGeneralTypeIssues]


def test_a_step_reads_at_least_2048_tokens() -> None:
    assert batches_a_step(4, 512) == 1 and batches_a_step(4, 2048) == 1
    assert batches_a_step(4, 511) == 2 and batches_a_step(1, 512) == 4


def test_every_step_reads_text_of_its_own(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_text, "STEP_TOKENS", 100)
    monkeypatch.setattr(tuning_text, "HELD_TOKENS", 256)
    text = load(tiny_llama, tiny_text)
    assert text.held_tokens == 256 and text.tokens == 5 * 2 * 64
    assert sorted(i for step in text.order for i in step) == list(range(10))
    assert all(len(step) == 2 for step in text.order)
    assert not rows(text.held) & rows(text.train)
    assert text.description["overlapping"] is False
    again = load(tiny_llama, tiny_text)
    assert all(torch.equal(a, b) for a, b in zip(text.train, again.train, strict=True))
    assert text.order == again.order != load(tiny_llama, tiny_text, seed=1).order


def test_a_short_text_is_read_again_and_nothing_is_judged_by_what_was_trained_on(
    tiny_llama: Path, tiny_text: Path
) -> None:
    text = load(tiny_llama, tiny_text)  # 5 x 2048 tokens and 8192 more, of about 7000
    assert 4000 < text.tokens + text.held_tokens < 8000
    assert text.held_tokens == pytest.approx((text.tokens + text.held_tokens) / 8, abs=32)
    assert not rows(text.held) & rows(text.train) and text.description["overlapping"] is False
    stream = [i for step in text.order for i in step]
    assert len(stream) == 5 * 32
    first = stream[: len(text.train)]
    assert sorted(first) == list(range(len(text.train)))  # each once before any comes twice


def test_a_text_without_room_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the walk of a block " * 3, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"--tune: .*short\.txt has room for 1 windows .*more text"
    ):
        load(tiny_llama, path)
