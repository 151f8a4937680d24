"""The report of a layer, to JSON and back."""

import json
from dataclasses import replace

import pytest

from ptq.checkpoint.layer_report import LayerReport

REPORT = LayerReport(
    name="model.layers.0.mlp.up_proj",
    out_features=128,
    in_features=64,
    format="nvfp4",
    rotation=16,
    algorithm="gptq",
    damping=0.05,
    error=0.0078125,
    held_out_error=None,
    rtn_error=0.015625,
    input_error=0.01,
    tokens=4096,
    topped_up=True,
    seconds=0.5,
    balance=0.25,
    of_outputs=False,
)
STORED = {
    "layer": "model.layers.0.mlp.up_proj",
    "out": 128,
    "in": 64,
    "format": "nvfp4",
    "rotation": 16,
    "algorithm": "gptq",
    "damping": 0.05,
    "error": 0.0078125,
    "held_out_error": None,
    "rtn_error": 0.015625,
    "input_error": 0.01,
    "tokens": 4096,
    "topped_up": True,
    "seconds": 0.5,
    "balance": 0.25,
    "of_outputs": False,
}
# what came later, and what it was before
DEFAULTS = {"balance": 0.0, "of_outputs": True}
NESTED = {"wide_error": 0.000125}


def test_the_keys_on_disk_are_these_in_this_order():
    assert list(REPORT.to_dict().items()) == list(STORED.items())


def test_the_error_of_the_wide_codes_is_there_where_codes_are_nested():
    nested = replace(REPORT, **NESTED)
    assert nested.to_dict() == STORED | NESTED
    assert LayerReport.from_dict(STORED | NESTED) == nested


def test_what_is_read_is_what_was_written():
    assert LayerReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT


def test_reports_from_before_balancing_and_from_later_are_read():
    old = {key: value for key, value in STORED.items() if key not in DEFAULTS}
    assert LayerReport.from_dict(old) == replace(REPORT, **DEFAULTS)
    assert LayerReport.from_dict(STORED | {"surprise": 1}) == REPORT
    assert LayerReport.from_dict(STORED | {"damping": 0}).damping == 0


@pytest.mark.parametrize("key", [key for key in STORED if key not in ("layer", *DEFAULTS)])
def test_a_missing_key_is_refused_by_layer_and_key(key):
    stored = {k: v for k, v in STORED.items() if k != key}
    with pytest.raises(
        ValueError, match=rf"the report of model.layers.0.mlp.up_proj has no '{key}'"
    ):
        LayerReport.from_dict(stored)


@pytest.mark.parametrize(("key", "value"), [("error", "small"), ("rtn_error", None), ("out", 1.5)])
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"up_proj: {key} is {value!r}, it should be a valid"):
        LayerReport.from_dict(STORED | {key: value})
