"""What a run was worth: its divergence beside that of rounding to nearest."""

from pathlib import Path

import pytest
import torch

from ptq.pipeline import against_nearest as module
from ptq.pipeline.against_nearest import AgainstNearest, against_nearest, cheap, to_nearest
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.inspect import inspect

CPU = torch.device("cpu")


def test_the_result_is_beside_the_same_model_rounded_to_nearest(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found = {}
    for quality in ("fast", "default"):
        out = tmp_path / quality
        recipe = Recipe.default("mxfp4", quality=quality, samples=8, seq_len=128)
        quantize_model(tiny_llama, out, recipe=recipe, device="cpu")
        found[quality] = against_nearest(tiny_llama, out, inspect(out).recipe, CPU)
    fast, best = found["fast"], found["default"]
    assert fast.kl == pytest.approx(fast.nearest_kl, rel=1e-5) and fast.avoided == pytest.approx(0)
    assert best.nearest_kl == pytest.approx(fast.kl, rel=1e-5)
    assert best.tokens == fast.tokens > 100


def test_what_is_avoided_is_a_share_of_the_damage() -> None:
    assert AgainstNearest(kl=0.1, nearest_kl=0.4, tokens=1).avoided == pytest.approx(0.75)
    assert AgainstNearest(kl=0.5, nearest_kl=0.4, tokens=1).avoided == pytest.approx(-0.25)
    assert AgainstNearest(kl=0.0, nearest_kl=0.0, tokens=1).avoided == 0


def test_layers_keep_their_formats_and_lose_what_was_done_for_them() -> None:
    rules = (
        ("q_proj", "mxfp8"),
        ("k_proj", "skip"),
        ("o_proj", {"format": "mxfp4", "descent": 9, "rotation": 16, "scheme": "w4a16"}),
    )
    recipe = Recipe.default("nvfp4", scheme="w4a4", rules=rules, ignore=("down_proj",))
    nearest = to_nearest(recipe.to_dict())
    assert not nearest.measures and nearest.ignore == ("down_proj",)
    q, o = nearest.for_module("q_proj"), nearest.for_module("o_proj")
    assert q is not None and o is not None and nearest.for_module("k_proj") is None
    assert (q.format, q.algorithm, q.measures) == ("mxfp8", "rtn", False)
    assert (o.format, o.rotation, o.scheme, o.measures) == ("mxfp4", 16, "w4a16", False)


def test_it_is_done_where_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "product_seconds", lambda device: 1e-11)
    monkeypatch.setattr(module, "free_bytes", lambda device: 8e9)
    assert cheap(100_000_000, 10, CPU)  # 12 s
    assert not cheap(300_000_000, 10, CPU) and cheap(300_000_000, 300, CPU)
    assert not cheap(1_000_000_000, 1e6, CPU)  # there is no room for two
