"""What is said before a run: text, time, memory, and who opens the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.cli import outlook
from ptq.pipeline.forecast import Forecast, forecast
from ptq.pipeline.recipe import Recipe


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Forecast:
    recipe = Recipe.default("nvfp4", scheme="w4a4", samples=16, seq_len=64)
    found = forecast(tiny_llama, recipe, device=torch.device("cpu"))
    return replace(found, dialect="compressed-tensors", reason="transformers and vLLM read it")


def told(capsys: pytest.CaptureFixture[str], expected: Forecast) -> dict[str, str]:
    """The lines by their labels."""
    outlook.print_outlook("m → q", replace(expected, seconds=372.0, peak_bytes=2_000_000_000))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines: dict[str, str] = {}
    label = ""
    for line in captured.err.splitlines():
        label = line[:10].strip() or label
        lines[label] = f"{lines.get(label, '')} {line[10:].strip()}".strip()
    return lines


def test_what_will_be_done_to_how_much_text_in_which_time(
    capsys: pytest.CaptureFixture[str], expected: Forecast
):
    lines = told(capsys, replace(expected, machine_bytes=25_000_000_000))
    assert lines["model"].startswith("m → q: ") and "of them quantized" in lines["model"]
    assert lines["recipe"] == (
        "nvfp4 w4a4, 14 layers in 2 blocks: GPTQ, scales by trial, 4 sweeps of descent, balance 0.5"
    )
    assert lines["text"] == "16 × 64 = 1,024 tokens of builtin (--quality default)"
    assert lines["opens in"] == "transformers and vLLM read it (dialect compressed-tensors)"
    assert lines["inputs"] == "scaled by four_six"
    assert lines["needs"] == "about 6 min 12 s and 2.00 GB of the 25.00 GB on cpu"


def test_what_does_not_fit_and_what_others_do_not_open(
    capsys: pytest.CaptureFixture[str], expected: Forecast
):
    reason = "not compressed-tensors: it has no format for mxfp8; use dialect ptq"
    lines = told(
        capsys,
        replace(
            expected, dialect="ptq", reason=reason, machine_bytes=2_100_000_000, calibration=None
        ),
    )
    assert lines["opens in"] == (
        "ptq, and transformers after `import ptq`; no other engine (dialect ptq: "
        "not compressed-tensors: it has no format for mxfp8)"
    )
    assert "does NOT fit" in lines["needs"] and "--activations disk" in lines["needs"]
    assert lines["text"] == "none is read (--quality default)"


def test_memory_is_told_part_by_part(expected: Forecast):
    text = replace(expected, rounds=3, hessians_at_once=10**10).memory.text()
    assert "in 3 rounds (all at once would be 10.00 GB" in text and "activations" in text
    assert "text: 16 × 64 = 1,024 tokens" in str(expected)
