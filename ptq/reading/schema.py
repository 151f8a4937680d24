"""Files and values from outside, checked against a declared type before anything is made of them.

The schema is the type: a dataclass or a container of them, with bounds as ``Annotated[int,
Field(ge=1)]``. Checks are strict: ``"2"`` and ``true`` are no numbers, ``"no"`` is
no truth value. Errors are one line that names the file, the key, the value and the remedy.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError

# A JSON file of more bytes is none of a model: safetensors allows no larger header either, and the
# index of one with 10⁵ tensors has 10⁷.
LARGEST = 100_000_000
SHOWN = 60  # characters of a value in a message
T = TypeVar("T")


def _whole(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it should be a finite number")
    return value


def stays_inside(name: str) -> bool:
    """Whether ``name`` is the name of a file that lies in the directory it is resolved in, or
    below."""
    path = PurePosixPath(name)
    return (
        bool(path.name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    )


def _inside(name: str) -> str:
    if not stays_inside(name):
        raise ValueError("it should be a file of this directory")
    return name


Finite = Annotated[float, AfterValidator(_whole)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
FileName = Annotated[str, AfterValidator(_inside)]
JsonObject = dict[str, JsonValue]


def read_json(path: Path, schema: type[T], remedy: str, where: str | None = None) -> T:
    """The content of a JSON file, as ``schema`` has it.

    Args:
        remedy: what to do about a file that is otherwise, as the end of a sentence.
        where: what messages call the file, if not by its path.

    Raises:
        ValueError: the file is no JSON, or not of the schema, or larger than any such file.
        OSError: it is missing, unreadable, or no regular file.
    """
    try:
        return _adapter(schema).validate_json(read_bytes(path), strict=True)
    except ValidationError as error:
        raise ValueError(_told(error, where or str(path), remedy)) from error


def check(value: object, schema: type[T], where: str, remedy: str = "") -> T:
    """A value as ``schema`` has it, of which ``where`` says in messages what it is. It counts as
    what JSON would say: a list may stand for a tuple, a mapping for a dataclass.

    Raises:
        ValueError: it is otherwise.
    """
    try:
        return _adapter(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_told(error, where, remedy)) from error
    except (TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{where} is {_shown(value)}: JSON could not say that") from error


def check_fields(record: object, where: str) -> None:
    """Raise ValueError for a field of a dataclass whose value is not of the declared type."""
    for field in fields(record):  # pyright: ignore[reportArgumentType]
        check(getattr(record, field.name), field.type, f"{where}: {field.name}")  # pyright: ignore[reportArgumentType]


def plain(record: object) -> dict[str, Any]:
    """A dataclass as JSON values, under the names that fields have on disk: the inverse of
    :func:`check`."""
    return _adapter(type(record)).dump_python(record, mode="json", by_alias=True)


def as_json(values: Mapping[str, object]) -> dict[str, Any]:
    """As JSON will give them back: tuples become lists."""
    return json.loads(json.dumps(values))


def open_regular(path: Path) -> BinaryIO:
    """A file open for reading, unless it is a pipe, a device or anything else that never ends.

    Raises:
        OSError: it is missing, unreadable, or no regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no regular file: put a copy of the file there")
    return file


def read_bytes(path: Path) -> bytes:
    """All of a regular file.

    Raises:
        OSError: as :func:`open_regular`.
        ValueError: it has more than ``LARGEST`` bytes.
    """
    with open_regular(path) as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST} bytes: it is not the file of a model")
    return raw


@lru_cache(maxsize=256)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _told(error: ValidationError, where: str, remedy: str) -> str:
    """``where: key is value, should …: remedy`` of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    key, value = _place(first["loc"]), _shown(first["input"])
    match first["type"]:
        case "json_invalid":
            told = f"{where} is not JSON ({message.removeprefix('Invalid JSON: ')})"
        case "missing":
            told = f"{where} has no {key!r}"
        case "unexpected_keyword_argument" | "extra_forbidden":
            told = f"{where} has an unknown key {key!r}"
        case _:
            told = f"{where}{': ' if key else ''}{key} is {value}, {message}"
    return f"{told}: {remedy}" if remedy else told


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _place(location: tuple[str | int, ...]) -> str:
    """``a.b[0]`` of ``("a", "b", 0)``; without the names that alternatives of a union have."""
    result = ""
    for part in location:
        if isinstance(part, int):
            result += f"[{part}]"
        elif part not in ("[key]", "int", "str", "bool", "float", "none"):
            result += f".{part}" if result else part
    return result
