"""Loading: the model that comes back is the model that was written."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint
from ptq.kernels import gpu
from ptq.runtime.load import load, settle_inputs
from ptq.runtime.quant_linear import QuantLinear

ON_DISK = dict.fromkeys(
    ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu"
)
ON_DISK["model.layers.1"] = "disk"


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def written(make_run, tmp_path_factory) -> Path:
    """A W4A4 checkpoint, not to be changed."""
    out = tmp_path_factory.mktemp("written") / "out"
    make_run("llama", "nvfp4", scheme="w4a4", rotation=16)(out, dialect="ptq")
    return out


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3"])  # qwen2: bias, tied
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvint4", "mxint4"])
def test_a_loaded_checkpoint_is_the_model_that_was_saved(
    make_run, tmp_path, token_ids, fmt, scheme, kind
):
    model = make_run(kind, fmt, scheme=scheme, rotation=16)(tmp_path / "out", dialect="ptq")
    loaded = load(tmp_path / "out", inputs="quantized")
    assert_same_state(model, loaded)
    assert torch.equal(logits(model, token_ids), logits(loaded, token_ids))
    tied = (
        loaded.get_submodule("lm_head").weight is loaded.get_submodule("model.embed_tokens").weight
    )
    assert tied == (kind in ("llama_tied", "qwen2"))


@pytest.mark.parametrize("fmt", ["mxint6", "mxfp6", "mxint8", "mxfp8", "int4-g32", "fp8-channel"])
def test_study_formats_come_back_too(make_run, tmp_path, token_ids, fmt):
    model = make_run("llama", fmt, dtype=torch.float32)(tmp_path / "out")
    assert torch.equal(logits(model, token_ids), logits(load(tmp_path / "out"), token_ids))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvint4"])
def test_experts_come_back_under_the_names_of_the_hub(make_run, tmp_path, token_ids, kind, fmt):
    model = make_run(kind, fmt, rotation=16)(tmp_path / "out", dialect="ptq")
    loaded = load(tmp_path / "out")
    assert_same_state(model, loaded)
    assert torch.equal(logits(model, token_ids), logits(loaded, token_ids))
    leaf = "block_sparse_moe.experts.3.w1" if kind == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"model.layers.0.{leaf}" in Checkpoint(tmp_path / "out").layer_names()


def test_layers_may_differ(make_run, tmp_path, token_ids):
    rules = (
        ("q_proj", {"rotation": 1}),
        ("down_proj", {"format": "mxfp8", "scheme": "w4a16"}),
        ("layers.1.mlp.up_proj", "skip"),
    )
    model = make_run("llama", "nvfp4", scheme="w4a4", rotation=16, rules=rules)(tmp_path / "out")
    loaded = load(tmp_path / "out", inputs="quantized")
    assert_same_state(model, loaded)
    assert torch.equal(logits(model, token_ids), logits(loaded, token_ids))
    layers = Checkpoint(tmp_path / "out").layers
    assert (
        layers["model.layers.1.mlp.down_proj"].format == "mxfp8"
        and "model.layers.1.mlp.up_proj" not in layers
    )
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.up_proj"), nn.Linear)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("fmt", "scheme", "rotation"),
    [
        ("nvfp4", "w4a16", 1),
        ("nvfp4", "w4a4", 16),
        ("mxfp4", "w4a16", 32),
        ("mxfp4", "w4a4", 1),
        ("nvint4", "w4a16", 16),
    ],
)
def test_compressed_tensors_come_back_as_the_same_numbers(
    make_run, tmp_path, token_ids, kind, fmt, scheme, rotation
):
    rules = (
        (("re:.*[qkv]_proj", {"rotation": 1}),) if kind == "qwen2" else ()
    )  # biased: not rotated in this dialect
    run = make_run(kind, fmt, scheme=scheme, rotation=rotation, rules=rules)
    model = run(tmp_path / "out")
    assert run.choice.dialect == "compressed-tensors", run.choice.reason
    loaded = load(tmp_path / "out", inputs="quantized")
    assert torch.equal(logits(model, token_ids), logits(loaded, token_ids))
    if fmt != "nvint4":  # whose split into scale and global scale is not unique
        assert_same_state(model, loaded)


def test_rotated_biased_layers_make_auto_choose_ptq(make_run, tmp_path):
    run = make_run("qwen2", "mxfp4", rotation=32)
    run(tmp_path / "out")
    assert run.choice.dialect == "ptq" and "bias" in run.choice.reason


def test_a_global_scale_of_inputs_may_be_one_per_token(make_run, tmp_path, token_ids):
    model = make_run("llama", "nvfp4", scheme="w4a4", input_scale="token")(tmp_path / "out")
    loaded = load(tmp_path / "out", inputs="quantized")
    assert not any("input_global_scale" in name for name in Checkpoint(tmp_path / "out").names())
    assert torch.equal(logits(model, token_ids), logits(loaded, token_ids))


def test_inputs_are_as_asked(written, token_ids, caplog):
    full, quantized = load(written, inputs="full"), load(written, inputs="quantized")
    with caplog.at_level(logging.INFO, "ptq.runtime.load"):
        auto = load(written)
    unchecked, told, kept = caplog.messages
    assert f"`ptq verify {written}`" in unchecked and "not whether files" in unchecked
    assert "keep 16 bits" in told  # a CPU does not multiply FP4
    assert "keep dequantized weights" in kept
    assert torch.equal(logits(auto, token_ids), logits(full, token_ids))
    assert not torch.equal(logits(quantized, token_ids), logits(full, token_ids))
    with pytest.raises(ValueError, match="auto, quantized, full"):
        load(written, inputs="some")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("capability", "rounds"),
    [((9, 0), False), ((10, 0), True), ((11, 0), False), ((12, 0), True)],
    ids=lambda value: str(value),
)
def test_inputs_are_rounded_where_a_kernel_multiplies_fp4(
    capability: tuple[int, int], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on every new GPU: there are no kernels for sm_110, and without them rounded inputs
    are emulated."""
    pytest.importorskip("triton")
    layer = QuantLinear(64, 32, LayerInfo(format="nvfp4", quantize_inputs=True))
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(QuantLinear, "weight_packed", on_gpu, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu._capability.cache_clear()
    settle_inputs(layer, "auto")
    gpu._capability.cache_clear()
    assert layer.quantize_inputs == rounds


def test_small_models_are_cached_and_it_is_said(written, monkeypatch, caplog):
    def cached(model):
        return {m.cache for m in model.modules() if isinstance(m, QuantLinear)}

    with caplog.at_level("INFO"):
        assert cached(load(written)) == {True}
        assert "keep dequantized weights" in caplog.text
        monkeypatch.setattr("ptq.runtime.load.CACHE_BYTES", 100)
        assert cached(load(written)) == {False} and cached(load(written, cache=True)) == {True}
        assert "unpack their weights every time (cache=True keeps them" in caplog.text


def test_a_cache_changes_no_bit(written, token_ids):
    model, cached = load(written, cache=False), load(written, cache=True)
    expected = logits(model, token_ids)
    assert torch.equal(logits(cached, token_ids), expected) and torch.equal(
        logits(cached, token_ids), expected
    )
    layers = [m for m in cached.modules() if isinstance(m, QuantLinear)]
    assert all(layer._dequantized is not None for layer in layers)


def test_the_dtype_of_computation_may_be_chosen(written, token_ids):
    model = load(written, dtype=torch.float32)
    assert logits(model, token_ids).dtype == torch.float32
    exact, rounded = logits(model, token_ids), logits(load(written), token_ids).float()
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.filterwarnings("ignore:Current model requires:UserWarning")
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, ON_DISK], ids=["auto", "cpu", "disk"])
def test_layers_may_lie_elsewhere(written, tmp_path, token_ids, device_map):
    model = load(written, device_map=device_map, offload_folder=tmp_path / "offload")
    if device_map is ON_DISK:
        away = model.get_submodule("model.layers.1.mlp.up_proj")
        assert isinstance(away, QuantLinear) and away.weight_packed.is_meta
    assert torch.equal(logits(model, token_ids), logits(load(written), token_ids))


