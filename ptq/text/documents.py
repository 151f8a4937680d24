"""Documents out of files, data sets of the Hugging Face hub, or the built-in text."""

import codecs
import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import torch

from ptq.text import builtin as builtin_text
from ptq.text.records import Render, Tally, Unusable, default_field
from ptq.text.records import texts as texts_of

T = TypeVar("T")
Records = list[tuple[str, object]]  # each with the words that say which one it is
DATASET_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+){0,2}$")
SUFFIXES = (".txt", ".jsonl", ".parquet")
LOOK = 100  # records of a streamed dataset in which the field is looked for
BUFFER = 10_000  # documents of a streamed dataset that are shuffled at a time


@dataclass(frozen=True)
class Documents:
    """Texts in the order of the seed, to be read once, and a record of where they are from.

    ``tally`` counts while they are read: records that give no text are left out.
    """

    texts: Iterator[str]
    description: dict[str, object]
    tally: Tally = field(default_factory=Tally)


def read(
    source: str, *, field: str | None, seed: int | None, render: Render | None = None
) -> Documents:
    """The documents of ``source``; shuffled by ``seed``, or in their own order when it is None.

    Args:
        source: a .txt, .jsonl or .parquet file, a data set of the hub (``id``, ``id:config`` or
            ``id:config:split``), or "builtin".
        field: the column that holds the text; None means ``text``, ``messages`` or
            ``conversations``, whichever comes first.
        render: makes a text of a list of chat messages, or raises ``Unusable``; without it they are
            no text.

    Raises:
        FileNotFoundError, ValueError: saying what is there instead; when texts are read also where
            no record gives one.
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
    field, tally = field or default_field(records, source), Tally()
    texts = texts_of(_shuffled(records, seed), field, source, render, tally)
    return Documents(texts, {**description, "field": field}, tally)


def read_text(path: Path) -> str:
    """A whole text file without its byte order mark; ValueError unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def read_jsonl(path: Path) -> Records:
    """One value per line, or why there is none; blank lines are left out."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [
        (f"line {number}", _parsed(line)) for number, line in enumerate(lines, 1) if line.strip()
    ]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unusable(f"is not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return Unusable(f"is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits, a deep nesting
        return Unusable(f"is no JSON that can be read ({first_line(error)})")


def _read_parquet(path: Path) -> Records:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({first_line(error)})") from error
    return _numbered(rows)


def _numbered(records: Iterable[object]) -> Records:
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


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
        records = ((f"record {number}", record) for number, record in enumerate(stream, 1))
        # the first record may lack what the others have
        ahead = list(islice(records, 1 if field else LOOK))
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{source} is neither a file nor a readable dataset of the Hugging Face hub "
            f"({first_line(error)})"
        ) from error
    if not ahead:
        raise ValueError(f"{source} is empty")
    field, tally = field or default_field(ahead, source), Tally()
    texts = texts_of(chain(ahead, records), field, source, render, tally)
    description = {"source": source, "field": field, "revision": _revision(str(name))}
    return Documents(texts, description, tally)


def _revision(name: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name).sha
    except (HfHubHTTPError, OSError):
        return None


def _shuffled(items: list[T], seed: int | None) -> Iterator[T]:
    if seed is None:
        return iter(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return (items[i] for i in order.tolist())


def first_line(error: Exception) -> str:
    """The first line of a message that is not blank; the name of the error when there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
