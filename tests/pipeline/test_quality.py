"""How much text a preset reads, by the model and the device."""

from pathlib import Path

import pytest

from ptq.model.blueprint import Blueprint
from ptq.pipeline.plan import Plan
from ptq.pipeline.quality import windows
from ptq.pipeline.recipe import Recipe

SMALL, BILLION = 106_000_000, 1_000_000_000


@pytest.mark.parametrize(
    ("quality", "parameters", "device", "positions", "expected"),
    [
        ("default", SMALL, "cpu", 8192, (32, 512)),
        ("best", SMALL, "cpu", None, (64, 512)),
        ("default", SMALL, "cuda", None, (128, 2048)),
        ("best", SMALL, "cuda", 1024, (256, 1024)),
        ("default", BILLION, "cpu", None, (16, 512)),
        ("best", 100 * BILLION, "cpu", 128, (64, 128)),
        ("default", 1_000, "cpu", None, (128, 2048)),
    ],
)
def test_windows(
    quality: str, parameters: int, device: str, positions: int | None, expected: tuple[int, int]
) -> None:
    assert windows(quality, parameters, device, positions, measures=True) == expected


def test_ranges_alone_need_little_text_whatever_the_quality() -> None:
    for quality, device in (("fast", "cpu"), ("best", "cuda")):
        assert windows(quality, SMALL, device, None, measures=False) == (8, 512)


def test_what_the_recipe_names_is_taken(tiny_llama: Path) -> None:
    def sizes(device: str = "cpu", **given: object) -> tuple[int, int, object, object]:
        plan = Plan.of(Blueprint.of(tiny_llama), Recipe.default("nvfp4", **given), device)
        return plan.samples, plan.seq_len, plan.recipe.samples, plan.recipe.seq_len

    assert sizes() == (1024, 256, 1024, 256)  # 256 positions
    assert sizes(samples=3) == (3, 256, 3, 256)
    assert sizes(seq_len=64) == (4096, 64, 4096, 64)
    assert sizes(samples=3, seq_len=999) == (3, 256, 3, 999)


def test_presets_are_recipes_that_options_change() -> None:
    fast = Recipe.default("nvfp4", quality="fast")
    assert (fast.algorithm, fast.scales, fast.balance) == ("rtn", "mse", 0)
    assert Recipe.default("nvfp4", quality="fast", algorithm="gptq").algorithm == "gptq"
    best, usual = Recipe.default("nvfp4", quality="best"), Recipe.default("nvfp4")
    assert {**best.to_dict(), "quality": "default", "fisher": 0} == usual.to_dict()
    with pytest.raises(ValueError, match="unknown quality 'good'; choose from fast, default, best"):
        Recipe.default("nvfp4", quality="good")


def test_levers_are_named(tiny_llama: Path) -> None:
    def levers(**given: object) -> str:
        return Plan.of(Blueprint.of(tiny_llama), Recipe.default("mxfp4", **given)).levers

    assert levers(samples=4) == (
        "GPTQ, scales by trial, 4 sweeps of descent, balance 0.25, Hadamard 32; "
        "4 x 256 tokens of builtin"
    )
    nearest = "round to nearest, scales by mse, Hadamard 32; reads no text"
    assert levers(quality="fast") == nearest
