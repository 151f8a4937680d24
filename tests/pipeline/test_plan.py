"""The plan of a run: which layers, with which recipe, and what is refused before any weight is
read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_model

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.model.blueprint import Blueprint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline.plan import LayerPlan, Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear

Make = Callable[..., Path]


@pytest.fixture
def quick(tiny_text: Path) -> Callable[..., Recipe]:
    """A recipe on little data."""

    def make(format: str = "nvfp4", **given: object) -> Recipe:
        data = {"calibration": str(tiny_text), "samples": 9, "seq_len": 32, "batch_size": 3}
        return Recipe.default(format, **{**data, **given})

    return make


def test_the_recipe_of_a_layer_is_resolved_once_in_a_run(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = Recipe.for_module

    def count(recipe: Recipe, *names: str) -> Recipe | None:
        asked.append(names[0])
        return original(recipe, *names)

    monkeypatch.setattr(Recipe, "for_module", count)
    recipe = quick("mxfp4", scheme="w4a4", rules=(("o_proj", "nvfp4"), ("k_proj", "skip")))
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu", dialect="ptq")
    assert len(asked) == len(set(asked)) == 14


@pytest.mark.parametrize("from_weights", [True, False])
def test_a_plan_says_what_happens_to_every_layer(
    tiny_llama: Path, quick, from_weights: bool
) -> None:
    rules = (("o_proj", {"rotation": 32}), ("v_proj", "skip"))
    recipe = quick("mxfp4", scheme="w4a4", rotation=16, rules=rules)
    source = CheckpointSource(tiny_llama) if from_weights else Blueprint.of(tiny_llama)
    plan = Plan.of(source, recipe)
    assert len(plan.layers) == 12
    assert not any("v_proj" in name for name in plan.layers)
    layer = plan["model.layers.1.self_attn.o_proj"]
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 64, False)
    assert layer.rotations == [32] and plan.rotations == [16, 32]
    assert layer.info == LayerInfo(format="mxfp4", rotation=32, quantize_inputs=True)
    assert plan.balances and plan.seq_len == 32 and plan.head is None and plan.foreign is None


def test_a_rotation_that_is_chosen_later_counts_as_that_of_the_group() -> None:
    recipe = Recipe(format="nvfp4", rotation="auto", scheme="w4a4")
    layer = LayerPlan(name="q", recipe=recipe, in_features=256, out_features=8, bias=True)
    assert layer.rotations == [1, 16, 128]
    assert layer.info == LayerInfo(
        format="nvfp4", rotation=16, quantize_inputs=True, static_inputs=True, bias=True
    )


def test_sequences_are_no_longer_than_the_model_has_positions(tiny_llama: Path, quick) -> None:
    positions = json.loads((tiny_llama / "config.json").read_text())["max_position_embeddings"]
    assert Plan.of(Blueprint.of(tiny_llama), quick(seq_len=4096)).seq_len == positions


def test_a_quantized_head_is_planned_and_foreign(tiny_llama: Path, quick) -> None:
    plan = Plan.of(CheckpointSource(tiny_llama), quick(lm_head=True))
    assert plan.head == "lm_head" and plan["lm_head"].out_features == 256
    assert plan.foreign is not None and "output head" in plan.foreign


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore": ("donw_proj",)}, r"'donw_proj' matches no module .* down_proj"),
        ({"ignore": ("*",)}, "ignores every linear layer"),
        (
            {"rotation": 128},
            r"layers.0.self_attn.q_proj and \d+ more: a rotation of 128 does not divide 64 .* is "
            r"64; .*--ignore",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_weight_is_read(
    tiny_llama: Path, quick, given: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(CheckpointSource(tiny_llama), quick(**given))


def test_ragged_groups_name_the_layers_and_the_remedy(make_tiny_model: Make, quick) -> None:
    source = CheckpointSource(make_tiny_model("llama", intermediate_size=72))
    with pytest.raises(
        ValueError,
        match=r"mlp.down_proj and 1 more: 72 input features are not divisible .* 16 of nvfp4; "
        r".*--ignore down_proj",
    ):
        Plan.of(source, quick())
    plan = Plan.of(source, quick(ignore=("down_proj",)))
    assert not any("down_proj" in name for name in plan.layers)


# As they stand in recipes that are published for other quantizers.
PUBLISHED = (
    "lm_head",
    "re:.*lm_head",
    "re:.*mlp.gate$",
    "re:.*block_sparse_moe.gate",
    "model.layers.0.block_sparse_moe.gate",
    "re:.*input_layernorm",
    "model.embed_tokens",
)


@pytest.mark.parametrize("from_weights", [True, False])
@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_that_select_what_stays_anyway_are_fine(
    make_tiny_model: Make, quick, from_weights: bool, pattern: str
) -> None:
    model = make_tiny_model("mixtral")
    source = CheckpointSource(model) if from_weights else Blueprint.of(model)
    assert len(Plan.of(source, quick(ignore=(pattern,))).layers) == 2 * (4 + 3 * 4)


@pytest.mark.parametrize("from_weights", [True, False])
def test_patterns_may_use_the_names_of_the_checkpoint(
    make_tiny_model: Make, quick, from_weights: bool
) -> None:
    model = make_tiny_model("mixtral")
    source = CheckpointSource(model) if from_weights else Blueprint.of(model)
    plan = Plan.of(source, quick(ignore=("re:.*block_sparse_moe.experts.0.*",)))
    assert len(plan.layers) == 2 * (4 + 3 * 3)
    rules = (("re:.*block_sparse_moe.*w2", "mxfp8"),)
    plan = Plan.of(source, quick(rules=rules))
    assert sum(layer.recipe.format == "mxfp8" for layer in plan.layers.values()) == 2 * 4


def test_what_its_authors_keep_in_float32_is_quantized_only_by_a_rule_of_its_own(
    make_tiny_model: Make, tmp_path: Path, tiny_text: Path, quick
) -> None:
    """And runs then, although the model looks at its weight beside calling it."""
    random_model(FAMILIES["DeepSeek-V3.2"]).save_pretrained(tmp_path / "m")
    for file in make_tiny_model("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "m")
    name = "model.layers.0.self_attn.indexer.weights_proj"
    source = CheckpointSource(tmp_path / "m")
    assert name not in Plan.of(source, quick(rules=(("self_attn.*", "mxfp8"),))).layers
    recipe = quick(rules=(("weights_proj", "mxfp8"),), algorithm="rtn")
    assert name in Plan.of(source, recipe).layers
    quantize_model(tmp_path / "m", tmp_path / "out", recipe=recipe, device="cpu", dialect="ptq")
    model = load(tmp_path / "out", dtype=torch.bfloat16)
    assert isinstance(model.get_submodule(name), QuantLinear)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_a_rule_for_what_is_no_linear_layer_is_a_mistake(tiny_llama: Path, quick) -> None:
    with pytest.raises(ValueError, match="'input_layernorm' matches no linear layer"):
        Plan.of(CheckpointSource(tiny_llama), quick(rules=(("input_layernorm", "mxfp8"),)))
