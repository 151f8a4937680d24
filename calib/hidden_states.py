"""Where the hidden states of all batches live between two blocks: host memory, the device, or a
file."""

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


def check_storage(storage: str) -> None:
    """Raise ValueError for a place that hidden states cannot live in."""
    if storage not in ("ram", "device", "disk"):
        raise ValueError(f"activations must be 'ram', 'device' or 'disk', not {storage!r}")


class HiddenStates:
    """One tensor per batch, kept once: writing a batch again overwrites it. A context manager.

    "ram" keeps them on the CPU, "device" where the blocks run, "disk" in memory-mapped files of a
    temporary directory that is removed at the end. Reading gives a copy on ``device``: blocks may
    write into what they are given.
    """

    def __init__(self, storage: str, device: torch.device):
        check_storage(storage)
        self.device, self._storage = device, storage
        self._tensors: dict[int, Tensor] = {}
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "HiddenStates":
        if self._storage == "disk":
            self._directory = tempfile.TemporaryDirectory(prefix="ptq-activations-")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def another(self) -> "HiddenStates":
        """An empty one of the same kind, entered; whoever asks closes it."""
        return HiddenStates(self._storage, self.device).__enter__()

    def close(self) -> None:
        """Drop the tensors, and the files they lie in."""
        self._tensors.clear()
        if self._directory is not None:
            self._directory.cleanup()

    def __setitem__(self, batch: int, value: Tensor) -> None:
        if self._directory is not None and batch not in self._tensors:
            self._tensors[batch] = _mapped(Path(self._directory.name) / f"{batch}.bin", value)
        if self._directory is not None:
            self._tensors[batch].copy_(value)
        else:
            self._tensors[batch] = value if self._storage == "device" else value.to("cpu")

    def like(self, batch: int) -> Tensor:
        """A tensor of the same dtype and shape, without storage."""
        return self._tensors[batch].to("meta")

    def __getitem__(self, batch: int) -> Tensor:
        return self._tensors[batch].to(self.device, copy=True)


def _mapped(path: Path, like: Tensor) -> Tensor:
    with path.open("wb") as file:
        file.truncate(max(like.nbytes, 1))
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(
        like.shape
    )
