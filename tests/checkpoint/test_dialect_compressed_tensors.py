"""The ``compressed-tensors`` dialect: configurations and rotation matrices."""

from dataclasses import replace

import pytest
import torch

from ptq.checkpoint.dialect_compressed_tensors import (
    ct_config,
    is_rotation_tensor,
    parse_ct,
    rotation_tensors,
)
from ptq.checkpoint.quantization_config import LayerInfo, summarize
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import hadamard

NAMES = [
    f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.q_proj", "mlp.down_proj")
]


def config(layers, others=("lm_head",)):
    return ct_config(
        summarize(layers, others, recipe={"r": 1}, provenance={"p": 1}), layers, others
    )


def layers(fmt, rotation=1, inputs=False):
    static = inputs and FORMATS[fmt].has_global_scale
    info = LayerInfo(format=fmt, rotation=rotation, quantize_inputs=inputs, static_inputs=static)
    return dict.fromkeys(NAMES, info)


def test_rotated_nvfp4_w4a4_is_the_example_of_the_specification():
    arguments = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
    }
    arguments |= {"scale_dtype": "torch.float8_e4m3fn"}
    apply = {"targets": ["Linear"], "ignore": ["lm_head"]}
    written = config(layers("nvfp4", 16, inputs=True))
    assert written.pop("ptq") == {
        "version": 1,
        "input_rule": "default",
        "recipe": {"r": 1},
        "provenance": {"p": 1},
    }
    assert written == {
        "quant_method": "compressed-tensors",
        "version": "0.17.0",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "nvfp4-pack-quantized",
                "rotated_weights": "`import ptq.hf` before from_pretrained",
                "weights": arguments | {"dynamic": False},
                "input_activations": arguments | {"dynamic": "local"},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "transform_config": {
            "config_groups": {
                "h16": {
                    "type": "hadamard",
                    "head_dim": 16,
                    "precision": "torch.float32",
                    "randomize": False,
                    "requires_grad": False,
                    "apply": [
                        apply | {"location": "input", "inverse": False},
                        apply | {"location": "weight_input", "inverse": True},
                    ],
                }
            }
        },
    }


@pytest.mark.parametrize(
    ("fmt", "inputs"),
    [
        ("nvfp4", True),
        ("nvfp4", False),
        ("mxfp4", True),
        ("mxfp4", False),
        ("nvint4", False),
        ("mxfp8", True),
        ("mxint4", False),
        ("int4-g128", False),
        ("int4-g32", False),
        ("fp8-channel", True),
        ("fp8-channel", False),
    ],
)
@pytest.mark.parametrize("rotation", [1, 16, 64])
def test_what_is_read_is_what_was_written(fmt, rotation, inputs):
    infos = layers(fmt, rotation, inputs)
    parsed = parse_ct(config(infos))
    assert {name: parsed.layer(name, bias=False) for name in infos} == infos
    assert parsed.recipe == {"r": 1} and parsed.provenance == {"p": 1} and parsed.ignores("lm_head")


def test_unrotated_layers_are_ignored_by_the_transform_and_not_by_the_quantizer():
    infos = {n: i if "mlp" in n else replace(i, rotation=1) for n, i in layers("mxfp4", 32).items()}
    written = config(infos)
    assert written["ignore"] == ["lm_head"]
    (scheme,) = written["transform_config"]["config_groups"].values()
    assert all(a["ignore"] == ["lm_head", r"re:.*\.self_attn\.q_proj$"] for a in scheme["apply"])
    assert {n: parse_ct(written).layer(n, bias=False) for n in infos} == infos


def test_each_block_size_has_a_scheme_and_a_matrix():
    infos = {n: replace(i, rotation=32 if "mlp" in n else 16) for n, i in layers("mxfp4").items()}
    written = config(infos)
    schemes = written["transform_config"]["config_groups"]
    assert {name: s["head_dim"] for name, s in schemes.items()} == {"h16": 16, "h32": 32}
    assert {n: parse_ct(written).layer(n, bias=False) for n in infos} == infos
    matrices = rotation_tensors(infos)
    assert list(matrices) == [
        "model.layers.0.self_attn.q_proj.h16_input.weight",
        "model.layers.0.mlp.down_proj.h32_input.weight",
    ]
    assert all(is_rotation_tensor(name) for name in matrices)
    for size, matrix in zip((16, 32), matrices.values(), strict=True):
        assert matrix.dtype == torch.float32 and torch.equal(matrix, hadamard(size))


MIXED = {
    "model.layers.0.self_attn.q_proj": LayerInfo(format="mxfp8", quantize_inputs=True),
    "model.layers.0.mlp.down_proj": LayerInfo(
        format="nvfp4", quantize_inputs=True, static_inputs=True, input_rule="four_six"
    ),
    "model.layers.1.self_attn.q_proj": LayerInfo(
        format="nvfp4", quantize_inputs=True, static_inputs=True, input_rule="four_six"
    ),
    "model.layers.1.mlp.down_proj": LayerInfo(format="nvfp4", rotation=16),
}


def test_a_mixture_is_a_group_for_every_format_and_scheme_that_names_its_layers():
    written = config(MIXED)
    assert written["format"] == "mixed-precision" and written["ignore"] == ["lm_head"]
    groups = written["config_groups"]
    assert [(group["format"], group["targets"]) for group in groups.values()] == [
        (
            "nvfp4-pack-quantized",
            ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"],
        ),
        ("mxfp8-quantized", ["model.layers.0.self_attn.q_proj"]),
        ("nvfp4-pack-quantized", ["model.layers.1.mlp.down_proj"]),
    ]
    eight = groups["group_1"]
    arguments = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
    arguments |= {"symmetric": True, "scale_dtype": "torch.uint8"}
    assert eight["weights"] == arguments | {"dynamic": False}
    assert eight["input_activations"] == arguments | {"dynamic": True}
    assert groups["group_2"]["input_activations"] is None
    assert ["rotated_weights" in group for group in groups.values()] == [False, False, True]
    parsed = parse_ct(written)
    assert {name: parsed.layer(name, bias=False) for name in MIXED} == MIXED


@pytest.mark.parametrize("leaves", [("w1", "w2", "w3"), ("gate_proj", "up_proj", "down_proj")])
def test_experts_of_a_mixture_are_named_by_their_block(leaves: tuple[str, ...]):
    """vLLM asks for the scheme of ``….experts.0.gate_proj`` whatever a model calls it."""
    attention = {f"model.layers.{i}.self_attn.o_proj": LayerInfo(format="mxfp8") for i in range(2)}
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}": LayerInfo(format="nvfp4")
        for i in range(2)
        for e in range(2)
        for leaf in leaves
    }
    groups = config(attention | experts)["config_groups"]
    assert groups["group_0"]["targets"] == [r"re:.*\.experts\.\d+\..*"]
    one = {n: LayerInfo(format="mxfp8") if ".1.mlp." in n else i for n, i in experts.items()}
    groups = config(attention | one)["config_groups"]
    assert groups["group_0"]["targets"] == [
        r"re:.*\.self_attn\.o_proj$",
        r"re:model\.layers\.1\.mlp\.experts\.\d+\..*",
    ]
    assert groups["group_1"]["targets"] == [r"re:model\.layers\.0\.mlp\.experts\.\d+\..*"]
    parsed = parse_ct(config(attention | one))
    assert {n: parsed.layer(n, bias=False) for n in attention | one} == attention | one
