"""Checkpoints that an earlier ptq wrote: they load as the numbers that they always were, and equal
runs still give their bytes.

``tests/golden/{ptq,compressed-tensors}`` were written by ptq 0.1.0, before dialects were records,
and are never regenerated: a change of the schema adds another directory, and a version.
"""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ptq.checkpoint.convert import convert
from ptq.checkpoint.dialect_ptq import guard_tensors
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint, to_disk
from ptq.checkpoint.writer import CheckpointWriter
from ptq.numerics.formats import FORMATS
from ptq.numerics.key_values import key_value_scale
from ptq.numerics.rotation import Rotation
from ptq.numerics.tensor import QuantizedTensor, Scales
from ptq.pipeline.recipe import Recipe
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear, stored_layer

GOLDEN = Path(__file__).parents[1] / "golden"
Q, K, DOWN = (f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down"))
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # code 0 … 15
INT4 = [0, 1, 2, 3, 4, 5, 6, 7, -7, -6, -5, -4, -3, -2, -1, 0]
CONFIG = {"model_type": "llama", "dtype": "bfloat16"}


def layer(fmt: str, values: list[float], scale: int, global_scale: float, **more) -> QuantLinear:
    """Two rows, ``values`` and their negatives, with the same byte as scale of every group."""
    record = FORMATS[fmt]
    rows = torch.tensor([values, [-v for v in values]], dtype=torch.float32)
    bits = torch.full((2, rows.shape[1] // record.group_size), scale, dtype=torch.uint8)
    weight = QuantizedTensor(
        record.element.encode(rows), Scales(bits, torch.tensor(global_scale), record)
    )
    rotation, bias = more.pop("rotation", 1), more.pop("bias", None)
    options = {"quantize_inputs": False, "input_global_scale": None} | more
    return QuantLinear.from_quantized(weight, Rotation(rotation), bias, **options)


def layers(dialect: str) -> dict[str, QuantLinear]:
    if dialect == "compressed-tensors":
        return {DOWN: layer("nvint4", INT4, 0x3C, 0.25, rotation=16)}  # E4M3 0x3C is 1.5
    inputs = {"quantize_inputs": True, "input_global_scale": torch.tensor(0.5), "rotation": 16}
    return {
        Q: layer("nvfp4", E2M1, 0x3C, 0.25, bias=torch.tensor([1.0, -2.0]).bfloat16(), **inputs),
        K: layer("nvfp4", E2M1, 0x38, 0.25, **inputs),
        DOWN: layer("mxfp4", E2M1 + E2M1[::-1], 126, 1.0, rotation=32),  # E8M0 126 is 1/2
    }


def report(name: str, quantized: QuantLinear) -> LayerReport:
    return LayerReport(
        name=name,
        out_features=2,
        in_features=quantized.in_features,
        format=quantized.info.format,
        rotation=quantized.info.rotation,
        algorithm="gptq",
        damping=0.05,
        error=0.0078125,
        held_out_error=None if name == Q else 0.01,
        rtn_error=0.015625,
        input_error=0.01 if quantized.info.quantize_inputs else None,
        tokens=4096,
        topped_up=False,
        balance=0.25,
        seconds=0.5,
    )


def write(dialect: str, out: Path) -> None:
    """The run that wrote ``tests/golden/<dialect>``."""
    quantized_layers = layers(dialect)
    infos = {name: quantized.info for name, quantized in quantized_layers.items()}
    tensors = {
        f"{n}.{k}": t for n, q in quantized_layers.items() for k, t in q.state_dict().items()
    }
    norm = {"model.layers.0.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    writer = CheckpointWriter(
        out,
        source_config=CONFIG,
        recipe=Checkpoint(GOLDEN / dialect).recipe,
        provenance={"source": "some/model", "calibration": {"sha256": "c0ffee"}},
        fingerprint="f",
        dialect=dialect,
    )
    with writer:
        reports = [report(name, quantized) for name, quantized in quantized_layers.items()]
        writer.add("model.layers.0", to_disk(tensors, infos) | norm, infos, reports)
        writer.finish([("lm_head.weight", torch.ones(2, 4, dtype=torch.bfloat16))])


def dense(name: str, checkpoint: Checkpoint) -> Tensor:
    """The weight of a layer as it lies there: in the rotated basis."""
    tensors, info = checkpoint.layer(name), checkpoint.layers[name]
    features = tensors["weight_packed"].shape[1] * 2
    linear = torch.nn.Linear(features, 2, bias=info.bias, device="meta")
    return stored_layer(linear, info, tensors, name).quantized_weight().dequantize()


def test_the_ptq_dialect_is_what_it_was():
    checkpoint = Checkpoint(GOLDEN / "ptq")
    assert checkpoint.dialect == "ptq"
    assert checkpoint.layers == {
        Q: LayerInfo(
            format="nvfp4", rotation=16, quantize_inputs=True, static_inputs=True, bias=True
        ),
        K: LayerInfo(format="nvfp4", rotation=16, quantize_inputs=True, static_inputs=True),
        DOWN: LayerInfo(format="mxfp4", rotation=32),
    }
    for name, row in {
        Q: [v * 1.5 * 0.25 for v in E2M1],
        K: [v * 0.25 for v in E2M1],
        DOWN: [v / 2 for v in E2M1 + E2M1[::-1]],
    }.items():
        assert dense(name, checkpoint).tolist() == [row, [-v for v in row]], name
    assert checkpoint.layer(Q)["input_global_scale"].item() == 0.5
    assert checkpoint.layer(Q)["bias"].tolist() == [1.0, -2.0]
    assert checkpoint.other_names() == ["lm_head.weight", "model.layers.0.norm.weight"]
    assert checkpoint.parsed.ignores("lm_head")


def test_the_compressed_tensors_dialect_is_what_it_was():
    checkpoint = Checkpoint(GOLDEN / "compressed-tensors")
    assert checkpoint.dialect == "compressed-tensors"
    assert checkpoint.layers == {DOWN: LayerInfo(format="nvint4", rotation=16)}
    row = [v * 1.5 * 0.25 for v in INT4]
    assert dense(DOWN, checkpoint).tolist() == [row, [-v for v in row]]
    assert checkpoint.tensor(f"{DOWN}.weight_packed").dtype == torch.int32
    assert checkpoint.other_names() == ["lm_head.weight", "model.layers.0.norm.weight"]


@pytest.mark.parametrize("dialect", ["ptq", "compressed-tensors"])
def test_recipes_and_reports_of_then_are_understood(dialect):
    stored = Checkpoint(GOLDEN / dialect).recipe
    again = json.loads(json.dumps(Recipe.from_dict(stored).to_dict()))
    assert {key: again[key] for key in stored} == stored
    rows = {row.layer: row for row in inspect(GOLDEN / dialect).layers}
    assert rows.keys() == layers(dialect).keys()
    for name, row in rows.items():
        assert (row.algorithm, row.error, row.rtn_error) == ("gptq", 0.0078125, 0.015625)
        assert row.held_out_error == (None if name == Q else 0.01)
        assert (row.damping, row.balance) == (0.05, 0.25)


def test_the_same_run_still_gives_the_same_bytes(tmp_path):
    write("compressed-tensors", tmp_path / "out")
    for file in (GOLDEN / "compressed-tensors").iterdir():
        again = (tmp_path / "out" / file.name).read_bytes()
        assert again == file.read_bytes(), file.name


def test_the_ptq_dialect_has_since_got_a_guard_and_nothing_else(tmp_path):
    write("ptq", tmp_path / "out")
    for file in ("config.json", "ptq_report.json"):
        assert (tmp_path / "out" / file).read_bytes() == (GOLDEN / "ptq" / file).read_bytes(), file
    old, new = (Checkpoint(path) for path in (GOLDEN / "ptq", tmp_path / "out"))
    assert set(new.names()) - set(old.names()) == set(guard_tensors([Q, K, DOWN]))
    assert new.other_names() == old.other_names() and new.layers == old.layers
    for name in old.names():
        before, after = old.tensor(name), new.tensor(name)
        assert before.dtype == after.dtype and before.shape == after.shape
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), name


# ---------------------------------------------------------------- of other tools

# scripts/make_golden_peers.py made them: they are the models that those tools computed with.
PEERS = GOLDEN / "peers"
IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 31]])
# The largest difference of a logit, of about 5, in bfloat16. These tools multiply the two scales of
# NVFP4 in bfloat16 before they multiply the codes; ptq rounds once. Codes times scales of bfloat16
# are rounded to it, too; inputs of FP8 are divided by their scales in it, and 3 % of them get the
# code beside.
WITHIN = {"mxfp4": 0.0, "mxfp8": 0.0, "nvfp4": 0.1, "int4-g32": 0.1, "fp8-channel": 0.6}
NAMES = sorted(path.name for path in PEERS.iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("llm-compressor")])
def test_they_load_as_what_they_were(name: str) -> None:
    path = PEERS / name
    layers = Checkpoint(path).layers
    assert len(layers) == 7 and not any(info.rotation > 1 for info in layers.values())
    expected = load_file(path / "expected.safetensors")["logits"]
    with torch.no_grad():
        logits = load(path, dtype=torch.bfloat16, inputs="quantized")(input_ids=IDS).logits[0]
    within = max(WITHIN[info.format] for info in layers.values())
    assert (logits.float() - expected).abs().max() <= within
    assert expected.abs().max() > 4


