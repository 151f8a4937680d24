"""What the Linears of a block read: hooks that group them by input and accumulate statistics
(G1, G3, G5)."""

import math
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.calib.hessian import Hessian, entry_bytes, reduce_max, reduce_sum
from ptq.model.experts import Expert, Experts

SAMPLE = 2048  # tokens of a group's input that are kept as they are

Probe = Callable[[Tensor], Tensor]


def statistics_bytes(features: int, device: torch.device, itemsize: int) -> int:
    """What an input group of so many features takes: two Hessians, and the sample of its inputs."""
    return features * (2 * features * entry_bytes(features, device) + SAMPLE * itemsize)


@dataclass(kw_only=True)
class InputGroup:
    """Linear layers that read the same activation (q/k/v, gate/up), and what is known of it.

    ``hessian`` and ``holdout`` are over disjoint sequences, ``amax[size]`` is max |probe(x)| over
    all tokens (float32 scalar), ``sample`` (≤ 2048 tokens, in) is spread over the batches, ``seen``
    counts all tokens. All are empty where no token came by; without ``moments`` the Hessians and
    the sample always are.
    """

    hessian: Hessian
    holdout: Hessian
    amax: dict[int, Tensor]
    sample: Tensor
    moments: bool
    seen: int = 0
    layers: dict[str, nn.Linear] = field(default_factory=dict)  # by name within the block

    @property
    def bytes(self) -> int:
        """What its statistics take at most."""
        features, device = self.hessian.features, self.hessian.device
        return statistics_bytes(features, device, self.sample.element_size())

    def reduce(self) -> None:
        """Combine the statistics of all ranks, except the sample; a no-op on one rank."""
        if self.moments:
            self.hessian.reduce()
            self.holdout.reduce()
        self.seen = reduce_sum(self.seen, self.hessian.device)
        for value in self.amax.values():
            reduce_max(value)

    def clear(self) -> None:
        """Drop what takes memory: Hessians and sample."""
        old = self.hessian
        self.hessian, self.holdout = (
            Hessian(old.features, old.device, old.dtype, full=old.full) for _ in range(2)
        )
        self.sample = self.sample[:0].clone()


@dataclass
class _Reading:
    """A tensor that some Linear read in the current forward, and the groups that have counted
    it."""

    tensor: "weakref.ref[Tensor]"
    version: int
    groups: list[InputGroup]


