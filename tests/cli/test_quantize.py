"""``ptq quantize`` as a person sees it: what is said before and after a run."""

from pathlib import Path

import pytest

from ptq.cli import quantize as module


@pytest.fixture
def quantize(ptq, tiny_llama: Path, tmp_path: Path):
    """A run on little text."""

    def run(*args: object):
        little = ["--samples", 8, "--seq-len", 64]
        return ptq("quantize", tiny_llama, "-f", "nvfp4", "-o", tmp_path / "q", *little, *args)

    return run


def test_before_during_and_after(quantize, tmp_path: Path):
    done = quantize("--quality", "fast", "--scheme", "w4a4")
    assert done.code == 0
    before = " ".join(done.err.split())
    assert "recipe nvfp4 w4a4, 14 layers in 2 blocks: round to nearest, scales by mse" in before
    assert "text 8 × 64 = 512 tokens of builtin (--quality fast)" in before
    # this model is in float32, which other engines do not compute
    assert "opens in ptq, and transformers after `import ptq`; no other engine" in before
    assert "inputs scaled by four_six" in before and "needs about" in before
    assert "quantizing 2/2 model.layers.1" in before
    after = " ".join(done.out.split())
    assert f"written {tmp_path / 'q'}: nvfp4 w4a4" in after and "worst model.layers." in after
    assert "verdict" in after and "as by rounding to nearest" in after
    assert f"ptq inspect {tmp_path / 'q'}" in after
    assert "by kind of module" not in done.out


def test_a_quiet_run_says_nothing(quantize):
    done = quantize("--quality", "fast", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_dry_run_names_levers_and_text(quantize):
    told = " ".join(quantize("--dry-run", "--quality", "best").out.split())
    assert "GPTQ, scales by trial, 4 sweeps of descent, outputs weighed by gradients" in told
    assert "of 32 windows, balance 0.25 text 8 × 64 = 512" in told
    assert "memory at the peak" in told
    assert "choose from fast, default, best" in quantize("--quality", "x").error


def test_what_keeps_a_result_from_being_compared_is_no_error(
    quantize, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object) -> None:
        raise ValueError("another vocabulary")

    monkeypatch.setattr("ptq.pipeline.against_nearest.against_nearest", refuse)
    done = quantize("--quality", "fast")
    assert done.code == 0 and "not compared: another vocabulary" in done.err
    assert "verdict" not in done.out and module.__name__ == "ptq.cli.quantize"


def test_who_opens_a_mixture_is_said_before_it_is_chosen(ptq, demo_model: Path):
    def told(*options: str) -> str:
        done = ptq("quantize", demo_model, "--eight-bit", "10%", *options, "--dry-run")
        return " ".join(done.out.split())

    both = told("-f", "nvfp4")
    assert "transformers and vLLM read it (dialect compressed-tensors)" in both
    assert "SGLang: not known: whether it reads several formats in one checkpoint" in both
    for fmt, reason in (("mxint6", "no format for mxint6"), ("nvint4", "int4 inputs")):
        text = told("-f", fmt, "--scheme", "w4a4")
        assert "no other engine (dialect ptq: not compressed-tensors:" in text and reason in text