@pytest.mark.parametrize(
    ("name", "fmt", "inputs"), [("int4", "int4-g32", False), ("fp8", "fp8-channel", True)]
)
def test_formats_of_bfloat16_scales_are_read_and_written_as_they_were(
    tmp_path: Path, name: str, fmt: str, inputs: bool
) -> None:
    path = PEERS / f"llm-compressor-{name}"
    infos = set(Checkpoint(path).layers.values())
    assert infos == {LayerInfo(format=fmt, quantize_inputs=inputs)}
    convert(path, tmp_path / "ptq", "ptq")
    convert(tmp_path / "ptq", tmp_path / "again", "compressed-tensors")
    before, after = (load_file(x / "model.safetensors") for x in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key].float()) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_described(name: str) -> None:
    report = inspect(PEERS / name)
    assert len(report.layers) == 7


@pytest.mark.parametrize("alone", [False, True])
def test_modelopt_is_read_with_either_file(tmp_path: Path, alone: bool) -> None:
    """It computes NVFP4 on GPUs alone: what is known is the weight before it was rounded."""
    path, name = PEERS / "modelopt-nvfp4", "model.layers.0.mlp.down_proj"
    if alone:
        for file in path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        path = tmp_path
    checkpoint = Checkpoint(path)
    info = checkpoint.layers[name]
    assert (info.format, info.quantize_inputs, info.static_inputs) == ("nvfp4", True, True)
    stored = checkpoint.layer(name)
    assert torch.equal(stored["input_global_scale"], checkpoint.tensor(f"{name}.input_scale"))
    weight = load_file(path / "expected.safetensors")[name]
    module = load(path, dtype=torch.bfloat16, inputs="quantized")
    dense = cast(QuantLinear, module.get_submodule(name)).quantized_weight().dequantize()
    assert (dense - weight).norm() < 0.12 * weight.norm()
    with torch.no_grad():
        assert module(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "attention", "mlp"), [("groups", "nvfp4", "mxfp4"), ("mixture", "mxfp8", "nvfp4")]
)
def test_several_groups_are_told_apart(name: str, attention: str, mlp: str) -> None:
    layers = Checkpoint(PEERS / f"llm-compressor-{name}").layers
    formats = {name.split(".")[3]: info.format for name, info in layers.items()}
    assert formats == {"self_attn": attention, "mlp": mlp}


