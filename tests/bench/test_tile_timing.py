"""What is timed for a tile: every operation's launch, on weights as they are served."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ptq.bench import tile_timing, timing
from ptq.bench.tile_timing import Unbuildable, tile_calls, timer
from ptq.bench.tuning_log import Work
from ptq.kernels import gpu, operator
from ptq.kernels.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(copies: int, *, tokens: int = 1, n: int = 64, k: int = 128) -> timing.Problem:
    return timing.Problem(
        tokens=tokens,
        n=n,
        k=k,
        element="e2m1",
        scale="e4m3",
        rotation=16,
        device=DEVICE,
        copies=copies,
    )


def _arguments(call: timing.Call) -> tuple[Any, ...]:
    assert isinstance(call, partial)
    return call.args


def test_tiles_are_timed_on_weights_as_they_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table timed on rows would be wrong for weights in units: 31.9 µs and 25.5 on an H200."""
    for operation, copies in (("w4a16", 2), ("grouped", 16)):
        for units in (False, True):
            monkeypatch.setattr(gpu, "reads_units", lambda device, units=units: units)
            calls = tile_calls(operation, problem(copies))(Tile(kernel="w4a16"))
            weights = [_arguments(call)[1 if operation == "w4a16" else 2] for call in calls]
            assert [weight.tiled for weight in weights] == [units, units]


@pytest.mark.skipif(not operator.INTERPRETED, reason="sm_100 multiplies them, or the interpreter")
@pytest.mark.parametrize(
    ("operation", "tile"),
    [
        ("w4a16", Tile(kernel="w4a16", block_n=64)),
        ("grouped", Tile(kernel="w4a16", block_n=64)),
        ("w4a4", Tile(kernel="w4a4", block_n=64, swap=True)),
        ("w4a4_blocked", Tile(kernel="w4a4_tma", block_m=128, stages=2)),
    ],
)
def test_every_operation_is_launched(
    monkeypatch: pytest.MonkeyPatch, operation: str, tile: Tile
) -> None:
    """The launch fills its output: that of the operator."""
    inputs = timing.Problem.inputs
    monkeypatch.setattr(timing.Problem, "inputs", lambda self: inputs(self).bfloat16())
    calls = tile_calls(operation, problem(8, tokens=3, n=128))(tile)
    assert len(calls) == (1 if operation == "grouped" else 8)
    out = next(
        a
        for a in _arguments(calls[0])
        if isinstance(a, torch.Tensor)
        and a.shape[-1] == 128
        and a.shape[0] in (3, 24)
        and a.dtype == torch.bfloat16
        and a is not _arguments(calls[0])[0]
    )
    out.fill_(torch.nan)
    calls[0]()
    assert out.isfinite().all() and out.any()


def test_what_the_compiler_cannot_build_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of tuning ended at the first tile that it failed at; an error of the device still ends
    them."""
    from triton.runtime.errors import PTXASError

    fails: dict[int, Exception] = {
        64: PTXASError("out of registers"),
        128: RuntimeError("PassManager::run failed"),
        16: RuntimeError("an illegal memory access was encountered"),
    }

    def timed(groups, device, repeats):
        if (error := fails.get(groups[""][0].block_n)) is not None:
            raise error
        return {"": [1.0, 3.0, 2.0]}

    monkeypatch.setattr(timing, "time_calls", timed)
    monkeypatch.setattr(tile_timing, "tile_calls", lambda operation, problem: lambda tile: [tile])
    seconds = timer(Work("w4a16", "nvfp4", 1, 64, 128), torch.device("cpu"))
    assert seconds(Tile(kernel="w4a16", block_n=256)) == 2.0
    for width, reason in ((64, "out of registers"), (128, "PassManager")):
        with pytest.raises(Unbuildable, match=reason):
            seconds(Tile(kernel="w4a16", block_n=width))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        seconds(Tile(kernel="w4a16", block_n=16))
