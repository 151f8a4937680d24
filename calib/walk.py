"""Walk a decoder block by block: calibrate a block, let the caller change it, run what it became
(gptq.md, 7)."""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ptq.calib.block_arguments import Call, Recorder, hidden_states
from ptq.calib.hessian import distributed
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.observer import InputGroup, Observer, Probe
from ptq.calib.rare_experts import pool_key, pooled, top_up
from ptq.model.checkpoint_source import Source
from ptq.model.experts import routed_everywhere
from ptq.model.memory_source import MemorySource

__all__ = ["CalibratedBlock", "InputGroup", "walk"]

PREPARE = 1 << 15  # tokens of all ranks, at least a batch on each, that a block is prepared with
TRIAL = 64  # tokens that a block which is prepared can be run on at little cost


@dataclass(frozen=True, kw_only=True)
class CalibratedBlock:
    """A block filled with its weights, and the groups of Linears in it (none when it was skipped).

    ``prefix`` makes a name within ``module`` a full name: ``name`` and a dot, but for the output
    head.
    """

    name: str
    prefix: str
    module: nn.Module
    groups: list[InputGroup]
    index: int
    count: int
    _pools: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def hessian(self, group: InputGroup) -> Float[Tensor, "in in"]:
        """The Hessian to solve ``group`` with: the mean over its tokens, topped up for rare experts
        (G30).

        With several ranks, reduce all groups first; with experts, ask before layers are replaced.
        Raises ValueError, naming the layer, when neither the group nor the pool saw a token.
        """
        seen, first = group.hessian, next(iter(group.layers))
        try:
            pool = pool_key(self.module, first)
            if pool is None or seen.tokens >= seen.features:
                return seen.mean()
            if pool not in self._pools:
                peers = [
                    g for g in self.groups if pool_key(self.module, next(iter(g.layers))) == pool
                ]
                self._pools[pool] = pooled(g.hessian for g in peers)
            return top_up(
                seen.mean() if seen.tokens else None, self._pools[pool], seen.tokens, seen.features
            )
        except ValueError as error:
            raise ValueError(f"{self.prefix}{first}: {error}") from error


