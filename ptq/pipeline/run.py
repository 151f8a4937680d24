"""Model in, packed checkpoint out: the loop over decoder blocks.

source ─▶ walk: Hessian and samples per input group ─▶ solve: codes and scales ─▶ QuantLinear
             ▲                                                                        │
             └──────────── the next block sees what the quantized block produces ◀────┴─▶ disk
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ptq import __version__
from ptq.calib.hidden_states import check_storage
from ptq.calib.output_costs import OutputCosts
from ptq.calib.walk import CalibratedBlock, held_out, walk
from ptq.checkpoint.companions import companion_files
from ptq.checkpoint.destination import check_destination, chosen_by
from ptq.checkpoint.dialect_choice import Choice, Readers
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.writer import CheckpointWriter, config_dtype
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource
from ptq.model.origin import hub_name, licence
from ptq.model.source import Source
from ptq.model.structure import GENERATION, read_generation_config
from ptq.model.tied_weights import says_untied
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.blocks_on_disk import Blocks, BlocksInMemory, BlocksOnDisk
from ptq.pipeline.budget import allocate, room
from ptq.pipeline.key_values import install_key_values
from ptq.pipeline.memory import statistics_limit
from ptq.pipeline.output_costs import output_costs
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import from_first, share, world
from ptq.pipeline.readers import plan_for
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Solved
from ptq.pipeline.tasks import Task, reduce, tasks
from ptq.pipeline.tuned_codes import latents_of
from ptq.pipeline.tuning import Step, check_tunable, tune
from ptq.pipeline.tuning_text import TuningText, load_tuning_text
from ptq.reading.schema import as_json
from ptq.runtime.quant_linear import QuantLinear
from ptq.text.windows import Calibration, load_calibration, load_tokenizer

logger = logging.getLogger(__name__)

UNREAD = 8  # tokens that stand for a text which nothing depends on
LOST = 0.5  # of a layer's output: no format is that coarse by itself


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A block that is finished.

    Attributes:
        index, count: its number, from 0, and how many blocks there are.
        reports: of its layers; none if ``resumed``: an earlier run finished it.
    """

    block: str
    index: int
    count: int
    reports: list[LayerReport]
    resumed: bool


@torch.no_grad()
def quantize(
    source: Source,
    batches: Sequence[Tensor],
    plan: Plan,
    finished_blocks: Blocks,
    *,
    device: torch.device | str = "cpu",
    activations: str = "ram",
    held: Sequence[Tensor | None] | None = None,
    finished: Callable[[int, Tensor], None] | None = None,
    limit: Callable[[], float] = lambda: math.inf,
    costs: OutputCosts | None = None,
) -> Iterator[Progress]:
    """Quantize the blocks of ``source`` one after the other, keeping each as soon as it is
    finished.

    Args:
        batches: token ids, each (sequences, length).
        activations, held, finished, limit: see :func:`ptq.calib.walk.walk`.
        costs: of the outputs of layers, where the recipe wants them.

    Yields:
        One :class:`Progress` per block.
    """
    balancing = Balancing(plan)
    blocks = walk(
        source,
        batches,
        plan.watch(),
        device=device,
        skip=finished_blocks.has,
        held=held,
        activations=activations,
        finished=finished,
        prepare=balancing if plan.balances else None,
        limit=limit,
    )
    for block in blocks:
        resumed, reports = finished_blocks.has(block.name), list[LayerReport]()
        if resumed:
            finished_blocks.reinstall(block)
        else:
            solved = solve_block(block, plan, costs)
            latents = latents_of(block, solved, plan)
            layers, reports = install(block, solved, plan, balancing)
            tell(block, reports, plan)
            install_key_values(block)
            finished_blocks.add(block, layers, reports, balancing.changes_of(block), latents)
            del solved, layers, latents
        block.forget()
        yield Progress(
            block=block.name,
            index=block.index,
            count=block.count,
            reports=reports,
            resumed=resumed,
        )


def solve_block(
    block: CalibratedBlock, plan: Plan, costs: OutputCosts | None = None
) -> list[Solved]:
    """The quantized layers of a block, in the order of its groups however many rounds it takes."""
    solved = [
        result
        for groups in block.rounds(reduce)
        for results in share(tasks(block, groups, plan, costs), Task.solve)
        for result in results
    ]
    order = {
        f"{block.prefix}{name}": index
        for index, group in enumerate(block.groups)
        for name in group.layers
    }
    return sorted(solved, key=lambda result: order[result.name])


