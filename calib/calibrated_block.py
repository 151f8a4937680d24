"""A block with statistics of what its Linears read, and the Hessians to solve them with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from ptq.calib.expert_rounds import ExpertRounds, expert_of, split
from ptq.calib.key_value_ranges import Range
from ptq.calib.observer import InputGroup
from ptq.calib.rare_experts import Pool, pool_key, top_up

Reduce = Callable[[Sequence[InputGroup]], None]


@dataclass(kw_only=True)
class CalibratedBlock:
    """A block filled with its weights, and the groups of Linears in it (none when it was skipped).

    ``prefix`` makes a name within ``module`` a full name: ``name`` and a dot, but for the output
    head. ``key_values``: ranges of its attention layers, by name within ``module``, if the walk
    watches them. ``later``: the rounds in which experts are looked at, if not all at once.
    """

    name: str
    prefix: str
    module: nn.Module
    groups: list[InputGroup]
    index: int
    count: int
    key_values: dict[str, Range] = field(default_factory=dict)
    later: ExpertRounds | None = field(default=None, repr=False, compare=False)
    _pools: dict[str, Pool] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, module: nn.Module, index: int, count: int) -> "CalibratedBlock":
        """A block of that full name that nothing is known of."""
        return cls(name=name, prefix=f"{name}.", module=module, groups=[], index=index, count=count)

    def rounds(self, reduce: Reduce | None = None) -> Iterator[list[InputGroup]]:
        """The groups, as many at a time as memory has room for: all of them at once unless the
        walk has a limit. They have their statistics until the next round is asked for.

        Every group comes once; experts that borrow come last, when all have been seen. Layers may
        be replaced when there is no further round.

        Args:
            reduce: combines the statistics of some groups over all ranks; None is for one rank.
        """
        reduce = reduce or _alone
        if self.later is None:
            reduce(self.groups)
            yield self.groups
            return
        homes = [expert_of(self.module, next(iter(group.layers))) for group in self.groups]
        pools: dict[str, Pool] = {}
        rare: dict[str, InputGroup] = {}
        for index, experts in enumerate(self.later.parts):
            inside = {*experts, None} if index == 0 else {*experts}  # None: all that is no expert
            groups = [g for g, home in zip(self.groups, homes, strict=True) if home in inside]
            if index:
                self.later.observe(groups)
            reduce(groups)
            for group in groups:
                if pool := self.pool(group):
                    pools.setdefault(pool, Pool()).add(group.hessian)
            rare |= {next(iter(group.layers)): group for group in groups if self.borrows(group)}
            yield [group for group in groups if not self.borrows(group)]
            _clear(groups)
        self._pools = pools
        for names in split({name: group.bytes for name, group in rare.items()}, self.later.limit):
            groups = [rare[name] for name in names]
            self.later.observe(groups)
            reduce(groups)
            yield groups
            _clear(groups)

    def pool(self, group: InputGroup) -> str | None:
        """The experts that a group may borrow from; None if it is no part of an expert."""
        return pool_key(self.module, next(iter(group.layers)))

    def borrows(self, group: InputGroup) -> bool:
        """Whether the Hessian of a group is topped up (G30)."""
        return group.hessian.tokens < group.hessian.features and self.pool(group) is not None

    def hessian(self, group: InputGroup) -> Float[Tensor, "in in"]:
        """The Hessian to solve ``group`` with: the mean over its tokens, topped up for rare experts
        (G30).

        Of a group of the current round; with experts, ask before layers are replaced.

        Raises:
            ValueError: naming the layer, when neither the group nor the pool saw a token.
        """
        seen, pool = group.hessian, self.pool(group)
        try:
            if pool is None or not self.borrows(group):
                return seen.mean()
            if pool not in self._pools:
                self._pools[pool] = Pool(g.hessian for g in self.groups if self.pool(g) == pool)
            mean = seen.mean() if seen.tokens else None
            return top_up(mean, self._pools[pool].mean(), seen.tokens, seen.features)
        except ValueError as error:
            raise ValueError(f"{self.prefix}{next(iter(group.layers))}: {error}") from error

    def forget(self) -> None:
        """Drop statistics and layers, so that nobody holds them while the next block is observed:
        memory must not hold those of two blocks."""
        self.groups, self.key_values, self._pools = [], {}, {}
        if self.later is not None:
            self.later.close()
            self.later = None


def _alone(groups: Sequence[InputGroup]) -> None:
    """One rank has nothing to combine."""


def _clear(groups: Sequence[InputGroup]) -> None:
    for group in groups:
        group.clear()
