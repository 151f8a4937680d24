"""The examples run, from what they are told to do to what they say."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import ptq
from ptq.runtime.load import load

Main = Callable[[list[str]], object]


@pytest.fixture
def example(root: Path, demo_model: Path, tmp_path: Path) -> Callable[..., object]:
    """``example(name, *arguments)``: what ``main`` of an example returns; it writes to
    ``tmp_path / "out"``."""

    def run(name: str, *arguments: object) -> object:
        spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([*map(str, arguments), "--out", str(tmp_path / "out")])

    return run


def test_every_example_is_run(root: Path):
    names = {path.stem for path in (root / "examples").glob("*.py")}
    here = Path(__file__).read_text("utf-8")
    assert {name for name in names if f'example("{name}"' not in here} == set()


def test_quantize_and_evaluate(example, tmp_path: Path, capfd):
    found = example("quantize_and_evaluate", "--quality", "fast", "--max-tokens", 512)
    assert 0 < found.kl < 0.1 and found.tokens == 510
    out = capfd.readouterr().out
    for words in ("memory at the peak", "by kind of module", "KL top 25", "def area(width, height"):
        assert words in out
    assert ptq.verify(tmp_path / "out").ok


def test_mixed_precision(example, tmp_path: Path):
    few = ("--quality", "fast", "--samples", 4, "--seq-len", 64, "--max-tokens", 512)
    found = example("mixed_precision", *few)
    assert found["budget"].kl < found["four bits"].kl
    made = ptq.inspect(tmp_path / "out" / "budget")
    assert set(made.formats) == {"mxfp4", "mxfp8"} and made.bits_per_weight <= 4.75
    rule = {row.layer: row.format for row in ptq.inspect(tmp_path / "out" / "rule").layers}
    assert all(("down" in name) == (fmt == "mxfp8") for name, fmt in rule.items())


def test_custom_architecture(example, capfd):
    found = example("custom_architecture", "--steps", 20)
    assert 0 < found.kl < 0.05 and math.isfinite(found.perplexity)
    assert "QuantLinear" in capfd.readouterr().out


def test_lora(example, tmp_path: Path):
    before, after = example("lora", "--steps", 8, "--seq-len", 128, "--max-tokens", 1024)
    assert after < 0.95 * before
    assert ptq.verify(tmp_path / "out" / "base").ok
    assert load(tmp_path / "out" / "base") is not None
    assert (tmp_path / "out" / "adapters.safetensors").stat().st_size > 0
