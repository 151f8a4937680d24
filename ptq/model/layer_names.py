"""What the names of a model's layers say: the block, and what a layer does in it."""

from collections.abc import Iterable


def block_of(name: str) -> str:
    """The block that a layer belongs to: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``; else
    its own name."""
    parts = name.split(".")
    return ".".join(parts[: _block_length(parts)])


def block_label(block: str) -> str:
    """A block in few characters: its number, or the last part of its name."""
    return block.rpartition(".")[2]


def kinds(names: Iterable[str]) -> dict[str, str]:
    """By layer, what it does: the end of its name without numbers, with as many parts as tell it
    from all others, ``q_proj`` and ``mlp.c_proj``."""
    paths = {name: _path(name) for name in names}
    different = set(paths.values())
    found = {}
    for path in different:
        ends = [
            count
            for count in range(1, len(path) + 1)
            if not any(other != path and other[-count:] == path[-count:] for other in different)
        ]
        found[path] = ".".join(path[-ends[0] :] if ends else path)
    return {name: found[path] for name, path in paths.items()}


def _path(name: str) -> tuple[str, ...]:
    """The parts of a name within its block, without numbers: those of experts are one kind."""
    parts = name.split(".")
    inside = parts[_block_length(parts) :] or parts
    return tuple(part for part in inside if not part.isdecimal()) or (name,)


def _block_length(parts: list[str]) -> int:
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return index + 1
