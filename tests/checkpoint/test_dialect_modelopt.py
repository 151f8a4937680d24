"""The ModelOpt dialect: NVFP4 under the names of another tool, and by its conventions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.checkpoint.convert import convert
from ptq.checkpoint.dialect_choice import choose
from ptq.checkpoint.dialect_modelopt import (
    FILE,
    hf_quant_config,
    key_value_name,
    modelopt_config,
    parse_modelopt,
    read_layer,
    store_key_value,
    write_layer,
)
from ptq.checkpoint.quantization_config import LayerInfo, summarize
from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.load import load

DOWN = "model.layers.0.mlp.down_proj"


def config(**facts) -> dict:
    layers = {DOWN: LayerInfo(format="nvfp4", **facts)}
    summary = summarize(layers, ["lm_head"], recipe={"r": 1}, provenance={"p": 1})
    return modelopt_config(summary, layers, ["lm_head", "model.layers.0.mlp.gate"])


def test_the_configuration_says_it_twice() -> None:
    written = config(quantize_inputs=True, static_inputs=True)
    assert (written["quant_method"], written["quant_algo"]) == ("modelopt", "NVFP4")
    assert written["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4
    assert written["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert hf_quant_config(written) == {
        "hf_quant_config.json": {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": None,
                "group_size": 16,
                "exclude_modules": written["ignore"],
            },
        }
    }
    alone = config()
    assert alone["quant_algo"] == "W4A16_NVFP4"
    assert alone["config_groups"]["group_0"]["input_activations"] is None


def test_both_say_the_same_to_a_reader() -> None:
    for facts in ({}, {"quantize_inputs": True, "static_inputs": True}):
        written = json.loads(json.dumps(config(**facts)))
        for said in (written, hf_quant_config(written)[FILE]):
            layer = parse_modelopt(said).layer(DOWN, bias=False)
            assert layer == LayerInfo(format="nvfp4", **facts)
            assert parse_modelopt(said).ignores("lm_head")


@pytest.mark.parametrize(
    ("said", "inputs"),
    [
        ({"quant_algo": "nvfp4"}, True),
        ({"quant_algo": "NVFP4", "config_groups": {"g": {"input_activations": None}}}, False),
        ({"quant_algo": "W4A16_NVFP4"}, False),
    ],
)
def test_inputs_are_quantized_where_it_says_so(said: dict, inputs: bool) -> None:
    assert parse_modelopt(said).layer(DOWN, bias=False).quantize_inputs is inputs


def test_patterns_are_those_of_a_shell() -> None:
    said = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}
    parsed = parse_modelopt({"quantization": said})
    assert parsed.ignores("model.layers.11.mlp.gate") and parsed.ignores("lm_head")
    assert not parsed.ignores("model.layers.11.mlp.gate_proj") and not parsed.ignores("xlm_head")


@pytest.mark.parametrize(
    "said",
    [
        {"kv_cache_quant_algo": "FP8"},
        {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    ],
)
def test_an_fp8_cache_is_read_in_both_words(said: dict) -> None:
    parsed = parse_modelopt({"quant_algo": "NVFP4"} | said)
    assert parsed.kv_cache == "fp8" and parsed.unread is None
    assert parse_modelopt({"quant_algo": "NVFP4", "kv_cache_scheme": None}).kv_cache is None


@pytest.mark.parametrize(
    "said",
    [{"kv_cache_quant_algo": "NVFP4"}, {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}],
)
def test_another_quantized_cache_is_not_read_and_that_is_told(said: dict, caplog) -> None:
    parsed = parse_modelopt({"quant_algo": "NVFP4"} | said)
    assert parsed.kv_cache is None and parsed.unread is not None
    assert "are not read: they stay in 16 bits" in caplog.text


def test_scales_of_keys_and_values_lie_under_their_projections() -> None:
    stored = store_key_value("model.layers.0.self_attn.k_scale", torch.ones(1))
    assert stored[0] == "model.layers.0.self_attn.k_proj.k_scale" and stored[1].shape == ()
    assert key_value_name(stored[0]) == "model.layers.0.self_attn.k_scale"
    for name in ("model.layers.0.self_attn.k_proj.v_scale", "model.layers.0.mlp.k_proj.k_scale"):
        assert key_value_name(name) == name


def test_models_without_self_attn_have_no_place_for_them() -> None:
    layers = {"model.layers.0.self_attn.o_proj": LayerInfo(format="nvfp4")}
    assert choose(layers, "modelopt", dtype="bfloat16", kv_cache="fp8").dialect == "modelopt"
    with pytest.raises(ValueError, match=r"cannot write modelopt: .*leave out --kv-cache"):
        choose({DOWN: layers.popitem()[1]}, "modelopt", dtype="bfloat16", kv_cache="fp8")


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4_AWQ", "MIXED_PRECISION", "W4A8_AWQ"])
def test_other_schemes_are_refused_by_name(algorithm: str) -> None:
    with pytest.raises(ValueError, match=f"does not read the ModelOpt scheme '{algorithm}', only"):
        parse_modelopt({"quant_algo": algorithm})
    with pytest.raises(ValueError, match="groups of 32, only 16"):
        parse_modelopt({"quant_algo": "NVFP4", "group_size": 32})


def test_factors_are_the_reciprocals_of_divisors() -> None:
    """ModelOpt's weight is code · weight_scale · weight_scale_2."""
    ours = {
        "weight_packed": torch.arange(16, dtype=torch.uint8).view(1, 16),
        "weight_scale": torch.ones(1, 2).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([4.0]),
        "input_global_scale": torch.tensor([8.0]),
        "bias": torch.ones(1),
    }
    theirs = write_layer(ours)
    assert set(theirs) == {"weight", "weight_scale", "weight_scale_2", "input_scale", "bias"}
    assert theirs["weight_scale_2"].shape == () and theirs["weight_scale_2"].item() == 0.25
    assert theirs["input_scale"].item() == 0.125
    again = read_layer(theirs)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[leaf].float(), ours[leaf].float()) for leaf in ours)


