"""Diagonal balancing: inputs and weights share their dynamic range, channel by channel (A1).

x'_j = x_j · a_j and W'_j = W_j / a_j with a_j = (rms_W,j / rms_x,j)^p, of geometric mean 1: a
channel with large inputs gets smaller ones, and larger weights. The factors fold into the weights
that produce x: inference does not change.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq.calib.fold import Site, fold
from ptq.calib.walk import CalibratedBlock

LIMIT = 2.0**8  # of a factor: norms of 16 bits must hold the result


def balancing(
    inputs: Float[Tensor, " in"],
    weights: Float[Tensor, " in"],
    channel: Int64[Tensor, " in"],
    strength: float,
) -> Float[Tensor, " rows"]:
    """The factors of a producer's rows, float32, from the mean squares of inputs and weights by
    input channel.

    Args:
        channel: the row that each input comes from; those of one row share a factor, by the mean of
            their squares.
        strength: p; 0 changes nothing, 0.5 gives inputs and weights the same profile, 1 makes the
            inputs flat.
    """
    rows = int(channel.max()) + 1

    def by_row(squares: Tensor) -> Tensor:
        channels = channel.to(squares.device)
        return torch.zeros(rows, dtype=torch.float64, device=squares.device).index_add_(
            0, channels, squares.double()
        )

    x, w = by_row(inputs), by_row(weights)
    live = (x > 0) & (w > 0)
    logs = torch.where(live, (w / x).log2(), 0.0) * (strength / 2)
    mean = logs[live].mean() if live.any() else 0.0
    return torch.where(live, torch.exp2(logs - mean), 1.0).clamp(1 / LIMIT, LIMIT).float()


def balance(
    block: CalibratedBlock,
    sites: Sequence[Site],
    strengths: Mapping[str, float],
    *,
    powers_of_two: bool = False,
) -> dict[str, Tensor]:
    """Balance ``block`` at ``sites``, in place.

    Args:
        block: with statistics of some tokens; of their Hessians the diagonals are enough.
        strengths: p by the full names of layers; the same for all readers of a site.
        powers_of_two: round every factor to the nearest power of two, on a logarithmic scale: gains
            and weights keep their fractions, as the channel biases of LLM-FP4 (arXiv 2310.16836).

    Returns:
        New values of parameters that are not quantized, by full name.
    """
    watched = [name for group in block.groups for name in group.layers]
    changes: dict[str, Tensor] = {}
    for site in sites:
        groups = [
            g for g in block.groups if any(f"{name}.weight" in site.readers for name in g.layers)
        ]
        layers = [name for group in groups for name in group.layers]
        p = strengths[f"{block.prefix}{layers[0]}"]
        tokens = sum(group.hessian.tokens for group in groups)
        if p and tokens:
            inputs = torch.stack([group.hessian.diagonal() for group in groups]).sum(0) / tokens
            weights = [block.module.get_parameter(f"{name}.weight").float() for name in layers]
            squares = torch.stack([w.square().sum(0) for w in weights]).sum(0) / sum(
                map(len, weights)
            )
            factor = balancing(inputs, squares, site.channel, p)
            if powers_of_two:
                factor = torch.exp2(factor.log2().round())
            changes |= fold(block.module, site, factor, watched)
    return {f"{block.prefix}{name}": value for name, value in changes.items()}
