"""Descriptions of quantized layers, and patterns that select them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.checkpoint.quantization_config import (
    LayerInfo,
    decided_together,
    expert_groups,
    fused_groups,
    is_expert,
    is_key_value_scale,
    natural,
    patterns,
    summarize,
)
from ptq.reading.name_patterns import matches_name

NAMES = [
    f"model.layers.{i}.{leaf}"
    for i in range(12)
    for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.3.w1")
]


@given(st.sets(st.sampled_from([*NAMES, "lm_head"])))
def test_patterns_select_what_they_should_and_nothing_else(names):
    selecting = patterns(names, [*NAMES, "lm_head"])
    assert {n for n in [*NAMES, "lm_head"] if any(matches_name(p, n) for p in selecting)} == names


def test_a_kind_of_layer_is_one_pattern_whatever_the_depth():
    assert sorted(patterns(NAMES, [*NAMES, "lm_head"])) == [
        r"re:.*\.mlp\.experts\.\d+\.w1$",
        r"re:.*\.mlp\.up_proj$",
        r"re:.*\.self_attn\.q_proj$",
    ]
    assert patterns(["lm_head"], [*NAMES, "lm_head"]) == ["lm_head"]
    assert patterns([NAMES[0]], NAMES) == [NAMES[0]]


def test_a_pattern_is_an_exact_name_or_an_expression_from_the_start():
    assert (
        matches_name("a.b", "a.b")
        and not matches_name("a.b", "a.b.c")
        and not matches_name("a.*", "a.b")
    )
    assert matches_name(r"re:a\.", "a.b") and not matches_name(r"re:b", "a.b")


infos = st.builds(
    LayerInfo,
    format=st.sampled_from(["nvfp4", "mxfp4", "mxint8"]),
    rotation=st.sampled_from([1, 16, 128]),
    quantize_inputs=st.booleans(),
    static_inputs=st.booleans(),
    input_rule=st.sampled_from(["default", "absmax"]),
    bias=st.booleans(),
    nested=st.sampled_from([0, 4]),
)


@given(st.lists(infos, min_size=len(NAMES), max_size=len(NAMES)))
def test_a_summary_says_of_every_layer_what_it_was_made_from(descriptions):
    layers = dict(zip(NAMES, descriptions, strict=True))
    summary = summarize(layers, ["lm_head"], recipe={"a": 1}, provenance={"b": [2]})
    assert {n: summary.layer(n, bias=info.bias) for n, info in layers.items()} == layers
    assert summary.ignores("lm_head") and not any(summary.ignores(name) for name in NAMES)


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ValueError, match="no layer was quantized"):
        summarize({}, ["lm_head"], recipe={}, provenance={})


def test_descriptions_survive_json():
    info = LayerInfo(
        format="nvfp4", rotation=16, quantize_inputs=True, static_inputs=True, bias=True
    )
    assert LayerInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    with pytest.raises(ValueError, match="zero"):
        LayerInfo.from_dict(info.to_dict() | {"zero": 1})


def test_experts_are_known_by_their_names():
    assert is_expert("model.layers.0.mlp.experts.12.up_proj")
    assert not is_expert("model.layers.0.mlp.shared_experts.up_proj")
    assert sorted(["l.10.a", "l.9.a"], key=natural) == ["l.9.a", "l.10.a"]


def test_fused_groups_are_within_a_module():
    names = [
        "a.q_proj",
        "a.k_proj",
        "b.v_proj",
        "m.experts.0.w1",
        "m.experts.0.w3",
        "m.experts.1.w1",
        "x.up_proj",
    ]
    assert fused_groups(names) == [["a.q_proj", "a.k_proj"], ["m.experts.0.w1", "m.experts.0.w3"]]


def test_experts_of_a_block_belong_together():
    names = [
        "l.0.m.experts.0.w1",
        "l.0.m.experts.1.w2",
        "l.1.m.experts.0.w1",
        "l.0.o",
        "l.0.up_proj",
    ]
    assert expert_groups(names) == {"l.0.m": names[:2], "l.1.m": names[2:3]}
    gates = ["l.0.gate_proj", "l.0.up_proj"]
    assert decided_together([*names, gates[0]]) == [gates[::-1], names[:2]]


def test_scales_of_keys_and_values_have_names_of_their_own():
    assert is_key_value_scale("a.v_scale") and not is_key_value_scale("a.weight_scale")
