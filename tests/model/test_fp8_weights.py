"""FP8 in blocks is a source like any other: the same checkpoint as from its 16-bit conversion."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.fp8_weights import SCALES, Fp8Shards, dequantize
from ptq.pipeline.forecast import forecast
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model

Make = Callable[..., Path]
BLOCK = (48, 32)


def quantized(path: Path, to: Path, block: tuple[int, int] | None = BLOCK) -> tuple[Path, Path]:
    """A model in FP8 as DeepSeek writes it, and what its conversion to bfloat16 gives."""
    fp8, wide = to / "fp8", to / "bf16"
    for folder in (fp8, wide):
        shutil.copytree(path, folder)
    narrow, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        plain[name] = narrow[name] = tensor.bfloat16()
        if tensor.ndim == 2 and "layers" in name and "gate.weight" not in name:
            grid = (
                (1, 1)
                if block is None
                else tuple(-(-n // side) for n, side in zip(tensor.shape, block, strict=True))
            )
            scales = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) + 0.5
            sides = tensor.shape if block is None else block
            full = scales.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
            full = full[: tensor.shape[0], : tensor.shape[1]]
            codes = (tensor.float() / full).to(torch.float8_e4m3fn)
            narrow[name] = codes
            narrow[f"{name}{SCALES}"] = scales if block is not None else scales.reshape(())
            plain[name] = (codes.float() * full).bfloat16()
    save_file(narrow, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, wide / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text()) | {"dtype": "bfloat16"}
    (wide / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": block,
    }  # fmt: skip
    (fp8 / "config.json").write_text(json.dumps(config))
    return fp8, wide


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("block", [BLOCK, None])
def test_the_model_is_that_of_its_conversion(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    block: tuple[int, int] | None,
) -> None:
    models = []
    for path in quantized(tiny_checkpoint(family), tmp_path, block):
        source = CheckpointSource(path)
        source.blocks()
        model = source.skeleton()
        source.fill(model, "", "cpu")
        models.append(dict(model.named_parameters()))
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        assert value.dtype == models[1][name].dtype and torch.equal(value, models[1][name]), name


def test_transformers_reads_the_same(make_tiny_model: Make, tmp_path: Path) -> None:
    fp8, wide = quantized(make_tiny_model("llama"), tmp_path, (32, 32))
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16)(ids).logits
            for p in (fp8, wide)
        )
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_result_is_that_of_its_conversion(
    make_tiny_model: Make, tiny_text: Path, tmp_path: Path, family: str
) -> None:
    """Weights that stay (the ignored ones here) are written in 16 bits."""
    recipe = Recipe(
        format="mxfp4", samples=2, seq_len=16, calibration=str(tiny_text), ignore=("q_proj",),
        rotation=32,
    )  # fmt: skip
    results = []
    for path in quantized(make_tiny_model(family), tmp_path):
        out = tmp_path / f"{path.name}-q"
        assert forecast(path, recipe).output_bytes > 0
        quantize_model(path, out, recipe=recipe, device="cpu")
        results.append(load_file(out / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert not any(name.endswith(SCALES) for name in results[0])
    for name, value in results[0].items():
        assert torch.equal(value.view(torch.uint8), results[1][name].view(torch.uint8)), name


def test_values_are_the_product_rounded_once() -> None:
    torch.manual_seed(0)
    value = torch.randn(3, 70, 50).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, 2) + 0.1
    full = scales.double().repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :70, :50]
    wanted = (value.double() * full).float()
    assert torch.equal(dequantize(value, scales, (32, 32), torch.float32), wanted)


def broken(path: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: object) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(whole))


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(NAME + SCALES), {}, f"{NAME} is in FP8 and has no"),
        (lambda t: t.update({NAME + SCALES: torch.ones(1, 7)}), {}, r"has shape \(1, 7\), and"),
        (lambda t: t[NAME + SCALES].fill_(0), {}, "holds what is no scale"),
        (lambda t: t[NAME + SCALES].fill_(float("nan")), {}, "holds what is no scale"),
        (lambda _: None, {"weight_block_size": [128]}, "weight_block_size"),
        (lambda _: None, {"weight_block_size": [0, 1]}, "weight_block_size"),
        (lambda _: None, {"weight_block_size": "x"}, "weight_block_size is 'x'"),
        (lambda _: None, {"weight_block_size": None}, r"has \(\) blocks of all of it"),
    ],
)
def test_scales_that_are_none_are_said(
    make_tiny_model: Make, tmp_path: Path, change: Callable, config: dict, message: str
) -> None:
    path, _ = quantized(make_tiny_model("llama"), tmp_path)
    broken(path, change, **config)
    with pytest.raises(ValueError, match=message) as caught:
        source = CheckpointSource(path)
        source.fill(source.skeleton(), "", "cpu")
    assert "\n" not in str(caught.value)


def test_scales_have_no_names(make_tiny_model: Make, tmp_path: Path) -> None:
    path, wide = quantized(make_tiny_model("llama"), tmp_path)
    shards = Fp8Shards(path, BLOCK)
    assert set(shards.names()) == set(load_file(wide / "model.safetensors"))
    assert shards.dtype(NAME) == shards.tensor(NAME).dtype == torch.bfloat16
