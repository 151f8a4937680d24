"""Layers that run in kernels, on a GPU or in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ptq.kernels import gpu
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: one of Hopper's kind, whose kernels the interpreter runs."""
    pytest.importorskip("triton")
    from ptq.kernels.operator import INTERPRETED

    if DEVICE == "cpu":
        if not INTERPRETED:
            pytest.skip("kernels were imported without TRITON_INTERPRET=1")
        monkeypatch.setattr(gpu, "available", lambda device: torch.device(device).type == "cpu")
        monkeypatch.setattr(gpu, "architecture", lambda device: 90)
        monkeypatch.setattr(gpu, "multiplies_fp4", lambda device: False)


@pytest.fixture
def quantized() -> Callable[..., QuantLinear]:
    """``quantized(linear, fmt, rotation, amax)``: rounded to nearest, in kernels for bfloat16 where
    those run; layers with the same ``amax`` have one global scale."""

    def make(
        linear: nn.Linear, name: str = "nvfp4", rotation: int = 1, amax: float = 1.0
    ) -> QuantLinear:
        fmt = FORMATS[name]
        weight = Rotation(rotation).exact(linear.weight.detach().float())
        grid = Grid(fmt, fmt.global_scale(torch.tensor(amax)), "absmax")
        layer = QuantLinear.from_quantized(
            round_to(weight, grid.scales(weight)),
            Rotation(rotation),
            linear.bias,
            quantize_inputs=False,
            input_global_scale=None,
        ).to(DEVICE)
        layer.prepare(torch.bfloat16)
        return layer

    return make
