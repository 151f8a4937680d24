"""A conversation with a model: the turns so far, and what of them fits into its positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ptq.runtime.generate import generate, record, stream_text
from ptq.runtime.loaded_model import Loaded

Message = dict[str, str]
SHARE = 4  # an answer gets a quarter of the positions, if it may be that long


class TooLong(ValueError):
    """A message that leaves no room for an answer; the conversation goes on without it."""


@dataclass
class Conversation:
    """Turns of a user and a model.

    Attributes:
        system: instructions that stay when old turns are forgotten.
        messages: of user and assistant in turn, as chat templates take them.
        forgotten: how many messages were left out of the last question, the oldest ones.
        cut: why the last answer ended before the model ended it, or None (:func:`cut`).
    """

    model: Loaded
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    cut: str | None = None

    def __post_init__(self) -> None:
        self.encode([{"role": "user", "content": ""}])  # a template that refuses does so now

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of ``messages`` after the system's; raises as ``Loaded.encode_chat``."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.encode_chat([*first, *messages])

    def reset(self) -> None:
        """Forget all turns."""
        self.messages.clear()
        self.forgotten, self.cut = 0, None

    def fit(self, max_new_tokens: int) -> list[int]:
        """The tokens of as many of the last messages as leave room for an answer.

        Whole turns are left out, the oldest first, and stay left out.

        Raises:
            TooLong: the last message alone leaves no room.
        """
        limit, self.forgotten = self.model.positions, 0
        ids = self.encode(self.messages)
        if limit is None:
            return ids
        wanted = min(max_new_tokens, limit // SHARE)
        while len(ids) + wanted > limit and len(self.messages) > 2:
            del self.messages[:2]
            self.forgotten += 2
            ids = self.encode(self.messages)
        if len(ids) >= limit:
            raise TooLong(
                f"this message makes {len(ids)} tokens and the model has {limit} positions; "
                "shorten it"
            )
        return ids

    def answer(
        self, text: str, *, max_new_tokens: int = 512, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield the model's answer to ``text``, piece by piece, and keep both turns.

        An iterator that is closed before its end keeps what it has yielded. A question without an
        answer is not kept.

        Raises:
            TooLong: the message alone leaves no room.
            ValueError: what :func:`ptq.runtime.generate.generate` raises.
        """
        self.messages.append({"role": "user", "content": text})
        self.cut = None
        made: list[int] = []
        pieces: list[str] = []
        try:
            ids = self.fit(max_new_tokens)
            tokens = generate(
                self.model.module,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                stop=self.model.ends,
            )
            for piece in stream_text(self.model.decode, ids, record(tokens, made)):
                pieces.append(piece)
                yield piece
            self.cut = cut(self.model, ids, made, max_new_tokens)
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()


def cut(
    model: Loaded, prompt: Sequence[int], made: Sequence[int], max_new_tokens: int
) -> str | None:
    """Why a text ended before the model ended it, in words; None if the model did."""
    if len(made) == max_new_tokens:
        return f"stopped at --max-new-tokens {max_new_tokens}"
    limit = model.positions
    if limit is not None and len(prompt) + len(made) > limit:
        return f"stopped: the model has {limit} positions, and they are full"
    return None