def install(
    block: CalibratedBlock, solved: Sequence[Solved], plan: Plan, balancing: Balancing
) -> tuple[dict[str, QuantLinear], list[LayerReport]]:
    """Put quantized layers in the places of the original ones; return them by full name, and the
    reports of all."""
    layers: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    for result in solved:
        recipe, inner = plan[result.name].recipe, result.name.removeprefix(block.prefix)
        old = block.module.get_submodule(inner)
        result = result.to(next(old.parameters()).device)
        layer = QuantLinear.from_quantized(
            result.weight,
            result.rotation,
            getattr(old, "bias", None),
            quantize_inputs=recipe.quantize_inputs,
            input_global_scale=result.input_scale,
            input_rule=recipe.stored_input_rule(result.rotation.size),
            nested=recipe.nested,
        )
        layer.cache = True  # the block runs over all batches once more
        block.module.set_submodule(inner, layer)
        layers[result.name] = layer
        strength = balancing.strengths.get(result.name, 0.0)
        reports.append(replace(result.report, balance=strength))
    return layers, reports


def tell(block: CalibratedBlock, reports: Sequence[LayerReport], plan: Plan) -> None:
    """What the user should know of a block: nothing that changes the numbers happens silently."""
    for report in reports:
        logger.info(
            "%s %s rotation %d error %.2e (rtn %.2e) damping %g %.1fs",
            report.name,
            report.format,
            report.rotation,
            report.error,
            report.rtn_error,
            report.damping,
            report.seconds,
        )
        recipe = plan[report.name].recipe
        if report.damping > recipe.damping:
            logger.warning(
                "%s: its Hessian is not positive definite at damping %g; used %g",
                report.name,
                recipe.damping,
                report.damping,
            )
        if recipe.algorithm != "rtn" and report.algorithm == "rtn":
            if report.error == report.rtn_error == report.damping == 0:
                reason = "reads nothing but zeros during calibration; rounded to nearest"
            else:
                reason = f"{recipe.algorithm.upper()} did not beat round to nearest, which was kept"
            logger.warning("%s: %s", report.name, reason)
        if report.error > LOST:
            logger.warning(
                "%s: %.0f %% of its output is lost: it is so much smaller than layers that engines "
                "fuse it with that one global scale cannot serve both; leave it out with --ignore",
                report.name,
                100 * min(report.error, 1),
            )
    if rare := [report.tokens for report in reports if report.topped_up]:
        logger.warning(
            "%s: %d expert layers saw fewer tokens than they have inputs (the least %d) and "
            "borrowed from the others; raise --samples, or use --route-all-experts",
            block.name,
            len(rare),
            min(rare),
        )


