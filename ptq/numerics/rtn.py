"""Round to nearest."""

from jaxtyping import Float
from torch import Tensor

from ptq.numerics.scales import Grid, round_to
from ptq.numerics.tensor import QuantizedTensor


def rtn(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None,
    grid: Grid,
    *,
    weighted: bool = False,
) -> QuantizedTensor:
    """Every weight to its nearest grid point.

    Args:
        hessian: consulted only with ``weighted``, and then only its diagonal; None otherwise.
        weighted: a scale search weights the columns by the diagonal of the Hessian.
    """
    weight, importance = weight.float(), None
    if weighted:
        assert hessian is not None
        importance = hessian.diagonal().float()
    return round_to(weight, grid.scales(weight, importance))
