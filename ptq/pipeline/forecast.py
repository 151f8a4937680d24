"""What a run will need, from the model's configuration alone: memory, time, size of the result.

``ptq quantize --dry-run`` prints it.

    peak = program + activations + block + Hessians + solver

- program: Python and its libraries.
- activations: samples · seq_len · hidden, in the dtype of the computation, and one batch inside a
  block. On the host, on the device or on disk (``--activations``).
- block: the largest decoder block's parameters in the dtype of the computation (float32 where they
  are balanced), and once more as they lie on disk while they are read; the token embedding takes
  its place at the start if it is larger.
- Hessians: two (calibration, held out) of in² entries for every input group of a block.
- solver: for the input group that needs most, copies of the rows that are solved at a time and of
its Hessian.
"""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ptq.calib.hessian import WIDE
from ptq.model.structure import blueprint, find_head
from ptq.model.weight_files import Shards
from ptq.pipeline.recipe import Recipe, chosen_layers
from ptq.pipeline.solve import PART_ELEMENTS

PROGRAM = (
    0.75e9  # measured: torch, transformers and the compiled parts of a CPU run, before any model
)
# Copies of the rows that are solved at a time (float32) and of the Hessian (float64) that are alive
# together: solve.py.
WEIGHT_COPIES, HESSIAN_COPIES = 11, 2
# Layers that read what no neighbour reads. Others of one module with the same number of inputs
# count as one group.
ALONE = (
    "o_proj",
    "down_proj",
    "out_proj",
    "dense",
    "c_proj",
    "dense_4h_to_h",
    "w2",
    "fc2",
    "fc_out",
    "wo",
)
# of the measured rate of a large product; the rest are passes over memory and the steps of the
# sweep
EFFICIENCY = 0.35


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All sizes in bytes, ``seconds`` on this machine (None when the device is not here)."""

    parameters: int
    quantized: int
    layers: int
    blocks: int
    source_bytes: int
    output_bytes: int
    bits_per_quantized_weight: float
    bits_per_parameter: float
    program: int
    activations: int
    block: int
    hessians: int
    solver: int
    peak_bytes: int
    device: str
    machine_bytes: int
    seconds: float | None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


def forecast(
    model: str | Path,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "ram",
    ranks: int = 1,
) -> Forecast:
    """Predict a run of :func:`ptq.pipeline.run.quantize_model` with the same arguments; reads no
    weights.

    Raises:
        ValueError, FileNotFoundError: what the run itself would refuse before reading weights.
    """
    config, skeleton, names = blueprint(model)
    device = torch.device(device)
    stored = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.bfloat16)
    computed = dtype or (torch.float32 if device.type == "cpu" else stored)
    blocks = [(name, skeleton.get_submodule(name)) for name in names]
    head = find_head(skeleton) if recipe.lm_head else None
    chosen = chosen_layers(blocks, recipe, (head, skeleton.get_submodule(head)) if head else None)

    tied = getattr(skeleton, "all_tied_weights_keys", {})
    everything = {
        n: p.numel() for n, p in skeleton.named_parameters(remove_duplicate=False) if n not in tied
    }
    quantized = sum(layer.weight.numel() for layer in chosen.values())
    packed, balanced = 0.0, False
    for name, layer in chosen.items():
        own = recipe.for_module(name)
        assert own is not None
        balanced |= own.balance > 0
        packed += layer.weight.numel() * own.fmt.bits_per_weight / 8 + 4 * own.fmt.has_global_scale
    total = sum(everything.values())
    source_bytes = _stored_bytes(Path(model)) or total * stored.itemsize
    output_bytes = round((total - quantized) * stored.itemsize + packed)

    hidden = _hidden(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(recipe.seq_len, positions or recipe.seq_len)
    tokens = recipe.samples * length // ranks
    widest = max((layer.in_features for layer in chosen.values()), default=hidden)
    batch = recipe.batch_size * length * (6 * hidden + 3 * widest) * max(computed.itemsize, 4)
    held = 0 if activations == "disk" else tokens * hidden * computed.itemsize
    sizes = [sum(p.numel() for p in block.parameters()) for _, block in blocks]
    embedding = max(
        (m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Embedding)), default=0
    )
    width = 4 if balanced else computed.itemsize  # balanced weights are float32
    block = max(
        max(sizes) * (width + stored.itemsize), embedding * (computed.itemsize + stored.itemsize)
    )
    groups = [list(_groups(name, module, chosen)) for name, module in blocks]
    groups += [[(chosen[head].in_features, chosen[head].out_features)]] if head in chosen else []
    hessians = max(sum(2 * n * n * _width(n, device) for n, _ in block) for block in groups)
    work = [(n, rows) for block in groups for n, rows in block]
    solver = max((_solver(n, rows, device) for n, rows in work), default=0)
    parts = {
        "program": round(PROGRAM), "activations": held + batch, "block": block, "hessians": hessians, "solver": solver,
    }  # fmt: skip
    return Forecast(
        parameters=total,
        quantized=quantized,
        layers=len(chosen),
        blocks=len(blocks),
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        bits_per_quantized_weight=8 * packed / quantized,
        bits_per_parameter=8 * output_bytes / total,
        peak_bytes=sum(parts.values()),
        device=str(device),
        machine_bytes=_machine_bytes(device),
        seconds=_seconds(recipe, sum(sizes), tokens, work, device, ranks),
        **parts,
    )


def _groups(name: str, block: nn.Module, chosen: dict[str, nn.Linear]) -> Iterable[tuple[int, int]]:
    """(inputs, rows) of the input groups of a block, guessed from names."""
    rows: dict[tuple[str, int], int] = {}
    for inner, module in block.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.{inner}" in chosen:
            parent, _, leaf = inner.rpartition(".")
            key = (inner if leaf in ALONE else parent, module.in_features)
            rows[key] = rows.get(key, 0) + module.out_features
    return [(features, count) for (_, features), count in rows.items()]


def _solver(features: int, rows: int, device: torch.device) -> int:
    """Bytes for one input group: rows being solved, codes of all rows (of two results, and joined),
    Hessians.

    Of the Hessian there are the mean of both parts, those rotated, and the factor in float32.
    """
    weights = WEIGHT_COPIES * 4 * min(rows * features, PART_ELEMENTS) + 3 * rows * features
    return weights + features**2 * (HESSIAN_COPIES * 8 + 4 * _width(features, device) + 4)


def _width(features: int, device: torch.device) -> int:
    """Bytes of an entry of a Hessian (ptq.calib.hessian)."""
    return 8 if device.type == "cpu" and features <= WIDE else 4


def _hidden(config: object) -> int:
    text = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(text, "hidden_size", None) or text.n_embd)  # pyright: ignore[reportAttributeAccessIssue]


def _stored_bytes(path: Path) -> int:
    """Bytes of the weights beside the configuration; 0 when there are none."""
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return 0
    return Shards(path).total_bytes


def _seconds(
    recipe: Recipe,
    parameters: int,
    tokens: int,
    work: list[tuple[int, int]],
    device: torch.device,
    ranks: int,
) -> float | None:
    """Two passes over the blocks, the Hessians, the factorisations and sweeps, at the rate of a
    product measured now."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    flops = 2 * 2 * parameters * tokens
    tries = 14 if recipe.in_loop == "trial" else 1
    for n, rows in work:
        flops += 2 * tokens * n * n
        if recipe.algorithm == "gptq":
            flops += (
                4 * n**3 / 3 * 2
                + rows * n * n * (2 + 2 * recipe.descent)
                + 2 * tries * rows * n * 32
            ) / ranks
    return flops / (_rate(device) * EFFICIENCY)


def _machine_bytes(device: torch.device) -> int:
    """Memory of the device that would compute; of the host for the CPU, and where the GPU asked for
    is not here."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rate(device: torch.device) -> float:
    """float32 operations a second of a large matrix product, measured in a fraction of a second."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
