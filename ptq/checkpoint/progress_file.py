"""progress.json in an unfinished checkpoint: which run it is of, and every block that is
finished."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo
from ptq.checkpoint.safetensors_files import sha256, write_json
from ptq.checkpoint.tuning_report import TuningState
from ptq.reading.schema import JsonObject, plain, read_json

NAME = "progress.json"
VERSION = 2
WEIGHTS = "weights"  # the part of an identity that has hashes by tensor
SHOWN = 3  # differences between two runs


@dataclass(frozen=True)
class Block:
    """A finished block: its file, the hash of that file, what is known of its layers, and hashes of
    the weights that it was made of, by tensor of the source."""

    file: Annotated[str, Field(pattern=r"^[^/]+$")]
    sha256: str
    weights: Mapping[str, str]
    layers: Mapping[str, LayerInfo]
    reports: tuple[LayerReport, ...]

    def to_dict(self) -> JsonDict:
        """Plain JSON values."""
        return plain(self)


@dataclass(frozen=True)
class _Version:
    version: int


@dataclass(frozen=True)
class _Progress:
    identity: JsonObject
    blocks: dict[str, Block]
    tuning: TuningState | None = None


@dataclass(frozen=True)
class ProgressFile:
    """The file in ``folder``, of the run that ``identity`` describes in plain JSON.

    A run is continued only by one with the same identity.
    """

    folder: Path
    identity: JsonDict

    def read(self) -> dict[str, Block]:
        """The finished blocks by name; none if there is no file.

        Raises:
            ValueError: the file is damaged, of another version or of a different run; the message
                says what differs, and what to do.
        """
        found = self._read()
        return {} if found is None else found.blocks

    def _read(self) -> _Progress | None:
        path = self.folder / NAME
        if not path.exists():
            return None
        remedy = f"it is damaged: delete {self.folder} to start over"
        if read_json(path, _Version, remedy).version != VERSION:
            raise ValueError(
                f"{self.folder} was left by another version of ptq: delete it to start over"
            )
        progress = read_json(path, _Progress, remedy)
        self._refuse(_differences(progress.identity, self.identity))
        return progress

    def check(self, block: Block, weights: Mapping[str, str]) -> None:
        """Raise ValueError, as :meth:`read` does, unless ``weights`` are those that ``block`` was
        made of."""
        self._refuse(_differences({WEIGHTS: block.weights}, {WEIGHTS: weights}))

    def _refuse(self, differences: list[str]) -> None:
        if not differences:
            return
        more = len(differences) - SHOWN
        shown = [*differences[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError(
            f"{self.folder} is of a different run ({'; '.join(shown)}): delete {self.folder} to "
            "start over, or repeat that run to continue it: the same model, options and versions"
        )

    def intact(self) -> dict[str, Block]:
        """The blocks of :meth:`read` whose files are what was written."""
        return {
            name: block
            for name, block in self.read().items()
            if (path := self.folder / block.file).is_file() and sha256(path) == block.sha256
        }

    def tuning(self, blocks: Collection[str]) -> TuningState | None:
        """How far tuning is, of which all files must be what was written.

        Args:
            blocks: those of :meth:`intact`.

        Raises:
            ValueError: tuning is finished and one of its blocks is damaged; or as :meth:`read`.
        """
        found = self._read()
        if found is None or found.tuning is None:
            return None
        state = found.tuning
        if state.file is None and (lost := found.blocks.keys() - set(blocks)):
            raise ValueError(
                f"{self.folder} holds a tuned model whose block {min(lost)} is damaged: delete "
                f"{self.folder} to start over"
            )
        if state.file is None:
            return state
        path = self.folder / state.file
        return state if path.is_file() and sha256(path) == state.sha256 else None

    def write(self, blocks: Mapping[str, Block], tuning: TuningState | None = None) -> None:
        """Say, durably, that these are the finished blocks, and how far tuning is."""
        write_json(
            self.folder / NAME,
            {
                "version": VERSION,
                "identity": self.identity,
                "blocks": {name: block.to_dict() for name, block in blocks.items()},
                **({} if tuning is None else {"tuning": plain(tuning)}),
            },
        )


def _differences(
    old: Mapping[str, object], new: Mapping[str, object], path: tuple[str, ...] = ()
) -> list[str]:
    """One ``key was … and is …`` for every leaf that differs, in the order of ``new``: what a user
    gave comes before what follows from it."""
    result = []
    for key in [*new, *sorted(old.keys() - new.keys())]:
        a, b, place = old.get(key), new.get(key), (*path, key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            result += _differences(a, b, place)
        elif a != b and path == (WEIGHTS,):
            result.append(f"{key} is not the weight that it was")
        elif a != b:
            result.append(f"{'.'.join(place)} was {a!r} and is {b!r}")
    return result
