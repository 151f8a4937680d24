"""Text that every installation has: the source files of Python's standard library to calibrate
with, and a bundled text to evaluate on."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

SMALLEST, LARGEST = 200, 400_000  # characters: no empty modules, no generated tables


def is_held_out(relative: str) -> bool:
    """Whether a file of the standard library, by its relative path with ``/``, is kept for
    evaluation: one in 25, by the hash of the path."""
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") % 25 == 0


def calibration_files(root: Path | None = None) -> list[str]:
    """The relative paths, sorted, of the files that calibration may use: neither held-out files,
    nor tests, nor installed packages.

    Args:
        root: the directory to look in; None is the standard library.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py")))
    return [
        name for name in names if not (is_held_out(name) or "test" in name or "-packages/" in name)
    ]


def texts(names: Iterable[str]) -> Iterator[str]:
    """The contents of files of the standard library, read one by one; those outside ``SMALLEST`` to
    ``LARGEST`` characters are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in names:
        text = (root / name).read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        if SMALLEST <= len(text) <= LARGEST:
            yield text


def held_out_text() -> str:
    """The bundled evaluation text; FileNotFoundError when this installation lacks it."""
    resource = files("ptq") / "demo" / "heldout.txt"
    if not resource.is_file():
        raise FileNotFoundError(
            "the built-in evaluation text (ptq/demo/heldout.txt) is not part of this installation; "
            "give a file"
        )
    return resource.read_text(encoding="utf-8")
