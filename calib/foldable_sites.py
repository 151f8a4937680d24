"""Where factors fold in a block, found by trial (A1)."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ptq.calib.fold import Site, scales

# Of the factors that are tried, 1 … 2^8: none below 1, so that 1 + (gain · factor - 1) is exact
# too, and as large as those that are folded, so that a clamp in between shows. float16 has no room
# for so much, and its small numbers lose digits: there results may differ by some roundings, where
# a wrong site makes them several times as large.
EXPONENT, EXPONENT_HALF = 8, 3
TOLERANCE_HALF, SMALL_HALF = 2.0**-7, 2.0**-10


def find_sites(
    block: nn.Module, groups: Sequence[Sequence[str]], run: Callable[[], Tensor]
) -> list[Site]:
    """Where factors fold in ``block``; those of all experts stand and fall together.

    Args:
        groups: names of the Linears within ``block`` that read the same activation, for every
            activation.
        run: the hidden states that the block returns for some tokens; called some thirty times.
    """
    trial = _Trial(block, run)
    watched = {name for group in groups for name in group}
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and n in watched}
    alike = _alike(groups)
    expert = {name for members in alike if len(members) > 1 for group in members for name in group}
    sites: list[Site] = []
    for members in alike:
        first = members[0][0]
        served = {reader for site in sites for reader in site.readers}
        if f"{first}.weight" in served:
            continue
        parent = first.rpartition(".")[0]
        beside = [
            n
            for n in linears
            if (n.rpartition(".")[0] == parent if len(members) > 1 else n not in expert)
        ]
        near = {
            name: linears[name] for name in beside
        }  # an expert's own layers, or those of no expert
        candidates = (
            s for s in _candidates(block, linears, near, groups, members, trial) if trial.holds(s)
        )
        sites += next(candidates, [])
    return sites


class _Trial:
    """Scales parts of a block, runs it, and puts everything back."""

    def __init__(self, block: nn.Module, run: Callable[[], Tensor]) -> None:
        self.block, self.run = block, run
        self.generator = torch.Generator().manual_seed(0)
        self.offsets: dict[str, int | None] = {}
        self.half = any(p.dtype == torch.float16 for p in block.parameters())
        self.tolerance = TOLERANCE_HALF if self.half else 0.0
        self.expected = self._results()
        # atomic sums of experts on a GPU: two runs of the same block differ
        again = self._results()
        self.noise = {
            name: _distance(again[name], result) for name, result in self.expected.items()
        }

    def holds(self, sites: Sequence[Site]) -> bool:
        """Whether the block and all its layers but the producers return what they did, with random
        factors folded."""
        factors = [(site, torch.exp2(self._exponents(site).float())) for site in sites]
        with _scaled(self.block, factors):
            results = self._results()
        producers = {site.producer for site in sites}
        return all(
            _distance(results[name], result)
            <= 4 * self.noise[name] + self.tolerance * _distance(result)
            for name, result in self.expected.items()
            if name not in producers
        )

    def offset(self, norm: str) -> int | None:
        """What a norm adds to its weight: 0 or 1; None if it is no norm that multiplies by its
        weight."""
        if norm not in self.offsets:
            weight = self.block.get_parameter(f"{norm}.weight")
            before, zero = weight.data, torch.zeros_like(weight.data)
            try:
                weight.data = zero
                result = self._results(norm)[norm]
            finally:
                weight.data = before
            bias = self.block.get_submodule(norm)._parameters.get("bias")
            rest = [r - bias.to(r.dtype) if bias is not None else r for r in result]
            self.offsets[norm] = None if not rest else int(any(bool(r.any()) for r in rest))
        return self.offsets[norm]

    def _exponents(self, site: Site) -> Tensor:
        return torch.randint(
            (EXPONENT_HALF if self.half else EXPONENT) + 1, (site.rows,), generator=self.generator
        )

    def _results(self, *more: str) -> dict[str, list[Tensor]]:
        """What the block (by the name "") and everything in it that has a matrix, or is named,
        returns."""
        results: dict[str, list[Tensor]] = {}

        def note(name: str) -> Callable[[nn.Module, object, object], None]:
            def hook(_: nn.Module, args: object, output: object) -> None:
                parts = output if isinstance(output, (tuple, list)) else [output]
                results[name] += [part.detach() for part in parts if isinstance(part, Tensor)]

            return hook

        hooks = []
        for name, module in self.block.named_modules():
            if name and (name in more or any(p.ndim > 1 for p in module.parameters(recurse=False))):
                results[name] = []
                hooks.append(module.register_forward_hook(note(name)))
        try:
            results[""] = [self.run()]
        finally:
            for hook in hooks:
                hook.remove()
        return results

    def channel(self, producer: str, start: int, rows: int, reader: str) -> Tensor | None:
        """Which of ``rows`` outputs of ``producer`` every input of the Linear ``reader`` comes
        from, if from one each.

        The digits of the row's number, one a run, are powers of two that a factor on the producer
        brings along.
        """
        before = self._input(reader)
        zero = before.abs() < SMALL_HALF if self.half else before == 0
        number, channel = torch.arange(rows), torch.zeros(before.shape[-1], dtype=torch.int64)
        for shift in range(0, max(1, (rows - 1).bit_length()), 2):
            factor = torch.exp2(((number >> shift) & 3).float())
            with _scaled(self.block, [(Site(producer, start, number, ()), factor)]):
                after = self._input(reader)
            if after.shape != before.shape:  # another routing
                return None
            fits = torch.stack(
                [((after == before * 2.0**digit) | zero).all(0) for digit in range(4)]
            )
            if not fits.any(0).all():
                return None
            channel += fits.int().argmax(0).cpu() << shift
        return channel if int(channel.max()) == rows - 1 else None

    def _input(self, reader: str) -> Tensor:
        """(tokens, in) what a Linear reads; no tokens if it reads nothing."""
        layer = self.block.get_submodule(reader)
        assert isinstance(layer, nn.Linear)
        read = [torch.zeros(0, layer.in_features)]
        hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
        try:
            self.run()
        finally:
            hook.remove()
        return read[-1]


def _distance(tensors: list[Tensor], expected: list[Tensor] | None = None) -> float:
    """‖tensors − expected‖, or ‖tensors‖; infinite where shapes differ or numbers are not
    finite."""
    if expected is not None and [t.shape for t in tensors] != [e.shape for e in expected]:
        return math.inf
    differences = (
        tensors
        if expected is None
        else [t.double() - e.double() for t, e in zip(tensors, expected, strict=True)]
    )
    squares = sum(float(d.double().square().sum()) for d in differences)
    return math.sqrt(squares) if math.isfinite(squares) else math.inf


@contextmanager
def _scaled(block: nn.Module, factors: Sequence[tuple[Site, Tensor]]) -> Iterator[None]:
    """Scale parameters in place by powers of two, and back at the end: exact, but for what float16
    has no range for."""
    undo: list[Callable[[], object]] = []
    try:
        for site, factor in factors:
            for name, scale in scales(block, site, factor):
                parameter = block.get_parameter(name)
                value, scale = parameter.data, scale.to(parameter.dtype)
                if site.offset and name == f"{site.producer}.weight":
                    undo.append(partial(setattr, parameter, "data", value))
                    parameter.data = (value.float() + site.offset) * scale.float() - site.offset
                elif value.dtype == torch.float16:
                    undo.append(partial(value.copy_, value.clone()))
                    value.mul_(scale)
                else:
                    undo.append(partial(value.div_, scale))
                    value.mul_(scale)
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def _alike(groups: Sequence[Sequence[str]]) -> list[list[tuple[str, ...]]]:
    """The groups, those together that differ in the number of a module only: the experts of a
    layer."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for group in groups:
        alike.setdefault(tuple(re.sub(r"(^|\.)\d+\.", r"\1#.", name) for name in group), []).append(
            tuple(group)
        )
    return list(alike.values())


