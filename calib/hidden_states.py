"""Where the hidden states of all batches live between two blocks: host memory, the device, or a
file."""

import os
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


def check_storage(storage: str) -> None:
    """Raise ValueError for a place that hidden states cannot live in."""
    if storage not in ("ram", "device", "disk"):
        raise ValueError(f"activations must be 'ram', 'device' or 'disk', not {storage!r}")


class _Folder:
    """A new folder of our own among the temporary files, gone with this object or the program.

    Who removes it stands before it is made: a Ctrl-C between the two (tempfile.TemporaryDirectory
    makes it first) would leave gigabytes behind.
    """

    def __init__(self):
        self.path = Path(tempfile.gettempdir()) / f"ptq-activations-{secrets.token_hex(8)}"
        self._at_the_end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        os.mkdir(self.path, 0o700)

    def remove(self) -> None:
        """Remove it with what lies in it; what an interrupt leaves of it goes at the end."""
        if self._at_the_end.alive:
            shutil.rmtree(self.path)
            self._at_the_end.detach()


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
        self._directory: _Folder | None = None

    def __enter__(self) -> "HiddenStates":
        if self._storage == "disk":
            self._directory = _Folder()
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
            self._directory.remove()

    def __setitem__(self, batch: int, value: Tensor) -> None:
        if self._directory is not None and batch not in self._tensors:
            self._tensors[batch] = _mapped(self._directory.path / f"{batch}.bin", value)
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
