"""The whole model on the page: casts and advice."""

import pytest
from browser import Browser, check_views

from ptq.drawing.page import Page, render
from ptq.numerics.formats import MICROSCALED
from ptq.pipeline.advice import Advice, Damage, Option, Unit, advise
from ptq.pipeline.analysis_whole_model import advice, direct_cast
from ptq.pipeline.cast_results import Cast, DirectCast

KINDS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def cast() -> DirectCast:
    """Rotation breaks one format."""
    casts = tuple(
        Cast(
            format=name, rotated=rotated, nll=2.5, kl=2.0 ** -fmt.element.bits * (5 if rotated and
            name == "nvfp4" else 1), kl_top25=0.01 + i / 100, top1_agreement=0.9,
            windows=(0.1, 0.2 + i / 100),
        )
        for i, (name, fmt) in enumerate(MICROSCALED.items())
        for rotated in (False, True)
    )  # fmt: skip
    return DirectCast(
        identity={}, tokens=510, seq_len=256, reference_nll=2.0, seconds=1.0, casts=casts
    )


@pytest.fixture(scope="module")
def advised() -> Advice:
    def options(loss: float) -> tuple[Option, ...]:
        return tuple(
            Option(format=name, rotation=1, bits=fmt.bits_per_weight,
                   kl=loss * 4.0 ** -fmt.element.bits, kl_top25=loss * 4.0 ** -fmt.element.bits)
            for name, fmt in MICROSCALED.items()
        )  # fmt: skip

    units = tuple(
        Unit(layers=(f"model.layers.{i}.{kind}",), weights=100, options=options(1.0 + i + 9 * j))
        for i in range(3)
        for j, kind in enumerate(KINDS)
    )
    damage = Damage(identity={}, scheme="w4a4", seconds=1.0, units=units)
    return advise(damage, budget=6.0)


def page(*sections) -> str:
    return render(
        Page(kind="k", title="t", facts=(), summary=(), sections=tuple(sections), foot="f")
    )


def test_casts_and_advice_in_a_browser(cast: DirectCast, advised: Advice, browser: Browser) -> None:
    views = browser.views(page(direct_cast(cast), advice(advised)))
    check_views(views, plots=3)
    front = len(advised.uniform) + len(advised.front) + 1
    for view in views:
        assert [plot.drawn for plot in view.plots] == [16, front, 6]


def test_what_broke_is_said(cast: DirectCast) -> None:
    section = direct_cast(cast)
    assert any("Rotation breaks nvfp4" in words for words in section.words)
    rows = section.tables[0].rows
    assert len(rows) == 16 and rows[0][:3] == ("mxfp4", "as it is", "4.25")
    assert len(section.tables[1].rows) == 8


def test_the_advice_says_what_it_comes_to(advised: Advice) -> None:
    section = advice(advised)
    assert "at most 6 bits per weight" in section.words[0]
    assert f"{advised.point.bits:.3f} bits per weight" in section.words[0]
    for label in advised.point.shares:
        assert label in section.figures[1].caption
    bounded = advise(advised.damage, ceiling=0.05)
    assert "a loss of at most 0.05 nats per token" in advice(bounded).words[0]
