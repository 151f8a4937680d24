"""Balancing: the factors, and what they do to a model whose activations have outliers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ptq.calib.balance import LIMIT, balancing
from ptq.checkpoint.layer_report import LayerReport
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.load import load

Make = Callable[..., Path]


def identity(n: int) -> Tensor:
    return torch.arange(n)


def test_half_gives_inputs_and_weights_the_same_profile():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(64, generator=generator) * 100, torch.rand(64, generator=generator)
    a = balancing(x, w, identity(64), 0.5).double()
    ratio = (x * a**2) / (w / a**2)
    torch.testing.assert_close(ratio, ratio[:1].expand(64), rtol=1e-5, atol=0)
    assert a.log().mean().abs() < 1e-6, "the geometric mean is 1"


def test_one_makes_inputs_flat_where_weights_are_and_zero_changes_nothing():
    x = torch.tensor([1.0, 4.0, 16.0, 0.25])
    a = balancing(x, torch.ones(4), identity(4), 1.0)
    torch.testing.assert_close(x * a**2, torch.full((4,), 2.0))
    assert torch.equal(balancing(x, torch.ones(4), identity(4), 0.0), torch.ones(4))


def test_channels_of_one_row_share_a_factor():
    channel = torch.tensor([0, 1, 0, 1])
    a = balancing(
        torch.tensor([1.0, 8.0, 3.0, 8.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]), channel, 0.5
    )
    assert a.shape == (2,)
    torch.testing.assert_close(a[0] / a[1], torch.tensor(2**0.5))  # (1/2 : 1/8)^(1/4)


def test_dead_channels_and_extremes():
    x, w = torch.tensor([0.0, 1.0, 1e30, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    a = balancing(x, w, identity(4), 1.0)
    assert a[0] == 1 and a[1] == 1
    assert a[2] == 1 / LIMIT and a[3] == LIMIT


def copied(path: Path, out: Path) -> dict[str, Tensor]:
    """The weights of a model, of which everything else is copied."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return load_file(path / "model.safetensors")


def outliers(path: Path, out: Path) -> Path:
    """The same function with some channels of every norm 32 times as large, as trained models have
    them."""
    tensors = copied(path, out)
    for name in [
        n
        for n in tensors
        if n.endswith(("input_layernorm.weight", "post_attention_layernorm.weight"))
    ]:
        stem = name.rpartition(".")[0].rpartition(".")[0]
        inner = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        inner = inner if "input" in name else ("mlp.gate_proj", "mlp.up_proj")
        tensors[name][5::32] *= 32
        for layer in inner:
            tensors[f"{stem}.{layer}.weight"][:, 5::32] /= 32
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def recipe(text: Path, **given: object) -> Recipe:
    data = {"calibration": str(text), "samples": 8, "seq_len": 64, "batch_size": 4}
    return Recipe.default("nvfp4", scheme="w4a4", **data, **given)


def damage(model: Path, out: Path, tokens: Tensor) -> float:
    """Relative error of the logits."""
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        found = load(out, dtype=torch.float32, inputs="quantized")(tokens).logits
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def test_outliers_do_no_harm(make_tiny_model: Make, tiny_text: Path, tmp_path: Path):
    model = make_tiny_model("llama")
    planted = outliers(model, tmp_path / "planted")
    tokens = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    errors = {}
    for source in (model, planted):
        for strength in (0.0, 0.5):
            out = tmp_path / f"{source.name}-{strength}"
            quantize_model(source, out, recipe=recipe(tiny_text, balance=strength), device="cpu")
            errors[source == planted, strength] = damage(source, out, tokens)
    # six seeds: 2.2 … 2.6 times without balancing, 0.91 … 1.14 with it
    assert errors[True, 0.0] > 1.8 * errors[False, 0.0], "the outliers must hurt"
    assert errors[True, 0.5] < 1.25 * errors[False, 0.5], "and no more when balanced"