@torch.no_grad()
def walk(
    source: Source | MemorySource,
    batches: Sequence[Tensor],
    *,
    probes: dict[int, Probe],
    skip: Callable[[str], bool],
    feed: Callable[[str, Tensor], Tensor] | None,
    ignore: Callable[[str], bool],
    device: torch.device | str,
    holdout_every: int = 8,
    held: Sequence[Tensor | None] | None = None,
    activations: str = "ram",
    finished: Callable[[int, Tensor], None] | None = None,
    prepare: Callable[[CalibratedBlock, Callable[[], Tensor]], None] | None = None,
    route_all: bool = False,
    head: bool = False,
) -> Iterator[CalibratedBlock]:
    """Yield every decoder block with statistics of what its Linears read, and go on through what
    the caller made of it.

    Whatever the caller did to ``block.module`` before asking for the next block is what the next
    block's inputs are computed with. The last block is run again only for ``finished(batch,
    hidden_states)``.

    ``batches``: token ids (sequences, length), all of the same length. ``probes``: for each key
    that divides a layer's features, max |probe(x)| is recorded. ``skip(block)``: yield the block
    without statistics. ``feed(layer, x)``: what a layer gets instead of ``x``; Hessians are of
    ``x``. ``ignore(layer)``: no statistics, no feed. Every ``holdout_every``-th sequence goes into
    ``holdout`` instead of ``hessian`` (0, or fewer sequences than that: none); ``held``, a mask of
    sequences per batch as :func:`held_out` makes it, overrides that. ``activations``: where the
    hidden states of all batches live: "ram", "device" or "disk". ``prepare(block, run)``: may
    change a block before it is observed; it gets the block with statistics of its first ``PREPARE``
    tokens, and what gives the hidden states that it returns for ``TRIAL`` tokens. The output head
    is not prepared. ``route_all``: statistics of experts are those of all tokens, instead of the
    tokens that the router sends to them. ``head``: the output head follows as a last block of one
    layer, which reads what the model makes of the last hidden states (final norm and whatever
    else).

    Raises ValueError for unusable batches, NaN or infinity in activations (naming the layer), and
    architectures that cannot be run block by block.
    """
    device = torch.device(device)
    blocks = source.blocks()
    head_name = source.head()[0] if head else ""
    go_on = finished is not None or (head and not skip(head_name))
    _check(batches, source.skeleton())
    held = held_out([len(b) for b in batches], holdout_every) if held is None else held
    held = [None if mask is None else mask.to(device) for mask in held]
    with HiddenStates(activations, device) as states:
        recorder = Recorder(source.skeleton(), [block for _, block in blocks], torch.device("cpu"))
        calls: list[list[Call]] = []
        short: list[Call] = []
        for i, (name, block) in enumerate(blocks):
            try:
                source.fill(block, name, device)
                if i == 0:  # with its weights: the form of what blocks return is looked at
                    calls, short = _record(recorder, source, batches, states, device)
                groups: list[InputGroup] = []
                made = partial(
                    CalibratedBlock,
                    name=name,
                    prefix=f"{name}.",
                    module=block,
                    index=i,
                    count=len(blocks) + head,
                )
                if not skip(name):
                    run = partial(_run, calls, i, block, states)
                    observe = partial(
                        _observed, block, name, run, batches, held, device, ignore, route_all
                    )
                    if prepare is not None:
                        start = states[0][:1, :TRIAL].clone()
                        # in the call only: afterwards nobody holds these statistics, nor layers
                        # that were replaced
                        prepare(
                            made(groups=observe(_few(batches), probes={}, feed=None)),
                            partial(_tried, short[i], block, start),
                        )
                    groups = observe(len(batches), probes=probes, feed=feed)
                yield made(groups=groups)
                if i + 1 < len(blocks) or go_on:
                    for j in range(len(batches)):
                        states[j] = _propagated(calls[j][i], block, states[j], name)
            finally:
                source.release(block)
                _trim()
        if finished is not None:
            for j in range(len(batches)):
                finished(j, states[j])
        if head:
            observe = partial(
                Observer, probes=probes, feed=None, device=device, batches=len(batches)
            )
            yield from _head(
                source, recorder, batches, states, observe, skip=skip, ignore=ignore, held=held
            )


def _run(
    calls: list[list[Call]], index: int, block: nn.Module, states: HiddenStates, batch: int
) -> object:
    """What a block returns for a batch."""
    return calls[batch][index](block, states[batch])


def _few(batches: Sequence[Tensor]) -> int:
    """How many of this rank's batches hold its share of ``PREPARE`` tokens: batch i of all is on
    rank i % ranks."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    wanted = math.ceil(PREPARE / batches[0].numel())
    return min(len(batches), max(1, len(range(rank, wanted, ranks))))


def _tried(call: Call, block: nn.Module, start: Tensor) -> Tensor:
    """The hidden states that a block returns."""
    return hidden_states(call(block, start.clone()))


def _observed(
    block: nn.Module,
    name: str,
    run: Callable[[int], object],
    batches: Sequence[Tensor],
    held: Sequence[Tensor | None],
    device: torch.device,
    ignore: Callable[[str], bool],
    route_all: bool,
    count: int,
    *,
    probes: dict[int, Probe],
    feed: Callable[[str, Tensor], Tensor] | None,
) -> list[InputGroup]:
    """The groups of Linears in a block, and what they read in the first ``count`` batches."""
    linears = {
        n: m
        for n, m in block.named_modules()
        if isinstance(m, nn.Linear) and not ignore(f"{name}.{n}")
    }
    observer = Observer(
        block, linears, probes=probes, feed=feed, device=device, batches=count, prefix=f"{name}."
    )
    with observer.installed(), routed_everywhere(block, route_all):
        for j, batch in enumerate(batches[:count]):
            observer.expect((batch.shape[0], batch.shape[1]), held[j])
            run(j)
    return observer.groups()


def _head(
    source: Source | MemorySource,
    recorder: Recorder,
    batches: Sequence[Tensor],
    states: HiddenStates,
    observe: Callable[..., Observer],
    *,
    skip: Callable[[str], bool],
    ignore: Callable[[str], bool],
    held: Sequence[Tensor | None],
) -> Iterator[CalibratedBlock]:
    """The output head as a block of one layer, with statistics of what the model makes of
    ``states`` for it to read."""
    (name, linear), device, count = source.head(), states.device, len(recorder.blocks)
    parent, _, leaf = name.rpartition(".")
    holder, prefix = nn.ModuleDict({leaf: linear}), f"{parent}." if parent else ""
    groups: list[InputGroup] = []
    try:
        source.fill(linear, name, device)
        if not skip(name) and not ignore(name):
            observer = observe(holder, {leaf: linear}, prefix=prefix)
            with (
                observer.installed(),
                _filled_on_demand(source, [*recorder.blocks, linear], device),
            ):
                for j, batch in enumerate(batches):
                    observer.expect((batch.shape[0], batch.shape[1]), held[j])
                    recorder.reach_head(batch.to(device), states[j])
            groups = observer.groups()
        yield CalibratedBlock(
            name=name, prefix=prefix, module=holder, groups=groups, index=count, count=count + 1
        )
        source.skeleton().set_submodule(name, holder[leaf])
    finally:
        source.release(holder)


def _trim() -> None:
    """Give freed memory back to the system: glibc otherwise keeps what a block leaves behind, 40 MB
    each time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _propagated(call: Call, block: nn.Module, before: Tensor, name: str) -> Tensor:
    after = hidden_states(call(block, before))
    assert after.dtype == before.dtype and after.shape == before.shape, (  # G28
        f"{name} turned {before.dtype} {tuple(before.shape)} into {after.dtype} "
        f"{tuple(after.shape)}"
    )
    return after


