"""Model in, packed checkpoint out: the loop over decoder blocks.

source ─▶ walk: Hessian and samples per input group ─▶ solve: codes and scales ─▶ QuantLinear replaces the layer
             ▲                                                                        │        └─▶ shard on disk
             └──────────── the next block sees what the quantized block produces ◀────┘
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ptq import __version__
from ptq.calib.observer import InputGroup
from ptq.calib.rare_experts import pool_key
from ptq.calib.walk import CalibratedBlock, held_out, walk
from ptq.checkpoint.dialect_choice import Choice, choose
from ptq.checkpoint.writer import CheckpointWriter, companion_files, config_dtype
from ptq.model.checkpoint_source import Source
from ptq.model.memory_source import MemorySource
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.rotation import Rotation
from ptq.pipeline.balancing import Balancing, reduce
from ptq.pipeline.blocks_on_disk import reinstall, write
from ptq.pipeline.plan import plan
from ptq.pipeline.ranks import from_first, share, world
from ptq.pipeline.recipe import Recipe, chosen_layers, layer_recipe
from ptq.pipeline.solve import INPUT_MARGIN, Job, Solved, solve
from ptq.runtime.quant_linear import QuantLinear
from ptq.text.windows import load_calibration, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A block that is finished: its reports, and how many blocks there are."""

    block: str
    index: int
    count: int
    reports: list[dict[str, object]]
    resumed: bool


@torch.no_grad()
def quantize(
    source: Source | MemorySource,
    batches: Sequence[Tensor],
    recipe: Recipe,
    out: CheckpointWriter | None,
    *,
    device: torch.device | str = "cpu",
    activations: str = "ram",
    held: Sequence[Tensor | None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Progress]:
    """Quantize the blocks of ``source`` one after the other, writing each as soon as it is
    finished.

    Args:
        batches: token ids, each (sequences, length).
        out: None keeps the result in the model of a :class:`MemorySource`.
        activations, held, finished: see :func:`ptq.calib.walk.walk`.

    Yields:
        One :class:`Progress` per block.
    """
    # by name: a reference to the layers themselves would keep their weights after they are replaced
    chosen = {name: layer.in_features for name, layer in _chosen(source, recipe).items()}
    probes = {size: Rotation(size).exact for size in _rotations(recipe, chosen)}
    feed = (
        partial(_feed, recipe)
        if any(layer_recipe(recipe, name).quantize_inputs for name in chosen)
        else None
    )
    balancing = (
        Balancing(recipe) if any(layer_recipe(recipe, name).balance for name in chosen) else None
    )
    blocks = walk(
        source,
        batches,
        probes=probes,
        skip=out.has if out else lambda _: False,
        feed=feed,
        ignore=lambda name: name not in chosen,
        device=device,
        activations=activations,
        held=held,
        finished=finished,
        prepare=balancing,
        route_all=recipe.route_all_experts,
        head=recipe.lm_head,
    )
    for block in blocks:
        if out is not None and out.has(block.name):
            reinstall(block, source, out, device)
            yield Progress(block.name, block.index, block.count, [], True)
            continue
        shared = share(_tasks(block, recipe), _Task.solve)
        solved = [result.to(device) for results in shared for result in results]
        layers = {result.name: _install(block, result, recipe) for result in solved}
        reports = [
            result.report
            | {"balance": balancing.strengths.get(result.name, 0.0) if balancing else 0.0}
            for result in solved
        ]
        for report in reports:
            logger.info(
                "%s %s rotation %d error %.2e (rtn %.2e) damping %g %.1fs",
                report["layer"],
                report["format"],
                report["rotation"],
                report["error"],
                report["rtn_error"],
                report["damping"],
                report["seconds"],
            )
            _warn(report, layer_recipe(recipe, str(report["layer"])))
        if rare := [int(str(report["tokens"])) for report in reports if report["topped_up"]]:
            logger.warning(
                "%s: %d expert layers saw fewer tokens than they have inputs (the least %d) and "
                "borrowed from "
                "the others; raise --samples, or use --route-all-experts",
                block.name, len(rare), min(rare),
            )  # fmt: skip
        if out is not None and world()[0] == 0:
            write(block, layers, balancing.of(block) if balancing else {}, source, out, reports)
        del shared, solved, layers
        # while the next block is observed nobody holds the statistics and layers of this one
        block.groups.clear()
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
        dtype: of the computation; None is float32 on the CPU (weights and activations of 16 bits
            are exact in it), the checkpoint's own on other devices.
        tokenizer: for a model in memory; otherwise the one beside the weights.
        on_block: called after every finished block.

    Returns:
        The dialect of the checkpoint, and why; the model itself if it was in memory and ``out`` is
        None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: with one line that says what, where, and
            what to do.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, nn.Module):
        source: Source | MemorySource = MemorySource(model)
        if tokenizer is None:
            raise ValueError(
                "a model in memory needs its tokenizer: quantize_model(model, tokenizer=...)"
            )
    else:
        if out is None:
            raise ValueError("give a directory for the checkpoint")
        source = Source(model, dtype=dtype or (torch.float32 if device.type == "cpu" else None))
        tokenizer = tokenizer or load_tokenizer(source.path)
    biased = {name: layer.bias is not None for name, layer in _chosen(source, recipe).items()}
    if out is not None and dialect != "auto":
        planned = plan(recipe, biased)
        choose(
            planned,
            dialect,
            dtype=config_dtype(_config(source)) or "float32",
            foreign=_foreign(source, recipe),
        )
    data = load_calibration(
        tokenizer,
        recipe.calibration,
        samples=recipe.samples,
        seq_len=_length(source, recipe),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        field=recipe.field,
    )
    rank, ranks = world()
    if len(data.batches) < ranks:
        raise ValueError(
            f"{ranks} processes need as many batches and there are {len(data.batches)}; lower "
            "--batch-size "
            "or raise --samples"
        )
    held = held_out(
        [len(batch) for batch in data.batches]
    )  # the same sequences whatever the number of ranks
    run = partial(
        quantize, source, data.batches[rank::ranks], recipe, device=device, activations=activations
    )
    run = partial(run, held=held[rank::ranks])
    if out is None:
        _drive(run(out=None), on_block)
        return source.skeleton()
    writer = CheckpointWriter(
        out,
        source_config=_config(source),
        recipe=recipe.to_dict(),
        provenance=_provenance(source, data.description | {"dtype": _dtype_name(source)}),
        fingerprint=source.fingerprint,
        overwrite=overwrite,
        dialect=dialect,
        foreign=_foreign(source, recipe),
    )
    heads = [source.head()[0]] if recipe.lm_head else []
    with _opened(writer):
        _drive(run(out=writer), on_block)
        return from_first(
            writer.finish(source.rest(heads), companion_files(source.path)) if rank == 0 else None
        )


