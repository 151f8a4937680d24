"""Documents out of files, data sets of the Hugging Face hub, or the built-in text."""

import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ptq.text import builtin as builtin_text

T = TypeVar("T")
Record = dict[str, object]
DATASET_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+){0,2}$")
SUFFIXES = (".txt", ".jsonl", ".parquet")
BUFFER = 10_000  # documents of a streamed dataset that are shuffled at a time
Render = Callable[[list[dict[str, object]]], str]


@dataclass(frozen=True)
class Documents:
    """Texts in the order of the seed, to be read once, and a record of where they are from."""

    texts: Iterator[str]
    description: dict[str, object]


def read(
    source: str, *, field: str | None, seed: int | None, render: Render | None = None
) -> Documents:
    """The documents of ``source``; shuffled by ``seed``, or in their own order when it is None.

    Args:
        source: a .txt, .jsonl or .parquet file, a data set of the hub (``id``, ``id:config`` or
            ``id:config:split``), or "builtin".
        field: the column that holds the text; None means ``text``, or ``messages`` where there is
            no ``text``.
        render: makes a text of a list of chat messages; without it they are refused.

    Raises:
        FileNotFoundError, ValueError: saying what is there instead; some only when texts are read.
    """
    path = Path(source).expanduser()
    if source == "builtin":
        texts = builtin_text.texts(_shuffled(builtin_text.calibration_files(), seed))
        return Documents(texts, {"source": "builtin", "python": platform.python_version()})
    if path.suffix.lower() not in SUFFIXES and not path.exists():
        return _from_hub(source, field, seed, render)
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} is a directory; give a file" if path.is_dir() else f"{source} does not exist"
        )
    description: dict[str, object] = {"source": path.name}
    match path.suffix.lower():
        case ".txt":
            return Documents(iter([read_text(path)]), description)
        case ".jsonl":
            records = read_jsonl(path)
        case ".parquet":
            records = _read_parquet(path)
        case _:
            raise ValueError(
                f"{source}: text data must be {', '.join(SUFFIXES)}, a dataset of the Hugging Face "
                "hub, or 'builtin'"
            )
    if not records:
        raise ValueError(f"{source} is empty")
    field = field or _default_field(records[0], source)
    texts = (
        _text_of(record, field, f"{source}, record {i + 1}", render)
        for i, record in _shuffled(list(enumerate(records)), seed)
    )
    return Documents(texts, {**description, "field": field})


def read_text(path: Path) -> str:
    """A whole text file; ValueError unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def read_jsonl(path: Path) -> list[Record]:
    """One JSON object per line; blank lines are skipped. ValueError naming the line otherwise."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number} is not a JSON object but a {type(record).__name__}"
            )
        records.append(record)
    return records


def _read_parquet(path: Path) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({first_line(error)})") from error


def _from_hub(source: str, field: str | None, seed: int | None, render: Render | None) -> Documents:
    if not DATASET_ID.match(source):
        raise FileNotFoundError(f"{source} does not exist")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(
            f"{source} is no file; reading a dataset of the Hugging Face hub needs: pip install "
            "datasets"
        ) from error
    name, config, split = (*source.split(":"), None, None)[:3]
    try:
        stream = load_dataset(str(name), config, split=split or "train", streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
        records = iter(stream)
        first = next(records, None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{source} is neither a file nor a readable dataset of the Hugging Face hub "
            f"({first_line(error)})"
        ) from error
    if first is None:
        raise ValueError(f"{source} is empty")
    column = field or _default_field(first, source)

    def texts() -> Iterator[str]:
        yield _text_of(first, column, source, render)
        yield from (_text_of(record, column, source, render) for record in records)

    return Documents(texts(), {"source": source, "field": column, "revision": _revision(str(name))})


def _revision(name: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name).sha
    except (HfHubHTTPError, OSError):
        return None


def _default_field(record: Record, where: str) -> str:
    for field in ("text", "messages"):
        if field in record:
            return field
    raise ValueError(f"{where} has no field 'text'; choose one of: {', '.join(map(str, record))}")


def _text_of(record: Record, field: str, where: str, render: Render | None) -> str:
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}; it has: {', '.join(map(str, record))}")
    value = record[field]
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and "role" in m for m in value)
    ):
        if render is None:
            raise ValueError(
                f"{where}: field {field!r} holds chat messages, plain text is wanted here"
            )
        return render(value)
    raise ValueError(
        f"{where}: field {field!r} holds {type(value).__name__}, neither text nor chat messages"
    )


def _shuffled(items: list[T], seed: int | None) -> Iterator[T]:
    if seed is None:
        return iter(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return (items[i] for i in order.tolist())


def first_line(error: Exception) -> str:
    """The first line of a message that is not blank; the name of the error when there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
