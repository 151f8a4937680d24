"""What must not be written in a dialect is refused, before quantization and after."""

import pytest
import torch

from ptq.checkpoint.dialect_choice import choose
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.pipeline.plan import LayerPlan
from ptq.pipeline.recipe import Recipe

Q, K, DOWN = (f"model.layers.0.{x}_proj" for x in ("self_attn.q", "self_attn.k", "mlp.down"))
EXPERT = "model.layers.0.mlp.experts.7.down_proj"


def one(name=DOWN, **facts):
    return {name: LayerInfo(**({"format": "nvfp4"} | facts))}


EXACT = "transformers computes it exactly, and vLLM reads it"
READ = "transformers and vLLM read it"
IMPORT = "vLLM reads it, and transformers after `import ptq.hf`"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (one(), EXACT),
        (one(format="nvint4"), EXACT),
        (one(format="mxfp4", rotation=32), IMPORT),
        (one(format="nvint4", rotation=16), IMPORT),
        (one(rotation=16, quantize_inputs=True, static_inputs=True), IMPORT),
        (one(Q, format="mxfp4", rotation=32) | one(EXPERT, format="mxfp4"), IMPORT),
        (one(EXPERT, format="mxfp4"), READ),
        (one(format="mxfp4", quantize_inputs=True), READ),
    ],
)
def test_what_transformers_and_vllm_read_is_compressed_tensors(layers, reason: str) -> None:
    """ "Exactly" is said of what tests/runtime/test_transformers_plugin.py compares bit by bit."""
    choice = choose(layers, dtype="bfloat16")
    assert choice.dialect == "compressed-tensors" and choice.reason == reason
    assert choose(layers, "compressed-tensors", dtype="bfloat16").dialect == "compressed-tensors"
    assert choose(layers, "ptq", dtype="bfloat16").dialect == "ptq"


REFUSED = [
    (one(format="mxint4"), "no format for mxint4"),
    (one(Q) | one(DOWN, format="mxfp4"), "mix mxfp4, nvfp4"),
    (one(EXPERT, format="mxfp4", rotation=32), "experts"),
    (one(rotation=16), "weight-only NVFP4"),
    (one(rotation=16, bias=True, quantize_inputs=True, static_inputs=True), "bias"),
    (one(format="mxfp4", rotation=256), "256"),
    (one(quantize_inputs=True), "calibrated global scale"),
    (one(format="nvint4", quantize_inputs=True, static_inputs=True), "int4 inputs"),
    (one(Q) | one(DOWN, quantize_inputs=True, static_inputs=True), "different ways"),
    (one(Q, format="mxfp4") | one(K, format="mxfp4", rotation=32), "different rotations"),
]


@pytest.mark.parametrize(("layers", "message"), REFUSED)
def test_an_inexact_export_is_refused_in_one_line_with_a_way_out(layers, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose(layers, "compressed-tensors", dtype="bfloat16")
    text = str(caught.value)
    assert (
        text.startswith("cannot write compressed-tensors: ")
        and "\n" not in text
        and "dialect ptq" in text
    )
    choice = choose(layers, dtype="bfloat16")
    assert choice.dialect == "ptq" and message in choice.reason


def test_engines_that_scale_inputs_by_another_rule_are_told_of():
    """Right enough to be written when asked for, not exact enough to be chosen."""
    layers = one(quantize_inputs=True, static_inputs=True, input_rule="four_six")
    said = f"engines scale the inputs of {DOWN} by absmax, not by four_six"
    choice = choose(layers, dtype="bfloat16")
    assert choice.dialect == "ptq" and choice.reason == f"not compressed-tensors: {said}"
    choice = choose(layers, "compressed-tensors", dtype="bfloat16")
    assert choice.dialect == "compressed-tensors" and choice.reason == f"as asked; {said}"
    assert choose(layers, "ptq", dtype="bfloat16").reason == "as asked"


def test_the_dtype_of_the_model_counts():
    with pytest.raises(ValueError, match="float16"):
        choose(one(format="nvint4"), "compressed-tensors", dtype="float16")
    assert choose(one(), dtype="float32").dialect == "ptq"
    for dtype in ("float32", "float16", None):  # transformers dies in its first forward
        with pytest.raises(ValueError, match=f"dtype of the model is {dtype}.*bfloat16"):
            choose(one(), "compressed-tensors", dtype=dtype)


def test_nvfp4_experts_are_left_to_those_who_ask_for_vllm():
    assert (
        choose(one(EXPERT), "compressed-tensors", dtype="bfloat16").dialect == "compressed-tensors"
    )
    choice = choose(one(EXPERT), dtype="bfloat16")
    assert choice.dialect == "ptq" and "#48371" in choice.reason


def test_global_scales_must_agree_where_engines_fuse():
    layers, one_scale, other = one(Q) | one(K) | one(DOWN), torch.tensor([2.0]), torch.tensor([3.0])
    assert (
        choose(layers, dtype="bfloat16", scales={Q: one_scale, K: one_scale, DOWN: other}).dialect
        == "compressed-tensors"
    )
    choice = choose(layers, dtype="bfloat16", scales={Q: one_scale, K: other, DOWN: other})
    assert choice.dialect == "ptq" and "two global scales" in choice.reason
    with pytest.raises(ValueError, match="two global scales"):
        choose(layers, "compressed-tensors", dtype="bfloat16", scales={Q: one_scale, K: other})
    with pytest.raises(ValueError, match="besides its E8M0"):
        choose(one(format="mxfp4"), "compressed-tensors", dtype="bfloat16", scales={DOWN: other})


def test_an_unknown_dialect_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="auto, compressed-tensors, ptq"):
        choose(one(), "gguf", dtype="bfloat16")


def test_a_measured_rotation_counts_as_one():
    recipe = Recipe(format="nvfp4", rotation="auto")
    layer = LayerPlan(name=DOWN, recipe=recipe, in_features=64, out_features=8, bias=False)
    with pytest.raises(ValueError, match="weight-only NVFP4"):
        choose({DOWN: layer.info}, "compressed-tensors", dtype="bfloat16")


def test_inputs_that_are_scaled_by_token_have_no_calibrated_scale():
    recipe = Recipe(format="nvfp4", scheme="w4a4", input_scale="token")
    layer = LayerPlan(name=DOWN, recipe=recipe, in_features=64, out_features=8, bias=False)
    assert layer.info == LayerInfo(
        format="nvfp4", quantize_inputs=True, static_inputs=False, input_rule="four_six"
    )
    with pytest.raises(ValueError, match="calibrated global scale"):
        choose({DOWN: layer.info}, "compressed-tensors", dtype="bfloat16")
