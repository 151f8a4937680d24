"""Experts in rounds: the statistics of some at a time, where those of all would not fit in memory.

An expert's Hessians take as much as those of any layer of its size, and a block has hundreds of
experts. In the first pass over the batches the inputs of every :class:`Experts` are kept, with
where its router sent them; from those, some experts at a time run again. Each of them reads what
it read before, token by token: results do not depend on the number of rounds, to the bit.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.calib.hidden_states import HiddenStates
from ptq.calib.observer import InputGroup, Observer, statistics_bytes
from ptq.model.experts import Experts, routed_everywhere


def expert_of(module: nn.Module, layer: str) -> str | None:
    """The expert that a Linear is part of, by their names within ``module``; None if it is not."""
    expert = layer.rpartition(".")[0]
    experts = expert.rpartition(".")[0]
    inside = experts and isinstance(module.get_submodule(experts), Experts)
    return expert if inside else None


def split(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    """The keys of ``sizes`` in order, as many at a time as ``limit`` has room for, at least one."""
    parts: list[list[str]] = []
    room: float = 0
    for key, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(key)
        room -= size
    return parts


def expert_sizes(
    module: nn.Module, linears: Mapping[str, nn.Linear], device: torch.device
) -> dict[str, int]:
    """The bytes of every expert's statistics: gate and up read the same, down something else."""
    groups: dict[str, dict[str, int]] = {}
    for name, layer in linears.items():
        expert = expert_of(module, name)
        if expert is not None:
            names = getattr(module.get_submodule(expert), "names", None)
            leaf = name.rpartition(".")[2]
            kind = "down" if names is not None and leaf == names.down else "input"
            size = statistics_bytes(layer.in_features, device, layer.weight.element_size())
            groups.setdefault(expert, {})[kind] = size
    return {expert: sum(sizes.values()) for expert, sizes in groups.items()}


@dataclass(kw_only=True)
class ExpertRounds:
    """What a block needs to look at some of its experts again.

    Attributes:
        parts: the experts of every round, by name within ``module``.
        batches: of every batch its (sequences, length), and which sequences are held out.
        limit: bytes that a round may take.
        everywhere: every expert reads all tokens.
    """

    module: nn.Module
    observer: Observer
    parts: Sequence[Collection[str]]
    batches: Sequence[tuple[tuple[int, int], Tensor | None]]
    inputs: HiddenStates
    limit: float
    everywhere: bool
    _calls: list[list[tuple[Experts, str, int, Tensor]]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[Callable[[], None]]:
        """While it lasts, the inputs of experts are kept; yields what says that a batch begins."""
        hooks = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, module in self.module.named_modules()
            if isinstance(module, Experts)
        ]
        try:
            yield lambda: self._calls.append([])
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, named: dict) -> None:
            assert isinstance(module, Experts)
            hidden, index = (*args, *(named[key] for key in NAMES[len(args) :]))[:2]
            key = sum(map(len, self._calls))
            self.inputs[key] = hidden.detach().clone()  # the block may write into it
            self._calls[-1].append((module, name, key, index.clone()))

        return hook

    @torch.no_grad()
    def observe(self, groups: Sequence[InputGroup]) -> None:
        """Statistics of ``groups``, all of experts, which have none."""
        layers = {name for group in groups for name in group.layers}
        wanted = {expert_of(self.module, name) for name in layers}
        self.observer.attend(layers)
        with self.observer.installed(), routed_everywhere(self.module, self.everywhere):
            for (shape, held), calls in zip(self.batches, self._calls, strict=True):
                self.observer.expect(shape, held)
                for module, name, key, index in calls:
                    experts = [i for i in range(module.num_experts) if f"{name}.{i}" in wanted]
                    module.run(self.inputs[key], index, experts)
        self.observer.settle(groups)

    def close(self) -> None:
        """Let go of the inputs."""
        self.inputs.close()
        self._calls.clear()


NAMES = ("hidden_states", "top_k_index", "top_k_weights")  # the arguments of Experts