def test_any_factor_survives_being_read() -> None:
    """Some float32 numbers are no reciprocal of one: they get a divisor that is wide enough."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(2000, generator=generator) * 1e-3
    assert not torch.equal(1 / (1 / factors), factors)
    for t in factors:
        divisor = read_layer({"weight_scale_2": t})["weight_global_scale"]
        assert torch.equal((1 / divisor).float().reshape(()), t)
        assert torch.equal(write_layer({"weight_global_scale": divisor})["weight_scale_2"], t)
    with pytest.raises(ValueError, match="should be one number"):
        read_layer({"weight_scale_2": torch.ones(3)})


@pytest.fixture
def converted(make_run, tmp_path: Path):
    """A checkpoint in compressed-tensors, and the same in ModelOpt."""

    def make(**given) -> tuple[Path, Path]:
        ours, theirs = tmp_path / "ct", tmp_path / "modelopt"
        make_run("llama", "nvfp4", **given)(ours, dialect="compressed-tensors")
        convert(ours, theirs, "modelopt")
        return ours, theirs

    return make


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_a_checkpoint_in_it_is_the_same_model(converted, token_ids, tmp_path, scheme) -> None:
    ours, theirs = converted(scheme=scheme)
    a, b = Checkpoint(ours), Checkpoint(theirs)
    assert b.dialect == "modelopt" and a.layers == b.layers and a.sizes["weights"] > 0
    assert a.other_names() == b.other_names() and (theirs / FILE).is_file()
    name = a.layer_names()[0]
    assert b.tensor(f"{name}.weight").dtype == torch.uint8 and b.shape(name) == a.shape(name)
    with torch.no_grad():
        logits = load(ours, inputs="quantized")(token_ids).logits
        assert torch.equal(load(theirs, inputs="quantized")(token_ids).logits, logits)
    convert(theirs, tmp_path / "back", "compressed-tensors")
    for tensor in a.names():
        there = Checkpoint(tmp_path / "back").tensor(tensor)
        assert torch.equal(there.view(torch.uint8), a.tensor(tensor).view(torch.uint8)), tensor


def test_the_other_file_alone_is_enough(converted, token_ids) -> None:
    """As ModelOpt wrote it before config.json had a quantization_config."""
    ours, theirs = converted()
    whole = json.loads((theirs / "config.json").read_text())
    del whole["quantization_config"]
    (theirs / "config.json").write_text(json.dumps(whole))
    assert Checkpoint(theirs).layers == Checkpoint(ours).layers
    with torch.no_grad():
        assert torch.equal(load(theirs)(token_ids).logits, load(ours)(token_ids).logits)


def test_a_factor_without_a_float32_divisor_is_read_and_not_rounded(converted, tmp_path) -> None:
    _, theirs = converted()
    checkpoint = Checkpoint(theirs)
    (file,) = theirs.glob("model*.safetensors")
    tensors, names = load_file(file), checkpoint.layer_names()
    random = torch.rand(100, generator=torch.Generator().manual_seed(1)) * 1e-3
    t = next(t for t in random if 1 / (1 / t) != t)
    for name in names:  # all, as some share it
        tensors[f"{name}.weight_scale_2"] = t.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    read = Checkpoint(theirs).layer(names[0])["weight_global_scale"]
    assert read.dtype == torch.float32 and torch.equal(read, t)
    with pytest.raises(ValueError, match=r"cannot write ptq: .*reciprocal of no float32"):
        convert(theirs, tmp_path / "back", "ptq")
    assert not list(tmp_path.glob("back*"))


def test_what_it_has_no_place_for_is_refused(make_run, tmp_path: Path) -> None:
    for fmt, given, reason in (
        ("mxfp4", {}, "no format for mxfp4"),
        ("nvfp4", {"rotation": 16}, "rotates inputs"),
        ("nvfp4", {"scheme": "w4a4", "input_scale": "token"}, "calibrated global scale"),
    ):
        with pytest.raises(ValueError, match=f"cannot write modelopt: .*{reason}"):
            make_run("llama", fmt, **given)(tmp_path / f"{fmt}-{len(given)}", dialect="modelopt")
