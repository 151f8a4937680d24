"""What a Hessian says of an error."""

import pytest
from torch import Tensor

from ptq.numerics.errors import output_error
from ptq.numerics.formats import MXFP4, MXINT4, NVFP4, NVINT4, Format
from ptq.numerics.gptq import gptq
from ptq.numerics.scales import Grid

deployed = pytest.mark.parametrize("fmt", [MXFP4, NVFP4, NVINT4, MXINT4], ids=lambda f: f.name)


def grid(w: Tensor, fmt: Format, rule: str = "mse", margin: float = 1.0) -> Grid:
    return Grid(fmt, fmt.global_scale(w.abs().amax(), margin), rule)


def loss(w: Tensor, quantized, h: Tensor) -> float:
    return float(output_error(w, quantized.dequantize(), h))


@deployed
def test_the_loss_is_the_output_error_on_the_same_tokens(fmt: Format, problem) -> None:
    """G17: un-damped."""
    w, x, h = problem
    swept = gptq(w, h, grid(w, fmt))
    direct = ((w - swept.dequantize()).double() @ x.double().T).square().sum() / (
        w.double() @ x.double().T
    ).square().sum()
    assert abs(loss(w, swept, h) / float(direct) - 1) < 1e-5
