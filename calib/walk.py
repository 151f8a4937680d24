"""Walk a decoder block by block: calibrate a block, let the caller change it, run what it became.

Calibration looks at what layers read and knows nothing of rotations, formats or checkpoints: what
it is to look at comes in as functions (:class:`Watch`).
"""

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptq.calib.block_arguments import Call, Recorder, hidden_states
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.expert_rounds import ExpertRounds, expert_of, expert_sizes, split
from ptq.calib.hessian import distributed
from ptq.calib.hidden_states import HiddenStates
from ptq.calib.key_value_ranges import ranges_of
from ptq.calib.observer import InputGroup, Observer, Probe
from ptq.model.experts import routed_everywhere
from ptq.model.source import Source

__all__ = ["CalibratedBlock", "InputGroup", "Watch", "held_out", "walk"]

PREPARE = 1 << 15  # tokens of all ranks, at least a batch on each, that a block is prepared with
TRIAL = 64  # tokens that a block which is prepared can be run on at little cost


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a walk looks at: decided once, before it starts.

    Attributes:
        layers: full names of the Linears to watch; None for all of them.
        probes: functions by a number that must divide a layer's features for ``max |probe(x)|`` to
            be recorded, as ``amax`` under that number.
        feed: ``feed(layer, x)``, what a watched layer gets instead of ``x`` (*s, in) while its
            block is observed; statistics are those of ``x``. None changes nothing.
        route_all: statistics of experts are those of all tokens, not only of those that the router
            sends to them.
        moments: whether second moments and samples of inputs are gathered. Without them every block
            runs once only, and the next one reads what the original returned, whatever the caller
            made of it.
        head: the output head follows as a last block of one layer, which reads what the model makes
            of the last hidden states (final norm and whatever else).
        squares: of Hessians the diagonals are enough, and no samples are wanted.
        key_values: the largest keys and values are wanted too.
    """

    layers: Collection[str] | None = None
    probes: Mapping[int, Probe] = field(default_factory=dict)
    feed: Callable[[str, Tensor], Tensor] | None = None
    route_all: bool = False
    moments: bool = True
    head: bool = False
    squares: bool = False
    key_values: bool = False

    def watches(self, layer: str) -> bool:
        """Whether there are to be statistics of the Linear of that full name."""
        return self.layers is None or layer in self.layers

    def first_look(self) -> "Watch":
        """The same layers without probes and without a feed, and only mean squares: all that
        preparing a block needs."""
        return replace(self, probes={}, feed=None, squares=True, key_values=False)


Prepare = Callable[[CalibratedBlock, Callable[[], Tensor] | None], None]


@torch.no_grad()
def walk(
    source: Source,
    batches: Sequence[Tensor],
    watch: Watch,
    *,
    device: torch.device | str,
    skip: Callable[[str], bool] = lambda block: False,
    held: Sequence[Tensor | None] | None = None,
    activations: str = "ram",
    finished: Callable[[int, Tensor], None] | None = None,
    prepare: Prepare | None = None,
    limit: Callable[[], float] = lambda: math.inf,
) -> Iterator[CalibratedBlock]:
    """Yield every decoder block with statistics of what its Linears read, and go on through what
    the caller made of it.

    Whatever the caller did to ``block.module`` before asking for the next block is what the next
    block's inputs are computed with, unless ``watch`` asks for no moments.

    Args:
        batches: token ids (sequences, length), int64, all of the same length.
        skip: of a block's name: yield it without statistics.
        held: a mask of sequences for each batch, as :func:`held_out` makes it: those go into
            ``holdout`` instead of ``hessian``. None holds out every eighth sequence.
        activations: where the hidden states of all batches live: "ram", "device" or "disk".
        finished: called at the end with a batch's index and its hidden states (sequences, length,
            hidden), for every batch. Without it, and without a head, the last block is not run
            again.
        prepare: may change a block before it is observed; it gets the block with statistics of its
            first ``PREPARE`` tokens, and a function that gives the hidden states that it returns
            for ``TRIAL`` tokens, or None (:meth:`Steps.trial`). The output head is not prepared.
        limit: asked for every block before it is observed: bytes that the statistics of its experts
            may take at a time, the same on all ranks.

    Raises:
        ValueError: unusable batches, NaN or infinity in activations (naming the layer), and
            architectures that cannot be run block by block.
    """
    device = torch.device(device)
    blocks = source.blocks()
    head_name = source.head()[0] if watch.head else ""
    go_on = finished is not None or (watch.head and not skip(head_name))
    _check(batches, source.skeleton())
    masks = held_out([len(batch) for batch in batches]) if held is None else held
    with HiddenStates(activations, device) as states:
        steps = Steps.of(
            source, batches, states, [None if mask is None else mask.to(device) for mask in masks]
        )
        for index, (name, module) in enumerate(blocks):
            block = CalibratedBlock.of(name, module, index, len(blocks) + watch.head)
            try:
                source.fill(module, name, device)
                if index == 0:  # with its weights: the form of what blocks return is looked at
                    steps.record()
                if not skip(name):
                    if prepare is not None:
                        steps.observe(block, watch.first_look(), _few(batches))
                        prepare(block, steps.trial(block))
                        block.forget()
                    steps.observe(
                        block, watch, len(batches), limit() if watch.moments else math.inf
                    )
                elif not watch.moments:
                    steps.propagate(block)
                yield block
                if watch.moments and (index + 1 < len(blocks) or go_on):
                    steps.propagate(block)
            finally:
                if block.later is not None:
                    block.later.close()
                source.release(module)
                _trim()
        if finished is not None:
            for batch in range(len(batches)):
                finished(batch, states[batch])
        if watch.head:
            yield from _head(steps, watch, skip)


@dataclass(kw_only=True)
class Steps:
    """What can be done with a block, and what does not change from block to block.

    ``calls``: the arguments of every block, by batch; ``short``: for ``TRIAL`` tokens.
    """

    source: Source
    batches: Sequence[Tensor]
    held: Sequence[Tensor | None]
    states: HiddenStates
    recorder: Recorder
    calls: list[list[Call]] = field(default_factory=list)
    short: list[Call] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        source: Source,
        batches: Sequence[Tensor],
        states: HiddenStates,
        held: Sequence[Tensor | None] | None = None,
    ) -> "Steps":
        """The steps of a walk that has not begun; ``held`` as :func:`walk` takes it, None holds
        nothing out."""
        blocks = [module for _, module in source.blocks()]
        return cls(
            source=source,
            batches=batches,
            held=[None] * len(batches) if held is None else held,
            states=states,
            recorder=Recorder(source.skeleton(), blocks, torch.device("cpu")),
        )

    @property
    def device(self) -> torch.device:
        return self.states.device

    def record(self) -> None:
        """Put the inputs of the first block into ``states``, and note the arguments of all."""
        recorder = self.recorder
        with filled_on_demand(self.source, recorder.blocks, self.device):
            probe = self.batches[0][:1].to(self.device)
            recorder.learn(probe)
            for index, batch in enumerate(self.batches):
                self.states[index], arguments = recorder(batch.to(self.device))
                self.calls.append(arguments)
            self.short = recorder(probe[:, :TRIAL])[1]

    def observe(
        self, block: CalibratedBlock, watch: Watch, count: int, limit: float = math.inf
    ) -> None:
        """Give ``block`` the groups of its Linears, and what they read in the first ``count``
        batches; of experts only those of the first round."""
        linears = {
            name: layer
            for name, layer in block.module.named_modules()
            if isinstance(layer, nn.Linear) and watch.watches(f"{block.prefix}{name}")
        }
        observer = self.observer(block, linears, watch, count)
        rounds = self._rounds(block, watch, linears, observer, limit)
        with ExitStack() as stack:
            stack.enter_context(observer.installed())
            stack.enter_context(routed_everywhere(block.module, watch.route_all))
            begins = stack.enter_context(rounds.recording()) if rounds else lambda: None
            if watch.key_values:
                ranges = ranges_of(block.module, self.device)
                block.key_values = stack.enter_context(ranges)
            for index, batch in enumerate(self.batches[:count]):
                begins()
                observer.expect((batch.shape[0], batch.shape[1]), self.held[index])
                returned = self.calls[index][block.index](block.module, self.states[index])
                if not watch.moments:
                    self.keep(block, index, returned)
        block.groups, block.later = observer.groups(), rounds

    def _rounds(
        self,
        block: CalibratedBlock,
        watch: Watch,
        linears: dict[str, nn.Linear],
        observer: Observer,
        limit: float,
    ) -> ExpertRounds | None:
        """What comes after the first pass, which then leaves out the experts of later rounds."""
        parts = split(expert_sizes(block.module, linears, self.device), limit)
        if len(parts) < 2:
            return None
        first = {None, *parts[0]}
        observer.attend({name for name in linears if expert_of(block.module, name) in first})
        return ExpertRounds(
            module=block.module,
            observer=observer,
            parts=parts,
            batches=[
                ((len(batch), batch.shape[1]), mask)
                for batch, mask in zip(self.batches, self.held, strict=True)
            ],
            inputs=self.states.another(),
            limit=limit,
            everywhere=watch.route_all,
        )

    def observer(
        self, block: CalibratedBlock, linears: dict[str, nn.Linear], watch: Watch, count: int
    ) -> Observer:
        """One that watches ``linears`` of ``block`` over ``count`` batches."""
        return Observer(
            block.module,
            linears,
            probes=dict(watch.probes),
            feed=watch.feed,
            device=self.device,
            batches=count,
            prefix=block.prefix,
            squares=watch.squares,
            moments=watch.moments,
        )

    def trial(self, block: CalibratedBlock) -> Callable[[], Tensor] | None:
        """What gives the hidden states that the block, as it is then, returns for a few tokens;
        None if it cannot be seen which axes of theirs are sequences and tokens."""
        states, shape = self.states[0], tuple(self.batches[0].shape)
        axes = [i for i in range(states.ndim - 1) if tuple(states.shape[i : i + 2]) == shape]
        if len(axes) != 1:
            return None
        start = states.narrow(axes[0], 0, 1)
        start = start.narrow(axes[0] + 1, 0, min(TRIAL, shape[1])).clone()
        call = self.short[block.index]
        return lambda: hidden_states(call(block.module, start.clone()))

    def propagate(self, block: CalibratedBlock) -> None:
        """The hidden states of all batches, through the block."""
        for index in range(len(self.batches)):
            returned = self.calls[index][block.index](block.module, self.states[index])
            self.keep(block, index, returned)

    def keep(self, block: CalibratedBlock, index: int, returned: object) -> None:
        """Take the hidden states that a block returned for a batch in place of those it read."""
        before, after = self.states.like(index), hidden_states(returned)
        if after.dtype != before.dtype or after.shape != before.shape:  # G28
            raise ValueError(
                f"{block.name} turned {before.dtype} {tuple(before.shape)} into {after.dtype} "
                f"{tuple(after.shape)}: models whose blocks do that are not supported"
            )
        self.states[index] = after


def _few(batches: Sequence[Tensor]) -> int:
    """How many of this rank's batches hold its share of ``PREPARE`` tokens: batch i of all is on
    rank i % ranks."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    wanted = math.ceil(PREPARE / batches[0].numel())
    return min(len(batches), max(1, len(range(rank, wanted, ranks))))


