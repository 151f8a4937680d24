"""Runs that weigh errors of outputs by gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline import run
from ptq.pipeline.forecast import forecast
from ptq.pipeline.output_costs import output_costs
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model


def recipe(text: Path, **given: object) -> Recipe:
    return Recipe.default(
        "nvfp4", calibration=str(text), samples=6, seq_len=32, batch_size=2, fisher=4, **given
    )


def test_costs_are_those_of_layers_that_are_quantized(tiny_llama: Path) -> None:
    source = CheckpointSource(tiny_llama, dtype=torch.float32)
    plan = Plan.of(
        source, recipe(Path("builtin"), ignore=("v_proj",), rules=(("o_proj", "mxfp8"),))
    )
    batches = [torch.randint(3, 200, (2, 32)) for _ in range(3)]
    with output_costs(source, plan, batches, device="cpu", until=1) as costs:
        found = costs.of("model.layers.1.mlp.down_proj")
        assert found is not None and [tuple(g.shape) for g in found] == [(64, 64)]
        assert float(found[0].diagonal().min()) > 0
        for other in (
            "layers.0.mlp.down_proj",
            "layers.1.self_attn.v_proj",
            "layers.1.self_attn.o_proj",
        ):
            assert costs.of(f"model.{other}") is None
    with output_costs(source, plan, batches, device="cpu", until=2) as costs:
        assert costs.of("model.layers.1.mlp.down_proj") is None


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_run_chooses_other_codes_and_says_so(
    kind: str, make_tiny_model, tiny_text: Path, tmp_path: Path
) -> None:
    model = make_tiny_model(kind)
    weighed = recipe(tiny_text)
    for name, chosen in (
        ("weighed", weighed),
        ("again", weighed),
        ("usual", replace(weighed, fisher=0)),
    ):
        quantize_model(model, tmp_path / name, recipe=chosen, dialect="ptq")
    files = [
        (tmp_path / n / "model.safetensors").read_bytes() for n in ("weighed", "again", "usual")
    ]
    assert files[0] == files[1] != files[2]
    stored = json.loads((tmp_path / "weighed" / "config.json").read_text())["quantization_config"]
    assert stored["recipe"]["fisher"] == 4
    assert "outputs weighed by gradients of 4 windows" in weighed.levers


def test_an_interrupted_run_continues_to_the_same_bytes(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch
) -> None:
    weighed = recipe(tiny_text)
    quantize_model(tiny_llama, tmp_path / "whole", recipe=weighed)

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_llama, tmp_path / "parts", recipe=weighed, on_block=stop)
    asked: list[int] = []
    measure = run.output_costs

    def watched(*args, until: int, **rest):
        asked.append(until)
        return measure(*args, until=until, **rest)

    monkeypatch.setattr(run, "output_costs", watched)
    quantize_model(tiny_llama, tmp_path / "parts", recipe=weighed)
    assert asked == [1]  # what the first block needed is not measured again
    whole, parts = (tmp_path / n / "model.safetensors" for n in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_forecast_knows_what_it_takes(tiny_llama: Path) -> None:
    usual, weighed, disk = (
        forecast(tiny_llama, Recipe.default("nvfp4", samples=8, fisher=n), activations=where)
        for n, where in ((0, "ram"), (8, "ram"), (8, "disk"))
    )
    assert usual.outputs == 0 == disk.outputs < weighed.outputs
    assert weighed.seconds and usual.seconds and weighed.seconds > usual.seconds
    assert weighed.peak_bytes > usual.peak_bytes


def test_the_best_preset_weighs_where_it_can() -> None:
    assert Recipe.default("nvfp4", quality="best").fisher == 32
    for kind in ({"format": "mxfp8"}, {"format": "mxint8", "nested": 4}, {"algorithm": "rtn"}):
        given = {"format": "nvfp4", "quality": "best", **kind}
        assert Recipe.default(**given).fisher == 0
    assert Recipe.default("nvfp4", quality="best", fisher=0).fisher == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"algorithm": "rtn"}, "rtn does not look at what errors of outputs cost"),
        ({"format": "mxint8", "nested": 4}, "nested mxint8 does not look at what errors"),
    ],
)
def test_what_cannot_weigh_refuses(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe.default(**{"format": "nvfp4", "fisher": 4, **given})


def test_single_modules_may_be_rounded_to_nearest_beside_it() -> None:
    mixed = Recipe.default(
        "nvfp4", fisher=4, rules=(("o_proj", {"algorithm": "rtn", "scales": "mse"}),)
    )
    rounded = mixed.for_module("o_proj")
    assert rounded is not None and rounded.fisher == 0 and mixed.for_module("q_proj") is mixed
