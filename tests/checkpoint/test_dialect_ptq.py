"""The ``ptq`` dialect: its configuration, written, read and refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.checkpoint.dialect_ptq import parse_ptq, ptq_config
from ptq.checkpoint.quantization_config import LayerInfo, summarize

NAMES = [
    f"model.layers.{i}.{leaf}"
    for i in range(12)
    for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.3.w1")
]
PLAIN = LayerInfo(format="nvfp4")


def config(layers, others=("lm_head",)):
    return json.loads(
        json.dumps(ptq_config(summarize(layers, others, recipe={"a": 1}, provenance={"b": [2]})))
    )


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
def test_what_is_read_is_what_was_summarized(descriptions):
    layers = dict(zip(NAMES, descriptions, strict=True))
    parsed = parse_ptq(config(layers))
    assert {name: parsed.layer(name, bias=info.bias) for name, info in layers.items()} == layers
    assert parsed.recipe == {"a": 1} and parsed.provenance == {"b": [2]}
    assert parsed.ignores("lm_head") and not any(parsed.ignores(name) for name in NAMES)


def test_a_uniform_model_has_the_short_configuration_of_the_specification():
    written = config(dict.fromkeys(NAMES, replace(PLAIN, rotation=32)))
    assert written == {
        "quant_method": "ptq",
        "version": 1,
        "format": "nvfp4",
        "hadamard": 32,
        "quantize_activations": False,
        "static_activations": False,
        "input_rule": "default",
        "ignore": ["lm_head"],
        "recipe": {"a": 1},
        "provenance": {"b": [2]},
    }


def test_layers_that_differ_are_overrides():
    layers = {n: replace(PLAIN, rotation=1 if n.endswith("q_proj") else 32) for n in NAMES}
    written = config(layers)
    assert written["hadamard"] == 32 and written["hadamard_overrides"] == {
        r"re:.*\.self_attn\.q_proj$": 0
    }


def test_the_configuration_of_the_specification_is_enough():
    parsed = parse_ptq(
        {"quant_method": "ptq", "version": 1, "format": "mxfp4", "ignore": ["lm_head"]}
    )
    assert parsed.layer("x", bias=True) == LayerInfo(format="mxfp4", bias=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"format": "nvfp5"}, "unknown format 'nvfp5'"),
        ({"format_overrides": {"a": "x"}}, "unknown format 'x'"),
        ({"hadamard": 12}, "hadamard is 12"),
        ({"hadamard": True}, "hadamard is True"),
        ({"hadamard_overrides": {"a": -1}}, "hadamard is -1"),
        ({"quantize_activations": "yes"}, "quantize_activations is 'yes'"),
        ({"zero_points": 1}, "keys that this ptq does not know: zero_points"),
        ({"ignore": "lm_head"}, "ignore in quantization_config is 'lm_head'"),
        ({"recipe": []}, "recipe in quantization_config"),
    ],
)
def test_what_a_reader_does_not_know_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_ptq(config({"a": PLAIN}) | change)


@pytest.mark.parametrize("key", ["format", "ignore"])
def test_a_missing_key_is_refused(key):
    written = config({"a": PLAIN})
    del written[key]
    with pytest.raises(ValueError, match=f"no '{key}'"):
        parse_ptq(written)
