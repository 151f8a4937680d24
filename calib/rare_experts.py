"""Experts that saw few tokens borrow statistics from the others (G30)."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn

from ptq.calib.hessian import Hessian
from ptq.model.experts import Experts


def pool_key(model: nn.Module, name: str) -> str | None:
    """Which pool a Linear of an expert belongs to: ``mlp.experts.3.up_proj`` →
    ``mlp.experts.*.up_proj``.

    ``model`` is the block (or model) that ``name`` is relative to. None for layers that are no part
    of an expert.
    """
    parent, _, leaf = name.rpartition(".")
    experts, _, _ = parent.rpartition(".")
    return (
        f"{experts}.*.{leaf}"
        if experts and isinstance(model.get_submodule(experts), Experts)
        else None
    )


class Pool:
    """``Σ sums / Σ tokens`` over the experts of one projection, in the order in which they are
    added, float64 when theirs is.

    For gate and up this is the Hessian of the router's input with each token counted once per
    expert chosen.
    """

    def __init__(self, hessians: Iterable[Hessian] = ()) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None
        self._mean: Tensor | None = None
        for hessian in hessians:
            self.add(hessian)

    def add(self, hessian: Hessian) -> None:
        """Count one expert, whose statistics are not needed after that."""
        if self._sum is None:
            self._sum = hessian.total().clone()
        elif hessian.tokens:
            self._sum += hessian.total()
        self.tokens += hessian.tokens

    def mean(self) -> Float[Tensor, "in in"]:
        """The Hessian of them all; ValueError when none of them saw a token."""
        if not self.tokens or self._sum is None:
            raise ValueError(
                "no tokens reached any expert of this projection during calibration; use more or "
                "longer samples"
            )
        if self._mean is None:
            self._mean = (self._sum + self._sum.T) / (2 * self.tokens)
        return self._mean


def top_up(
    hessian: Float[Tensor, "in in"] | None, pool: Float[Tensor, "in in"], tokens: int, features: int
) -> Float[Tensor, "in in"]:
    """The Hessian of an expert that saw ``tokens`` tokens, with the missing ones supplied by the
    pool (G30).

    ``(n · H_e + (in - n) · H_pool) / in`` for n < in = ``features``, else ``H_e``; ``hessian`` may
    be None when n is 0.
    """
    if tokens >= features:
        assert hessian is not None
        return hessian
    if tokens == 0 or hessian is None:
        return pool
    return (tokens * hessian + (features - tokens) * pool) / features
