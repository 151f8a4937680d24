"""Experts in MXFP4 as gpt-oss has them: the model that transformers makes of the same files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from ptq.checkpoint.convert import convert
from ptq.checkpoint.dialect_mxfp4 import parse_mxfp4
from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load
from ptq.runtime.loaded_model import load_model
from ptq.runtime.quant_linear import QuantLinear

KEEP = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random gpt-oss in bfloat16 whose experts are random codes and scales."""
    path = tmp_path_factory.mktemp("gpt-oss")
    generator = torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, features, rows = tensors.pop(name).shape
        shape = (experts, rows, features // 32)
        bits = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": bits, f"{name}_scales": scales}
        tensors[f"{name}_bias"] = torch.randn(experts, rows, generator=generator).bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": KEEP}
    (path / "config.json").write_text(json.dumps(said))
    return path


def reference(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits in float32 of the weights that transformers dequantizes, exactly, to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float().eval()
    with torch.no_grad():
        return model(ids).logits


def test_it_is_what_transformers_makes_of_it(gpt_oss: Path, token_ids: torch.Tensor) -> None:
    expected = reference(gpt_oss, token_ids)
    model = load(gpt_oss, dtype=torch.float32)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == 2 * 4 * 3 and all(layer.bias is not None for layer in packed)
    with torch.no_grad():
        logits = model(token_ids).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(logits[:, :1], logits[:, 1:2])


def test_it_is_described_evaluated_and_converted(
    gpt_oss: Path, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    report = inspect(gpt_oss)
    assert report.dialect == "mxfp4" and len(report.layers) == 24
    checkpoint = Checkpoint(gpt_oss)
    assert checkpoint.shape(f"{EXPERTS}.3.up_proj") == (32, 64)
    stored = load_file(gpt_oss / "model.safetensors")
    tensors = checkpoint.layer(f"{EXPERTS}.3.up_proj")
    blocks = stored[f"{EXPERTS}.gate_up_proj_blocks"][3, 1::2]
    assert torch.equal(tensors["weight_packed"], blocks.flatten(1))
    assert checkpoint.parsed.ignores("model.layers.0.self_attn.q_proj")
    assert not checkpoint.parsed.ignores(f"{EXPERTS}.3.up_proj")
    assert convert(gpt_oss, tmp_path / "out", "auto").dialect == "ptq"
    with torch.no_grad():
        one, other = (load(x)(token_ids).logits for x in (gpt_oss, tmp_path / "out"))
    assert torch.equal(one, other)
    for dialect in ("compressed-tensors", "modelopt"):
        for source in (gpt_oss, tmp_path / "out"):
            with pytest.raises(ValueError, match=r"experts are stored in one tensor.*dialect ptq"):
                convert(source, tmp_path / "refused", dialect)
            assert not (tmp_path / "refused").exists()


def test_what_loads_models_to_evaluate_takes_it(gpt_oss: Path, monkeypatch) -> None:
    monkeypatch.setattr("ptq.runtime.loaded_model.load_tokenizer", lambda path: None)
    model = load_model(gpt_oss, device=torch.device("cpu")).module
    assert any(isinstance(m, QuantLinear) for m in model.modules())


def _short(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][..., :8].contiguous()


def _flat(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten(1)


def _odd(tensors: dict[str, torch.Tensor], name: str) -> None:
    for leaf in ("blocks", "scales", "bias"):
        key = f"{name.removesuffix('_blocks')}_{leaf}"
        tensors[key] = tensors[key][:, :-1].contiguous()


def _no_scales(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name.replace("_blocks", "_scales")]


def _no_blocks(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace("_blocks", "_scales")][2, 5] = 255


def _fewer(tensors: dict[str, torch.Tensor], name: str) -> None:
    for leaf in ("blocks", "scales", "bias"):
        key = f"{name.removesuffix('_blocks')}_{leaf}"
        tensors[key] = tensors[key][:3].contiguous()


def _floats(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_short, r"gate_up_proj_blocks has shape \(4, 64, 2, 8\), which experts"),
        (_flat, r"gate_up_proj_blocks has shape \(4, 2048\)"),
        (_odd, r"gate_up_proj_\w+ has shape \(4, 63"),
        (_no_scales, r"experts\.0\.gate_proj\.weight_scale is missing"),
        (_no_blocks, r"no tensor for parameter .*experts\.0\.gate_proj\.weight"),
        (_nan, r"experts\.2\.up_proj\.weight_scale holds NaN"),
        (_fewer, r"gate_up_proj has 3 experts, and the model .*experts\.3\.gate_proj"),
        (_floats, r"gate_up_proj_blocks is BF16 and should be U8"),
    ],
)
def test_damaged_experts_are_refused_in_one_line(
    gpt_oss: Path, tmp_path: Path, damage, said
) -> None:
    for file in gpt_oss.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(gpt_oss / "model.safetensors")
    damage(tensors, f"{EXPERTS}.gate_up_proj_blocks")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_configurations_are_checked() -> None:
    assert parse_mxfp4({"quant_method": "mxfp4"}).ignore == ()
    with pytest.raises(ValueError, match="modules_to_not_convert is 3"):
        parse_mxfp4({"modules_to_not_convert": 3})
