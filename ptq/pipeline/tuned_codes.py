"""How the codes of a layer are tuned: by latents that drift through their cells, or by jumps.

Both are told a derivative by the dequantized weight, rotated as the codes are, and put codes into
the layer; what they remember waits in a store while it is not needed.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.hidden_states import HiddenStates
from ptq.numerics.adam import moments
from ptq.numerics.discrete_step import jumps
from ptq.numerics.latents import codes, latent_gradient, latents
from ptq.numerics.tensor import pack
from ptq.pipeline.plan import Plan
from ptq.pipeline.solve import Solved
from ptq.runtime.quant_linear import QuantLinear

# Largest learning rate of latents, in units of the element.
LATENT_RATE = 1.25e-2
# Of jumps: how far a linearisation is believed, in units of the element; the largest share of the
# codes that a step moves, and of the weight's norm; steps that are only looked at, because moments
# of one or two derivatives point anywhere.
REACH, SHARE, TRUST, WAIT = 1.0, 2e-4, 5e-2, 3


class Moments:
    """Adam's moments of one tensor."""

    PARTS = ("first", "second")

    def __init__(self, store: HiddenStates, key: int, like: Tensor) -> None:
        """Zeros of the shape of ``like``, under keys of ``store`` that no other ``key`` has."""
        self._store, self._keys = store, (3 * key + 1, 3 * key + 2)
        self.count = 0
        self._put(torch.zeros_like(like, dtype=torch.bfloat16))

    def _put(self, first: Tensor, second: Tensor | None = None) -> None:
        self._store[self._keys[0]] = first
        self._store[self._keys[1]] = first.clone() if second is None else second

    def take(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, root) with ``gradient``, which is counted."""
        first, second = (self._store[key] for key in self._keys)
        self.count += 1
        mean, root, first, second = moments(gradient, first, second, count=self.count)
        self._put(first, second)
        return mean, root

    def forget(self, where: Tensor) -> None:
        """Let the mean begin anew ``where`` that is true."""
        key = self._keys[0]
        self._store[key] = self._store[key].masked_fill(where, 0)

    def state(self) -> dict[str, Tensor]:
        """All that they are."""
        parts = {name: self._store[k] for name, k in zip(self.PARTS, self._keys, strict=True)}
        return {**parts, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what :meth:`state` gave."""
        self.count = int(state["count"])
        self._put(state["first"], state["second"])


class Trained:
    """A float32 tensor that Adam trains."""

    PARTS: tuple[str, ...] = ("value", *Moments.PARTS, "count")  # of a state

    def __init__(self, store: HiddenStates, key: int, value: Tensor) -> None:
        """It and its moments wait in ``store``, under keys that no other ``key`` has."""
        self._store, self._key = store, 3 * key
        self._moments = Moments(store, key, value)
        self._store[self._key] = value.float()

    def step(self, gradient: Tensor, rate: float, limit: float | None = None) -> Tensor:
        """Take a step, and return the new value; its magnitude is at most ``limit``."""
        mean, root = self._moments.take(gradient)
        value = self._store[self._key] - rate * (mean / root)
        if limit is not None:
            value.clamp_(-limit, limit)
        self._store[self._key] = value
        return value

    def state(self) -> dict[str, Tensor]:
        """All that it is."""
        return {"value": self._store[self._key], **self._moments.state()}

    def restore(self, state: Mapping[str, Tensor]) -> Tensor:
        """Become what :meth:`state` gave; the value."""
        self._moments.restore(state)
        self._store[self._key] = state["value"]
        return self._store[self._key]


class TunedCodes(Protocol):
    """The codes of a layer, and how they are tuned.

    Attributes:
        PARTS: what a state has.
    """

    PARTS: tuple[str, ...]
    layer: QuantLinear

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step of ``rate`` times the largest, against the derivative by the weight."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that training needs to go on."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        ...


class Latents:
    """Codes are what latents round to (:mod:`ptq.numerics.latents`)."""

    PARTS: tuple[str, ...] = Trained.PARTS

    def __init__(self, layer: QuantLinear, latent: Trained) -> None:
        """``latent`` rounds to the codes that ``layer`` has."""
        self.layer, self._latent = layer, latent

    def step(self, gradient: Tensor, rate: float) -> None:
        by_latent = latent_gradient(gradient, self.layer.quantized_weight())
        limit = self.layer.format.element.max
        self._encode(self._latent.step(by_latent, rate * LATENT_RATE, limit))

    def state(self) -> dict[str, Tensor]:
        return self._latent.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._encode(self._latent.restore(state))

    def _encode(self, latent: Tensor) -> None:
        fmt = self.layer.format
        self.layer.weight_packed = pack(codes(fmt.element, latent), fmt)


class Jumps:
    """A few codes go to a neighbour in every step (:mod:`ptq.numerics.discrete_step`)."""

    PARTS: tuple[str, ...] = ("packed", *Moments.PARTS, "count")

    def __init__(self, layer: QuantLinear, of: Moments) -> None:
        """``of`` the derivatives by the values of ``layer``, which is at the start."""
        self.layer, self._moments = layer, of

    def step(self, gradient: Tensor, rate: float) -> None:
        weight = self.layer.quantized_weight()
        mean, root = self._moments.take(latent_gradient(gradient, weight))
        if self._moments.count <= WAIT:
            return
        after = jumps(weight, mean, root, reach=REACH, share=rate * SHARE, trust=TRUST)
        # what had built up is for where they were: they would jump on before a derivative there
        self._moments.forget(after != weight.codes)
        self.layer.weight_packed = pack(after, self.layer.format)

    def state(self) -> dict[str, Tensor]:
        return {"packed": self.layer.weight_packed.cpu(), **self._moments.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._moments.restore(state)
        self.layer.weight_packed = state["packed"].to(self.layer.weight_packed.device)


def latents_of(block: CalibratedBlock, solved: Sequence[Solved], plan: Plan) -> dict[str, Tensor]:
    """Where in the cells of their codes the weights of a block lie, by full names of layers, in
    float16; none if no latents will be tuned. The original layers are still in their places."""
    if not plan.recipe.tune or plan.recipe.tune_codes != "latents":
        return {}
    found: dict[str, Tensor] = {}
    for result in solved:
        if plan[result.name].tunable:
            weight = block.module.get_submodule(result.name.removeprefix(block.prefix)).weight
            rotated = result.rotation.exact(weight.detach().float())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            found[result.name] = latents(rotated, result.to(rotated.device).weight).half()
    return found


def differing(layer: QuantLinear, before: Tensor) -> int:
    """How many codes of a layer are not those packed in ``before``."""
    difference = layer.weight_packed ^ before
    if not layer.format.packed:
        return int(difference.count_nonzero())
    return int((difference & 0xF).count_nonzero() + (difference >> 4).count_nonzero())
