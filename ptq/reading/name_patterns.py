"""Patterns that select modules by name, from recipes and checkpoints: matched in bounded time.

A regular expression can be made to take longer than the universe, ``(a|aa)+$`` on sixty letters:
those of others are matched by an engine that can be stopped, and stopped when all slow matches of
one expression together take a second. One that people write takes microseconds.
"""

import fnmatch
import time
from functools import lru_cache

import regex

LONGEST = 1000  # characters of a pattern
SECONDS = 1.0  # for all slow matches of an expression
SLOW = 0.001
EXPRESSION = "re:"  # what an expression starts with


class Expression:
    """A regular expression, matched from the start of a name."""

    def __init__(self, text: str) -> None:
        """Raises ValueError where it is none, or too long."""
        self._text = text
        self._left = SECONDS
        if len(text) > LONGEST:
            raise ValueError(
                f"the pattern re:{text[:40]}… has {len(text)} characters: use less than {LONGEST}"
            )
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            reason = getattr(error, "msg", None) or "it is nested too deeply"
            raise ValueError(
                f"re:{text} is no regular expression ({reason}): write a literal dot or bracket as "
                "\\. or \\("
            ) from error

    def matches(self, name: str) -> bool:
        """Whether it matches ``name``; ValueError where that takes too long to tell."""
        start = time.perf_counter()
        try:
            return self._compiled.match(name, timeout=max(self._left, SLOW)) is not None
        except TimeoutError as error:
            raise ValueError(
                f"the pattern re:{self._text} takes too long on {name[:80]}: write it without a "
                "repetition inside a repetition"
            ) from error
        finally:
            if (spent := time.perf_counter() - start) > SLOW:
                self._left -= spent


@lru_cache(maxsize=4096)
def _expression(text: str) -> Expression:
    return Expression(text)


def check_pattern(pattern: str) -> str:
    """The pattern itself; ValueError for one that is too long, or an expression that is none."""
    if pattern.startswith(EXPRESSION):
        _expression(pattern.removeprefix(EXPRESSION))
    elif len(pattern) > LONGEST:
        raise ValueError(
            f"the pattern {pattern[:40]}… has {len(pattern)} characters: use less than {LONGEST}"
        )
    return pattern


def matches_name(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (an exact name, or ``re:`` and an expression matched from the start)
    selects ``name``: the patterns of a configuration."""
    if pattern.startswith(EXPRESSION):
        return _expression(pattern.removeprefix(EXPRESSION)).matches(name)
    return pattern == name


def matches(pattern: str, *names: str) -> bool:
    """Whether a pattern selects a module that has these names, as recipes have them: ``re:`` and a
    regular expression matched from the start, a shell-style wildcard pattern, or a name; a pattern
    without wildcard also selects by the last parts of the name (``down_proj``, ``mlp.gate``)."""
    if pattern.startswith(EXPRESSION):
        return any(matches_name(pattern, name) for name in names)
    tail = f"*.{pattern}"
    return any(fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, tail) for n in names)