def _candidates(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    near: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    members: list[tuple[str, ...]],
    trial: _Trial,
) -> Iterator[list[Site]]:
    """Sites that may hold for groups of the same form, the likeliest first."""
    first = members[0]
    features = linears[first[0]].in_features
    identity = torch.arange(features)
    offsets = {name: trial.offset(name) for name in _norms(block, features)}
    norms = {name: offset for name, offset in offsets.items() if offset is not None}
    if len(members) == 1:
        weights = tuple(f"{reader}.weight" for reader in first)
        yield from ([Site(name, 0, identity, weights, offset)] for name, offset in norms.items())
    for name, start, rows in _slices(near, first, features):
        leaf = name.rpartition(".")[2]
        channel = identity if rows == features else trial.channel(name, start, rows, first[0])
        if channel is not None:
            producers = [
                f"{group[0].rpartition('.')[0]}.{leaf}" if len(members) > 1 else name
                for group in members
            ]
            yield [
                Site(producer, start, channel, tuple(f"{reader}.weight" for reader in group))
                for producer, group in zip(producers, members, strict=True)
            ]
    if len(members) > 1:  # what experts read, their router and the shared expert read too
        readers = _readers(block, linears, groups, first[0].partition(".")[0], len(members))
        yield from (
            [Site(name, 0, identity, tuple(sorted(readers)))]
            for name, offset in norms.items()
            if not offset
        )


def _readers(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    part: str,
    experts: int,
) -> set[str]:
    """All weights in ``block.part`` that may read what experts read: theirs, the shared expert's,
    and of routers, which have a row per expert or one; other layers that are not quantized stay as
    they are."""
    features = next(
        linears[group[0]].in_features for group in groups if group[0].startswith(f"{part}.")
    )
    matrices = block.get_submodule(part).named_parameters(prefix=part)
    others = {
        n for n, p in matrices if p.ndim == 2 and p.shape[1] == features and len(p) in (1, experts)
    }
    others -= {f"{name}.weight" for name in linears}
    entries: dict[str, Sequence[str]] = {}  # of every expert the first group: gate and up, not down
    for group in groups:
        if group[0].startswith(f"{part}.") and linears[group[0]].in_features == features:
            entries.setdefault(group[0].rpartition(".")[0], group)
    return others | {f"{name}.weight" for group in entries.values() for name in group}


def _norms(block: nn.Module, features: int) -> list[str]:
    """Modules whose parameters are vectors of so many features, from the last to the first."""
    norms = []
    for name, module in block.named_modules():
        parameters = list(module.parameters(recurse=False))
        vectors = bool(parameters) and all(p.shape == (features,) for p in parameters)
        if vectors and not list(module.children()):
            norms.append(name)
    return norms[::-1]


def _slices(
    linears: Mapping[str, nn.Linear], readers: tuple[str, ...], features: int
) -> Iterator[tuple[str, int, int]]:
    """(layer, first row, rows) of what may have been multiplied or averaged into ``features``
    inputs.

    A layer of its own (up, v), a half of a layer (gate and up in one), or the last rows (q, k and v
    in one).
    """
    for name, layer in reversed(list(linears.items())):
        out = layer.out_features
        if name in readers:
            continue
        if features % out == 0:
            yield name, 0, out
        if out == 2 * features:
            yield name, features, features
            yield name, 0, features
        if out > features and (out - features) % 2 == 0 and features % ((out - features) // 2) == 0:
            rows = (out - features) // 2
            yield name, out - rows, rows
