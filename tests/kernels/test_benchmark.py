"""Shapes, rooflines and records of the layer benchmark; timing itself on tiny shapes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptq import benchmark
from ptq.benchmark import GPUS, Measurement


def test_shapes_are_those_of_the_models() -> None:
    """The list of kernels.md §14."""
    assert benchmark.shapes("llama-3.1-8b") == [
        ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336),
    ]  # fmt: skip
    assert benchmark.shapes("llama-3.1-70b") == [
        ("qkv", 10240, 8192), ("o", 8192, 8192), ("gate_up", 57344, 8192), ("down", 8192, 28672),
    ]  # fmt: skip
    assert benchmark.shapes("qwen3-32b")[1] == ("o", 5120, 8192)


def test_shapes_of_a_config(tmp_path: Path) -> None:
    config = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = [("qkv", 128, 64), ("o", 64, 64), ("gate_up", 256, 64), ("down", 64, 128)]
    assert benchmark.shapes(str(tmp_path)) == expected
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="hidden_size"):
        benchmark.shapes(str(tmp_path))
    with pytest.raises(ValueError, match=r"llama-3\.1-8b"):
        benchmark.shapes("no-such-model")


# one decoder layer, microseconds: kernels.md §15
SPEC = [
    ("h200", "llama-3.1-8b", 1, 101.5, 28.6, None), ("h200", "llama-3.1-8b", 64, 103.5, 35.3, 30.2),
    ("h200", "llama-3.1-8b", 512, 283.0, 283.0, 154.0), ("b200", "llama-3.1-8b", 128, 63.1, 38.5, 18.8),
    ("b200", "llama-3.1-70b", 2048, 2417.0, 2417.0, 754.0), ("rtx5090", "llama-3.1-8b", 16, 274.0, 78.1, 77.7),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "model", "tokens", "bf16", "w4a16", "w4a4"), SPEC)
def test_rooflines_are_those_of_the_specification(gpu, model, tokens, bf16, w4a16, w4a4) -> None:
    found = benchmark.layer_sums(list(benchmark.predict(model, [tokens], ["nvfp4"], GPUS[gpu])))
    seconds = {m.backend: m.median_s * 1e6 for m in found}
    assert seconds["bf16"] == pytest.approx(bf16, rel=0.015)
    assert seconds["w4a16"] == pytest.approx(w4a16, rel=0.015)
    assert w4a4 is None or seconds["w4a4"] == pytest.approx(w4a4, rel=0.015)
    assert seconds["rotate+w4a16"] > seconds["w4a16"] and all(m.predicted for m in found)


def test_a_record_survives_its_file_and_the_table_says_what_is_predicted(tmp_path: Path) -> None:
    found = list(benchmark.predict("llama-3.1-8b", [1, 64], ["nvfp4", "nvint4"], GPUS["h200"]))
    benchmark.append(tmp_path / "runs.jsonl", found[:3])
    benchmark.append(tmp_path / "runs.jsonl", found[3:])
    assert benchmark.read(tmp_path / "runs.jsonl") == found
    text = benchmark.table(found, GPUS["h200"])
    assert text.startswith("**Predicted** from a roofline; nothing was measured.") and "| 3.55 |" in text
    assert not any(m.backend.endswith("w4a4") for m in found if m.format == "nvint4"), "int4 has no tensor-core format"


def test_the_reference_path_is_timed_on_a_cpu(tmp_path: Path) -> None:
    found = list(benchmark.run("tiny", [1, 3], ["nvfp4", "mxfp4"], "cpu", layers=[("small", 64, 128)], repeats=3))
    assert [(m.shape[0], m.backend, m.format) for m in found] == [
        (1, "bf16", ""), (1, "reference", "nvfp4"), (1, "reference", "mxfp4"),
        (3, "bf16", ""), (3, "reference", "nvfp4"), (3, "reference", "mxfp4"),
    ]  # fmt: skip
    for m in found:
        assert isinstance(m, Measurement) and 0 < m.p20_s <= m.median_s <= m.p80_s and not m.predicted
        assert m.tflops == pytest.approx(m.flops / m.median_s / 1e12)
    benchmark.plot(found, tmp_path / "speed.png") if benchmark.importlib.util.find_spec("matplotlib") else None
    with pytest.raises(ValueError, match="no backend marlin"):
        next(benchmark.run("tiny", [1], ["nvfp4"], "cpu", only=["marlin"], layers=[("small", 64, 128)]))


@pytest.mark.slow
def test_the_script_predicts_without_a_gpu(root: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(root / "scripts" / "bench_layers.py"), "--predict", "h200", "--tokens", "1", "--sum"]
    out = tmp_path / "runs.jsonl"
    run = subprocess.run(
        [*script, "--out", str(out)], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    assert (
        "Predicted" in run.stdout and "| 28.6 |" in run.stdout and len(benchmark.read(out)) == 4 * (1 + 3 * 2 + 2 * 2)
    )
