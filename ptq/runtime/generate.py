"""Text from a model, token by token, with a cache of keys and values."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ptq.model.structure import positions
from ptq.runtime import decoding

CONTEXT = 8  # tokens before the first new one that are decoded with it
# what a decoder shows for the first bytes of a character that the next token completes
UNFINISHED = "\ufffd"


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from logits (vocab): the most likely at temperature 0, else a draw from
    softmax(logits / T).

    Waits for the device once: token and largest logit, or all logits, come to the host together.

    Raises:
        ValueError: NaN or infinite logits.
    """
    if temperature == 0:  # a token is exact in float64
        token, largest = torch.stack((logits.argmax().double(), logits.amax().double())).tolist()
        _check(largest)
        return int(token)
    logits = logits.cpu()
    largest = float(logits.amax())
    _check(largest)
    probabilities = ((logits.double() - largest) / temperature).softmax(
        -1
    )  # no overflow at small temperatures
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(largest: float) -> None:
    """Raise ValueError if the largest logit, which is NaN if any is, says that they are no
    numbers."""
    if math.isnan(largest) or largest == math.inf:
        raise ValueError(
            "the model gives NaN or infinite logits; the weights are damaged, or try --dtype "
            "float32"
        )


def room(model: nn.Module, prompt: Sequence[int]) -> int | None:
    """How many tokens can follow ``prompt`` before the model's positions end; None if its
    configuration names no end. The last token needs no position: nothing is asked after it.

    Raises:
        ValueError: the prompt alone has more tokens than the model has positions.
    """
    config = getattr(model, "config", None)
    limit = None if config is None else positions(config)
    if limit is None:
        return None
    if len(prompt) > limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the model {limit} positions; shorten it"
        )
    return limit - len(prompt) + 1


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Iterable[int] = (),
    decode: decoding.Decode = "auto",
) -> Iterator[int]:
    """Yield the tokens that follow ``prompt``, until one of ``stop``, which is not yielded, the end
    of the model's positions (:func:`room`), or ``max_new_tokens``.

    The same arguments give the same text on the same machine. ``decode`` is how steps run
    (``ptq/runtime/decoding.py``): if not given, as a CUDA graph over a cache of fixed size where
    device and model allow it, else plainly.

    Raises:
        ValueError: a prompt that is empty or longer than the model's positions, a negative
            temperature or length, logits that are no numbers, or a way to decode that the model or
            its device does not allow.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give some text with --prompt")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature} is not a number of 0 or more")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: ask for at least one")
    left = room(model, prompt)
    if left is not None:
        max_new_tokens = min(max_new_tokens, left)
    generator = torch.Generator().manual_seed(seed)
    ends = frozenset(stop)
    steps = decoding.decode(model, prompt, len(prompt) + max_new_tokens, decode)
    logits = next(steps)
    for remaining in reversed(range(max_new_tokens)):
        token = choose(logits, temperature, generator)
        if token in ends:
            return
        yield token
        if remaining:
            logits = steps.send(token)


def stream_text(
    decode: Callable[[list[int]], str], prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """The text of ``tokens``, piece by piece, as the continuation of ``prompt``.

    A piece is held back while it ends within a character. A token is decoded together with those
    before it, so that a decoder which drops the space at the start of a text does not drop it here;
    only with a few, so that the time per token does not grow.
    """
    ids = list(prompt)
    start, read = max(0, len(ids) - CONTEXT), len(ids)
    for token in tokens:
        ids.append(token)
        before, now = decode(ids[start:read]), decode(ids[start:])
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            yield now[len(before) :]
            start, read = read, len(ids)
    rest = decode(ids[start:])[len(decode(ids[start:read])) :]
    if rest:
        yield rest


def record(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    """``tokens`` as they are, each appended to ``into`` as it passes."""
    for token in tokens:
        into.append(token)
        yield token