def _head(steps: Steps, watch: Watch, skip: Callable[[str], bool]) -> Iterator[CalibratedBlock]:
    """The output head as a block of one layer, with statistics of what the model makes of the last
    hidden states for it to read."""
    source, recorder = steps.source, steps.recorder
    (name, linear), count = source.head(), len(recorder.blocks)
    parent, _, leaf = name.rpartition(".")
    block = CalibratedBlock(
        name=name,
        prefix=f"{parent}." if parent else "",
        module=nn.ModuleDict({leaf: linear}),
        groups=[],
        index=count,
        count=count + 1,
    )
    try:
        source.fill(linear, name, steps.device)
        if not skip(name) and watch.watches(name):
            assert isinstance(linear, nn.Linear)
            # what it reads stays in 16 bits while it is observed: nothing comes after it
            unfed = replace(watch, feed=None)
            observer = steps.observer(block, {leaf: linear}, unfed, len(steps.batches))
            filled = filled_on_demand(source, [*recorder.blocks, linear], steps.device)
            with observer.installed(), filled:
                for index, batch in enumerate(steps.batches):
                    observer.expect((batch.shape[0], batch.shape[1]), steps.held[index])
                    recorder.reach_head(batch.to(steps.device), steps.states[index])
            block.groups = observer.groups()
        yield block
        source.skeleton().set_submodule(name, block.module.get_submodule(leaf))
    finally:
        source.release(block.module)


def _trim() -> None:
    """Give freed memory back to the system: glibc otherwise keeps what a block leaves behind, 40 MB
    each time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
    mask = torch.arange(1, total + 1) % every == 0
    return [part if part.any() else None for part in mask.split(list(sizes))]


@contextmanager
def filled_on_demand(source: Source, but: list[nn.Module], device: torch.device) -> Iterator[None]:
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
