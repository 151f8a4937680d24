"""What must not be written in a dialect is refused, before quantization and after."""

import pytest
import torch

from ptq.checkpoint import dialect_choice
from ptq.checkpoint.dialect_choice import choose
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import TARGETS
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.pipeline.plan import LayerPlan
from ptq.pipeline.recipe import Recipe

Q, K, DOWN = (f"model.layers.0.{x}_proj" for x in ("self_attn.q", "self_attn.k", "mlp.down"))
EXPERT = "model.layers.0.mlp.experts.7.down_proj"
OTHER = "model.layers.0.mlp.experts.5.up_proj"


def one(name=DOWN, **facts):
    return {name: LayerInfo(**({"format": "nvfp4"} | facts))}


READ = "transformers and vLLM read it"
IMPORT = "vLLM reads it, and transformers after `import ptq`"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (one(), READ),
        (one(format="nvint4"), READ),
        (one(format="mxfp4", rotation=32), IMPORT),
        (one(format="nvint4", rotation=16), IMPORT),
        (one(rotation=16, quantize_inputs=True, static_inputs=True), IMPORT),
        (one(Q, format="mxfp4", rotation=32) | one(EXPERT, format="mxfp4"), IMPORT),
        (one(EXPERT, format="mxfp4"), READ),
        (one(format="mxfp4", quantize_inputs=True), READ),
        (one(format="mxfp8"), READ),
        (one(Q, format="mxfp8") | one(DOWN), READ),
        (one(Q, format="nvint4") | one(DOWN, format="mxfp8"), READ),
        (one(Q) | one(DOWN, quantize_inputs=True, static_inputs=True), READ),
        (one(Q, format="mxfp8") | one(EXPERT), IMPORT),
    ],
)
def test_what_transformers_and_vllm_read_is_compressed_tensors(
    layers, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect_choice, "exact", lambda engine, kind: False)
    choice = choose(layers, dtype="bfloat16")
    assert choice.dialect == "compressed-tensors" and choice.reason == reason
    assert choose(layers, "compressed-tensors", dtype="bfloat16").dialect == "compressed-tensors"
    assert choose(layers, "ptq", dtype="bfloat16").dialect == "ptq"


def test_exactly_is_said_of_what_was_opened_and_had_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(dialect_choice, "exact", lambda engine, kind: engine == "transformers")
    assert choose(one(), dtype="bfloat16").reason.startswith("transformers computes it exactly")


W4A4 = {"quantize_inputs": True, "static_inputs": True}


@pytest.mark.parametrize(
    ("layers", "target", "dialect", "reason"),
    [
        (one(), "transformers", "compressed-tensors", "transformers: right"),
        (one(rotation=16, **W4A4), "transformers", "compressed-tensors", "after `import"),
        (one(rotation=16), "transformers", "compressed-tensors", "after `import"),
        (one(format="mxint4"), "sglang", "compressed-tensors", "SGLang: right"),
        (one(format="mxint6"), "transformers", "ptq", "after `import"),
        (one(EXPERT), "transformers", "compressed-tensors", "after `import"),
        (one(EXPERT), "vllm", "compressed-tensors", "vLLM: right"),
        (one(format="mxfp4", rotation=32), "vllm", "compressed-tensors", "tensor_parallel_size=1"),
        (one(rotation=16), "vllm", "ptq", "vLLM: right after `pip install ptq-llm` beside it"),
        (one(EXPERT, rotation=32), "vllm", "ptq", "run there on a CPU, not yet on a GPU"),
        (one(), "sglang", "compressed-tensors", "SGLang: right"),
        (one(**W4A4), "trtllm", "compressed-tensors", "TensorRT-LLM: right"),
        (one(format="mxfp4"), "trtllm", "compressed-tensors", "TensorRT-LLM: right"),
        (one(Q, **W4A4) | one(DOWN, format="mxfp8"), "vllm", "compressed-tensors", "vLLM: right"),
        (one(**W4A4), "any", "compressed-tensors", "SGLang: right; TensorRT-LLM: right"),
    ],
)
def test_a_target_gets_the_dialect_that_its_engines_compute_right(layers, target, dialect, reason):
    choice = choose(layers, target=target, dtype="bfloat16")
    assert choice.dialect == dialect and reason in choice.reason
    assert choose(layers, dialect, target=target, dtype="bfloat16") == choice


@pytest.mark.parametrize(
    ("layers", "target", "reason"),
    [
        (one(format="mxfp4", rotation=32), "sglang", "does not rotate inputs; use --rotation none"),
        (one(rotation=16, **W4A4), "trtllm", "does not rotate inputs; use --rotation none"),
        (one(format="nvint4"), "sglang", "groups of 16"),
        (one(format="mxint8", rotation=32), "vllm", "no format for mxint8"),
        (one(), "trtllm", "no weight-only NVFP4; use --scheme w4a4"),
        (one(), "any", "TensorRT-LLM"),
        (one(format="mxfp4"), "any", "SGLang"),
        (one(format="mxfp8"), "sglang", "MXFP8 of this dialect is not known"),
        (one(Q, **W4A4) | one(DOWN, format="mxfp8"), "trtllm", "several formats"),
    ],
)
def test_what_a_target_would_compute_wrong_is_refused_with_a_way_out(layers, target, reason):
    for dialect in ("auto", "compressed-tensors", "ptq"):
        with pytest.raises(ValueError, match=f"^nothing to write for --target {target}: ") as e:
            choose(layers, dialect, target=target, dtype="bfloat16")
        assert "\n" not in str(e.value)
        if dialect != "ptq":
            assert reason in str(e.value)


def test_every_dialect_has_a_verdict_on_every_engine() -> None:
    for name, dialect in DIALECTS.items():
        assert list(dialect.opens(one())) == list(TARGETS["any"]), name
    with pytest.raises(ValueError, match="unknown target 'llama'; choose one of transformers"):
        choose(one(), target="llama", dtype="bfloat16")


REFUSED = [
    (one(format="mxint6"), "no format for mxint6"),
    (one(format="mxint4", quantize_inputs=True), "int4 inputs"),
    (one(Q) | one(K, format="mxfp8"), "are quantized in different ways"),
    (one(Q) | one(K, quantize_inputs=True, static_inputs=True), "are quantized in different ways"),
    (one(EXPERT) | one(OTHER, format="mxfp8"), "quantized in several ways"),
    (one(EXPERT, format="mxfp4", rotation=32), "experts"),
    (one(rotation=16), "weight-only NVFP4"),
    (one(rotation=16, bias=True, quantize_inputs=True, static_inputs=True), "bias"),
    (one(format="mxfp4", rotation=256), "256"),
    (one(quantize_inputs=True), "calibrated global scale"),
    (one(format="nvint4", quantize_inputs=True, static_inputs=True), "int4 inputs"),
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


def test_nvfp4_experts_need_an_import_in_transformers():
    choice = choose(one(EXPERT), dtype="bfloat16")
    assert choice.dialect == "compressed-tensors" and choice.reason == IMPORT


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
    with pytest.raises(ValueError, match="auto, compressed-tensors, modelopt, ptq"):
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