class Observer:
    """Watches the Linears of one block while batches run through it.

    ``linears``: the layers to watch, by name within the block; ``prefix`` before that makes the
    full name. ``probes`` apply where their size divides the features. ``feed(name, x)`` says what a
    layer gets instead of ``x``; statistics are those of ``x``. ``moments``: whether Hessians and
    samples are gathered too; ``squares``: of Hessians only the diagonals are kept, and no samples.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        *,
        probes: dict[int, Probe],
        feed: Callable[[str, Tensor], Tensor] | None,
        device: torch.device,
        batches: int,
        prefix: str,
        moments: bool = True,
        squares: bool = False,
    ):
        self._moments = moments
        self._block, self._linears, self._probes, self._feed = block, linears, probes, feed
        self._device, self._prefix = device, prefix
        self._quota = 0 if squares else math.ceil(SAMPLE / batches)
        self._full = not squares
        self._counted: Collection[str] = linears
        self._groups: list[InputGroup] = []
        self._group_of: dict[str, InputGroup] = {}
        self._readings: list[_Reading] = []
        self._samples: dict[int, list[Tensor]] = {}  # parts of the samples, by id of their group
        self._held: Tensor | None = None
        self._shape = (0, 0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on all watched layers."""
        hooks = [
            m.register_forward_pre_hook(self._hook(n, self._experts_of(n)))
            for n, m in self._linears.items()
        ]
        try:
            yield
        finally:
            self._readings.clear()
            for hook in hooks:
                hook.remove()

    def attend(self, names: Collection[str]) -> None:
        """Measure only these layers from now on; how layers are grouped does not depend on it."""
        self._counted = names

    def expect(self, shape: tuple[int, int], held: Tensor | None) -> None:
        """A batch of ``shape`` (sequences, length) follows, of which the sequences in ``held`` are
        for the holdout."""
        self._readings.clear()
        self._shape, self._held = shape, held

    def groups(self) -> list[InputGroup]:
        """All groups in the order of the block's modules, layers that read nothing included.

        The order and the members do not depend on which tokens came by: gate and up of an unseen
        expert are a group as they are in a seen one. Other unseen layers are groups of their own.
        """
        for name, layer in self._linears.items():
            if name not in self._group_of:
                sibling = self._unseen_sibling(name)
                group = self._group_of.get(sibling) if sibling else None
                self._join(name, layer, group or self._new_group(layer))
        self.settle(self._groups)
        rank = {name: i for i, name in enumerate(self._linears)}
        for group in self._groups:
            group.layers = dict(sorted(group.layers.items(), key=lambda item: rank[item[0]]))
        return sorted(self._groups, key=lambda group: rank[next(iter(group.layers))])

    def settle(self, groups: Collection[InputGroup]) -> None:
        """Put the samples of ``groups`` together."""
        for group in groups:
            if parts := self._samples.pop(id(group), None):
                group.sample = torch.cat([group.sample, *parts])

    def _unseen_sibling(self, name: str) -> str | None:
        parent, _, leaf = name.rpartition(".")
        expert = self._block.get_submodule(parent)
        if isinstance(expert, Expert) and leaf in (expert.names.gate, expert.names.up):
            return f"{parent}.{expert.names.gate if leaf == expert.names.up else expert.names.up}"
        return None

    def _experts_of(self, name: str) -> Experts | None:
        parts = name.split(".")
        owner = self._block.get_submodule(".".join(parts[:-2])) if len(parts) > 2 else None
        return owner if isinstance(owner, Experts) else None

    def _hook(
        self, name: str, experts: Experts | None
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = args[0]
            self._read(name, x, experts)
            return (
                None if self._feed is None else (self._feed(f"{self._prefix}{name}", x), *args[1:])
            )

        return observe

    def _read(self, name: str, x: Tensor, experts: Experts | None) -> None:
        self._readings = [r for r in self._readings if r.tensor() is not None]
        reading = next(
            (r for r in self._readings if r.tensor() is x and r.version == x._version), None
        )
        if reading is None:
            reading = _Reading(weakref.ref(x), x._version, [])
            self._readings.append(reading)
        if name not in self._group_of:
            layer = self._linears[name]
            self._join(name, layer, reading.groups[0] if reading.groups else self._new_group(layer))
        group = self._group_of[name]
        if all(group is not g for g in reading.groups):
            reading.groups.append(group)
            if name in self._counted:
                self._count(group, name, x.detach(), self._held_rows(x, experts))

    def _new_group(self, layer: nn.Linear) -> InputGroup:
        size = layer.in_features
        group = InputGroup(
            hessian=Hessian(size, self._device, full=self._full),
            holdout=Hessian(size, self._device, full=self._full),
            amax={k: torch.zeros((), device=self._device) for k in self._probes if size % k == 0},
            sample=torch.empty(0, size, dtype=layer.weight.dtype, device=self._device),
            moments=self._moments,
        )
        self._groups.append(group)
        return group

    def _join(self, name: str, layer: nn.Linear, group: InputGroup) -> None:
        self._group_of[name] = group
        group.layers[name] = layer

    def _held_rows(self, x: Tensor, experts: Experts | None) -> Tensor | None:
        """Which rows of ``x`` (flattened to tokens) belong to held-out sequences; None: none of
        them."""
        if self._held is None:
            return None
        sequences, length = self._shape
        if experts is not None and experts.routed is not None:
            return self._held[experts.routed // length]
        rows = x.numel() // x.shape[-1]
        if rows % sequences == 0 and (
            x.shape[0] == sequences or (x.ndim == 2 and rows == sequences * length)
        ):
            return self._held.repeat_interleave(rows // sequences)
        return None  # no telling which sequence a row is from

    def _count(self, group: InputGroup, name: str, x: Tensor, held: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        if not len(rows):
            return
        if not rows.abs().amax().isfinite():
            raise ValueError(
                f"{self._prefix}{name}: its inputs contain NaN or infinity during calibration; "
                "try a wider dtype (bfloat16 or float32 instead of float16) and check the "
                "checkpoint"
            )
        for size, seen in group.amax.items():
            seen.copy_(torch.maximum(seen, self._probes[size](rows).abs().amax().float()))
        group.seen += len(rows)
        if not self._moments:
            return
        fit = rows if held is None else rows[~held]
        group.hessian.update(fit)
        if held is not None:
            group.holdout.update(rows[held])
        parts = self._samples.setdefault(id(group), [])
        quota = min(self._quota, SAMPLE - sum(map(len, parts)), len(fit))
        if quota > 0:
            spread = torch.linspace(0, len(fit) - 1, quota, device=fit.device).long()
            parts.append(fit[spread].to(group.sample.dtype))
