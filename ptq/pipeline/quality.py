"""Presets: how much a run may cost for its accuracy, and how much text that buys.

``fast`` rounds to nearest, ``default`` is the best known recipe of a format with as much text as a
machine of that kind reads in minutes, ``best`` weighs errors of outputs by the model's own
gradients, too, and reads twice as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# Windows of 2048 tokens are taken once there are so many of them; shorter ones before that, so that
# they come from enough documents.
WINDOWS, LONG, SHORT = 64, 2048, 512
# Largest numbers that round to nearest reads static input scales from.
RANGE_TOKENS = 8 * SHORT
LEAST, MOST = 16 * SHORT, 128 * LONG


@dataclass(frozen=True)
class Quality:
    """A preset.

    Attributes:
        choices: fields of a recipe that it decides.
        work: weights times tokens on a CPU; a GPU reads as much as was ever found useful.
        about: for ``--help`` and messages.
    """

    choices: Mapping[str, object]
    work: float
    about: str


# 2e12: 16k tokens for a model of 135 million parameters, five minutes of a CPU core.
QUALITIES = {
    "fast": Quality({"algorithm": "rtn"}, 0, "round to nearest"),
    "default": Quality({}, 2e12, "the best known recipe of the format"),
    "best": Quality(
        {"fisher": 32}, 4e12, "the same, outputs weighed by gradients, twice the text on a CPU"
    ),
}


def windows(
    quality: str, parameters: int, device: str, positions: int | None, *, measures: bool
) -> tuple[int, int]:
    """Calibration windows and tokens in each, for a model with so many parameters in its blocks.

    Args:
        device: ``"cpu"``, or anything else for a GPU.
        positions: that the model has, if that is limited.
        measures: whether more is asked of the text than the range of inputs.
    """
    if not measures:
        tokens = RANGE_TOKENS
    elif device != "cpu":
        tokens = MOST
    else:
        affordable = int(QUALITIES[quality].work / parameters)
        tokens = min(max(1 << affordable.bit_length() >> 1, LEAST), MOST)
    length = LONG if tokens >= WINDOWS * LONG else SHORT
    length = min(length, positions or length)
    return max(tokens // length, 1), length
