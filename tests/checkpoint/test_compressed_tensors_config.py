"""What is read of ``compressed-tensors`` configurations, ours and others'."""

import pytest

from ptq.checkpoint.compressed_tensors_config import parse_ct
from ptq.checkpoint.dialect_compressed_tensors import ct_config
from ptq.checkpoint.quantization_config import LayerInfo, summarize

DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"


def config(**layers):
    layers = layers or {DOWN: LayerInfo(format="nvfp4")}
    others = ["lm_head"]
    return ct_config(summarize(layers, others, recipe={}, provenance={}), layers, others)


def group(fmt: str, targets: list[str], **changed):
    """A config group as llm-compressor writes it."""
    ((_, found),) = config(**{DOWN: LayerInfo(format=fmt)})["config_groups"].items()
    extra = {"actorder": None, "observer": "memoryless_minmax", "zp_dtype": None}
    return found | {"targets": targets, "weights": found["weights"] | extra} | changed


def test_groups_that_name_layers_go_before_the_one_of_all_others():
    groups = {"a": group("nvfp4", ["Linear"]), "b": group("mxfp8", ["re:.*self_attn.*"])}
    parsed = parse_ct(config() | {"format": "mixed-precision", "config_groups": groups})
    assert parsed.layer(Q, bias=False).format == "mxfp8"
    assert parsed.layer(DOWN, bias=False).format == "nvfp4"


def test_inputs_of_another_format_than_the_weights_are_refused():
    """MXFP4 weights with FP8 inputs, which compressed-tensors knows, are no MXFP4 W4A4."""
    weights = group("mxfp4", [])["weights"]
    for change in ({"num_bits": 8}, {"type": "int"}, {"group_size": 128}):
        inputs = weights | {"dynamic": True} | change
        groups = {"g": group("mxfp4", ["Linear"], input_activations=inputs)}
        with pytest.raises(ValueError, match=f"does not read this variant.*{next(iter(change))}"):
            parse_ct(config() | {"config_groups": groups})
    same = {"g": group("mxfp4", ["Linear"], input_activations=weights | {"dynamic": True})}
    assert parse_ct(config() | {"config_groups": same}).layer(DOWN, bias=False).quantize_inputs


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kv_cache_scheme", {"num_bits": 8}, "does not read this kv_cache_scheme"),
        ("config_groups", {}, "no config group"),
        ("config_groups", {"g": {"format": "float-quantized", "weights": {}}}, "float-quantized"),
        (
            "config_groups",
            {
                "g": {
                    "format": "pack-quantized",
                    "targets": ["Linear"],
                    "weights": {"group_size": 128, "type": "int"},
                }
            },
            "128",
        ),
        (
            "transform_config",
            {"config_groups": {"v": {"type": "random-hadamard", "apply": []}}},
            "random-hadamard",
        ),
    ],
)
def test_what_ptq_does_not_write_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        parse_ct(config() | {key: value})
