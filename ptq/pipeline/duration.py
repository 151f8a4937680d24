"""How long the blocks of a run take, from their shapes and the speed of this machine.

A block costs passes over the tokens (a first look if it is balanced, one that is observed, one with
what it became), the Hessians of what its layers read, and solving them (G26). What is expected of a
machine is measured (:mod:`ptq.pipeline.speed`); docs/how-long.md compares it with what came.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptq.calib.walk import PREPARE
from ptq.numerics.both_sides import WIDEST, growing
from ptq.pipeline.damage import LENGTH, SEQUENCES
from ptq.pipeline.plan import Plan
from ptq.pipeline.solve import PART_ELEMENTS
from ptq.pipeline.speed import FEATURES, Speed, attention_flops

# Passes over a hidden state, and over the inputs of layers, that no product is in: norms, rotary
# positions, residuals, the search for infinities. Counted, not fitted.
PASSES = 36
# Forward passes that finding the layers for eight bits costs on its few tokens: forward, again with
# gradients, backward, and the errors of two choices for every layer.
SENSITIVITY = 10
# The same where gradients weigh outputs: once to keep what blocks read, once for balancing, with
# gradients, and back; the products of gradients are counted apart.
BACKWARD = 6
# Seconds for a token of text (tokenizer and windows, measured: 262 thousand in 2.3 s), for a byte
# of weights that is read, hashed and written, and for what comes once.
TEXT, BYTE, ONCE = 9e-6, 1e-8, 1.0


@dataclass(frozen=True)
class Group:
    """Layers that read the same: so many inputs, the rows of each layer, of which expert."""

    features: int
    rows: tuple[int, ...]
    expert: str | None

    @property
    def weights(self) -> int:
        """How many, of all layers."""
        return self.features * sum(self.rows)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A block, or the output head.

    Attributes:
        parameters: that a token meets; of experts those that it is sent to.
        groups: of quantized layers.
        attention: features of its attention heads together; 0 where there is no attention.
        routed: the share of tokens that reach an expert.
        repeated: weights of experts that run once more because memory has no room for all
            statistics at once.
    """

    parameters: float
    groups: Sequence[Group]
    attention: int
    routed: float
    repeated: int = 0

    def reached(self, group: Group, tokens: float) -> float:
        """How many of the tokens reach a group."""
        return tokens if group.expert is None else tokens * self.routed


def block_seconds(
    blocks: Sequence[Work],
    plan: Plan,
    speed: Speed,
    *,
    tokens: int,
    hidden: int,
    ranks: int,
) -> list[float]:
    """What every block, and the output head as a last one, takes.

    Args:
        tokens: of calibration text on one rank; 0 where nothing depends on it.
        hidden: features of the hidden states.
        ranks: processes that share the solving.
    """
    seconds = []
    for index, work in enumerate(blocks):
        forward = _forward(work, speed, hidden, plan.seq_len)
        total = forward * tokens  # observed
        if plan.measures:
            if plan.balances:
                few = min(tokens, PREPARE)
                total += forward * few + _hessians(work, speed, few)
            total += _hessians(work, speed, tokens)
            total += sum(2 * w * tokens * work.routed * speed.flop for w in [work.repeated])
            if index + 1 < len(blocks):  # what it became; the last block is not run again
                total += forward * tokens + _rounding(work, speed, tokens, each_layer=False)
        if plan.recipe.quantize_inputs and plan.measures:
            total += _rounding(work, speed, tokens, each_layer=True)
        if plan.allocates:
            total += SENSITIVITY * forward * SEQUENCES * min(LENGTH, plan.seq_len)
        if plan.recipe.fisher:
            total += _output_costs(work, plan, speed, forward)
        seconds.append(total + _solving(work, plan, speed) / ranks)
    return seconds


def other_seconds(plan: Plan, source_bytes: int) -> float:
    """What a run takes besides its blocks: the text, and weights that are read and written."""
    return ONCE + TEXT * plan.tokens + BYTE * source_bytes


def _forward(work: Work, speed: Speed, hidden: int, length: int) -> float:
    """Of one token through the block."""
    attention = attention_flops(work.attention, length) * speed.attention
    return 2 * work.parameters * speed.flop + PASSES * hidden * speed.element + attention


def _hessians(work: Work, speed: Speed, tokens: float) -> float:
    return sum(
        work.reached(group, tokens)
        * (2 * group.features**2 * speed.flop + 4 * group.features * speed.element)
        for group in work.groups
    )


def _rounding(work: Work, speed: Speed, tokens: float, *, each_layer: bool) -> float:
    """Of inputs that are quantized: of every layer while it is observed, of a group afterwards."""
    return sum(
        work.reached(group, tokens)
        * group.features
        * (len(group.rows) if each_layer else 1)
        * speed.rounded
        for group in work.groups
    )


def _output_costs(work: Work, plan: Plan, speed: Speed, forward: float) -> float:
    """Of gradients, and of their products."""
    tokens = min(plan.recipe.fisher, plan.samples) * min(LENGTH, plan.seq_len)
    products = sum(2 * rows * min(rows, WIDEST) for group in work.groups for rows in group.rows)
    return tokens * (BACKWARD * forward + products * speed.flop)


def _solving(work: Work, plan: Plan, speed: Speed) -> float:
    """All layers: their columns one after the other, their weights, and what grows with in² and
    in³."""
    recipe, seconds = plan.recipe, 0.0
    # operations for every weight and input: the sweep, the gradient of the descent and its sweeps,
    # and five quadratic forms
    products = 1 + 2 * (1 + recipe.descent) + 10 if recipe.measures else 0
    for group in work.groups:
        n = group.features
        seconds += speed.factor * n**3
        if recipe.fisher:  # layers go in step, a block of rows after the other
            seconds += n * speed.column * len(growing(min(max(group.rows), WIDEST)))
        for rows in group.rows:
            parts = 0 if recipe.fisher else -(-rows * n // PART_ELEMENTS)
            more = products * (n - FEATURES) * speed.flop
            seconds += parts * n * speed.column + rows * n * max(speed.weight + more, 0.0)
    return seconds
