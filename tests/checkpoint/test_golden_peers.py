"""Checkpoints that other tools wrote (scripts/make_golden_peers.py) are the models that those tools
computed with."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear

PEERS = Path(__file__).parents[1] / "golden" / "peers"
IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 31]])
# The largest difference of a logit, of about 5, in bfloat16. These tools multiply the two scales of
# NVFP4 in bfloat16 before they multiply the codes; ptq rounds once.
WITHIN = {"mxfp4": 0.0, "nvfp4": 0.1}
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


def test_several_groups_are_told_apart() -> None:
    layers = Checkpoint(PEERS / "llm-compressor-groups").layers
    formats = {name.split(".")[3]: info.format for name, info in layers.items()}
    assert formats == {"self_attn": "nvfp4", "mlp": "mxfp4"}


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