@contextmanager
def _opened(writer: CheckpointWriter) -> Iterator[None]:
    """Rank 0 owns the directory; the others read the blocks that it found intact."""
    if world()[0] == 0:
        with writer:
            from_first(sorted(writer.blocks))
            yield
    else:
        intact = from_first(None)
        writer.blocks = {name: writer.blocks[name] for name in intact or ()}
        yield


def _foreign(source: Source | MemorySource, recipe: Recipe) -> str | None:
    """Why engines cannot find the layers of a checkpoint under their names; None if they can."""
    return "engines do not look for a quantized output head" if recipe.lm_head else source.foreign()


def _drive(steps: Iterator[Progress], on_block: Callable[[Progress], None] | None) -> None:
    for progress in steps:
        if on_block is not None:
            on_block(progress)


def _chosen(source: Source | MemorySource, recipe: Recipe) -> dict[str, nn.Linear]:
    return chosen_layers(source.blocks(), recipe, source.head() if recipe.lm_head else None)


def _rotations(recipe: Recipe, features: dict[str, int]) -> list[int]:
    """The block sizes that any layer may be rotated by."""
    return sorted(
        {
            size
            for name, count in features.items()
            for size in layer_recipe(recipe, name).rotations(count)
        }
    )


def _feed(recipe: Recipe, name: str, x: Tensor) -> Tensor:
    """What a layer gets for ``x`` while its block is calibrated: rotated, quantized, and rotated
    back.

    The global scale is not known yet; every sequence takes its own, with the margin of a static one
    (G33).
    """
    own = layer_recipe(recipe, name)
    if not own.quantize_inputs:
        return x
    size = (
        own.rotation
        if own.rotation != "auto"
        else Recipe.default(own.format, scheme=own.scheme).rotation
    )
    rotation = Rotation(int(size) if size != "auto" and x.shape[-1] % int(size) == 0 else 1)
    sequences = x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
    quantized = []
    for rows in sequences:
        if not len(rows):
            quantized.append(rows)
            continue
        static = own.fmt.has_global_scale and own.input_scale == "static"
        scale = (
            own.fmt.global_scale(rotation.exact(rows).abs().amax().float(), INPUT_MARGIN)
            if static
            else None
        )
        result = quantize_inputs(rows, own.fmt, rotation, scale, own.input_rule).dequantize()
        quantized.append(rotation.exact(result).to(x.dtype))
    return torch.stack(quantized).reshape(x.shape)


