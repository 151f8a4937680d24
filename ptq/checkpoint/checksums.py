"""SHA256SUMS: what every file of a finished checkpoint should hold.

The format is that of coreutils, so that ``sha256sum -c SHA256SUMS`` checks a copy without ptq. Sums
are taken of the bytes on their way to the disk. They show damage and mix-ups, not forgery: who can
change a file can change its sum.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ptq.checkpoint.safetensors_files import sha256, write_file
from ptq.reading.schema import stays_inside

SUMS = "SHA256SUMS"
# A line that starts with a backslash has escapes in its name.
LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the sums (hex) of files by name, durably.

    Raises:
        OSError: as :func:`ptq.checkpoint.safetensors_files.write_file`.
    """
    lines = []
    for name in sorted(sums):
        escaped = "".join(ESCAPES.get(character, character) for character in name)
        lines.append(f"{'' if escaped == name else chr(92)}{sums[name]}  {escaped}\n")
    write_file(folder / SUMS, [os.fsencode("".join(lines))])


def read_sums(folder: Path) -> dict[str, str]:
    """The sums (hex) of files by name.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is not what ``sha256sum`` writes, or names files elsewhere.
    """
    path = folder / SUMS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so that nothing says what the files should hold; if you trust "
            f"them, write it: cd {folder} && sha256sum * > .sums && mv .sums {SUMS}"
        )
    sums = {}
    lines = os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line)
        name = match and _unescaped(match[3], escaped=bool(match[1]))
        if match is None or name is None or not stays_inside(name):
            raise ValueError(
                f"{path}, line {number}, is no sum of a file of this directory: copy it again"
            )
        sums[name] = match[2]
    return sums


def _unescaped(name: str, *, escaped: bool) -> str:
    back = {value: key for key, value in ESCAPES.items()}
    return re.sub(r"\\.", lambda m: back.get(m[0], m[0]), name) if escaped else name


def differences(folder: Path) -> Iterator[str]:
    """One line for every file that is missing, changed or not listed; reads all files.

    Hidden files are not asked for: the hub and version control put theirs beside a model.
    """
    try:
        sums = read_sums(folder)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (found := sha256(path)) != expected:
            yield f"{name} is changed: its sha256 is {found[:16]}… and should be {expected[:16]}…"
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not path.is_dir() and not hidden and relative.as_posix() not in (SUMS, *sums):
            yield f"{relative} is not in {SUMS}: it came later"
