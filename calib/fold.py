"""Factors per channel that move from what layers read into what produces it (A1).

``x' = x · a`` and ``W' = W / a`` leave a layer as it was. The factor of x is free if it folds into
the producer of x: the gain of a norm, or the rows of another linear layer (``v_proj`` before
``o_proj``, ``up_proj`` before ``down_proj``). Where that holds is not read off names: it is tried,
with powers of two, for which floating point loses nothing: all layers that were not scaled return
the same bits if a block is folded rightly, and do not if it is not.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Site:
    """A producer and all that reads it, by names within a block.

    Attributes:
        producer: a norm or a Linear whose output is scaled; all its parameters have a row per
            channel.
        start: the first row of the producer that belongs to the site.
        channel: for every input of the readers, the row of the producer after ``start`` that it
            comes from; under grouped-query attention several inputs come from one row.
        readers: names of the weights (out, in) whose columns take the inverse.
        offset: what is added to the weight of a norm before it multiplies: 1 in Gemma.
    """

    producer: str
    start: int
    channel: Int64[Tensor, " in"]
    readers: tuple[str, ...]
    offset: int = 0

    @property
    def rows(self) -> int:
        """How many rows of the producer belong to the site."""
        return int(self.channel.max()) + 1


class FoldedLinear(nn.Linear):
    """A linear layer with its weight in float32, computing in the type of its inputs: folding
    rounds nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight.to(input.dtype), self.bias)


def remember(module: nn.Module) -> Callable[[], None]:
    """What puts the modules and parameters that ``module`` has now back in their places."""
    before = [(m, dict(m._modules), dict(m._parameters)) for m in module.modules()]

    def restore() -> None:
        for owner, modules, parameters in before:
            owner._modules.clear()
            owner._modules.update(modules)
            owner._parameters.clear()
            owner._parameters.update(parameters)

    return restore


def fold(
    block: nn.Module, site: Site, factor: Float[Tensor, " rows"], watched: Iterable[str]
) -> dict[str, Tensor]:
    """Scale the producer's rows by ``factor`` and the readers' columns by its inverse, in new
    parameters.

    Weights of the Linears ``watched``, which will be quantized, become float32. What stays in the
    checkpoint as it is must hold its new values exactly: a gain is rounded to bfloat16, and what
    was rounded is what the readers undo; if there are biases or other readers (routers), factors
    are rounded to powers of two.

    Returns:
        The new values of the parameters that are not quantized, by name within the block.
    """
    watched = {f"{name}.weight" for name in watched}
    producer = block.get_submodule(site.producer)
    kept = {f"{site.producer}.{name}": p for name, p in producer.named_parameters(recurse=False)}
    kept = {name: p for name, p in kept.items() if name not in watched}
    others = [name for name in site.readers if name not in watched]
    factor = factor.to(producer.get_parameter("weight").device, torch.float32)
    exact: dict[str, Tensor] = {}
    if list(kept) == [f"{site.producer}.weight"] and not others:
        weight = producer.get_parameter("weight").detach().float()
        gain = weight + site.offset
        rounded = (gain * factor - site.offset).bfloat16().float()
        dead = (gain == 0) | (rounded + site.offset == 0)
        factor = torch.where(dead, 1.0, (rounded + site.offset) / gain)
        exact[f"{site.producer}.weight"] = torch.where(dead, weight, rounded)
    elif kept or others:
        factor = torch.exp2(factor.log2().round())
    changed: dict[str, Tensor] = {}
    for name, scale in scales(block, site, factor):
        value = exact.get(name)
        value = block.get_parameter(name).detach().float() * scale if value is None else value
        _assign(
            block, name, value, wide=name in watched
        )  # one by one: experts are most of the model
        if name not in watched:
            changed[name] = value
    return changed


def scales(block: nn.Module, site: Site, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What to multiply parameters with, by name; it broadcasts."""
    for name, parameter in block.get_submodule(site.producer).named_parameters(recurse=False):
        whole = torch.ones(len(parameter), device=parameter.device)
        whole[site.start : site.start + len(factor)] = factor.to(parameter.device)
        yield f"{site.producer}.{name}", whole.view(-1, *[1] * (parameter.ndim - 1))
    for name in site.readers:
        yield (
            name,
            factor.reciprocal()[site.channel.to(factor.device)].to(
                block.get_parameter(name).device
            ),
        )


def _assign(block: nn.Module, name: str, value: Tensor, *, wide: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    old = owner.get_parameter(leaf)
    if wide and old.dtype != torch.float32:
        assert isinstance(owner, nn.Linear), name
        bias = owner.bias
        owner = FoldedLinear(owner.in_features, owner.out_features, bias=False, device="meta")
        owner.bias = bias
        block.set_submodule(path, owner)
    setattr(owner, leaf, nn.Parameter(value if wide else value.to(old.dtype), requires_grad=False))