def uneven(path: Path, out: Path) -> Path:
    """A model whose norms and value heads have channels of very different size."""
    tensors = copied(path, out)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight") or "v_proj" in name:
            tensor[5::16] *= 32
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_a_balanced_checkpoint_is_the_model_in_memory(
    kind: str, make_tiny_model: Make, tiny_text: Path, tmp_path: Path
):
    model = uneven(make_tiny_model(kind, dtype=torch.bfloat16), tmp_path / "uneven")
    settings = recipe(tiny_text)
    assert settings.balance == 0.5
    # in memory nobody else reads the result: inputs are scaled as readers of our own dialect do
    quantize_model(model, tmp_path / "q", recipe=settings, device="cpu", dialect="ptq")
    memory = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    memory = quantize_model(
        memory, recipe=settings, device="cpu", tokenizer=AutoTokenizer.from_pretrained(model)
    )
    loaded = load(tmp_path / "q", dtype=torch.float32, inputs="quantized")
    tokens = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, memory(tokens).logits)
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "q" / "model.safetensors"),
    )
    both = {n for n in before.keys() & after.keys() if after[n].numel()}  # others are guards
    changed = {name for name in both if not torch.equal(before[name], after[name])}
    assert any("input_layernorm" in name for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in changed)
    assert ("model.layers.0.self_attn.v_proj.bias" in changed) == (kind == "qwen2")
    assert any(n.endswith("gate.weight") for n in changed) == (kind == "mixtral"), (
        "the router undoes its factors"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_computing_in_sixteen_bits_balances_too(
    kind: str, dtype: torch.dtype, make_tiny_model: Make, tiny_text: Path, tmp_path: Path
):
    model = make_tiny_model(kind, dtype=dtype)
    reports: list[LayerReport] = []
    quantize_model(
        model,
        tmp_path / "q",
        recipe=recipe(tiny_text),
        device="cpu",
        dtype=dtype,
        on_block=lambda progress: reports.extend(progress.reports),
    )
    assert reports and all(report.balance == 0.5 for report in reports)
    tokens = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    assert damage(model, tmp_path / "q", tokens) < 0.5


def test_a_resumed_run_keeps_layers_that_were_left_out(
    tiny_text: Path, tmp_path: Path, make_tiny_model: Make
):
    """GPT-2 stores them transposed; this one is square, so that its shape does not tell."""
    path = tmp_path / "model"
    config = GPT2Config(
        vocab_size=300,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    for file in make_tiny_model("llama").glob("tokenizer*"):
        shutil.copy(file, path)
    settings = recipe(tiny_text, ignore=("attn.c_proj",))
    quantize_model(path, tmp_path / "whole", recipe=settings, device="cpu")

    class Stop(Exception):
        pass

    def stop(progress: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        quantize_model(path, tmp_path / "parts", recipe=settings, device="cpu", on_block=stop)
    quantize_model(path, tmp_path / "parts", recipe=settings, device="cpu")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_factors_in_powers_of_two_move_exponents_only(
    make_tiny_model: Make, tiny_text: Path, tmp_path: Path
):
    model = outliers(make_tiny_model("llama", dtype=torch.bfloat16), tmp_path / "planted")
    tokens = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    before, errors = load_file(model / "model.safetensors"), []
    for name, given in (
        ("none", {"balance": 0.0}),
        ("powers", {"balance": 0.5, "balance_factors": "power_of_two"}),
    ):
        quantize_model(
            model,
            tmp_path / name,
            recipe=recipe(tiny_text, **given),
            device="cpu",
            dialect="ptq",
        )
        errors.append(damage(model, tmp_path / name, tokens))
    assert errors[1] < 0.8 * errors[0]
    after = load_file(tmp_path / "powers" / "model.safetensors")
    moved = 0
    for name in (n for n in before if n.endswith("layernorm.weight")):
        ratio = (after[name].double() / before[name].double()).log2()
        assert torch.equal(ratio, ratio.round())
        moved += int(ratio.count_nonzero())
    assert moved > 8