def quantize_model(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    recipe: Recipe,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    dialect: str | Readers = "auto",
    activations: str = "ram",
    hessian_memory: float | None = None,
    tokenizer: Any = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_block: Callable[[Progress | Step], None] | None = None,
) -> Choice | nn.Module:
    """Quantize a causal language model.

    Args:
        model: a directory, a hub id, or a model in memory, whose layers are then replaced in place.
        out: directory of the checkpoint; required unless the model is in memory.
        dialect: how it is written, and for whom.
        dtype: of the computation; None is float32 on the CPU (weights and activations of 16 bits
            are exact in it), the checkpoint's own on other devices.
        hessian_memory: bytes that the statistics of a block's experts may take at a time; None is a
            part of what is free. Results do not depend on it.
        tokenizer: for a model in memory; otherwise the one beside the weights.
        on_plan: called when the text is there and before any weight is read; once more where
            layers that get eight bits had to be found first (``about_budget``).
        on_block: called after every finished block, and after every step of tuning.

    Returns:
        The dialect of the checkpoint, and why; the model itself if it was in memory and ``out`` is
        None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: with one line that says what, where, and
            what to do.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_storage(activations)
    readers = Readers.of(dialect)
    source, tokenizer = _opened(model, out, device, dtype, tokenizer)
    stored = config_dtype(_config(source)) or "float32"
    settle = partial(
        plan_for,
        source,
        dialect=None if out is None else readers.dialect,
        target=readers.target,
        dtype=stored,
        device=device.type,
    )
    settled = cache(lambda: settle(recipe=recipe))

    def asked() -> dict[str, object]:
        return as_json(settled().recipe.to_dict())

    companions: list[Path] = []
    chosen = None
    if out is not None:
        out = check_destination(out, source.path, overwrite=overwrite, recipe=asked)
        companions = _companions(source)
        chosen = None if overwrite else chosen_by(out, asked())
    plan = settled()
    room(plan)
    on_disk = out is not None and isinstance(source, CheckpointSource)
    check_tunable(plan, on_disk=on_disk, ranks=world()[1])
    data = _calibration(plan, tokenizer)
    text = load_tuning_text(plan, tokenizer) if plan.recipe.tune else None
    extra: dict[str, object] = {"asked": asked()} if plan.allocates else {}
    if chosen is not None:  # what this run chose when it finished; the writer looks at the rest
        plan = settle(recipe=Recipe.from_dict(dict(chosen)))
    if on_plan is not None:
        on_plan(plan)
    if plan.allocates:
        found = allocate(source, plan, data.batches, device=device, activations=activations)
        plan = replace(settle(recipe=found.applied_to(recipe, plan)), about_budget=str(found))
        if on_plan is not None:
            on_plan(plan)
    rank, ranks = world()

    def run(blocks: Blocks) -> None:
        # the same sequences are held out whatever the number of ranks
        held = held_out([len(batch) for batch in data.batches])
        measured = nullcontext()
        if plan.recipe.fisher:  # the same on every rank
            measured = output_costs(
                source,
                plan,
                data.batches,
                device=device,
                activations=activations,
                until=sum(1 for _ in takewhile(blocks.has, (name for name, _ in source.blocks()))),
            )
        with measured as costs:
            for progress in quantize(
                source,
                data.batches[rank::ranks],
                plan,
                blocks,
                device=device,
                activations=activations,
                held=held[rank::ranks],
                limit=lambda: from_first(statistics_limit(device, hessian_memory)),
                costs=costs,
            ):
                if on_block is not None:
                    on_block(progress)

    if out is None:
        run(BlocksInMemory())
        return source.skeleton()
    writer = CheckpointWriter(
        out,
        source_config=_config(source),
        recipe=plan.recipe.to_dict(),
        provenance=_provenance(source, data, text) | extra,
        fingerprint=source.fingerprint,
        weights=source.digests(None),
        overwrite=overwrite,
        dialect=readers.dialect,
        target=readers.target,
        foreign=plan.foreign,
        kv_cache=plan.recipe.kv_cache,
    )
    (done,) = from_first([writer.done])
    if done is not None:
        if rank == 0:
            writer.settle()
        return done
    with _owned(writer):
        blocks = BlocksOnDisk(source=source, writer=writer, device=device)
        if text is None or not all(blocks.has(name) for name, _ in source.blocks()):
            run(blocks)
        if text is not None:
            tune(source, plan, blocks, text, activations=activations, on_step=on_block)
        if rank != 0:
            return from_first(None)
        rest = source.rest([plan.head] if plan.head else [])
        return from_first(writer.finish(rest, companions))


def _opened(
    model: str | Path | nn.Module,
    out: str | Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    tokenizer: Any,
) -> tuple[Source, Any]:
    """The model as a source, and its tokenizer."""
    if isinstance(model, nn.Module):
        source = MemorySource(model)
        if tokenizer is None:
            raise ValueError(
                "a model in memory needs its tokenizer: quantize_model(model, tokenizer=...)"
            )
        return source, tokenizer
    if out is None:
        raise ValueError("give a directory for the checkpoint")
    source = CheckpointSource.on(model, device, dtype, hashed=True)
    return source, tokenizer or load_tokenizer(source.path)


def _companions(source: Source) -> list[Path]:
    """What is copied from beside the weights: nothing that we could not load ourselves."""
    files = companion_files(source.path)
    if any(f.name == GENERATION for f in files) and read_generation_config(source.path) is None:
        return [f for f in files if f.name != GENERATION]
    return files


def _calibration(plan: Plan, tokenizer: Any) -> Calibration:
    """The calibration data of a run; ValueError if there are fewer batches than ranks.

    Where nothing depends on the text none is read: a few tokens, whichever, show which layers read
    the same.
    """
    recipe, ranks = plan.recipe, world()[1]
    if not plan.reads_text:
        tokens = torch.zeros(1, min(UNREAD, plan.seq_len), dtype=torch.int64)
        return Calibration([tokens] * ranks, {"source": None, "tokens": 0})
    data = load_calibration(
        tokenizer,
        recipe.calibration,
        samples=plan.samples,
        seq_len=plan.seq_len,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        field=recipe.field,
    )
    if len(data.batches) < ranks:
        raise ValueError(
            f"{ranks} processes need as many batches and there are {len(data.batches)}; lower "
            "--batch-size or raise --samples"
        )
    return data


@contextmanager
def _owned(writer: CheckpointWriter) -> Iterator[None]:
    """Rank 0 owns the directory; the others read the blocks that it found intact."""
    if world()[0] == 0:
        with writer:
            from_first(sorted(writer.blocks))
            yield
    else:
        intact = from_first(None)
        writer.blocks = {name: writer.blocks[name] for name in intact or ()}
        yield


def _config(source: Source) -> dict[str, object]:
    """config.json as it is beside the weights, but for matrices that it ties and they do not; of a
    model in memory as transformers would write it."""
    if isinstance(source, MemorySource):
        written = source.config.to_dict()
    else:
        written = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return says_untied(written, source.config, source.skeleton())


def _origin(directory: Path) -> dict[str, object]:
    """``source``, on the hub if it is from there, with the commit; and its licence."""
    named = hub_name(directory)
    where = {"source": directory.name}
    if named is not None:
        where = {"source": named[0], "commit": named[1]}
    return {**where, **licence(directory)}


def _provenance(source: Source, data: Calibration, text: TuningText | None) -> dict[str, object]:
    """Where a checkpoint comes from. The dtype of the computation is part of it: a run that
    continues in another one would not be the same run."""
    dtype = str(source.compute_dtype).removeprefix("torch.")
    return {
        "ptq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **_origin(source.path),
        "fingerprint": source.fingerprint,
        "calibration": data.description
        | {"dtype": dtype}
        | ({} if text is None else {"tuning": text.description}),
    }
