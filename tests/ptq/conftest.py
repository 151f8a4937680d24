"""Tiny checkpoints: models whose layers are rounded to nearest by the math layer and written by CheckpointWriter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq.algorithms import rtn
from ptq.calib.source import Source
from ptq.checkpoint import to_disk
from ptq.dialects import LayerInfo
from ptq.linear import QuantLinear
from ptq.recipe import Recipe
from ptq.rotation import Rotation
from ptq.scales import Grid
from ptq.writer import CheckpointWriter, companion_files

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def quantize(layer: nn.Linear, recipe: Recipe, amax: torch.Tensor) -> QuantLinear:
    """Round to nearest; ``amax`` is that of the layers which share the global scale."""
    fmt, rotation = recipe.fmt, Rotation(1 if recipe.rotation == "auto" else int(recipe.rotation))
    weight = rotation.exact(layer.weight.detach().float())
    grid = Grid(fmt, fmt.global_scale(amax, 1.5), "absmax")
    static = recipe.quantize_inputs and fmt.has_global_scale and recipe.input_scale == "static"
    return QuantLinear.from_quantized(
        rtn(weight, torch.eye(weight.shape[1]), grid),
        rotation,
        layer.bias,
        quantize_inputs=recipe.quantize_inputs,
        input_global_scale=fmt.global_scale(torch.tensor(8.0), 2.0) if static else None,
        input_rule=recipe.input_rule,
    )


def shared_amax(block: nn.Module, name: str, rotation: int) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    names = next((group for group in FUSED if leaf in group), (leaf,))
    weights = [block.get_submodule(f"{parent}.{n}").weight for n in names]
    return torch.stack([Rotation(rotation).exact(w.detach().float()).abs().amax() for w in weights]).amax()


@dataclass
class Run:
    """A stand-in for the pipeline: every block of ``source`` is quantized, installed and added."""

    source: Source
    recipe: Recipe
    after_block: Callable[[int], None] = lambda index: None

    def writer(self, out: Path, **options) -> CheckpointWriter:
        config = json.loads((self.source.path / "config.json").read_text())
        given = {
            "source_config": config,
            "recipe": self.recipe.to_dict(),
            "provenance": {"calibration": {"sha256": "0" * 64}},
            "fingerprint": self.source.fingerprint,
        }
        return CheckpointWriter(out, **(given | options))

    def quantize_block(self, name: str, block: nn.Module) -> tuple[dict, dict[str, LayerInfo]]:
        self.source.fill(block, name, "cpu")
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        made = {}
        for n, linear in linears.items():
            own = self.recipe.for_module(f"{name}.{n}")
            if own is not None:
                made[n] = quantize(linear, own, shared_amax(block, n, int(own.rotation)))
        for n, layer in made.items():
            block.set_submodule(n, layer)
        layers = {self.stored(f"{name}.{n}"): layer.info for n, layer in made.items()}
        tensors = {self.source.checkpoint_name(f"{name}.{k}"): t for k, t in block.state_dict().items()}
        return to_disk(tensors, layers), layers

    def stored(self, name: str) -> str:
        return self.source.checkpoint_name(f"{name}.weight_packed").rpartition(".")[0]

    def blocks(self, writer: CheckpointWriter) -> None:
        for index, (name, block) in enumerate(self.source.blocks()):
            tensors, layers = self.quantize_block(name, block)
            if not writer.has(name):
                writer.add(name, tensors, layers, [{"layer": n, "error": 0.5, "seconds": 0.0} for n in layers])
            self.after_block(index)

    def __call__(self, out: Path, **options) -> nn.Module:
        """Write a checkpoint; returns the model that it is of, in memory."""
        with self.writer(out, **options) as writer:
            self.blocks(writer)
            self.choice = writer.finish(self.source.rest(), companion_files(self.source.path))
        model = self.source.skeleton()
        for name, _ in model.named_children():
            self.fill_rest(model, name)
        model.tie_weights()
        return model.eval()

    def fill_rest(self, model: nn.Module, path: str) -> None:
        """Everything outside the blocks, whose layers are quantized already."""
        module = model.get_submodule(path)
        blocks = {name for name, _ in self.source.blocks()}
        if path in blocks:
            return
        if any(name.startswith(f"{path}.") for name in blocks):
            for child, _ in module.named_children():
                self.fill_rest(model, f"{path}.{child}")
        else:
            self.source.fill(module, path, "cpu")


@pytest.fixture(scope="session")
def make_run(make_tiny_model: Callable[..., Path]) -> Callable[..., Run]:
    """``make(kind, format, …) -> Run``; calling it with a directory writes a checkpoint and returns the model."""

    def make(kind: str = "llama", format: str = "nvfp4", *, dtype=torch.bfloat16, **recipe) -> Run:
        settings = {"scheme": "w4a16", "rotation": 1, "algorithm": "rtn", "ignore": ("lm_head",)} | recipe
        return Run(Source(make_tiny_model(kind, dtype=dtype)), Recipe(format=format, **settings))

    return make


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.arange(3, 43).reshape(2, 20)