@pytest.mark.filterwarnings("ignore:Current model requires:UserWarning")
@pytest.mark.parametrize("device_map", [{"": "cpu"}, ON_DISK], ids=["whole", "disk"])
def test_a_spread_model_runs_in_kernels(
    kernels, written, tmp_path, token_ids, device_map, caplog
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU stands for a GPU here")
    with caplog.at_level(logging.INFO, "ptq.runtime.load"):
        model = load(
            written,
            dtype=torch.bfloat16,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
            inputs="full",
        )
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert all(layer.kernel_dtype == torch.bfloat16 for layer in layers)
    assert f"{len(layers)} of {len(layers)} quantized layers run in Triton kernels" in caplog.text
    reference = load(written, dtype=torch.bfloat16, inputs="full")
    for layer in reference.modules():
        if isinstance(layer, QuantLinear):
            layer.kernel_dtype = None
    spread, expected = logits(model, token_ids).float(), logits(reference, token_ids).float()
    assert float((spread - expected).norm() / expected.norm()) < 2e-2
    for layer in layers:
        assert layer._kernel_weight is None or not layer.weight_packed.is_meta, "holds what went"


def test_layers_on_disk_need_a_folder(written):
    with pytest.raises(ValueError, match="offload_folder"):
        load(written, device_map=ON_DISK)


def test_generation_settings_are_those_of_the_checkpoint(written, tmp_path):
    assert not load(written).generation_config.do_sample
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in written.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5}')
    assert load(copy).generation_config.temperature == 0.5


