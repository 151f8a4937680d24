"""Predictions from a configuration alone: sizes against the published ones and against what a run
really writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from ptq.pipeline.forecast import forecast
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
QWEN3_30B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("config", "architecture", "billions", "layers"),
    [
        (LLAMA_8B, "LlamaForCausalLM", 8.03, 224),
        (QWEN3_30B, "Qwen3MoeForCausalLM", 30.53, 48 * (4 + 3 * 128)),
    ],
)
def test_published_models_from_their_configuration(
    tmp_path: Path, config: PretrainedConfig, architecture: str, billions: float, layers: int
) -> None:
    config.architectures, config.dtype = [architecture], torch.bfloat16
    config.save_pretrained(tmp_path)
    expected = forecast(tmp_path, Recipe.default("nvfp4"))
    assert round(expected.parameters / 1e9, 2) == billions
    assert expected.layers == layers
    assert expected.source_bytes == 2 * expected.parameters
    kept = expected.parameters - expected.quantized
    assert expected.output_bytes == pytest.approx(2 * kept + expected.quantized * 4.5 / 8, rel=1e-3)
    assert expected.peak_bytes < expected.source_bytes + 10e9
    parts = (
        expected.program,
        expected.activations,
        expected.block,
        expected.hessians,
        expected.solver,
    )
    assert sum(parts) == expected.peak_bytes


def test_activations_on_disk_need_less_memory(tiny_llama: Path) -> None:
    recipe = Recipe.default("nvfp4")
    ram, disk = (forecast(tiny_llama, recipe, activations=where) for where in ("ram", "disk"))
    assert disk.activations < ram.activations and disk.peak_bytes < ram.peak_bytes


@pytest.mark.parametrize(
    ("kind", "fmt"), [("llama", "nvfp4"), ("llama_tied", "mxfp4"), ("qwen2", "mxfp8")]
)
def test_the_size_is_what_a_run_writes(
    make_tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, kind: str, fmt: str
) -> None:
    model = make_tiny_model(kind)
    recipe = Recipe.default(fmt, algorithm="rtn", calibration=str(tiny_text), samples=2, seq_len=16)
    expected = forecast(model, recipe)
    quantize_model(model, tmp_path / "out", recipe=recipe, device="cpu")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert written - header == pytest.approx(expected.output_bytes, rel=1e-3)


def test_what_the_run_would_refuse_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="does not divide 64"):
        forecast(tiny_llama, Recipe.default("nvfp4", rotation=128))
