"""Balancing as a step of a run: every block before it is observed, the same on every rank."""

import logging
from collections.abc import Callable

from torch import Tensor

from ptq.calib.balance import balance
from ptq.calib.foldable_sites import find_sites
from ptq.calib.walk import CalibratedBlock
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import from_first, world
from ptq.pipeline.tasks import reduce

logger = logging.getLogger(__name__)


class Balancing:
    """Balances blocks before they are observed; knows what that did to the last one.

    Attributes:
        strengths: by the full names of the layers whose inputs could be balanced.
        changes: new values of parameters that are not quantized, by full name.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.strengths: dict[str, float] = {}
        self.changes: dict[str, Tensor] = {}

    def __call__(self, block: CalibratedBlock, run: Callable[[], Tensor] | None) -> None:
        """Balance ``block``, which has statistics of some tokens; ``run`` gives the hidden states
        that it returns. Where that is not known nothing can be tried: a warning says so."""
        reduce(block.groups)
        groups = [list(group.layers) for group in block.groups]
        found = None
        if world()[0] == 0:
            found = [] if run is None else find_sites(block.module, groups, run)
        sites = from_first(found)
        if run is None and world()[0] == 0:
            logger.warning(
                "%s: its hidden states have a form that balancing cannot be tried on; its inputs "
                "are not balanced",
                block.name,
            )
        layers = {f"{name}.weight": f"{block.prefix}{name}" for group in groups for name in group}
        self.strengths = {}
        for site in sites:
            readers = [layers[name] for name in site.readers if name in layers]
            strength = min(self.plan[name].recipe.balance for name in readers)
            self.strengths |= dict.fromkeys(readers, strength)
        powers = self.plan.recipe.balance_factors == "power_of_two"
        self.changes = balance(block, sites, self.strengths, powers_of_two=powers)

    def changes_of(self, block: CalibratedBlock) -> dict[str, Tensor]:
        """``changes`` if they are those of ``block``: the output head is not balanced."""
        prefix = f"{block.name}."
        return {name: value for name, value in self.changes.items() if name.startswith(prefix)}
