"""The text that tuning reads: windows that are trained on, and windows that it is judged by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.pipeline.plan import Plan
from ptq.text.windows import load_calibration

# Tokens of a step, at least: with 512 codes flip that gain nothing (2.3 % of them).
STEP_TOKENS = 2048
# Tokens that results are judged by, at most; of a short text an eighth.
HELD_TOKENS, HELD_SHARE = 8192, 8


@dataclass(frozen=True, kw_only=True)
class TuningText:
    """Batches of windows.

    Attributes:
        train, held: token ids (sequences, length), int64; no window is in both.
        order: for every step, which batches of ``train`` it reads; each comes once before any
            comes twice.
        description: as :class:`ptq.text.windows.Calibration` has it.
    """

    train: Sequence[Tensor]
    held: Sequence[Tensor]
    order: Sequence[tuple[int, ...]]
    description: dict[str, object]

    @property
    def tokens(self) -> int:
        """To train on, each window counted once."""
        return sum(batch.numel() for batch in self.train)

    @property
    def held_tokens(self) -> int:
        """To judge by."""
        return sum(batch.numel() for batch in self.held)


def batches_a_step(batch_size: int, seq_len: int) -> int:
    """How many batches a step reads."""
    return math.ceil(STEP_TOKENS / (batch_size * seq_len))


def held_windows(seq_len: int) -> int:
    """How many windows results are judged by, where there is enough text."""
    return max(HELD_TOKENS // seq_len, 2)


def load_tuning_text(plan: Plan, tokenizer: Any) -> TuningText:
    """The text of a run that tunes: of the calibration text, as many windows as all steps read;
    where there are fewer, steps read them again.

    Raises:
        ValueError: the text has no room for a step and what results are judged by.
        FileNotFoundError: there is no such text.
    """
    recipe, length = plan.recipe, plan.seq_len
    each = batches_a_step(recipe.batch_size, length)
    held = held_windows(length)
    wanted = recipe.tune * each * recipe.batch_size + held
    data = load_calibration(
        tokenizer,
        recipe.calibration,
        samples=wanted,
        seq_len=length,
        batch_size=wanted,
        seed=recipe.seed,
        field=recipe.field,
        fewer=True,
    )
    rows = data.batches[0]
    if len(rows) < wanted:
        held = min(held, max(len(rows) // HELD_SHARE, 1))
    if len(rows) <= held:
        raise ValueError(
            f"--tune: {recipe.calibration} has room for {len(rows)} windows of {length} tokens, "
            "and some are trained on and others judged by: give more text, or a smaller --seq-len"
        )
    aside = torch.zeros(len(rows), dtype=torch.bool)
    aside[[(2 * i + 1) * len(rows) // (2 * held) for i in range(held)]] = True
    generator = torch.Generator().manual_seed(recipe.seed)
    train = rows[~aside]
    train = train[torch.randperm(len(train), generator=generator)].split(recipe.batch_size)
    stream: list[int] = []
    while len(stream) < recipe.tune * each:
        stream += torch.randperm(len(train), generator=generator).tolist()
    order = [tuple(stream[i * each : (i + 1) * each]) for i in range(recipe.tune)]
    return TuningText(
        train=train,
        held=rows[aside].split(recipe.batch_size),
        order=order,
        description=data.description,
    )
