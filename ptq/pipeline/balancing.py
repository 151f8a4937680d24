"""Balancing as a step of a run: every block before it is observed, the same on every rank."""

from collections.abc import Callable

from torch import Tensor

from ptq.calib.balance import balance
from ptq.calib.foldable_sites import find_sites
from ptq.calib.walk import CalibratedBlock
from ptq.pipeline.ranks import from_first, together, world
from ptq.pipeline.recipe import Recipe, layer_recipe


def reduce(block: CalibratedBlock) -> None:
    """Statistics of all ranks, on every rank."""
    with together():
        for group in block.groups:
            group.reduce()


class Balancing:
    """Balances blocks before they are observed, and remembers which unquantized values of the last
    one changed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.changes: dict[str, Tensor] = {}
        self.strengths: dict[str, float] = {}  # of the layers whose inputs could be balanced

    def __call__(self, block: CalibratedBlock, run: Callable[[], Tensor]) -> None:
        reduce(block)
        groups = [list(group.layers) for group in block.groups]
        sites = from_first(find_sites(block.module, groups, run) if world()[0] == 0 else None)
        layers = {f"{name}.weight": f"{block.prefix}{name}" for group in groups for name in group}
        self.strengths = {}
        for site in sites:
            readers = [layers[name] for name in site.readers if name in layers]
            self.strengths |= dict.fromkeys(
                readers, min(layer_recipe(self.recipe, name).balance for name in readers)
            )
        self.changes = balance(block, sites, self.strengths)

    def of(self, block: CalibratedBlock) -> dict[str, Tensor]:
        """New values of unquantized parameters, by full name."""
        return {
            name: value for name, value in self.changes.items() if name.startswith(f"{block.name}.")
        }
