"""CheckpointWriter: a checkpoint written block by block, which survives interruption and appears
when it is complete.

    <out>.partial/progress.json           what the run is, and every finished block: file, sha256, layers, reports
    <out>.partial/block-<name>.safetensors    one finished block (schema of checkpoint.py, dialect ptq)
    <out>.partial/finished/               made by finish(); renamed to <out> as the last step

Every file is durable before progress.json names it. The dialect is decided at the end, when all
layers are known.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ptq.checkpoint.compressed_tensors import (
    ct_config,
    fold_int4,
    is_rotation_tensor,
    rotation_tensors,
)
from ptq.checkpoint.dialect_choice import Choice, choose
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.model_card import model_card
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, natural, ptq_config, summarize
from ptq.checkpoint.reader import INDEX, PARTIAL, REPORT, SINGLE, config_dtype
from ptq.checkpoint.safetensors_files import (
    Entry,
    merge_tensors,
    read_header,
    read_tensor,
    sha256,
    sync_folder,
    write_file,
    write_json,
    write_tensors,
)

SHARD_BYTES = (
    5 * 1000**3
)  # of a file in the finished checkpoint; a single larger tensor or block makes a larger one
PROGRESS = "progress.json"
PROGRESS_VERSION = 1
FINISHED = "finished"
# Files of a source directory that belong to the model but are neither weights nor written anew
# here.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model", "*.tiktoken", "*preprocessor_config.json", "processor_config.json", "*.py", "LICENSE*",
    "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A finished block: its file, the hash of that file, and what is known of its layers."""

    file: str
    sha256: str
    layers: Mapping[str, LayerInfo]
    reports: tuple[LayerReport, ...]


