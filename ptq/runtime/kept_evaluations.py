"""What ``ptq eval --keep`` found of a checkpoint, in a hidden file of its directory.

A line of ``.ptq_eval.jsonl`` is an evaluation and the sum of the checkpoint that it is of: what is
written anew in the same place is another one. Hidden files are no part of a checkpoint, and
``ptq verify`` passes them by.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ptq.checkpoint.checksums import SUMS
from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.safetensors_files import sha256, write_file
from ptq.reading.schema import check, plain
from ptq.runtime.evaluate import Evaluation

FILE = ".ptq_eval.jsonl"


@dataclass(frozen=True, kw_only=True)
class _Line:
    checkpoint: str
    evaluation: Evaluation


def _sum(folder: Path) -> str:
    """What stands for the files of a checkpoint: the sum of their sums."""
    path = folder / SUMS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so that nothing says of which files a result would be: ptq verify "
            f"{folder} says how to write it"
        )
    return sha256(path)


def keep(folder: Path, evaluation: Evaluation) -> Path:
    """Add an evaluation to those of the checkpoint in ``folder``; the file that it is in.

    Raises:
        ValueError, OSError: there is no complete checkpoint, or the file is damaged.
    """
    check_keep(folder)
    line = _Line(checkpoint=_sum(folder), evaluation=evaluation)
    kept = [_Line(checkpoint=line.checkpoint, evaluation=e) for e in kept_evaluations(folder)]
    written = [json.dumps(plain(found), ensure_ascii=False) for found in (*kept, line)]
    write_file(folder / FILE, [f"{text}\n".encode() for text in written])
    return folder / FILE


def check_keep(folder: Path) -> None:
    """Raise ValueError or OSError where :func:`keep` would, before anything is evaluated."""
    if not folder.is_dir():
        raise ValueError(f"--keep: {folder} is no directory of a quantized checkpoint")
    Checkpoint(folder)
    kept_evaluations(folder)


def kept_evaluations(folder: Path) -> list[Evaluation]:
    """What was kept of the checkpoint that is in ``folder`` now, the oldest first; none where
    nothing was.

    Raises:
        ValueError: a damaged line.
        OSError: the checkpoint has no sums.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    now = _sum(folder)
    found = []
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        where, remedy = f"{path}, line {number}", "remove it, and evaluate again"
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; {remedy}") from error
        line = check(value, _Line, where, remedy)
        if line.checkpoint == now:
            found.append(line.evaluation)
    return found
