"""Second moments of what a layer reads (G1, G3)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

WIDE = 4096  # features above which float64 sums would cost too much memory (in² · 8 bytes)


def entry_bytes(features: int, device: torch.device) -> int:
    """Bytes of an entry of a :class:`Hessian`'s sum."""
    return 8 if device.type == "cpu" and features <= WIDE else 4


class Hessian:
    """The mean of ``xᵀx`` over all tokens seen so far; every token has the same weight.

    Products are computed per batch in ``dtype`` without TF32; the running sum is float64 on the CPU
    up to 4096 features and ``dtype`` otherwise. What is observed is never written to.

    With ``full=False`` only the diagonal of the sum is kept, the same numbers in 1/in of the
    memory.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        full: bool = True,
    ):
        self.features, self.device, self.dtype = features, torch.device(device), dtype
        self.full = full
        self.tokens = 0
        self._sum: Tensor | None = None  # allocated at the first token: an expert may never see one

    def update(self, x: Float[Tensor, "*s in"]) -> None:
        """Add the tokens of ``x`` (any float dtype)."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.device, self.dtype)
        if not len(x):
            return
        with full_precision():
            product = x.T @ x
        self._add(product if self.full else product.diagonal())
        self.tokens += len(x)

    def mean(self) -> Float[Tensor, "in in"]:
        """``Σ xᵀx / tokens``, exactly symmetric, in the dtype of the sum; ValueError when no token
        came by."""
        assert self.full, "only the diagonal was kept"
        if not self.tokens or self._sum is None:
            raise ValueError(
                "no tokens reached this layer during calibration; use more or longer samples, or "
                "leave the layer out"
            )
        return (self._sum + self._sum.T) / (2 * self.tokens)

    def total(self) -> Float[Tensor, "in in"]:
        """``Σ xᵀx``; zeros when no token came by."""
        assert self.full, "only the diagonal was kept"
        return self._kept()

    def diagonal(self) -> Float[Tensor, " in"]:
        """The diagonal of :meth:`total`."""
        return self._kept().diagonal() if self.full else self._kept()

    def _kept(self) -> Tensor:
        return self._zeros() if self._sum is None else self._sum

    def reduce(self) -> None:
        """Add up sums and token counts over all ranks; every rank must call it, in the same order.

        Does nothing unless ``torch.distributed`` is initialised with more than one rank.
        """
        if not distributed():
            return
        self._sum = self._kept()
        dist.all_reduce(self._sum)
        self.tokens = reduce_sum(self.tokens, self.device)

    def _zeros(self) -> Tensor:
        shape = (self.features,) * (2 if self.full else 1)
        exact = entry_bytes(self.features, self.device) == 8
        return torch.zeros(shape, device=self.device, dtype=torch.float64 if exact else self.dtype)

    def _add(self, product: Tensor) -> None:
        if self._sum is None:
            self._sum = self._zeros()
        self._sum += product


def reduce_max(value: Tensor) -> None:
    """Replace ``value`` by its maximum over all ranks, in place; does nothing on one rank."""
    if distributed():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)


def reduce_sum(count: int, device: torch.device) -> int:
    """The sum of ``count`` over all ranks."""
    if not distributed():
        return count
    total = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def distributed() -> bool:
    """Whether several ranks work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32: no TF32 on CUDA, no bfloat16 on CPU, whatever the
    caller has set."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009
    before = [b.fp32_precision for b in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
