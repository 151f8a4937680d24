"""CheckpointWriter: a checkpoint written block by block, which survives interruption and appears
when it is complete.

    <out>.partial/progress.json              the run, and its finished blocks (progress_file)
    <out>.partial/block-<name>.safetensors   a finished block, as the ``ptq`` dialect stores it
    <out>.partial/tuning-<step>.safetensors  all that tuning needs to go on
    <out>.partial/finished/                  made by finish(); becomes <out> (work_folder)

Every file is durable before progress.json names it. The dialect is decided at the end, when all
layers are known.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ptq.checkpoint.checksums import write_sums
from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialect_choice import Choice, choose
from ptq.checkpoint.dialects import DIALECTS, READ
from ptq.checkpoint.engines import TARGETS, refusals
from ptq.checkpoint.layer_checks import GLOBALS, check_layer
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.model_card import model_card
from ptq.checkpoint.progress_file import NAME as PROGRESS
from ptq.checkpoint.progress_file import WEIGHTS, Block, ProgressFile
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, natural, summarize
from ptq.checkpoint.reader import REPORT, Checkpoint, config_dtype
from ptq.checkpoint.safetensors_files import (
    read_tensor,
    write_file,
    write_json,
    write_tensors,
)
from ptq.checkpoint.shards import SHARD_BYTES, write_shards
from ptq.checkpoint.tuning_report import TuningReport, TuningState
from ptq.checkpoint.work_folder import WorkFolder
from ptq.reading.safetensors_layout import Entry, read_header
from ptq.reading.schema import as_json

# Of what changes numbers, if only in their last bits: a run that another version continues would
# not be the run that its provenance says.
VERSIONS = ("ptq", "torch", "transformers")


class CheckpointWriter:
    """Context manager over an output directory; one process enters it. What others construct may
    only be read.

    Blocks that an earlier, interrupted run finished are kept if they belong to the same recipe,
    source and calibration data; those whose file is not what was recorded are forgotten, to be made
    again. Leaving the context before a block is finished removes everything; later,
    ``<out>.partial`` stays for the next run.

    Attributes:
        done: the dialect of what is at ``path``, if that is what this run would write and nothing
            is left to do but :meth:`settle`; None otherwise.
        tuning: how far it is, inside the context; None if it has not begun.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        source_config: JsonDict,
        recipe: JsonDict,
        provenance: JsonDict,
        fingerprint: str,
        weights: Mapping[str, str] | None = None,
        overwrite: bool = False,
        dialect: str = "auto",
        target: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        foreign: str | None = None,
        kv_cache: str | None = None,
    ) -> None:
        """Check that the run can start or continue. Nothing is written yet.

        Args:
            source_config: config.json of the source model.
            recipe, provenance: plain JSON; a continued run must have the same ``calibration`` and
                versions of ``VERSIONS`` in its provenance.
            fingerprint: identifies the source.
            weights: hashes of tensors outside of blocks, as far as the fingerprint does not tell
                them apart.
            overwrite: replace a checkpoint at ``path``, once the new one is complete.
            kv_cache: how keys and values are kept, if blocks have scales for them.
            dialect, target, foreign: see :func:`ptq.checkpoint.dialect_choice.choose`; they may
                differ between the runs of one checkpoint.

        Raises:
            FileExistsError: ``path`` exists and is not an empty directory.
            ValueError: ``<path>.partial`` is of a different run, or not of ptq.
        """
        self.foreign, self.kv_cache = foreign, kv_cache
        self.path = Path(os.path.abspath(path))
        self.work = WorkFolder(self.path, overwrite=overwrite)
        self.partial = self.work.path
        self.source_config, self.dialect, self.target = source_config, dialect, target
        self.shard_bytes = shard_bytes
        self.recipe, self.provenance = as_json(recipe), as_json(provenance)
        identity = {
            "recipe": self.recipe,
            "source": fingerprint,
            "calibration": self.provenance.get("calibration"),
            "versions": {name: self.provenance.get(name) for name in VERSIONS},
            WEIGHTS: dict(weights or {}),
        }
        self.progress = ProgressFile(self.partial, identity)
        self.blocks: dict[str, Block] = {}
        self.tuning: TuningState | None = None
        self.done = self._done(overwrite)
        if self.done is None:
            self.work.check()
            if not self.work.published:  # else the remains of a run that is complete
                self.blocks = self.progress.read()

    def _done(self, overwrite: bool) -> Choice | None:
        if overwrite and not self.work.published:
            return None  # a checkpoint that is to be made anew
        try:
            found = Checkpoint(self.path)
        except (OSError, ValueError):
            return None
        made = found.parsed
        if (made.recipe, made.provenance) != (self.recipe, self.provenance):
            return None
        if self.dialect not in ("auto", found.dialect) or not self._serves(found):
            return None
        return Choice(found.dialect, "an earlier run of the same command had finished it")

    def _serves(self, found: Checkpoint) -> bool:
        """Whether a checkpoint is for the engines of the target."""
        openings = READ[found.dialect].opens(found.layers)
        return self.target is None or not refusals(openings, TARGETS[self.target])

    def settle(self) -> None:
        """Remove what a run that is ``done`` left behind: it was killed in its last moments.

        Raises:
            ValueError: another process is just doing it.
        """
        assert self.done is not None
        self.work.settle()

    def __enter__(self) -> "CheckpointWriter":
        """Take possession of ``<out>.partial``; raises ValueError if another process has it, or it
        is not ours."""
        self.work.open()
        try:
            if not self.work.published:
                self.blocks = self.progress.intact()
                self.tuning = self.progress.tuning(self.blocks)
            self.work.clear(self._files())
            self.progress.write(self.blocks, self.tuning)  # from now on the folder says whose it is
            self.work.begin()
        except BaseException:
            self.work.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not self.blocks:
                self.work.remove()
        finally:
            self.work.close()

    def _files(self) -> set[str]:
        """What the run goes on from."""
        state = self.tuning.file if self.tuning is not None else None
        return {b.file for b in self.blocks.values()} | {PROGRESS} | ({state} if state else set())

    def abandon(self) -> None:
        """Forget all blocks: what is refused is not continued, and leaving the context removes
        it."""
        self.blocks = {}

    def has(self, block: str) -> bool:
        """Whether a block is finished."""
        return block in self.blocks

    def read(self, block: str) -> dict[str, Tensor]:
        """The tensors of a finished block as they lie on disk (``from_disk`` turns them into a
        state dict)."""
        return {
            name: read_tensor(entry)
            for name, entry in read_header(self.partial / self.blocks[block].file).items()
        }

    def check_weights(self, block: str, weights: Mapping[str, str]) -> None:
        """Raise ValueError unless a finished block was made of ``weights``, hashes by tensor of the
        source."""
        self.progress.check(self.blocks[block], weights)

    def layers(self, block: str) -> dict[str, LayerInfo]:
        """The quantized layers of a finished block."""
        return dict(self.blocks[block].layers)

    def add(
        self,
        block: str,
        tensors: Mapping[str, Tensor],
        layers: Mapping[str, LayerInfo],
        reports: Sequence[LayerReport],
        weights: Mapping[str, str] | None = None,
    ) -> None:
        """Write a finished block; when this returns it survives a loss of power.

        Args:
            tensors: all tensors of the block by full name, as :func:`ptq.checkpoint.reader.to_disk`
                returns them.
            layers: its quantized layers by full name, in the order of the model.
            reports: one for each layer, under its name in the checkpoint.
            weights: hashes of what it was made of, see :meth:`check_weights`.

        Raises:
            ValueError: a layer that no reader would take; blocks that were finished before stay.
            OSError: no space left; likewise.
        """
        assert self.work.held, "only inside the context"
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in by_layer:
                by_layer[owner][leaf] = tensor
        for name, info in layers.items():
            check_layer(by_layer[name], info, name)  # what cannot be loaded is not written
        file = f"block-{block}.safetensors"
        digest = write_tensors(self.partial / file, tensors)
        made = Block(file, digest, dict(weights or {}), dict(layers), tuple(reports))
        finished = self.blocks | {block: made}
        self.progress.write(finished, self.tuning)
        self.blocks = finished

    def save_tuning(self, tensors: Mapping[str, Tensor], report: TuningReport) -> None:
        """Keep all that tuning needs to go on; when this returns it survives a loss of power."""
        assert self.work.held, "only inside the context"
        file = f"tuning-{report.done:05}.safetensors"
        digest = write_tensors(self.partial / file, tensors)
        self.tuning = TuningState(report, file, digest)
        self.progress.write(self.blocks, self.tuning)
        self.work.clear(self._files())

    def read_tuning(self) -> dict[str, Tensor]:
        """What was kept last by :meth:`save_tuning`."""
        assert self.tuning is not None and self.tuning.file is not None
        entries = read_header(self.partial / self.tuning.file)
        return {name: read_tensor(entry) for name, entry in entries.items()}

    def replace(
        self, blocks: Mapping[str, Callable[[], Mapping[str, Tensor]]], report: TuningReport
    ) -> None:
        """Replace the tensors of all blocks by those that tuning made of them: all at once, or none
        if the process is killed meanwhile.

        Args:
            blocks: what gives the tensors of a block, as :meth:`add` takes them, by its name.
        """
        assert self.work.held and blocks.keys() == self.blocks.keys()
        finished = dict(self.blocks)
        for name, tensors in blocks.items():
            file = f"tuned-{self.blocks[name].file}"
            digest = write_tensors(self.partial / file, tensors())
            finished[name] = replace(self.blocks[name], file=file, sha256=digest)
        self.progress.write(finished, TuningState(report))
        self.blocks, self.tuning = finished, TuningState(report)

    def finish(
        self, rest: Iterable[tuple[str, Tensor]], extra_files: Iterable[Path] = ()
    ) -> Choice:
        """Write what is not in blocks, the index, configuration, model card and the sums of all
        files, and move the result to its place.

        Args:
            rest: (full name, tensor) of everything outside the blocks: embeddings, final norm,
                output head.
            extra_files: to be copied, see :func:`ptq.checkpoint.companions.companion_files`.

        Returns:
            The dialect that was written, and why.

        Raises:
            ValueError: an explicit dialect cannot express the result.
            OSError: no space left; the finished blocks stay.
        """
        assert self.work.held, "only inside the context"
        blocks = [self.blocks[name] for name in sorted(self.blocks, key=natural)]
        layers = {name: info for block in blocks for name, info in block.layers.items()}
        folder = self.work.finished
        self.work.clear({block.file for block in blocks} | {PROGRESS})
        folder.mkdir()
        choice = self._choose(blocks, layers)
        dialect = DIALECTS[choice.dialect]
        others = (dialect.stored(*item) for item in rest)
        outside = chain(others, dialect.extra_tensors(layers).items())
        parts = [*self._block_parts(blocks, dialect), *self._parts_outside(outside)]
        entries, sums = write_shards(folder, parts, self.shard_bytes)
        others = _linear_layers(entries, layers, dialect)
        summary = summarize(
            layers,
            others,
            recipe=self.recipe,
            provenance=self.provenance,
            kv_cache=self.kv_cache,
        )
        config = dialect.config(summary, layers, others)
        for file in extra_files:
            sums[file.name] = write_file(folder / file.name, [file.read_bytes()])
        for file, content in dialect.extra_files(config).items():
            sums[file] = write_json(folder / file, content)
        reports = [report.to_dict() for block in blocks for report in block.reports]
        tuned = None if self.tuning is None else self.tuning.report
        told = {"layers": reports} | ({} if tuned is None else {"tuning": tuned.to_dict()})
        sums[REPORT] = write_json(folder / REPORT, told)
        size = sum(entry.bytes for entry in entries.values())
        name = self.path.name
        card = model_card(choice, layers, size, self.recipe, self.provenance, name, tuned)
        sums["README.md"] = write_file(folder / "README.md", [card.encode()])
        # last but for the sums: now it is a model
        whole = self.source_config | {"quantization_config": config}
        sums["config.json"] = write_json(folder / "config.json", whole)
        write_sums(folder, sums)
        self.work.publish()
        self.blocks = {}
        self.work.remove()
        return choice

    def _choose(self, blocks: Iterable[Block], layers: Mapping[str, LayerInfo]) -> Choice:
        suffix = ".weight_global_scale"
        scales = {
            name.removesuffix(suffix): read_tensor(entry)
            for block in blocks
            for name, entry in read_header(self.partial / block.file).items()
            if name.endswith(suffix)
        }
        return choose(
            layers,
            self.dialect,
            target=self.target,
            dtype=config_dtype(self.source_config),
            scales=scales,
            foreign=self.foreign,
            kv_cache=self.kv_cache,
        )

    def _block_parts(self, blocks: Iterable[Block], dialect: Dialect) -> Iterator[dict[str, Entry]]:
        """The tensors of every block as ``dialect`` stores them, in new files where it differs."""
        for block in blocks:
            path = self.partial / block.file
            conversions = {
                name: conversion
                for name, info in block.layers.items()
                if (conversion := dialect.conversion(info)) is not None
            }
            _refuse_wide(path, conversions, dialect)
            entries = read_header(path)
            if conversions or dialect.store_key_value is not None:
                tensors = {name: read_tensor(entry) for name, entry in entries.items()}
                for name, conversion in conversions.items():
                    leaves = [key for key in tensors if key.rpartition(".")[0] == name]
                    layer = {key.removeprefix(f"{name}."): tensors.pop(key) for key in leaves}
                    try:
                        layer = conversion.write(layer)
                    except ValueError as error:
                        raise ValueError(f"cannot write {dialect.name}: {name}: {error}") from error
                    tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.items()}
                path = path.with_name(f"converted-{block.file}")
                write_tensors(path, dict(dialect.stored(*item) for item in tensors.items()))
            yield read_header(path)

    def _parts_outside(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Entry]]:
        """A file for each tensor that lies in no block."""
        for i, (name, tensor) in enumerate(tensors):
            file = self.partial / f"rest-{i:05}.safetensors"
            write_tensors(file, {name: tensor})
            yield read_header(file)


def _refuse_wide(file: Path, converted: Mapping[str, object], dialect: Dialect) -> None:
    """Raise ValueError for a divisor in float64 where files hold those of float32."""
    for name, entry in read_header(file).items():
        owner, _, leaf = name.rpartition(".")
        if leaf in GLOBALS and entry.dtype == "F64" and owner not in converted:
            raise ValueError(
                f"cannot write {dialect.name}: {name} is the reciprocal of no float32 number, and "
                "would be rounded; keep the dialect that it has"
            )


def _linear_layers(
    entries: Mapping[str, Entry], layers: Mapping[str, LayerInfo], dialect: Dialect
) -> list[str]:
    """Modules with a 2-D weight that are not quantized: linear layers and routers, no embeddings.
    The output head is always one of them: tied, it has no tensor of its own, and is a linear layer
    all the same."""
    suffix = ".weight"
    modules = {
        name.removesuffix(suffix)
        for name, entry in entries.items()
        if name.endswith(suffix) and len(entry.shape) == 2 and not dialect.is_extra(name)
    }
    linear = {
        name
        for name in modules
        if not any("embed" in part or part in ("wte", "wpe") for part in name.split("."))
    }
    return sorted((linear | {"lm_head"}) - layers.keys(), key=natural)
