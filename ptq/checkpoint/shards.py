"""The weight files of a finished checkpoint, merged from parts, and their index."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ptq.checkpoint.reader import INDEX, SINGLE
from ptq.checkpoint.safetensors_files import merge_tensors, write_json
from ptq.reading.safetensors_layout import Entry

# Of a file; a single larger part makes a larger one.
SHARD_BYTES = 5 * 1000**3


def write_shards(
    folder: Path, parts: Iterable[Mapping[str, Entry]], shard_bytes: int
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Merge consecutive ``parts`` into files of at most ``shard_bytes``, named as the hub does,
    with an index; return all tensors, and the sha256 of every file by its name."""
    shards: list[dict[str, Entry]] = [{}]
    for part in parts:
        size = sum(entry.bytes for entry in [*shards[-1].values(), *part.values()])
        if shards[-1] and size > shard_bytes:
            shards.append({})
        twice = shards[-1].keys() & part.keys()
        assert not twice, f"written twice: {twice}"
        shards[-1] |= part
    count = len(shards)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    for file, shard in zip(files if count > 1 else [SINGLE], shards, strict=True):
        sums[file] = merge_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(sorted(shard), file)
    entries = {name: entry for shard in shards for name, entry in shard.items()}
    total = sum(entry.bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    sums[INDEX] = write_json(folder / INDEX, index)
    return entries, sums
