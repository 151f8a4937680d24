"""The text of a record of a data set, plain or chat; a record that gives none is skipped and
counted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

Messages = list[dict[str, object]]
Render = Callable[[Messages], str]

FIELDS = ("text", "messages", "conversations")  # looked for in this order
# ShareGPT: who speaks, in the words of chat templates; other speakers keep their names.
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
PATIENCE = 1000  # records without a single text before a source is given up: it may be endless


class Unusable(ValueError):
    """Why a record gives no text."""


@dataclass
class Tally:
    """Of the records read so far: how many gave a text, how many did not, and the first of those
    with the reason."""

    used: int = 0
    skipped: int = 0
    first: str = ""

    def __str__(self) -> str:
        if self.skipped == 1 and not self.used:
            return f"its only record cannot be used: {self.first}"
        return (
            f"{self.skipped} of {self.used + self.skipped} records cannot be used, the first: "
            f"{self.first}"
        )


def texts(
    records: Iterable[tuple[str, object]],
    field: str,
    source: str,
    render: Render | None,
    tally: Tally,
) -> Iterator[str]:
    """The texts of ``records``, each with the words that say which one it is; ``tally`` counts.

    Raises:
        ValueError: none of them gave a text, or none of the first ``PATIENCE``.
    """
    for where, record in records:
        try:
            text = text_of(record, field, render)
        except Unusable as error:
            tally.skipped += 1
            tally.first = tally.first or f"{where} {error}"
            if not tally.used and tally.skipped == PATIENCE:
                break
            continue
        tally.used += 1
        yield text
    if not tally.used:
        raise ValueError(f"{source} holds no text: {tally}")


def default_field(records: Iterable[tuple[str, object]], source: str) -> str:
    """The first of ``FIELDS`` in the first record that has one of them.

    Raises:
        ValueError: no record has, naming the fields of the first; or none is a JSON object.
    """
    found: str | None = None
    for where, record in records:
        if isinstance(record, dict):
            if known := next((field for field in FIELDS if field in record), None):
                return known
            names = ", ".join(map(str, record)) or "nothing"
            found = found or f"{source} has no field 'text'; choose one of: {names}"
        elif found is None:
            try:
                text_of(record, "", None)
            except Unusable as error:
                found = f"{source} holds no text: {where} {error}"
    raise ValueError(found or f"{source} is empty")


def text_of(record: object, field: str, render: Render | None) -> str:
    """The text in ``field`` of a record, chat messages through ``render``.

    Raises:
        Unusable: there is none, ``render`` refuses, or it is not Unicode (an unpaired surrogate).
    """
    if isinstance(record, Unusable):  # what could not even be parsed
        raise record
    if not isinstance(record, dict):
        raise Unusable(f"is not a JSON object but a {type(record).__name__}")
    if field not in record:
        raise Unusable(
            f"has no field {field!r}; it has: {', '.join(map(str, record)) or 'nothing'}"
        )
    value = record[field]
    if isinstance(value, str):
        text = value
    elif (messages := _messages(value)) is None:
        kind = "null" if value is None else type(value).__name__
        raise Unusable(f"holds {kind} in field {field!r}, neither text nor chat messages")
    elif render is None:
        raise Unusable(f"holds chat messages in field {field!r}, plain text is wanted here")
    else:
        text = render(messages)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            f"holds an unpaired surrogate in field {field!r}, at character {error.start}"
        ) from error
    return text


def _messages(value: object) -> Messages | None:
    """Chat messages with ``role`` and ``content``, those of ShareGPT (``from`` and ``value``)
    translated; None if that is not what ``value`` is."""
    if not isinstance(value, list) or not value:
        return None
    messages: Messages = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        if "role" in turn:
            messages.append(turn)
        elif "from" in turn and "value" in turn:
            speaker = turn["from"]
            role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
            messages.append({"role": role, "content": turn["value"]})
        else:
            return None
    return messages
