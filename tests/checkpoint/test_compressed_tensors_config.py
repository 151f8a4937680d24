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


@pytest.mark.parametrize(("size", "fmt"), [(16, "nvint4"), (32, "int4-g32"), (128, "int4-g128")])
def test_int4_of_others_is_told_by_its_groups(size: int, fmt: str):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": size}
    said = {"format": "pack-quantized", "targets": ["Linear"], "weights": weights}
    assert parse_ct(config() | {"config_groups": {"g": said}}).layer(DOWN, bias=False).format == fmt
    for change in ({"symmetric": False}, {"num_bits": 8}, {"actorder": "group"}):
        other = said | {"weights": weights | change}
        with pytest.raises(ValueError, match=f"does not read this variant.*{next(iter(change))}"):
            parse_ct(config() | {"config_groups": {"g": other}})


def test_int4_with_inputs_in_four_bits_is_refused():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128}
    said = {"format": "pack-quantized", "targets": ["Linear"], "weights": weights}
    said |= {"input_activations": weights | {"dynamic": True}}
    with pytest.raises(ValueError, match=r"does not read this variant of pack-quantized.*input"):
        parse_ct(config() | {"config_groups": {"g": said}})


FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}


@pytest.mark.parametrize("inputs", [True, False])
def test_fp8_with_a_scale_an_output_is_read(inputs: bool):
    weights = FP8 | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
    said = {"format": "float-quantized", "targets": ["Linear"], "weights": weights}
    if inputs:
        said["input_activations"] = FP8 | {"strategy": "token", "dynamic": True}
    layer = parse_ct(config() | {"config_groups": {"g": said}}).layer(DOWN, bias=False)
    assert layer == LayerInfo(format="fp8-channel", quantize_inputs=inputs)


@pytest.mark.parametrize(
    ("weights", "inputs", "said"),
    [
        ({"strategy": "tensor"}, {}, "strategy"),
        ({"strategy": "block"}, {}, "strategy"),
        ({}, {"strategy": "tensor"}, "strategy of inputs"),
        ({}, {"dynamic": False}, "dynamic of inputs"),
        ({}, {"strategy": None}, "strategy of inputs"),
    ],
)
def test_fp8_with_other_scales_is_refused(weights, inputs, said):
    group = {
        "format": "float-quantized",
        "targets": ["Linear"],
        "weights": FP8 | {"strategy": "channel", "dynamic": False} | weights,
        "input_activations": FP8 | {"strategy": "token", "dynamic": True} | inputs,
    }
    with pytest.raises(ValueError, match=f"does not read this variant of float-quantized.*{said}"):
        parse_ct(config() | {"config_groups": {"g": group}})


def test_a_group_says_which_of_our_formats_it_is_where_there_are_several():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    groups = {"g": {"format": "pack-quantized", "targets": ["Linear"], "weights": weights}}
    said = config() | {"config_groups": groups}
    for fmt in ("mxint4", "int4-g32"):
        ours = said | {"ptq": {"formats": {"g": fmt}}}
        assert parse_ct(ours).layer(DOWN, bias=False).format == fmt
    with pytest.raises(ValueError, match="'int4-g128' of a group that is int4-g32 or mxint4"):
        parse_ct(said | {"ptq": {"formats": {"g": "int4-g128"}}})


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
        ("config_groups", {"g": {"format": "int-quantized", "weights": {}}}, "int-quantized"),
        (
            "config_groups",
            {
                "g": {
                    "format": "pack-quantized",
                    "targets": ["Linear"],
                    "weights": {"group_size": 64, "type": "int"},
                }
            },
            "64",
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