def without(path: Path, target: Path, *names: str, **change) -> Path:
    """A copy of a checkpoint without some tensors, and with other entries in its config.json."""
    target.mkdir()
    tensors = {n: t for n, t in load_file(path / "model.safetensors").items() if n not in names}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | change
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.input_global_scale",
        "model.layers.1.mlp.up_proj.weight_packed",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(written, tmp_path, name):
    with pytest.raises(ValueError, match=name.removesuffix("_packed").replace(".", r"\.")):
        load(without(written, tmp_path / "copy", name))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (f"{UP}.weight_scale", lambda t: t.view(torch.uint8)[3, 1].fill_(0x7F), "holds NaN"),
        (f"{UP}.weight_scale", lambda t: t.view(torch.uint8)[3, 1].bitwise_or_(0x80), "holds -"),
        (f"{UP}.weight_scale", lambda t: t.view(torch.uint8)[3, 1].fill_(0), "holds 0"),
        (f"{UP}.weight_global_scale", lambda t: t.fill_(0), "is 0 and must be"),
        (f"{UP}.weight_global_scale", lambda t: t.fill_(1e-30), "products overflow"),
        (f"{UP}.input_global_scale", lambda t: t.fill_(float("inf")), "is inf and must be"),
        ("model.norm.weight", lambda t: t[5].fill_(2.0**127), "beyond"),
        ("model.norm.weight", lambda t: t[5].fill_(float("nan")), "contains NaN"),
    ],
)
def test_numbers_that_would_end_in_nan_are_refused(written, tmp_path, name, change, said):
    copy = without(written, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    change(tensors[name])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said) as caught:
        load(copy)
    assert name.removesuffix("_global_scale").removesuffix(".weight") in str(caught.value)


def test_a_config_of_another_model_is_refused(written, tmp_path):
    with pytest.raises(ValueError, match=r"weight_packed has shape|has shape"):
        load(without(written, tmp_path / "wide", intermediate_size=256))
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is no layer of the model"):
        load(without(written, tmp_path / "short", num_hidden_layers=1))
    with pytest.raises(ValueError, match="bias"):
        load(without(written, tmp_path / "biased", attention_bias=True))


def test_what_is_not_ours_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="not quantized"):
        load(tiny_llama)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing")
