"""Engines are compared with ptq.load: right, right with 16-bit inputs, wrong, refused."""

from pathlib import Path

import pytest
import torch

from ptq.checkpoint.reader import Checkpoint
from ptq.runtime import engine_check
from ptq.runtime.engine_check import (
    ENGINES,
    TOKENS,
    check_engines,
    judge,
    run_probe,
    token_ids,
)

G = torch.Generator().manual_seed(0)
EXACT = torch.randn(8, 50, generator=G)
ROUNDED = EXACT + 1e-3 * torch.randn(8, 50, generator=G)


def test_what_is_as_near_as_bfloat16_works() -> None:
    said = judge(EXACT + 1.5e-3 * torch.randn(8, 50, generator=G), EXACT, ROUNDED)
    assert said["outcome"] == "works" and not said["same_bits"]
    assert 0 < said["kl"] < 10 * said["yardstick"]  # pyright: ignore
    assert judge(ROUNDED, EXACT, ROUNDED)["same_bits"] is True


def test_a_constant_of_each_row_and_padding_do_not_count() -> None:
    shifted = EXACT + torch.arange(8.0).unsqueeze(1)
    assert judge(shifted, EXACT, ROUNDED)["outcome"] == "works"
    padded = torch.cat([EXACT, torch.full((8, 14), -torch.inf)], 1)
    assert judge(padded, EXACT, ROUNDED)["outcome"] == "works"
    assert judge(EXACT[:-1], EXACT, ROUNDED)["outcome"] == "works"  # nothing of the last token


@pytest.mark.parametrize(
    "logits",
    [
        EXACT.flip(0),
        EXACT + 0.1 * torch.randn(8, 50, generator=G),
        torch.zeros_like(EXACT),
        EXACT[:, :40],
        EXACT.index_fill(0, torch.tensor([3]), torch.nan),
    ],
)
def test_anything_else_is_wrong(logits: torch.Tensor) -> None:
    assert judge(logits, EXACT, ROUNDED)["outcome"] == "wrong"


def test_inputs_that_stay_in_16_bits_are_told_apart() -> None:
    rounded = EXACT + 0.1 * torch.randn(8, 50, generator=G)
    full = EXACT + 0.1 * torch.randn(8, 50, generator=G)
    said = judge(full + 1e-3, EXACT, rounded, full)
    assert said["outcome"] == "works, inputs in 16 bits"
    assert judge(rounded, EXACT, rounded, full)["outcome"] == "works"
    assert judge(-full, EXACT, rounded, full)["outcome"] == "wrong"


def test_one_token_that_is_far_off_makes_nothing_wrong() -> None:
    """A router that chooses another expert."""
    logits = ROUNDED.clone()
    logits[3] = -logits[3]
    said = judge(logits, EXACT, ROUNDED)
    assert said["outcome"] == "works" and said["kl"] > 0.1


def test_what_noise_hides_is_not_said_to_work() -> None:
    rounded = EXACT + torch.randn(8, 50, generator=G)
    other = EXACT + torch.randn(8, 50, generator=G)
    assert judge(other, EXACT, rounded)["outcome"] == "too noisy to tell"
    assert judge(rounded, EXACT, rounded)["outcome"] == "works"  # the same bits


@pytest.fixture
def checkpoint(make_run, tmp_path: Path) -> Path:
    make_run("llama", "nvfp4")(tmp_path / "out", dialect="compressed-tensors")
    return tmp_path / "out"


def test_each_engine_is_asked_and_says_what_it_finds(checkpoint: Path, monkeypatch) -> None:
    ids = token_ids(Checkpoint(checkpoint))
    assert len(ids) == TOKENS
    logits = torch.randn(len(ids), 256, generator=G)
    answers = {
        "reference": logits,
        "reference_16": logits + 1e-3,
        "plain": logits + 2e-3,
        "plugin": "ValueError: no",
        "lm_eval": logits.flip(0),
    }

    def answered(probe: str, path: Path, ids: list[int]) -> dict:
        said = answers[probe]
        return {"version": probe, "error" if isinstance(said, str) else "logits": said}

    monkeypatch.setattr(engine_check, "run_probe", answered)
    monkeypatch.setattr(engine_check, "find_spec", lambda name: None if name == "vllm" else name)
    told: list[str] = []
    found = {r.engine: r for r in check_engines(checkpoint, on_engine=told.append)}
    assert [r.outcome for r in found.values()] == [
        "works",
        "refused",
        "wrong",
        *["not installed"] * 2,
    ]
    assert list(found) == [engine.name for engine in ENGINES]
    assert found["transformers after import ptq"].reason == "ValueError: no"
    assert found["transformers"].version == "plain"
    assert told == ["ptq, for comparison", *[engine.name for engine in ENGINES[:3]]]
    answers["reference"] = "OSError: gone"
    with pytest.raises(ValueError, match=r"ptq\.load does not open .*out: OSError: gone"):
        check_engines(checkpoint, [])


def test_a_process_of_its_own_answers_or_says_why_not(checkpoint: Path, tmp_path: Path) -> None:
    ids = token_ids(Checkpoint(checkpoint))
    answer = run_probe("plain", checkpoint, ids)
    assert answer["logits"].shape == (TOKENS, 256) and "transformers 5" in answer["version"]
    answer = run_probe("plain", tmp_path / "nothing", ids)
    assert "Error" in answer["error"] and "\n" not in answer["error"]
    assert run_probe("plain", checkpoint, ids, seconds=0.01) == {"error": "no answer after 0 s"}


def test_every_engine_has_a_probe() -> None:
    from ptq.runtime.engine_probe import PROBES

    assert {engine.probe for engine in ENGINES} < PROBES.keys()
