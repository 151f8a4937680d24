"""Predictions from a configuration alone: sizes against the published ones and against what a run
really writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from ptq.calib.walk import walk
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline import forecast as forecasting
from ptq.pipeline.forecast import forecast
from ptq.pipeline.plan import Plan
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


def test_round_to_nearest_needs_no_hessians_and_reads_text_for_static_inputs_only(
    tiny_llama: Path,
) -> None:
    plain = forecast(tiny_llama, Recipe.default("nvfp4", algorithm="rtn"))
    static = forecast(tiny_llama, Recipe.default("nvfp4", scheme="w4a4", algorithm="rtn"))
    gptq = forecast(tiny_llama, Recipe.default("nvfp4"))
    assert plain.hessians == static.hessians == 0 < gptq.hessians
    assert plain.activations < static.activations < gptq.activations
    # the rate is measured anew every time, so only what is far apart can be compared
    assert sum(plain.block_seconds) < 0.1 * sum(gptq.block_seconds)
    assert gptq.seconds is not None and gptq.seconds > sum(gptq.block_seconds)


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


def test_experts_come_in_rounds_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the process holds by itself differs between two forecasts
    monkeypatch.setattr(forecasting, "held_bytes", lambda: 1 << 30)
    config = Qwen3MoeConfig(**QWEN3_30B.to_dict() | {"num_hidden_layers": 2})
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    config.save_pretrained(tmp_path)
    recipe = Recipe.default("nvfp4", samples=128, seq_len=2048)
    # of 128 experts: gate and up read 2048, down 768; on the CPU float64 and float32 samples
    expert = sum(2 * 8 * n * n + 2048 * 4 * n for n in (2048, 768))
    whole = forecast(tmp_path, recipe, hessian_memory=1e12)
    assert whole.rounds == 1 and whole.hessians == whole.hessians_at_once > 128 * expert
    some = forecast(tmp_path, recipe, hessian_memory=10.5 * expert)
    assert some.rounds == 13 and some.hessians_at_once == whole.hessians
    assert whole.hessians - some.hessians == (128 - 10) * expert
    inputs = 128 * 2048 * 2048 * 4
    assert some.activations - whole.activations == inputs
    assert whole.peak_bytes - some.peak_bytes == (128 - 10) * expert - inputs
    assert some.seconds is not None and whole.seconds is not None
    disk = [
        forecast(tmp_path, recipe, hessian_memory=m, activations="disk").activations
        for m in (1e12, 1.0)
    ]
    assert disk[0] == disk[1]


@pytest.mark.parametrize("memory", [1.0, 4e6, 1e12])
def test_rounds_are_those_of_the_run(make_tiny_model: Callable[..., Path], memory: float) -> None:
    model, recipe = make_tiny_model("qwen3_moe"), Recipe.default("nvfp4", seq_len=8)
    expected = forecast(model, recipe, hessian_memory=memory)
    source = CheckpointSource(model, dtype=torch.float32)
    plan, data = Plan.of(source, recipe), [torch.ones(1, 8, dtype=torch.int64)]
    block = next(walk(source, data, plan.watch(), device="cpu", limit=lambda: memory))
    assert expected.hessians_at_once == sum(group.bytes for group in block.groups)
    assert expected.rounds == (len(block.later.parts) if block.later else 1)


def test_what_the_run_would_refuse_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="does not divide 64"):
        forecast(tiny_llama, Recipe.default("nvfp4", rotation=128))
