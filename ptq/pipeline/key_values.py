"""Scales for keys and values as a step of a run: a block whose ranges were seen gets them."""

from ptq.calib.walk import CalibratedBlock
from ptq.numerics.key_values import key_value_scale
from ptq.pipeline.ranks import together
from ptq.runtime.key_values import round_cached


def install_key_values(block: CalibratedBlock) -> None:
    """Let the attention layers of ``block`` round keys and values from now on, so that later blocks
    are calibrated with what they will read; the same on every rank.

    Raises:
        ValueError: naming the attention layer, where numbers are not finite.
    """
    with together():
        for seen in block.key_values.values():
            seen.reduce()
    for inner, seen in block.key_values.items():
        try:
            scales = key_value_scale(seen.keys), key_value_scale(seen.values)
        except ValueError as error:
            raise ValueError(f"{block.prefix}{inner}: {error}") from error
        round_cached(block.module.get_submodule(inner), *scales)
