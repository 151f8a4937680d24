"""What direct casts and advice look like on a terminal."""

import pytest

from ptq.cli.study_tables import print_advice, print_direct_cast
from ptq.pipeline.advice import Damage, Option, Unit, advise
from ptq.pipeline.cast_results import Cast, DirectCast


def cast(format: str, rotated: bool, kl: float) -> Cast:
    return Cast(
        format=format, rotated=rotated, nll=2 + kl, kl=kl, kl_top25=kl / 2, top1_agreement=0.875,
        windows=(kl / 2,),
    )  # fmt: skip


def test_a_direct_cast(capsys: pytest.CaptureFixture[str]) -> None:
    found = DirectCast(
        identity={"text": "some.txt"}, tokens=31, seq_len=32, reference_nll=2.0, seconds=1.0,
        casts=(cast("nvint4", False, 0.01), cast("nvfp4", False, 0.02), cast("nvfp4", True, 0.05)),
    )  # fmt: skip
    print_direct_cast(found)
    out = capsys.readouterr().out
    assert "some.txt: 31 predictions in windows of 32" in out and "nvfp4 rotated" in out
    row = next(line.split() for line in out.splitlines() if "nvint4/nvfp4" in line)
    assert row[-8:] == ["0.50", "INT", "1", "of", "1", "0", "of", "12"]
    assert "nvfp4: rotation more than doubles its KL" in out


def shares(out: str) -> set[str]:
    """Those of the choice, in any order."""
    row = next(line for line in out.splitlines() if line.strip().startswith("chosen"))
    return {share.strip() for share in row.rpartition("   ")[2].split(",")}


def test_advice(capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        Option(format="nvfp4", rotation=1, bits=4.5, kl=0.2, kl_top25=0.1),
        Option(format="mxfp6", rotation=32, bits=6.25, kl=0.02, kl_top25=0.01),
    )
    units = tuple(Unit(layers=(n,), weights=100, options=options) for n in "ab")
    damage = Damage(identity={}, scheme="w4a4", seconds=1.0, units=units)
    print_advice(advise(damage, budget=5.4))
    out = capsys.readouterr().out
    assert "advice for 5.4 bits per weight, w4a4, by kl" in out
    assert "all mxfp6 r32" in out and {"mxfp6 r32 50%", "nvfp4 50%"} <= shares(out)
    assert "six-bit codes take a byte on disk: 6.38 bits" in out
    print_advice(advise(damage, ceiling=0.5))
    assert "advice for a loss of 0.5 nats per token" in capsys.readouterr().out
