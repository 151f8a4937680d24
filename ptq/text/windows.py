"""Calibration data: documents → one stream of tokens → windows of equal length → batches."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptq.text import builtin as builtin_text
from ptq.text import documents
from ptq.text.builtin import is_held_out
from ptq.text.records import Messages, Tally, Unusable

logger = logging.getLogger(__name__)

# classes that do just what tokenizer.json says
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# what a chat template raises of its own accord, and what Python raises in its expressions
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip
SURPLUS = 4  # tokens read for every token used: windows then come from more documents

__all__ = ["Calibration", "is_held_out", "load_calibration", "load_text", "load_tokenizer"]


@dataclass(frozen=True)
class Calibration:
    """Batches of token ids, and a record of how they came about.

    Attributes:
        batches: (sequences, length) int64, all of one length, without padding.
        description: source, field, seed, samples, seq_len, tokens, whether windows overlap, and
            ``sha256``, the hash of all token ids (int64, little endian, in order); ``skipped``, how
            many of the records that were read gave no text, if any.
    """

    batches: list[Tensor]
    description: dict[str, object]


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    field: str | None = None,
    fewer: bool = False,
) -> Calibration:
    """``samples`` windows of ``seq_len`` tokens; the same arguments give the same tokens.

    Windows do not overlap unless there is too little text.

    Args:
        source, field: as :func:`ptq.text.documents.read` takes them.
        fewer: give fewer windows rather than such as overlap.

    Raises:
        ValueError: the text is shorter than the windows need, or a field is missing.
        FileNotFoundError: there is no such source.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    corpus = documents.read(source, field=field, seed=seed, render=partial(_rendered, tokenizer))
    start = _start_tokens(tokenizer)
    length = seq_len - len(start)  # of a window without what the tokenizer puts in front
    if length < 1:
        raise ValueError(
            f"seq_len {seq_len} leaves no room after the {len(start)} tokens that start every text"
        )
    stream = _stream(tokenizer, corpus.texts, SURPLUS * samples * length, start)
    generator = torch.Generator().manual_seed(seed)
    if fewer:
        samples = max(min(samples, len(stream) // length), 1)
    try:
        offsets = _offsets(len(stream), length, samples, generator, source)
    except ValueError as error:
        if not corpus.tally.skipped:
            raise
        raise ValueError(f"{error}; {corpus.tally}") from error
    _tell(source, corpus.tally)
    prefix = torch.tensor(start, dtype=torch.int64)
    # (samples, seq_len)
    windows = torch.stack([torch.cat([prefix, stream[o : o + length]]) for o in offsets])
    description = {
        **corpus.description,
        **({"skipped": corpus.tally.skipped} if corpus.tally.skipped else {}),
        "seed": seed,
        "samples": samples,
        "seq_len": seq_len,
        "tokens": windows.numel(),
        "overlapping": samples * length > len(stream),
        "sha256": hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest(),
    }
    return Calibration(list(windows.split(batch_size)), description)


def load_text(source: str, *, field: str | None = None) -> str:
    """The whole text of ``source`` for evaluation, documents joined by empty lines; of "builtin"
    the bundled held-out text. ValueError when it is blank."""
    if source == "builtin":
        return builtin_text.held_out_text()
    corpus = documents.read(source, field=field, seed=None)
    text = "\n\n".join(corpus.texts)
    if not text.strip():
        raise ValueError(f"{source} contains no text")
    _tell(source, corpus.tally)
    return text


def _tell(source: str, tally: Tally) -> None:
    if tally.skipped:
        logger.warning("%s: %s; the others are used", source, tally)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Its tokenizer.json is the authority: where tokenizer_config.json names the generic class, that
    class reads it, because the automatic choice goes by the model's type and may tokenize
    differently.

    Raises:
        FileNotFoundError, ValueError: there is none that can be used.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory with a tokenizer")
    automatic: type = AutoTokenizer
    try:
        if (path / "tokenizer.json").is_file() and _declared_class(path) in GENERIC:
            automatic = PreTrainedTokenizerFast
        return automatic.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"{path} has no tokenizer that can be loaded: {documents.first_line(error)}"
        ) from error


def _declared_class(path: Path) -> str | None:
    config = path / "tokenizer_config.json"
    return (
        json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if config.is_file()
        else None
    )


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text: nothing, or its beginning-of-text
    token."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = _special(tokenizer, "bos")
    return [bos] if bos is not None and with_special[:1] == [bos] else []  # pyright: ignore[reportIndexIssue]


def _special(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    token = getattr(tokenizer, f"{name}_token_id")
    return token if isinstance(token, int) else None


def _separator(tokenizer: PreTrainedTokenizerBase, start: list[int]) -> list[int]:
    """The tokens between two documents: the end token if there is one, then what every text starts
    with; where both are missing, the beginning token."""
    end, bos = _special(tokenizer, "eos"), _special(tokenizer, "bos")
    ends = [end] if end is not None else []
    return ends + [s for s in start if [s] != ends] if ends or start or bos is None else [bos]


def _stream(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], least: int, start: list[int]
) -> Tensor:
    """The tokens of ``texts``, joined, until there are ``least``; the last text is kept whole."""
    separator, ids = _separator(tokenizer, start), list[int]()
    for text in texts:
        new: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        if start and new[:1] == start:  # a chat template has put it there already
            new = new[1:]
        if not new:
            continue
        if ids:
            ids += separator[1:] if separator and ids[-1] == separator[0] else separator
        ids += new
        if len(ids) >= least:
            break
    return torch.tensor(ids, dtype=torch.int64)


def _offsets(
    tokens: int, length: int, samples: int, generator: torch.Generator, source: str
) -> list[int]:
    """Where the windows start, ascending: at random without overlap where there is room for that,
    else evenly spread and overlapping."""
    room = tokens - length  # the last possible start
    if room + 1 < samples:
        raise ValueError(
            f"{source} is too short: {tokens} tokens, but {samples} samples of {length} tokens "
            f"need {samples * length} "
            f"(at least {length + samples - 1} when they overlap); give more text, fewer samples "
            "or a shorter seq_len"
        )
    spare = tokens - samples * length
    if spare >= 0:  # gaps of random size between windows, in sum at most what is spare
        gaps = torch.randint(0, spare + 1, (samples,), generator=generator).sort().values
        return [int(gap) + i * length for i, gap in enumerate(gaps)]
    return [round(i * room / max(samples - 1, 1)) for i in range(samples)]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The text of a conversation. Templates are programs that come with a model: they refuse some
    (a system turn, roles that do not alternate), and fail on others."""
    if not getattr(tokenizer, "chat_template", None):
        raise Unusable(
            "holds chat messages, but the tokenizer has no chat template; choose a field with "
            "plain text"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))  # pyright: ignore[reportArgumentType]
    except TEMPLATE_ERRORS as error:
        reason = documents.first_line(error)
        raise Unusable(f"is refused by the tokenizer's chat template ({reason})") from error
