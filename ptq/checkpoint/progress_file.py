"""progress.json in an unfinished checkpoint: which run it is of, and every block that is
finished."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo
from ptq.checkpoint.safetensors_files import sha256, write_json

NAME = "progress.json"
VERSION = 1


@dataclass(frozen=True)
class Block:
    """A finished block: its file, the hash of that file, and what is known of its layers."""

    file: str
    sha256: str
    layers: Mapping[str, LayerInfo]
    reports: tuple[LayerReport, ...]

    def to_dict(self) -> JsonDict:
        """Plain JSON values."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "layers": {name: info.to_dict() for name, info in self.layers.items()},
            "reports": [report.to_dict() for report in self.reports],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; raises ValueError or KeyError on what it does not
        know."""
        return cls(
            file=data["file"],
            sha256=data["sha256"],
            layers={name: LayerInfo.from_dict(info) for name, info in data["layers"].items()},
            reports=tuple(LayerReport.from_dict(report) for report in data["reports"]),
        )


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
        path = self.folder / NAME
        if not path.is_file():
            return {}
        damaged = f"{path} is damaged: delete {self.folder} to start over"
        try:
            progress = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(damaged) from error
        if progress.get("version") != VERSION:
            raise ValueError(
                f"{self.folder} was left by another version of ptq: delete it to start over"
            )
        if differences := _differences(progress["identity"], self.identity):
            raise ValueError(
                f"{self.folder} is of a different run ({'; '.join(differences)}): delete "
                f"{self.folder} to start over, or repeat the options of that run to continue it"
            )
        try:
            return {name: Block.from_dict(data) for name, data in progress["blocks"].items()}
        except (ValueError, KeyError) as error:
            raise ValueError(f"{damaged} ({error})") from error

    def intact(self) -> dict[str, Block]:
        """The blocks of :meth:`read` whose files are what was written."""
        return {
            name: block
            for name, block in self.read().items()
            if (path := self.folder / block.file).is_file() and sha256(path) == block.sha256
        }

    def write(self, blocks: Mapping[str, Block]) -> None:
        """Say, durably, that these are the finished blocks."""
        write_json(
            self.folder / NAME,
            {
                "version": VERSION,
                "identity": self.identity,
                "blocks": {name: block.to_dict() for name, block in blocks.items()},
            },
        )


def _differences(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> list[str]:
    """One ``key was … and is …`` for every leaf that differs."""
    result = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += _differences(a, b, f"{path}{key}.")
        elif a != b:
            result.append(f"{path}{key} was {a!r} and is {b!r}")
    return result
