"""Results of ``ptq eval`` beside a checkpoint: ``ptq_eval.json``, a part of its model card, and
their sums.

A result replaces one of the same text, windows, tokens and original. Nothing of the model changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq.checkpoint.checksums import read_sums, write_sums
from ptq.checkpoint.quantization_config import JsonDict
from ptq.checkpoint.safetensors_files import write_file, write_json
from ptq.reading.schema import read_json

FILE, CARD = "ptq_eval.json", "README.md"
HEADING, NEXT = "## Measured", "## Recipe"
# What tells results apart.
KEY = ("text", "reference", "seq_len", "tokens")
COLUMNS = {
    "perplexity": "perplexity",
    "reference_perplexity": "of the original",
    "kl": "KL, nats a token",
    "top1_agreement": "same top token",
}


@dataclass(frozen=True)
class _Stored:
    results: list[dict[str, object]]


def record(checkpoint: Path, result: Mapping[str, object]) -> None:
    """Keep a result with the checkpoint that it is of.

    Args:
        result: plain JSON, as :meth:`ptq.runtime.evaluate.Evaluation.to_dict` gives it, with the
            names of ``text`` and ``reference``; of paths the last part is kept.

    Raises:
        FileNotFoundError: the directory has no sums: it is no finished checkpoint of ptq.
        ValueError: the file of results is damaged.
    """
    sums = read_sums(checkpoint)
    row: JsonDict = {key: _name(value) if key in KEY else value for key, value in result.items()}
    rows = [r for r in stored(checkpoint) if any(r.get(key) != row.get(key) for key in KEY)]
    rows.append(row)
    card = checkpoint / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {checkpoint.name}\n"
    # the sums last: what is interrupted shows in ptq verify, and is mended by the same command
    sums[FILE] = write_json(checkpoint / FILE, {"results": rows})
    sums[CARD] = write_file(card, [with_results(text, rows).encode()])
    write_sums(checkpoint, sums)


def stored(checkpoint: Path) -> list[dict[str, object]]:
    """All results that are kept with a checkpoint; ValueError if their file is damaged."""
    path = checkpoint / FILE
    if not path.is_file():
        return []
    return read_json(path, _Stored, "remove the file, nothing else needs it").results


def with_results(card: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A model card with the table of results before its recipe, in the place of one that it has."""
    before, found, after = card.partition(f"{HEADING}\n")
    if found:
        start = after.find("\n## ")
        after = after[start + 1 :] if start >= 0 else ""
        card = before + after
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    table = [
        HEADING,
        "",
        "By `ptq eval`, in windows that do not overlap.",
        "",
        "| text | tokens | " + " | ".join(COLUMNS[key] for key in shown) + " |",
        "|---|---|" + "---|" * len(shown),
        *(
            f"| {row['text']}, windows of {row['seq_len']} | {row['tokens']} | "
            + " | ".join(_number(row.get(key)) for key in shown)
            + " |"
            for row in rows
        ),
    ]
    section = "\n".join([*table, "", ""])
    place = card.find(NEXT)
    if place < 0:
        return f"{card.rstrip()}\n\n{section.rstrip()}\n"
    return card[:place] + section + card[place:]


def _name(value: object) -> object:
    return Path(value).name or value if isinstance(value, str) else value


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