def test_modelopt_keeps_an_fp8_cache_under_two_layers(tmp_path: Path) -> None:
    """Its scales are the largest key and value that it saw over 448, as ptq's are, and are kept by
    a conversion there and back."""
    path, attention = PEERS / "modelopt-nvfp4-kv", "model.layers.0.self_attn"
    checkpoint = Checkpoint(path)
    assert checkpoint.parsed.kv_cache == "fp8" and checkpoint.parsed.unread is None
    seen = load_file(path / "expected.safetensors")
    scales = {}
    for kind in "kv":
        scales[kind] = checkpoint.tensor(f"{attention}.{kind}_scale")
        largest = seen[f"{attention}.{kind}_bmm_quantizer"]
        assert torch.equal(scales[kind], key_value_scale(largest.reshape(())))
    module = load(path, dtype=torch.bfloat16, inputs="quantized")
    assert torch.equal(module.get_submodule(attention).k_scale, scales["k"])
    convert(path, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "again", "modelopt")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    assert torch.equal(stored[f"{attention}.k_scale"], scales["k"])
    again, before = (load_file(x / "model.safetensors") for x in (tmp_path / "again", path))
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].float(), tensor.float()), name
    said = json.loads((tmp_path / "again" / "hf_quant_config.json").read_text())["quantization"]
    assert said["kv_cache_quant_algo"] == "FP8"
    with torch.no_grad():
        logits = [
            load(x, dtype=torch.bfloat16, inputs="quantized")(input_ids=IDS).logits
            for x in (path, tmp_path / "ct", tmp_path / "again")
        ]
        plain = load(PEERS / "modelopt-nvfp4", dtype=torch.bfloat16, inputs="quantized")
        assert not torch.equal(plain(input_ids=IDS).logits, logits[0])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_cache_without_scales_is_one_with_scales_of_one(tmp_path: Path) -> None:
    """Engines take 1 where another tool stored none; of ours that is a damaged checkpoint."""
    for file in (PEERS / "modelopt-nvfp4").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(config))
    attention = load(tmp_path).get_submodule("model.layers.0.self_attn")
    assert attention.k_scale.tolist() == attention.v_scale.tolist() == [1.0]
    config["quantization_config"]["ptq"] = {"version": 1, "recipe": {"format": "nvfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no scales of keys and values"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actorder": "static"}, None),
        ({"actorder": "weight"}, None),
        ({"actorder": "group"}, "'actorder': 'group'"),
        ({"group_size": 32}, "'group_size': 32"),
        ({"symmetric": False}, "'symmetric': False"),
    ],
)
def test_variants_are_read_or_refused_by_name(tmp_path: Path, changes, message) -> None:
    config = json.loads((PEERS / "llm-compressor-nvfp4a16" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(
        PEERS / "llm-compressor-nvfp4a16" / "model.safetensors"
    )
    if message is None:
        assert {i.format for i in Checkpoint(tmp_path).layers.values()} == {"nvfp4"}
    else:
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path)
