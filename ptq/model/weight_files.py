"""The tensors of a checkpoint directory: safetensors files, one or many, read lazily."""

import hashlib
from collections import Counter
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptq.reading.model_config import Stored
from ptq.reading.safetensors_layout import DTYPES, Entry, read_index, read_layout

INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "model*.h5",
    "flax_model*",
)


def has_weights(path: Path) -> bool:
    """Whether a directory has safetensors files at all, complete or not."""
    return path.is_dir() and any(path.glob("*.safetensors*"))


class Shards:
    """Lazy access to every tensor of the safetensors files in ``path``; ``total_bytes`` is the size
    of all files.

    Headers are read and checked against the file sizes at once, data only on request. Raises
    FileNotFoundError when there are no weights or a listed file is missing, ValueError for files
    that are truncated or no safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._digests: list[str] = []
        self._entries: dict[str, Entry] = {}
        self.total_bytes = 0
        for file in self._files():
            layout = read_layout(path / file)
            self._entries |= layout.entries
            self._digests.append(f"{file} {layout.bytes} {layout.digest}")
            self.total_bytes += layout.bytes

    def _files(self) -> list[str]:
        index = self.path / INDEX
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if index.exists():
            files = sorted(set(read_index(index).values()))
            if missing := [f for f in files if not (self.path / f).is_file()]:
                raise FileNotFoundError(
                    f"{self.path}: {len(missing)} of {len(files)} weight files listed in "
                    f"{index.name} are missing "
                    f"(first: {missing[0]}); download the model again"
                )
            return files
        files = sorted(p.name for p in self.path.glob("*.safetensors") if p.is_file())
        if len(files) == 1:
            return files
        if files:
            raise FileNotFoundError(
                f"{self.path} has {len(files)} safetensors files but no {index.name} to tell which "
                "belong together"
            )
        others = sorted(p.name for pattern in OTHER_WEIGHTS for p in self.path.glob(pattern))
        hint = "expected model.safetensors or an index of shards"
        if others:
            hint = (
                f"only {others[0]}; convert it (transformers: AutoModelForCausalLM.from_pretrained("
                "DIR).save_pretrained(OTHER), and copy the tokenizer)"
            )
        raise FileNotFoundError(f"{self.path} contains no safetensors weights: {hint}")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU. ValueError when the checkpoint has none of that
        name."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{self.path} has no tensor {name}")
        try:
            # opened anew: pages of a mapping that stays count as memory of this process, in the end
            # the whole model
            with safe_open(entry.file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{entry.file} cannot be read ({error}); download it again") from error

    def dtype(self, name: str) -> torch.dtype | None:
        """The stored type of a tensor; None for types that torch cannot hold."""
        return DTYPES.get(self._entries[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return self._entries[name].shape

    def common_dtype(self) -> torch.dtype:
        """The floating type that most values are stored in; float32 when there is none."""
        counts: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            dtype = DTYPES.get(entry.dtype)
            if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
                counts[dtype] += prod(entry.shape)
        return counts.most_common(1)[0][0] if counts else torch.float32

    @property
    def stored(self) -> Stored:
        """How much there is."""
        largest = max((max(e.shape, default=1) for e in self._entries.values()), default=0)
        return Stored(len(self._entries), largest, self.total_bytes)

    def digest(self) -> str:
        """Name, size and header bytes of every file, as a sha256; the data itself is not read."""
        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()
