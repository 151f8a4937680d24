"""Eight bits where they gain most: how much room there is, what decides together, and a run."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ptq.checkpoint.dialect_choice import Choice
from ptq.model.blueprint import Blueprint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline import run
from ptq.pipeline.budget import Allocation, allocate, room
from ptq.pipeline.forecast import forecast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.evaluate import evaluate
from ptq.runtime.load import load


def plan(path: Path, **given: object) -> Plan:
    return Plan.of(Blueprint.of(path), Recipe.default("nvfp4", **given))


def test_bits_per_weight_are_a_share_of_the_weights(tiny_llama: Path) -> None:
    assert room(plan(tiny_llama)) == 0
    assert room(plan(tiny_llama, eight_bit=0.1)) == 0.1
    assert room(plan(tiny_llama, budget=4.875)) == pytest.approx(0.1)
    assert room(plan(tiny_llama, budget=4.875, eight_bit=0.05)) == 0.05
    assert room(plan(tiny_llama, budget=12.0)) == 1
    with pytest.raises(ValueError, match=r"budget of 4.25 bits per weight is less than the 4.5 "):
        room(plan(tiny_llama, budget=4.25))


def test_a_forecast_has_the_additional_bits_and_refuses_too_few(tiny_llama: Path) -> None:
    usual = forecast(tiny_llama, Recipe.default("nvfp4"))
    more = forecast(tiny_llama, Recipe.default("nvfp4", budget=4.875))
    assert "4.875 bits per weight" in more.levers
    assert more.bits_per_quantized_weight - usual.bits_per_quantized_weight == pytest.approx(0.375)
    with pytest.raises(ValueError, match=r"a budget of 4\.25"):
        forecast(tiny_llama, Recipe.default("nvfp4", budget=4.25))


def allocated(path: Path, **given: object) -> Allocation:
    source = CheckpointSource(path, dtype=torch.float32)
    recipe = Recipe.default("nvfp4", scheme="w4a4", samples=4, seq_len=32, **given)
    batches = [torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))]
    return allocate(source, Plan.of(source, recipe), batches, device="cpu")


def test_layers_that_engines_fuse_decide_together(tiny_llama: Path) -> None:
    seen: set[str] = set()
    for share in (0.15, 0.4, 0.6):
        found = allocated(tiny_llama, eight_bit=share)
        assert 0 < found.share <= share and found.after < found.before
        for block in ("model.layers.0", "model.layers.1"):
            for family in ("self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj"):
                stem, _, rest = family.partition("{")
                leaves = rest.partition("}")[0].split(",")
                names = {f"{block}.{stem}{leaf}_proj" for leaf in leaves}
                assert len(names & {*found.layers}) in (0, len(names))
        seen |= {*found.layers}
    assert seen


def test_layers_with_a_rule_keep_it(tiny_llama: Path) -> None:
    rules = (("q_proj", "mxfp6"), ("down_proj", "skip"))
    found = allocated(tiny_llama, eight_bit=1.0, rules=rules)
    assert found.layers
    assert not any(name.endswith(("q_proj", "down_proj")) for name in found.layers)


def test_a_run_writes_what_it_chose_and_loses_less(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    losses = {}
    tokens = torch.randint(3, 200, (512,), generator=torch.Generator().manual_seed(1))
    original = load_original(tiny_llama)
    for share in (0.0, 0.5):
        recipe = Recipe.default(
            "nvfp4", scheme="w4a4", algorithm="rtn", eight_bit=share,
            calibration=str(tiny_text), samples=4, seq_len=32,
        )  # fmt: skip
        out = tmp_path / str(share)
        quantize_model(
            tiny_llama, out, recipe=recipe, device="cpu",
            on_plan=lambda plan: told.append(plan.about_budget),
        )  # fmt: skip
        subject = load(out, dtype=torch.float32, inputs="quantized")
        losses[share] = evaluate(subject, tokens, reference=original, seq_len=64).kl
    assert losses[0.5] < 0.8 * losses[0.0]
    assert told[:2] == ["", ""] and told[2].startswith("mxfp8 for ")
    config = json.loads((tmp_path / "0.5" / "config.json").read_text())["quantization_config"]
    stored = config.get("recipe") or config["ptq"]["recipe"]
    assert stored["eight_bit"] == 0 and stored["rules"]
    assert all(change == "mxfp8" for _, change in stored["rules"])
    assert Recipe.from_dict(stored).rules


def test_a_finished_run_is_seen_to_be_finished(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without choosing again; its own result looked like somebody else's."""
    recipe = Recipe.default(
        "nvfp4", algorithm="rtn", eight_bit=0.3, calibration=str(tiny_text), samples=4, seq_len=32
    )
    made = partial(quantize_model, tiny_llama, tmp_path / "out", device="cpu")
    made(recipe=recipe)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(run, "allocate", lambda *_, **__: pytest.fail("it chooses again"))
    again = made(recipe=recipe)
    assert isinstance(again, Choice) and "had finished it" in again.reason
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(FileExistsError, match="--overwrite"):
        made(recipe=replace(recipe, eight_bit=0.2))


def load_original(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
