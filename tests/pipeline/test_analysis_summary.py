"""Who wins, whether that was foreseen, and what hurts: on tensors made for it."""

import pytest
import torch

from ptq.pipeline.analysis import (
    BlockAnalysis,
    LayerAnalysis,
    OutputErrors,
    TensorAnalysis,
    forms,
    tensor_analysis,
)
from ptq.pipeline.analysis_summary import best, crossings, errors_at, lines, wins, worst


def tensor(name: str, x: torch.Tensor, rule: str = "absmax", role="weight") -> TensorAnalysis:
    return tensor_analysis(role, [name], forms(x, None, rule), x)


def gaussian_and_heavy(rule: str = "absmax") -> BlockAnalysis:
    draw = torch.Generator().manual_seed(1)
    gaussian = torch.randn(300, 64, generator=draw)
    heavy = gaussian * torch.exp(torch.randn(300, 64, generator=draw))
    tensors = (tensor("a", gaussian, rule), tensor("b", heavy, rule, "input"))
    return BlockAnalysis(name="m", index=0, tensors=tensors, layers=())


def test_wins_of_gaussian_and_of_heavy_tails() -> None:
    rows = {(w.ints, w.rotated, w.role): w for w in wins([gaussian_and_heavy()])}
    assert not any(w.balanced for w in rows.values())
    assert len(rows) == 4 * 2 * 3
    nv = rows["nvint4", False, "all"]
    assert (nv.tensors, nv.share, nv.paper, nv.floats) == (2, 0.5, 0.643, "nvfp4")
    assert rows["nvint4", False, "weight"].share == 1
    assert rows["nvint4", False, "input"].share == 0
    assert rows["nvint4", True, "all"].share == 1  # rotation makes both Gaussian
    assert rows["mxint8", False, "all"].share == 1 and rows["mxint4", False, "all"].share == 0
    assert nv.hits == {"printed": 1, "corrected": 1, "integrated": 1, "crossover": 1}


def test_searched_scales_are_judged_by_their_own_crossovers() -> None:
    rows = {(w.ints, w.rotated, w.role): w for w in wins([gaussian_and_heavy("mse")], "mse")}
    assert rows["nvint4", False, "all"].hits.keys() == {"crossover"}
    assert crossings("mse")["mxint4"] == 2.29
    assert crossings("absmax")["mxint8"] is None
    assert crossings("absmax")["nvint4"] == pytest.approx(2.287, abs=0.01)
    assert lines("absmax")["mxint6"]["printed"] == pytest.approx(1.958, abs=0.002)


def layer(name: str, error: float, *, rotated: float, balanced: float | None = None):
    def form(value: float, *, turn: bool, even: bool) -> OutputErrors:
        both = {"nvfp4": value, "nvint4": 2 * value, "mxfp8": value / 100}
        return OutputErrors(balanced=even, rotated=turn, both=both, weights=dict(both))

    found = [form(error, turn=False, even=False), form(rotated, turn=True, even=False)]
    if balanced is not None:
        found.append(form(balanced, turn=False, even=True))
    return LayerAnalysis(name=name, out_features=8, in_features=32, errors=tuple(found))


def test_the_worst_layers_come_first_with_something_to_do() -> None:
    x = torch.ones(4, 32)
    x[:, 5] = 50.0
    loud = tensor("m.a", x, role="input")
    layers = (
        layer("m.a", 0.5, rotated=0.2, balanced=0.1),
        layer("m.b", 0.01, rotated=0.02),
        layer("m.c", 0.02, rotated=0.03),
        LayerAnalysis(name="m.unseen", out_features=8, in_features=32, errors=()),
    )
    found = worst([BlockAnalysis(name="m", index=0, tensors=(loud,), layers=layers)])
    assert [w.name for w in found] == ["m.a", "m.c", "m.b"]
    first = found[0]
    assert (first.format, first.balanced, first.rotated, first.error) == ("nvfp4", True, False, 0.1)
    told = " | ".join(first.advice)
    assert "balance it (--balance 0.5): 0.5000 -> 0.1000 in nvfp4" in told
    assert "1 input channel is an outlier (5)" in told
    assert "5.0 times the median layer: give it eight bits (mxfp8 0.00100)" in told
    assert found[2].advice == ("nvfp4 is its best format in four bits; nothing stands out",)
    assert worst([]) == []


def test_the_best_of_some_formats() -> None:
    one = layer("m.a", 0.5, rotated=0.2)
    choice = best(one, ["nvint4"])
    assert choice is not None and choice[0] == "nvint4" and choice[1].rotated
    assert best(one, ["mxint4"]) is None
    plain = errors_at(one, balanced=True)  # balancing changes nothing there
    assert plain is not None and plain.both["nvfp4"] == 0.5
