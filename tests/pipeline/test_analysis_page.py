"""The page of an analysis: what it says, and how it looks in a browser."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser, check_views

from ptq.pipeline.analysis_files import Analysis
from ptq.pipeline.analysis_page import analysis_page, model_name
from ptq.pipeline.analysis_summary import tensors, wins, worst
from ptq.pipeline.analyze import Options, analyze

LAYERS, TENSORS = 2 * 7, 2 * (7 + 4)


@pytest.fixture(scope="module")
def found(tiny_llama: Path, tiny_text: Path) -> Analysis:
    options = Options(calibration=str(tiny_text), samples=4, seq_len=32, tokens=32)
    return analyze(tiny_llama, options)


def test_every_plot_has_its_data_on_every_screen(found: Analysis, browser: Browser) -> None:
    """Three maps of all layers, four histograms, eight formats, two fronts."""
    page = analysis_page(found)
    for dark in (False, True):
        views = browser.views(page, dark=dark)
        check_views(views, plots=3 + 4 + 8 + 2)
        phone, screen = views
        marks = [plot.drawn for plot in screen.plots]
        assert marks[:3] == [LAYERS] * 3
        assert marks[3:7] == [40] * 4
        assert marks[7:15] == [2 * TENSORS] * 8, "each as it is and rotated"
        assert marks[15:] == [8, 8]
        assert [plot.drawn for plot in phone.plots] == marks
        assert all(plot.label for plot in screen.plots)


def test_screenshots(found: Analysis, browser: Browser, tmp_path: Path) -> None:
    page = analysis_page(found)
    for name, width, dark in (("light", 1280, False), ("dark", 1280, True), ("phone", 500, False)):
        file = tmp_path / f"{name}.png"
        browser.screenshot(page, file, width=width, dark=dark)
        content = file.read_bytes()
        assert struct.unpack(">II", content[16:24]) == (width, 900)
        assert len(content) > 20_000, "not an empty page"
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()


def test_its_figures_are_those_of_the_analysis(found: Analysis) -> None:
    page = analysis_page(found)
    for layer in worst(found.blocks):
        assert layer.name.replace(".", ".<wbr>") in page
        assert f"{layer.error:.4f} in {layer.format}" in page
    row = next(r for r in wins(found.blocks) if r.role == "all" and r.rotated and not r.balanced)
    assert f"{row.share:.1%}" in page and f"{row.qsnr[0]:.2f}" in page
    one = next(tensors(found.blocks)).variants[0].formats["mxfp4"]
    assert f"predicted {one.integrated:.2f} dB, measured {one.qsnr:.2f}" in page


def test_sections_without_data_are_left_out(found: Analysis) -> None:
    assert 'id="cast"' not in analysis_page(found) and 'id="advice"' not in analysis_page(found)
    searched = [
        replace(
            block,
            layers=tuple(replace(layer, errors=()) for layer in block.layers),
            tensors=tuple(
                replace(t, variants=tuple(
                    replace(v, formats={
                        name: replace(f, printed=None, corrected=None, integrated=None)
                        for name, f in v.formats.items()
                    }) for v in t.variants
                )) for t in block.tensors
            ),
        )
        for block in found.blocks
    ]  # fmt: skip
    page = analysis_page(
        replace(found, blocks=tuple(searched), identity={**found.identity, "scales": "mse"})
    )
    for name in ("worst", "layers", "theory", "bits"):
        assert f'id="{name}"' not in page and f'href="#{name}"' not in page
    assert 'id="winners"' in page and 'id="crest"' in page


def test_an_analysis_of_nothing_is_a_page(found: Analysis, browser: Browser) -> None:
    check_views(browser.views(analysis_page(replace(found, blocks=()))), plots=0)


def test_names_of_a_model_are_text(found: Analysis) -> None:
    nasty = "<script>alert(1)</script>"
    block = found.blocks[0]
    layers = tuple(replace(layer, name=f"{nasty}.{layer.name}") for layer in block.layers)
    seen = tuple(
        replace(t, name=f"{nasty}.{t.name}", layers=tuple(f"{nasty}.{n}" for n in t.layers))
        for t in block.tensors
    )
    blocks = (replace(block, name=nasty, layers=layers, tensors=seen),)
    page = analysis_page(replace(found, model=nasty, blocks=blocks))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_name_of_a_model() -> None:
    assert model_name("/home/me/models/llama") == "llama"
    assert model_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
