"""The tensors of a checkpoint directory: safetensors files, one or many, read lazily."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "model*.h5",
    "flax_model*",
)


def stays_inside(name: object) -> bool:
    """Whether ``name`` is the name of a file that lies in the directory it is resolved in, or
    below."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def listed_files(weight_map: Iterable[object], index: Path) -> list[str]:
    """The files that the ``weight_map`` of ``index`` names, each once, in their order.

    Raises:
        ValueError: a name that is none, or leads out of the directory.
    """
    files = list(dict.fromkeys(weight_map))
    for file in files:
        if not stays_inside(file):
            raise ValueError(
                f"{index} names the weight file {file!r}, which is no file of its directory; "
                "download the model again"
            )
    return [str(file) for file in files]


class Shards:
    """Lazy access to every tensor of the safetensors files in ``path``.

    Headers are read and checked against the file sizes at once, data only on request. Raises
    FileNotFoundError when there are no weights or a listed file is missing, ValueError for files
    that are truncated or no safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._headers: dict[str, dict] = {}  # file → tensor → {dtype, shape, data_offsets}
        self._digests: list[str] = []
        self._file_of: dict[str, str] = {}
        for file in self._files():
            header, digest = _read_header(path / file)
            self._headers[file] = header
            self._digests.append(digest)
            self._file_of |= dict.fromkeys(header, file)

    def _files(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if index.exists():
            try:
                names = json.loads(index.read_text())["weight_map"].values()
                files = sorted(listed_files(names, index))
            except (
                json.JSONDecodeError,
                UnicodeDecodeError,
                KeyError,
                AttributeError,
                TypeError,
            ) as error:
                raise ValueError(
                    f"{index} is not a safetensors index ({error!r}); download the model again"
                ) from error
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
        hint = (
            f"only {others[0]}; convert it to safetensors first"
            if others
            else "expected model.safetensors or an index of shards"
        )
        raise FileNotFoundError(f"{self.path} contains no safetensors weights: {hint}")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU. ValueError when the checkpoint has none of that
        name."""
        file = self._file_of.get(name)
        if file is None:
            raise ValueError(f"{self.path} has no tensor {name}")
        try:
            # opened anew: pages of a mapping that stays count as memory of this process, in the end
            # the whole model
            with safe_open(self.path / file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} cannot be read ({error}); download it again"
            ) from error

    def dtype(self, name: str) -> torch.dtype | None:
        """The stored type of a tensor; None for types that torch cannot hold."""
        return DTYPES.get(self._headers[self._file_of[name]][name]["dtype"])

    def common_dtype(self) -> torch.dtype:
        """The floating type that most values are stored in; float32 when there is none."""
        counts: Counter[torch.dtype] = Counter()
        for header in self._headers.values():
            for entry in header.values():
                if (
                    (dtype := DTYPES.get(entry["dtype"]))
                    and dtype.is_floating_point
                    and dtype.itemsize > 1
                ):
                    counts[dtype] += prod(entry["shape"])
        return counts.most_common(1)[0][0] if counts else torch.float32

    @cached_property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum((self.path / file).stat().st_size for file in self._headers)

    def digest(self) -> str:
        """Name, size and header bytes of every file, as a sha256; the data itself is not read."""
        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()


def _read_header(file: Path) -> tuple[dict, str]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(
                f"{file} is truncated or not a safetensors file ({size} bytes); download it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise ValueError(
            f"{file} is not a safetensors file (its header cannot be read); download it again"
        ) from error
    if 8 + length + end != size:
        raise ValueError(
            f"{file} is truncated or damaged: {size} bytes instead of {8 + length + end}; download "
            "it again"
        )
    return header, f"{file.name} {size} {hashlib.sha256(raw).hexdigest()}"