def _check(batches: Sequence[Tensor], model: nn.Module) -> None:
    if not len(batches):
        raise ValueError("there are no calibration batches")
    if (
        any(b.ndim != 2 or b.dtype != torch.int64 or not b.numel() for b in batches)
        or len({b.shape[1] for b in batches}) > 1
    ):
        raise ValueError(
            "calibration batches must be int64 token ids (sequences, length), all of the same "
            "length"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    low, high = min(int(b.min()) for b in batches), max(int(b.max()) for b in batches)
    if low < 0 or (size is not None and high >= size):
        bad = low if low < 0 else high
        raise ValueError(
            f"token id {bad} is outside the model's vocabulary of {size}: the tokenizer belongs to "
            "another model"
        )


def held_out(sizes: Sequence[int], every: int = 8) -> list[Tensor | None]:
    """For each batch, which of its sequences are held out; None where none is."""
    total = sum(sizes)
    if every < 1 or total < every:
        return [None] * len(sizes)
    chosen = torch.arange(1, total + 1) % every == 0
    return [part if part.any() else None for part in chosen.split(list(sizes))]


def _record(
    recorder: Recorder,
    source: Source | MemorySource,
    batches: Sequence[Tensor],
    states: HiddenStates,
    device: torch.device,
) -> tuple[list[list[Call]], list[Call]]:
    """Put the inputs of the first block into ``states``; return the arguments of every block, per
    batch and for a few tokens."""
    with _filled_on_demand(source, recorder.blocks, device):
        probe = batches[0][:1].to(device)
        hidden, call = recorder.first(probe)
        recorder.returned = call(recorder.blocks[0], hidden)
        hidden_states(recorder.returned)
        recorder.check(probe)
        calls = []
        for j, batch in enumerate(batches):
            states[j], arguments = recorder(batch.to(device))
            calls.append(arguments)
        return calls, recorder(probe[:, :TRIAL])[1]


@contextmanager
def _filled_on_demand(
    source: Source | MemorySource, but: list[nn.Module], device: torch.device
) -> Iterator[None]:
    """Fill modules (embeddings, rotary tables) when they are called, release them at the end; not
    those in ``but``."""
    inside = {id(m) for block in but for m in block.modules()}
    filled: list[nn.Module] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def fill(module: nn.Module, _: tuple[object, ...]) -> None:
            if not any(module is f for f in filled):
                filled.append(module)
                source.fill(module, name, device, recurse=False)

        return fill

    hooks = [
        m.register_forward_pre_hook(hook(n))
        for n, m in source.skeleton().named_modules()
        if id(m) not in inside
    ]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()
        for module in filled:
            source.release(module, recurse=False)
