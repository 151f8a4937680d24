"""Finished blocks on disk and back: the block is then what it was when it was written."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq.calib.walk import CalibratedBlock
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.checkpoint_source import CheckpointSource
from ptq.numerics.formats import NVFP4
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.pipeline.blocks_on_disk import BlocksInMemory, BlocksOnDisk
from ptq.runtime.quant_linear import QuantLinear

Make = Callable[..., Path]
CPU = torch.device("cpu")


def filled(source: CheckpointSource) -> CalibratedBlock:
    name, module = source.blocks()[0]
    source.fill(module, name, "cpu")
    return CalibratedBlock(name=name, prefix=f"{name}.", module=module, groups=[], index=0, count=2)


def quantized(layer: nn.Linear) -> QuantLinear:
    grid = Grid(NVFP4, NVFP4.global_scale(layer.weight.abs().amax().float()), "mse")
    weight = rtn(layer.weight.detach().float(), torch.eye(layer.in_features), grid)
    return QuantLinear.from_quantized(
        weight, Rotation(1), layer.bias, quantize_inputs=False, input_global_scale=None
    )


def report(name: str) -> LayerReport:
    return LayerReport(
        name=name, out_features=1, in_features=1, format="nvfp4", rotation=1, algorithm="rtn",
        damping=0.0, error=0.1, held_out_error=None, rtn_error=0.1, input_error=None, tokens=1,
        topped_up=False, seconds=0.0,
    )  # fmt: skip


def writer(out: Path, source: CheckpointSource) -> CheckpointWriter:
    return CheckpointWriter(
        out,
        source_config={"model_type": "llama"},
        recipe={},
        provenance={"calibration": {}},
        fingerprint=source.fingerprint,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_a_block_comes_back_as_it_was_written(
    make_tiny_model: Make, tmp_path: Path, kind: str
) -> None:
    path = make_tiny_model(kind)
    source = CheckpointSource(path, dtype=torch.float32, hashed=True)
    block = filled(source)
    linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    linears = {
        n: m for n, m in linears.items() if "gate" not in n.rpartition(".")[2] or "proj" in n
    }
    for name, layer in linears.items():
        block.module.set_submodule(name, quantized(layer))
    layers = {
        f"{block.prefix}{n}": m for n, m in block.module.named_modules() if type(m) is QuantLinear
    }
    norm = f"{block.prefix}input_layernorm.weight"
    changes = {norm: 2 * block.module.get_parameter("input_layernorm.weight").detach()}
    block.module.get_parameter("input_layernorm.weight").data = changes[norm]
    expected = copy.deepcopy(block.module.state_dict())
    with writer(tmp_path / "out", source) as opened:
        blocks = BlocksOnDisk(source=source, writer=opened, device=CPU)
        assert not blocks.has(block.name)
        blocks.add(block, layers, [report(name) for name in layers], changes, {})
        assert blocks.has(block.name)
    again = CheckpointSource(path, dtype=torch.float32, hashed=True)
    fresh = filled(again)
    with writer(tmp_path / "out", again) as opened:
        blocks = BlocksOnDisk(source=again, writer=opened, device=CPU)
        assert blocks.has(fresh.name)
        stored = opened.blocks[fresh.name].reports
        blocks.reinstall(fresh)
    found = fresh.module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    # reports and layers have the names of the checkpoint
    assert {r.name for r in stored} == set(opened.layers(fresh.name))


def test_in_memory_nothing_is_kept() -> None:
    assert not BlocksInMemory().has("model.layers.0")
