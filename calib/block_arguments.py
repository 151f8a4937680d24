"""The arguments that a model calls its decoder blocks with.

The model's own forward is run with the blocks' forwards replaced by stand-ins that note their
arguments and hand the hidden states on. So masks, position embeddings, and whatever else an
architecture gives its blocks are what the architecture makes them, for every block separately.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.model.structure import is_cache

POOL = 16  # tensors of equal shape that are compared before an argument is stored as a new one


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def __call__(self, block: nn.Module, hidden: Tensor) -> object:
        """What the block returns for ``hidden`` (batch, length, features) with these arguments."""
        device = hidden.device
        args = (_moved(a, device) for a in self.args)
        return block(hidden, *args, **{k: _moved(v, device) for k, v in self.kwargs.items()})


def hidden_states(output: object) -> Tensor:
    """The hidden states in what a block returned: the tensor itself or the first of a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"a decoder block returned {type(first).__name__} where hidden states were expected: "
            "not supported"
        )
    return first


@dataclass
class Recorder:
    """Notes with what ``model`` calls its ``blocks``, without running them.

    Attributes:
        keep_on: the device for arguments that differ from batch to batch; those that are equal in
            several batches or blocks are stored once, where they are.
        returned: what a block really returned once; stand-ins return hidden states in that form.
    """

    model: nn.Module
    blocks: list[nn.Module]
    keep_on: torch.device
    returned: object = None
    _pool: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def first(self, tokens: Tensor) -> tuple[Tensor, Call]:
        """Hidden states and arguments of the first block only."""
        states, calls = self._run(tokens, 1, lambda hidden: hidden)
        return states[0], calls[0]

    def learn(self, tokens: Tensor) -> None:
        """See what the first block, which is filled, returns for ``tokens``; raise ValueError if
        that has no hidden states, or as :meth:`check`."""
        hidden, call = self.first(tokens)
        self.returned = call(self.blocks[0], hidden)
        hidden_states(self.returned)
        self.check(tokens)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states that enter the first block, and the arguments of every block."""
        states, calls = self._run(tokens, len(self.blocks), lambda hidden: hidden)
        return states[0], self._interned(calls)

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError if this model cannot be run block by block.

        It cannot if it calls a block several times, changes the hidden states between blocks, or
        hands other results on from block to block; nor if the arguments of a block depend on what
        earlier blocks returned, which two runs show whose stand-ins return different states.
        """
        name = type(self.model).__name__
        answers: list[Tensor] = []

        def other(hidden: Tensor) -> Tensor:
            answers.append(hidden * 0.5 + 1)
            return answers[-1]

        _, plain = self._run(tokens, len(self.blocks), lambda hidden: hidden, to_the_end=True)
        states, changed = self._run(tokens, len(self.blocks), other)
        for i, (before, after) in enumerate(zip(answers, states[1:], strict=True)):
            if before.shape != after.shape or not torch.equal(before, after):
                raise ValueError(
                    f"{name} changes the hidden states between blocks {i} and {i + 1}: it cannot "
                    "be run block by block"
                )
        for i, (a, b) in enumerate(zip(plain, changed, strict=True)):
            if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise ValueError(
                    f"{name} gives block {i} arguments that depend on earlier blocks: it cannot be "
                    "run block by block"
                )

    def reach_head(self, tokens: Tensor, last: Tensor) -> None:
        """Do what the model does between its last block, which returned ``last`` for ``tokens``,
        and its output layer.

        The output layer is not computed: its forward pre-hooks see what it would read.
        """
        self._run(tokens, len(self.blocks), self._ending_in(last), to_the_end=True)

    def logits(self, tokens: Tensor, last: Tensor) -> Tensor:
        """What the model returns for ``tokens`` where its last block returned ``last``: (sequences,
        length, vocabulary)."""
        results: list[Tensor] = []
        answer = self._ending_in(last)
        self._run(tokens, len(self.blocks), answer, to_the_end=True, results=results)
        return results[0]

    def _ending_in(self, last: Tensor) -> Callable[[Tensor], Tensor]:
        """What stand-ins return: what they are given, but for the last one ``last``."""
        answers = iter([None] * (len(self.blocks) - 1) + [last])

        def answer(hidden: Tensor) -> Tensor:
            state = next(answers)
            return hidden if state is None else state

        return answer

    def _run(
        self,
        tokens: Tensor,
        count: int,
        answer: Callable[[Tensor], Tensor],
        *,
        to_the_end: bool = False,
        results: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Call]]:
        """Hidden states and arguments of the first ``count`` blocks; ``to_the_end`` goes on up to
        the output layer, and through it if there are ``results`` to put logits in."""
        name, states, calls = type(self.model).__name__, list[Tensor](), list[Call]()

        def stand_in(i: int, first: str) -> Callable[..., object]:
            def forward(*args: object, **kwargs: object) -> object:
                hidden = args[0] if args else kwargs.pop(first)
                if i != len(calls) or not isinstance(hidden, Tensor):
                    raise ValueError(
                        f"{name} does not call its blocks once, one after the other: not supported"
                    )
                self._check_arguments(args[1:], kwargs)
                states.append(hidden)
                calls.append(Call(args[1:], kwargs))
                if i == count - 1 and not to_the_end:
                    raise _Done
                return self._shaped(answer(hidden))

            return forward

        with (
            _replaced_forwards(self.blocks[:count], stand_in),
            _stopped_at_output(self.model) if results is None else nullcontext(),
            suppress(_Done),
        ):
            returned = self.model(input_ids=tokens, use_cache=False)
            if results is not None:
                results.append(returned.logits)
        if len(calls) < count:
            raise ValueError(
                f"{name} called only {len(calls)} of its {count} blocks: not supported"
            )
        return states, calls

    def _check_arguments(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        name = type(self.model).__name__
        extras = self.returned[1:] if isinstance(self.returned, (tuple, list)) else ()
        for value in (*args, *kwargs.values()):
            if is_cache(value):
                raise ValueError(
                    f"{name} gives its blocks a cache although none is wanted: not supported"
                )
            if isinstance(value, Tensor) and any(value is extra for extra in extras):
                raise ValueError(
                    f"{name} hands more than hidden states from block to block: not supported"
                )

    def _shaped(self, hidden: Tensor) -> object:
        if isinstance(self.returned, tuple):
            return (hidden, *self.returned[1:])
        return [hidden, *self.returned[1:]] if isinstance(self.returned, list) else hidden

    def _interned(self, calls: list[Call]) -> list[Call]:
        seen: dict[
            int, tuple[object, object]
        ] = {}  # of this batch; originals are kept so that ids stay theirs

        def intern(value: object) -> object:
            if id(value) not in seen:
                seen[id(value)] = (value, self._stored(value, intern))
            return seen[id(value)][1]

        return [
            Call(tuple(intern(a) for a in c.args), {k: intern(v) for k, v in c.kwargs.items()})
            for c in calls
        ]

    def _stored(self, value: object, intern: Callable[[object], object]) -> object:
        if isinstance(value, Tensor):
            pool = self._pool.setdefault((value.shape, value.dtype), [])
            if (known := next((p for p in pool if torch.equal(p, value)), None)) is not None:
                return known
            if len(pool) < POOL:
                pool.append(value)
                return value
            return value.to(self.keep_on)
        if type(value) in (tuple, list):
            return type(value)(intern(v) for v in value)  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        if type(value) is dict and value:
            return {k: intern(v) for k, v in value.items()}
        # an empty dict stays the same object: blocks may hand things to later blocks through it
        return value


class _Done(Exception):
    pass


@contextmanager
def _stopped_at_output(model: nn.Module) -> Iterator[None]:
    """The output layer is not run, only its other hooks: it is large and nobody needs it."""
    output = getattr(model, "get_output_embeddings", lambda: None)()

    def stop(*_: object) -> None:
        raise _Done

    hook = output.register_forward_pre_hook(stop) if isinstance(output, nn.Module) else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def _replaced_forwards(
    blocks: list[nn.Module], stand_in: Callable[[int, str], Callable[..., object]]
) -> Iterator[None]:
    for i, block in enumerate(blocks):
        first = next(iter(inspect.signature(block.forward).parameters))
        block.__dict__["forward"] = stand_in(
            i, first
        )  # the module stays itself: models read attributes of their blocks
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
    if type(value) is dict and any(
        isinstance(v, Tensor) and v.device != device for v in value.values()
    ):
        return {k: _moved(v, device) for k, v in value.items()}
    return value


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True