def companion_files(source: Path) -> list[Path]:
    """Tokenizer, generation configuration, licence and code files of a model directory, to be
    copied as they are."""
    return sorted(
        {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    )


class CheckpointWriter:
    """Context manager over an output directory; one process enters it. What others construct may
    only be read.

    Blocks that an earlier, interrupted run finished are kept if they belong to the same recipe,
    source and calibration data; those whose file is not what was recorded are forgotten, to be made
    again. Leaving the context before a block is finished removes everything; later,
    ``<out>.partial`` stays for the next run.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        source_config: JsonDict,
        recipe: JsonDict,
        provenance: JsonDict,
        fingerprint: str,
        overwrite: bool = False,
        dialect: str = "auto",
        shard_bytes: int = SHARD_BYTES,
        foreign: str | None = None,
    ) -> None:
        """Check that the run can start or continue. Nothing is written yet.

        Args:
            source_config: config.json of the source model.
            recipe, provenance: plain JSON; a continued run must have the same
                ``provenance["calibration"]``.
            fingerprint: identifies the weights of the source.
            overwrite: replace a checkpoint at ``path``, once the new one is complete.
            dialect, foreign: see :func:`ptq.checkpoint.dialect_choice.choose`; they may differ
                between the runs of one checkpoint.

        Raises:
            FileExistsError: ``path`` exists and is not an empty directory.
            ValueError: ``<path>.partial`` is of a different run.
        """
        self.foreign = foreign
        self.path = Path(os.path.abspath(path))
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.previous = self.path.with_name(self.path.name + ".previous")
        self.source_config, self.overwrite, self.dialect, self.shard_bytes = (
            source_config,
            overwrite,
            dialect,
            shard_bytes,
        )
        self.recipe, self.provenance = _plain(recipe), _plain(provenance)
        self.identity = {
            "recipe": self.recipe,
            "source": fingerprint,
            "calibration": self.provenance.get("calibration"),
        }
        if self.path.is_file() or (
            self.path.is_dir() and any(self.path.iterdir()) and not overwrite
        ):
            raise FileExistsError(
                f"{self.path} exists and is not empty: choose another directory, or --overwrite"
            )
        self.blocks = self._recorded()
        self._lock: int | None = None

    def __enter__(self) -> "CheckpointWriter":
        """Take possession of ``<out>.partial``; raises ValueError if another process has it."""
        if (
            self.previous.is_dir() and not self.path.exists()
        ):  # killed while the old checkpoint was being replaced
            self.previous.rename(self.path)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(
                f"another process is writing {self.partial}: wait for it, or choose another "
                "directory"
            ) from error
        self.blocks = self._intact_blocks()
        keep = {b.file for b in self.blocks.values()} | {PROGRESS, ".lock"}
        for path in self.partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.blocks:
            shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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

    def layers(self, block: str) -> dict[str, LayerInfo]:
        """The quantized layers of a finished block."""
        return dict(self.blocks[block].layers)

    def add(
        self,
        block: str,
        tensors: Mapping[str, Tensor],
        layers: Mapping[str, LayerInfo],
        reports: Sequence[LayerReport],
    ) -> None:
        """Write a finished block; when this returns it survives a loss of power.

        Args:
            tensors: all tensors of the block by full name, as :func:`ptq.checkpoint.reader.to_disk`
                returns them.
            layers: its quantized layers by full name, in the order of the model.
            reports: one for each layer, under its name in the checkpoint.

        Raises:
            OSError: no space left; blocks that were finished before stay finished.
        """
        assert self._lock is not None, "only inside the context"
        missing = [name for name in layers if f"{name}.weight_packed" not in tensors]
        assert not missing, f"no tensors for {missing}"
        file = f"block-{block}.safetensors"
        digest = write_tensors(self.partial / file, tensors)
        finished = self.blocks | {block: Block(file, digest, dict(layers), tuple(reports))}
        self._record(finished)
        self.blocks = finished

    def finish(
        self, rest: Iterable[tuple[str, Tensor]], extra_files: Iterable[Path] = ()
    ) -> Choice:
        """Write what is not in blocks, the index, configuration and model card, and move the result
        to its place.

        Args:
            rest: (full name, tensor) of everything outside the blocks: embeddings, final norm,
                output head.
            extra_files: to be copied, see :func:`companion_files`.

        Returns:
            The dialect that was written, and why.

        Raises:
            ValueError: an explicit dialect cannot express the result.
            OSError: no space left; the finished blocks stay.
        """
        assert self._lock is not None, "only inside the context"
        order = sorted(self.blocks, key=natural)
        layers = {name: info for block in order for name, info in self.blocks[block].layers.items()}
        reports = [report for block in order for report in self.blocks[block].reports]
        folder = self.partial / FINISHED
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        parts = [read_header(self.partial / self.blocks[block].file) for block in order]
        choice = self._choose(layers, parts)
        compressed = choice.dialect == "compressed-tensors"
        if compressed:
            parts = self._convert(order, parts, layers)
        for i, (name, tensor) in enumerate(self._rest(rest, layers if compressed else {})):
            file = self.partial / f"rest-{i:05}.safetensors"
            write_tensors(file, {name: tensor})
            parts.append(read_header(file))
        entries = self._shards(folder, parts)
        others = _linear_layers(entries, layers)
        quantization = summarize(layers, others, recipe=self.recipe, provenance=self.provenance)
        config = ct_config(quantization, layers, others) if compressed else ptq_config(quantization)
        for file in extra_files:
            write_file(folder / file.name, [file.read_bytes()])
        write_json(folder / REPORT, {"layers": [report.to_dict() for report in reports]})
        card = model_card(
            choice,
            layers,
            sum(e.bytes for e in entries.values()),
            self.recipe,
            self.provenance,
            self.path.name,
        )
        write_file(folder / "README.md", [card.encode()])
        write_json(
            folder / "config.json", self.source_config | {"quantization_config": config}
        )  # last: now it is a model
        self._publish(folder)
        return choice

    def _recorded(self) -> dict[str, Block]:
        """The blocks of progress.json; raises ValueError if they belong to a different run."""
        path = self.partial / PROGRESS
        if not path.is_file():
            return {}
        remedy = (
            f"delete {self.partial} to start over, or repeat the options of that run to continue it"
        )
        try:
            progress = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: delete {self.partial} to start over") from error
        if progress.get("version") != PROGRESS_VERSION:
            raise ValueError(
                f"{self.partial} was left by another version of ptq: delete it to start over"
            )
        differences = _differences(progress["identity"], self.identity)
        if differences:
            raise ValueError(
                f"{self.partial} is of a different run ({'; '.join(differences)}): {remedy}"
            )
        return {
            name: Block(
                b["file"],
                b["sha256"],
                {n: LayerInfo.from_dict(info) for n, info in b["layers"].items()},
                tuple(LayerReport.from_dict(report) for report in b["reports"]),
            )
            for name, b in progress["blocks"].items()
        }

    def _record(self, blocks: Mapping[str, Block]) -> None:
        data = {
            name: {
                "file": b.file,
                "sha256": b.sha256,
                "layers": {n: info.to_dict() for n, info in b.layers.items()},
                "reports": [report.to_dict() for report in b.reports],
            }
            for name, b in blocks.items()
        }
        write_json(
            self.partial / PROGRESS,
            {"version": PROGRESS_VERSION, "identity": self.identity, "blocks": data},
        )

    def _intact_blocks(self) -> dict[str, Block]:
        """Those of progress.json whose file is what was written."""
        recorded = {name: (self.partial / b.file, b) for name, b in self._recorded().items()}
        return {
            name: b
            for name, (path, b) in recorded.items()
            if path.is_file() and sha256(path) == b.sha256
        }

    def _choose(self, layers: Mapping[str, LayerInfo], parts: list[dict[str, Entry]]) -> Choice:
        suffix = ".weight_global_scale"
        scales = {
            name.removesuffix(suffix): read_tensor(entry)
            for part in parts
            for name, entry in part.items()
            if name.endswith(suffix)
        }
        return choose(
            layers,
            self.dialect,
            dtype=config_dtype(self.source_config),
            scales=scales,
            foreign=self.foreign,
        )

    def _convert(
        self, order: list[str], parts: list[dict[str, Entry]], layers: Mapping[str, LayerInfo]
    ) -> list[dict[str, Entry]]:
        """Blocks as compressed-tensors stores them; only NVINT4 differs."""
        if not any(info.format == "nvint4" for info in layers.values()):
            return parts
        converted = []
        for block, part in zip(order, parts, strict=True):
            tensors = {name: read_tensor(entry) for name, entry in part.items()}
            for name in self.blocks[block].layers:
                leaves = [key for key in tensors if key.rpartition(".")[0] == name]
                own = {key.removeprefix(name + "."): tensors.pop(key) for key in leaves}
                try:
                    tensors |= {f"{name}.{leaf}": t for leaf, t in fold_int4(own).items()}
                except ValueError as error:
                    raise ValueError(f"cannot write compressed-tensors: {name}: {error}") from error
            file = self.partial / f"converted-{self.blocks[block].file}"
            write_tensors(file, tensors)
            converted.append(read_header(file))
        return converted

    @staticmethod
    def _rest(
        rest: Iterable[tuple[str, Tensor]], rotated: Mapping[str, LayerInfo]
    ) -> Iterable[tuple[str, Tensor]]:
        yield from rest
        yield from rotation_tensors(rotated).items()

    def _shards(self, folder: Path, parts: list[dict[str, Entry]]) -> dict[str, Entry]:
        """Merge consecutive parts into files of at most ``shard_bytes`` under their final names;
        return all tensors."""
        groups: list[dict[str, Entry]] = [{}]
        for part in parts:
            size = sum(e.bytes for e in [*groups[-1].values(), *part.values()])
            if groups[-1] and size > self.shard_bytes:
                groups.append({})
            twice = groups[-1].keys() & part.keys()
            assert not twice, f"written twice: {twice}"
            groups[-1] |= part
        names = (
            [SINGLE]
            if len(groups) == 1
            else [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        )
        weight_map, total = {}, 0
        for file, group in zip(names, groups, strict=True):
            merge_tensors(folder / file, group)
            weight_map |= dict.fromkeys(sorted(group), file)
            total += sum(e.bytes for e in group.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return {name: entry for group in groups for name, entry in group.items()}

    def _publish(self, folder: Path) -> None:
        """``folder`` takes the place of the output; the old one, if any, disappears after that."""
        sync_folder(folder)
        if self.path.is_dir() and any(self.path.iterdir()):
            if self.previous.is_dir():
                shutil.rmtree(self.previous)
            self.path.rename(self.previous)
        folder.rename(self.path)
        sync_folder(self.path.parent)
        self.blocks = {}
        shutil.rmtree(self.partial)
        if self.previous.is_dir():
            shutil.rmtree(self.previous)


def _plain(data: Mapping[str, object]) -> JsonDict:
    """As JSON will give it back: tuples become lists."""
    return json.loads(json.dumps(data))


def _differences(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> list[str]:
    """``key: old, now new`` for every leaf that differs."""
    result = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += _differences(a, b, f"{path}{key}.")
        elif a != b:
            result.append(f"{path}{key} was {a!r} and is {b!r}")
    return result


def _linear_layers(entries: Mapping[str, Entry], layers: Mapping[str, LayerInfo]) -> list[str]:
    """Modules with a 2-D weight that are not quantized: linear layers and routers, no embeddings.
    The output head is always one of them: tied, it has no tensor of its own, and is a linear layer
    all the same."""
    suffix = ".weight"
    found = {
        name.removesuffix(suffix)
        for name, entry in entries.items()
        if name.endswith(suffix) and len(entry.shape) == 2 and not is_rotation_tensor(name)
    }
    found = {
        name
        for name in found
        if not any("embed" in part or part in ("wte", "wpe") for part in name.split("."))
    }
    return sorted((found | {"lm_head"}) - layers.keys(), key=natural)
