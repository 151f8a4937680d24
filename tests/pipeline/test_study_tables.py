"""What an analysis, direct casts and advice look like as tables."""

import pytest
import torch

from ptq.numerics.formats import FORMATS, MICROSCALED
from ptq.numerics.hardware_cost import relative_area
from ptq.pipeline.advice import Damage, Option, Unit, advise
from ptq.pipeline.analysis import BlockAnalysis, forms, tensor_analysis
from ptq.pipeline.analysis_summary import Worst
from ptq.pipeline.cast_results import Cast, DirectCast
from ptq.pipeline.study_tables import advice_table, cast_tables, win_table, worst_table


@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_who_wins(rule: str) -> None:
    x = torch.randn(64, 64)
    made = forms(x, 2 * x, rule)
    tensor = tensor_analysis("weight", ["a"], made, x)
    table = win_table([BlockAnalysis(name="b", index=0, tensors=(tensor,), layers=())], rule)
    assert f"0 layers, 1 tensors, scales {rule}" in table.title
    assert len(table.rows) == 4 * len(MICROSCALED) // 2
    cells = {(row[0], row[1]): row for row in table.rows}
    plain = cells["as it is", "nvint4/nvfp4"]
    assert plain[4] in ("0.0%", "100.0%") and plain[5] == "64.3%"
    assert plain[-1] == f"{relative_area(FORMATS['nvint4'], FORMATS['nvfp4']):.2f}"
    assert cells["balanced + rotated", "mxint8/mxfp8"][5] == "–"
    assert (plain[6] == "–") == (rule == "mse")  # laws are about scales that clip nothing
    assert "a model and no synthesis" in table.text()


def test_layers_that_will_hurt() -> None:
    worst = Worst(
        name="a.down", format="nvfp4", rotated=True, balanced=False, error=0.25, plain=0.5,
        advice=("rotate it", "eight bits"),
    )  # fmt: skip
    table = worst_table([worst])
    assert table.rows == (("a.down", "0.2500", "rotate it; eight bits"),) and table.left(2)


def cast(format: str, rotated: bool, kl: float) -> Cast:
    return Cast(
        format=format, rotated=rotated, nll=2 + kl, kl=kl, kl_top25=kl / 2, top1_agreement=0.875,
        windows=(kl / 2,),
    )  # fmt: skip


def test_a_direct_cast() -> None:
    found = DirectCast(
        identity={"text": "some.txt"}, tokens=31, seq_len=32, reference_nll=2.0, seconds=1.0,
        casts=(cast("nvint4", False, 0.01), cast("nvfp4", False, 0.02), cast("nvfp4", True, 0.05)),
    )  # fmt: skip
    table, verdict = cast_tables(found)
    assert "some.txt: 31 predictions in windows of 32" in table.title and table.dim == {0}
    assert [row[0] for row in table.rows] == ["original", "nvint4", "nvfp4", "nvfp4 rotated"]
    assert table.rows[1][-1] == "87.50 %"
    assert verdict.rows == (("as it is", "nvint4/nvfp4", "0.50", "INT", "1 of 1", "0 of 12"),)
    assert "nvfp4: rotation more than doubles its KL" in verdict.notes[-1]


def test_advice() -> None:
    options = (
        Option(format="nvfp4", rotation=1, bits=4.5, kl=0.2, kl_top25=0.1),
        Option(format="mxfp6", rotation=32, bits=6.25, kl=0.02, kl_top25=0.01),
    )
    units = tuple(Unit(layers=(n,), weights=100, options=options) for n in "ab")
    damage = Damage(identity={}, scheme="w4a4", seconds=1.0, units=units)
    table = advice_table(advise(damage, budget=5.4))
    assert "advice for 5.4 bits per weight, w4a4, by kl" in table.title
    chosen, *others = table.rows
    assert chosen[:2] == ("chosen", "5.375")
    assert set(chosen[4].split(", ")) == {"mxfp6 r32 50%", "nvfp4 50%"}
    assert [row[0] for row in others[:2]] == ["all nvfp4", "all mxfp6 r32"]
    assert "six-bit codes take a byte on disk: 6.38 bits" in table.notes[0]
    table = advice_table(advise(damage, ceiling=0.5))
    assert "advice for a loss of 0.5 nats per token" in table.title and not table.notes
