"""Model in, packed checkpoint out: the loop over decoder blocks.

    source ─▶ walk: Hessian and samples per input group ─▶ solve: codes and scales ─▶ QuantLinear replaces the layer
                 ▲                                                                        │        └─▶ shard on disk
                 └──────────── the next block sees what the quantized block produces ◀────┘
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ptq import __version__
from ptq.calib.data import load_calibration, load_tokenizer
from ptq.calib.observe import InputGroup
from ptq.calib.source import MemorySource, Source
from ptq.calib.walk import CalibratedBlock, walk
from ptq.checkpoint import from_disk, to_disk
from ptq.distributed import share, world
from ptq.inputs import quantize_inputs
from ptq.linear import QuantLinear
from ptq.recipe import Recipe, check_patterns
from ptq.refusals import Choice, choose, plan
from ptq.rotation import Rotation
from ptq.solve import INPUT_MARGIN, Job, Solved, solve
from ptq.writer import CheckpointWriter, companion_files, config_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A block that is finished: its reports, and how many blocks there are."""

    block: str
    index: int
    count: int
    reports: list[dict[str, Any]]
    resumed: bool


def linear_layers(source: Source | MemorySource) -> dict[str, nn.Linear]:
    """The Linear layers of the decoder blocks by full name: what can be quantized."""
    return {
        f"{name}.{inner}": module
        for name, block in source.blocks()
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def check(source: Source | MemorySource, recipe: Recipe) -> dict[str, nn.Linear]:
    """The layers that the recipe will quantize, by full name; refuses before any weight is read what cannot work.

    Raises:
        ValueError: a pattern that matches nothing, inputs that do not form groups or rotation blocks (all such layers are
            named), or a recipe that leaves nothing to quantize.
    """
    layers = linear_layers(source)
    check_patterns([*recipe.ignore, *(pattern for pattern, _ in recipe.rules)], layers)
    chosen, ragged = {}, {}
    for name, layer in layers.items():
        own = recipe.for_module(name)
        if own is None:
            continue
        chosen[name] = layer
        if layer.in_features % own.fmt.group_size:
            reason = f"{layer.in_features} input features are not divisible by the group size {own.fmt.group_size} of {own.format}"
            ragged.setdefault(reason, []).append(name)
            continue
        try:
            own.rotations(layer.in_features)
        except ValueError as error:
            ragged.setdefault(str(error), []).append(name)
    for reason, names in ragged.items():
        leaves = sorted({name.rpartition(".")[2] for name in names})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        remedy = " ".join(f"--ignore {leaf}" for leaf in leaves)
        raise ValueError(f"{names[0]}{more}: {reason}; leave them out with {remedy}, or change the format or rotation")
    if not chosen:
        raise ValueError("the recipe ignores every linear layer of the model; nothing would be quantized")
    return chosen


@torch.no_grad()
def quantize(
    source: Source | MemorySource,
    batches: Sequence[Tensor],
    recipe: Recipe,
    out: CheckpointWriter | None,
    *,
    device: torch.device | str = "cpu",
    activations: str = "ram",
    finished: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Progress]:
    """Quantize the blocks of ``source`` one after the other, writing each as soon as it is finished.

    Args:
        batches: token ids, each (sequences, length).
        out: None keeps the result in the model of a :class:`MemorySource`.
        finished: see :func:`ptq.calib.walk.walk`.

    Yields:
        One :class:`Progress` per block.
    """
    chosen = check(source, recipe)
    probes = {size: Rotation(size).exact for size in _rotations(recipe, chosen)}
    feed = partial(_feed, recipe) if any(_own(recipe, name).quantize_inputs for name in chosen) else None
    blocks = walk(
        source, batches, probes=probes, skip=out.has if out else lambda _: False, feed=feed,
        ignore=lambda name: name not in chosen, device=device, activations=activations, finished=finished,
    )  # fmt: skip
    for block in blocks:
        if out is not None and out.has(block.name):
            _reinstall(block, out, device)
            yield Progress(block.name, block.index, block.count, [], True)
            continue
        jobs = [job for group in block.groups for job in _jobs(block, group, recipe)]
        solved = [result for results in share(jobs, solve) for result in results]
        layers = {result.name: _install(block, result, recipe) for result in solved}
        reports = [result.report for result in solved]
        for report in reports:
            logger.info(
                "%s %s rotation %d error %.2e (rtn %.2e) damping %g %.1fs", report["layer"], report["format"], report["rotation"],
                report["error"], report["rtn_error"], report["damping"], report["seconds"],
            )  # fmt: skip
        if out is not None and world()[0] == 0:
            _write(block, layers, source, out, reports)
        yield Progress(block.name, block.index, block.count, reports, False)


def quantize_model(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    recipe: Recipe,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    dialect: str = "auto",
    activations: str = "ram",
    tokenizer: Any = None,
    on_block: Callable[[Progress], None] | None = None,
) -> Choice | nn.Module:
    """Quantize a causal language model.

    Args:
        model: a directory, a hub id, or a model in memory, whose layers are then replaced in place.
        out: directory of the checkpoint; required unless the model is in memory.
        dtype: of the computation; None is float32 on the CPU (weights and activations of 16 bits are exact in it), the
            checkpoint's own on other devices.
        tokenizer: for a model in memory; otherwise the one beside the weights.
        on_block: called after every finished block.

    Returns:
        The dialect of the checkpoint, and why; the model itself if it was in memory and ``out`` is None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: with one line that says what, where, and what to do.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, nn.Module):
        source: Source | MemorySource = MemorySource(model)
        if tokenizer is None:
            raise ValueError("a model in memory needs its tokenizer: quantize_model(model, tokenizer=...)")
    else:
        if out is None:
            raise ValueError("give a directory for the checkpoint")
        source = Source(model, dtype=dtype or (torch.float32 if device.type == "cpu" else None))
        tokenizer = tokenizer or load_tokenizer(source.path)
    chosen = check(source, recipe)
    if out is not None and dialect != "auto":
        planned = plan(recipe, {name: layer.bias is not None for name, layer in chosen.items()})
        choose(planned, dialect, dtype=config_dtype(source.config.to_dict()))
    data = load_calibration(
        tokenizer, recipe.calibration, samples=recipe.samples, seq_len=_length(source, recipe), batch_size=recipe.batch_size,
        seed=recipe.seed, field=recipe.field,
    )  # fmt: skip
    rank, ranks = world()
    batches = data.batches[rank::ranks]
    if out is None:
        _drive(quantize(source, batches, recipe, None, device=device, activations=activations), on_block)
        return source.skeleton()
    writer = CheckpointWriter(
        out, source_config=_config(source), recipe=recipe.to_dict(), provenance=_provenance(source, data.description),
        fingerprint=source.fingerprint, overwrite=overwrite, dialect=dialect,
    )  # fmt: skip
    with writer:
        _drive(quantize(source, batches, recipe, writer, device=device, activations=activations), on_block)
        return writer.finish(source.rest(), companion_files(source.path))


def _drive(steps: Iterator[Progress], on_block: Callable[[Progress], None] | None) -> None:
    for progress in steps:
        if on_block is not None:
            on_block(progress)


def _own(recipe: Recipe, name: str) -> Recipe:
    own = recipe.for_module(name)
    assert own is not None, name
    return own


def _rotations(recipe: Recipe, chosen: dict[str, nn.Linear]) -> list[int]:
    return sorted({size for name, layer in chosen.items() for size in _own(recipe, name).rotations(layer.in_features)})


def _feed(recipe: Recipe, name: str, x: Tensor) -> Tensor:
    """What a layer gets for ``x`` while its block is calibrated: rotated, quantized, and rotated back.

    The global scale is not known yet; every sequence takes its own, with the margin of a static one (G33).
    """
    own = _own(recipe, name)
    if not own.quantize_inputs:
        return x
    size = own.rotation if own.rotation != "auto" else Recipe.default(own.format, scheme=own.scheme).rotation
    rotation = Rotation(int(size) if size != "auto" and x.shape[-1] % int(size) == 0 else 1)
    sequences = x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
    quantized = []
    for rows in sequences:
        if not len(rows):
            quantized.append(rows)
            continue
        static = own.fmt.has_global_scale and own.input_scale == "static"
        scale = own.fmt.global_scale(rotation.exact(rows).abs().amax().float(), INPUT_MARGIN) if static else None
        result = quantize_inputs(rows, own.fmt, rotation, scale, own.input_rule).dequantize()
        quantized.append(rotation.exact(result).to(x.dtype))
    return torch.stack(quantized).reshape(x.shape)


def _jobs(block: CalibratedBlock, group: InputGroup, recipe: Recipe) -> list[Job]:
    """The layers of an input group, split where their recipes differ."""
    group.reduce()
    recipes: list[tuple[Recipe, list[str]]] = []
    for inner in group.layers:
        own = _own(recipe, f"{block.name}.{inner}")
        match = next((names for known, names in recipes if known == own), None)
        if match is None:
            recipes.append((own, [inner]))
        else:
            match.append(inner)
    try:
        hessian = group.hessian.mean()
    except ValueError as error:
        raise ValueError(f"{block.name}.{next(iter(group.layers))}: {error}") from error
    return [
        Job(
            names=tuple(f"{block.name}.{inner}" for inner in names),
            weights=tuple(group.layers[inner].weight for inner in names),
            hessian=hessian,
            holdout=group.holdout.mean() if group.holdout.tokens else None,
            amax=group.amax,
            sample=group.sample,
            tokens=group.hessian.tokens,
            recipe=own,
        )
        for own, names in recipes
    ]


def _install(block: CalibratedBlock, solved: Solved, recipe: Recipe) -> QuantLinear:
    """Put the quantized layer in the place of the original one."""
    inner = solved.name.removeprefix(f"{block.name}.")
    own, old = _own(recipe, solved.name), block.module.get_submodule(inner)
    layer = QuantLinear.from_quantized(
        solved.weight, solved.rotation, old.bias, quantize_inputs=own.quantize_inputs, input_global_scale=solved.input_scale,
        input_rule=own.input_rule or "default",
    )  # fmt: skip
    layer.cache = True  # the block runs over all batches once more
    block.module.set_submodule(inner, layer)
    return layer


def _write(
    block: CalibratedBlock, layers: dict[str, QuantLinear], source: Source | MemorySource, out: CheckpointWriter,
    reports: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Quantized layers as they are; everything else of the block as the source stores it, not as it was computed with."""
    tensors: dict[str, Tensor] = {}
    infos = {name: layer.info for name, layer in layers.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items() if key != "bias"}
    tensors = to_disk(tensors, infos)
    replaced = {f"{name}.weight" for name in layers}
    for name in source.names():
        module_name = source.module_name(name)
        if module_name.startswith(f"{block.name}.") and module_name not in replaced:
            tensors[name] = source.tensor(name)
    out.add(block.name, tensors, infos, reports)


def _reinstall(block: CalibratedBlock, out: CheckpointWriter, device: torch.device | str) -> None:
    """Replace the layers of a block that an earlier run finished."""
    infos = out.layers(block.name)
    tensors = from_disk(out.read(block.name), infos)
    for name, info in infos.items():
        inner = name.removeprefix(f"{block.name}.")
        old = block.module.get_submodule(inner)
        layer = QuantLinear.from_info(info, old.in_features, old.out_features)
        own = {key: tensors[f"{name}.{key}"].to(device) for key in layer.state_dict() if key != "bias"}
        layer.load_state_dict(own, assign=True, strict=False)
        layer.bias, layer.cache = (None if old.bias is None else old.bias.detach()), True
        block.module.set_submodule(inner, layer)


def _length(source: Source | MemorySource, recipe: Recipe) -> int:
    """The length of a calibration sequence: the recipe's, but no more positions than the model has."""
    limit = getattr(source.config, "max_position_embeddings", None)
    return min(recipe.seq_len, limit) if isinstance(limit, int) else recipe.seq_len


def _config(source: Source | MemorySource) -> dict[str, Any]:
    path = source.path / "config.json"
    return json.loads(path.read_text()) if isinstance(source, Source) else source.config.to_dict()


def _provenance(source: Source | MemorySource, calibration: dict[str, Any]) -> dict[str, Any]:
    return {
        "ptq": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "source": source.path.name,
        "fingerprint": source.fingerprint, "calibration": calibration,
    }  # fmt: skip