@dataclass(frozen=True)
class _Task:
    """A job before its Hessian is made: one group's at a time, on the rank that solves it."""

    block: CalibratedBlock
    group: InputGroup
    inner: list[str]
    recipe: Recipe

    @property
    def cost(self) -> int:
        """Work in multiply-adds: the sweep over all rows and the factorisation."""
        features = self.group.hessian.features
        return (
            features
            * features
            * (sum(self.group.layers[name].out_features for name in self.inner) + features)
        )

    def solve(self) -> list[Solved]:
        """Results travel between ranks through host memory."""
        block, group = self.block, self.group
        rare = group.hessian.tokens < group.hessian.features
        topped_up = rare and pool_key(block.module, next(iter(group.layers))) is not None
        job = Job(
            names=tuple(f"{block.prefix}{name}" for name in self.inner),
            weights=tuple(group.layers[name].weight for name in self.inner),
            hessian=block.hessian(group),
            holdout=group.holdout.mean() if group.holdout.tokens and not topped_up else None,
            amax=group.amax,
            sample=group.sample,
            tokens=group.hessian.tokens,
            topped_up=topped_up,
            recipe=self.recipe,
        )
        results = solve(job)
        return results if world()[1] == 1 else [result.to("cpu") for result in results]


def _tasks(block: CalibratedBlock, recipe: Recipe) -> list[_Task]:
    """The layers of every input group, split where their recipes differ."""
    reduce(block)
    tasks = []
    for group in block.groups:
        own: list[_Task] = []
        for inner in group.layers:
            chosen = layer_recipe(recipe, f"{block.prefix}{inner}")
            task = next((task for task in own if task.recipe == chosen), None)
            if task is None:
                own.append(_Task(block, group, [inner], chosen))
            else:
                task.inner.append(inner)
        tasks += own
    return tasks


def _install(block: CalibratedBlock, solved: Solved, recipe: Recipe) -> QuantLinear:
    """Put the quantized layer in the place of the original one."""
    inner = solved.name.removeprefix(block.prefix)
    chosen, old = layer_recipe(recipe, solved.name), block.module.get_submodule(inner)
    bias = getattr(old, "bias", None)
    layer = QuantLinear.from_quantized(
        solved.weight,
        solved.rotation,
        bias,
        quantize_inputs=chosen.quantize_inputs,
        input_global_scale=solved.input_scale,
        input_rule=chosen.input_rule or "default",
    )
    layer.cache = True  # the block runs over all batches once more
    block.module.set_submodule(inner, layer)
    return layer


def _warn(report: dict[str, object], recipe: Recipe) -> None:
    """What the user should know of a layer: nothing that changes the numbers happens silently."""
    layer, damping = report["layer"], float(str(report["damping"]))
    if damping > recipe.damping:
        logger.warning(
            "%s: its Hessian is not positive definite at damping %g; used %g",
            layer,
            recipe.damping,
            damping,
        )
    if recipe.algorithm == "gptq" and report["algorithm"] == "rtn":
        logger.warning("%s: GPTQ did not beat round to nearest, which was kept", layer)


def _length(source: Source | MemorySource, recipe: Recipe) -> int:
    """The length of a calibration sequence: the recipe's, but no more positions than the model
    has."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return min(recipe.seq_len, limit) if isinstance(limit, int) else recipe.seq_len


def _dtype_name(source: Source | MemorySource) -> str:
    """Of the computation; a run that continues in another one would not be the same run."""
    return str(source.compute_dtype).removeprefix("torch.")


def _config(source: Source | MemorySource) -> dict[str, object]:
    path = source.path / "config.json"
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if isinstance(source, Source)
        else source.config.to_dict()
    )


def _provenance(source: Source | MemorySource, calibration: dict[str, object]) -> dict[str, object]:
    return {
        "ptq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "source": source.path.name,
        "fingerprint": source.fingerprint,
        "calibration": calibration,
    }
