"""The same quantized model in another dialect: no number changes, or it is refused.

Layers are read and written by the block, as a run of ``ptq quantize`` writes them, so an
interrupted conversion is continued, and one that fails leaves nothing that looks complete.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ptq.checkpoint.companions import companion_files
from ptq.checkpoint.destination import check_destination
from ptq.checkpoint.dialect import HEAD_NOT_FOUND
from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.dialect_mxfp4 import GPT_OSS
from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.blueprint import Blueprint

OUTSIDE = "outside"  # of all blocks: the output head


def convert(
    source: Path | str,
    out: Path | str,
    dialect: str,
    *,
    target: str | None = None,
    overwrite: bool = False,
) -> Choice:
    """Write the checkpoint ``source`` to the directory ``out`` in ``dialect``; all codes, scales
    and other tensors stand for the same numbers.

    Args:
        dialect: a key of :data:`ptq.checkpoint.dialects.DIALECTS`, or ``auto``.
        target: whose engines must compute the result right, see
            :func:`ptq.checkpoint.dialect_choice.choose`.
        overwrite: replace a checkpoint of ours in ``out``.

    Returns:
        The dialect that was written, and why.

    Raises:
        ValueError: the source is none that ptq reads, or is damaged; the dialect cannot express it
            exactly; ``out`` is, contains or lies in the source.
        FileNotFoundError, FileExistsError: no source; something else is at ``out``.
    """
    found = Checkpoint(source)
    place = check_destination(out, Path(source), overwrite=overwrite)
    config = {key: value for key, value in found.config.items() if key != "quantization_config"}
    parsed = found.parsed
    if parsed.unread is not None:
        raise ValueError(f"cannot convert {found.path}: {parsed.unread}, and would be lost")
    writer = CheckpointWriter(
        place,
        source_config=config,
        recipe=parsed.recipe,
        provenance=parsed.provenance | {"converted": f"from {found.dialect}"},
        fingerprint=_fingerprint(found),
        foreign=_foreign(found, dialect),
        overwrite=overwrite,
        dialect=dialect,
        kv_cache=parsed.kv_cache,
        target=target,
    )
    with writer:
        try:
            _copy(found, writer)
            return writer.finish(_others(found), companion_files(found.path))
        except ValueError:
            writer.abandon()
            raise


def _foreign(found: Checkpoint, dialect: str) -> str | None:
    """Why programs that read other dialects than these would not find the layers; in the dialect
    that they have those of others are found by whom they were made for."""
    if OUTSIDE in _blocks(found.layers) and dialect != found.dialect:
        return HEAD_NOT_FOUND
    if found.dialect not in (PTQ.name, GPT_OSS.name):
        return None
    return Blueprint.of(found.path).foreign()


def _copy(found: Checkpoint, writer: CheckpointWriter) -> None:
    """The quantized layers of a checkpoint, block by block, but for those that are there."""
    reports = {report.name: report for report in found.reports}
    # reports are in the order of the model
    names = [*(name for name in reports if name in found.layers), *found.layers]
    for block, layers in _blocks({name: found.layers[name] for name in names}).items():
        if writer.has(block):
            continue
        tensors = {
            f"{name}.{leaf}": tensor
            for name in layers
            for leaf, tensor in found.stored_layer(name).items()
        }
        told = [reports[name] for name in layers if name in reports]
        writer.add(block, tensors, layers, told)


def _blocks(layers: dict[str, LayerInfo]) -> dict[str, dict[str, LayerInfo]]:
    """Layers, in their order, by what precedes and is their first number, which is that of the
    decoder block."""
    blocks: dict[str, dict[str, LayerInfo]] = {}
    for name in layers:
        block = re.match(r"[^0-9]*\d+(?=\.)|", name)
        assert block is not None  # matches nothing, if nothing else
        blocks.setdefault(block.group() or OUTSIDE, {})[name] = layers[name]
    return blocks


def _others(found: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in found.other_names():
        yield name, found.tensor(name)


def _fingerprint(found: Checkpoint) -> str:
    """Of what is converted: its sums, or where it has none the sizes and places of its tensors."""
    sums = found.path / "SHA256SUMS"
    said = sums.read_bytes() if sums.is_file() else repr(sorted(found.entries.items())).encode()
    return hashlib.sha256(said).hexdigest()
