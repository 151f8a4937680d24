"""Records of operands: what their shapes say, and the flat arguments that they stand for."""

from dataclasses import fields, replace

import pytest
import torch

from ptq.kernels.operands import Encoding, PackedWeight, Prologue, QuantizedInputs
from ptq.numerics.formats import FORMATS, Format

RECORDS = [
    PackedWeight(
        packed=torch.zeros(2, 8, dtype=torch.uint8),
        scale_bits=torch.zeros(2, 1, dtype=torch.uint8),
        global_scale=torch.ones(()),
        element="e2m1",
        scale="e4m3",
    ),
    QuantizedInputs(torch.zeros(3, 8), torch.zeros(3, 1), None),
    Encoding("int4", "e8m0", "ceil"),
    Prologue("rms_norm", torch.ones(16), 1e-5),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_flat_arguments_are_the_fields_in_order(record) -> None:
    """On which the schemas of operators rely."""
    values = [getattr(record, field.name) for field in fields(record)]
    assert len(values) == len(record.flat)
    assert all(a is b for a, b in zip(values, record.flat, strict=True))


def test_a_weight_knows_its_sizes(fmt: Format, random_weight, stacked) -> None:
    _, packed = random_weight(fmt, 24, 96)
    experts = stacked([packed, packed, packed])
    for weight in (packed, experts):
        assert (weight.out_features, weight.in_features) == (24, 96) and not weight.blocked
        weight.check("it", 96)


def test_a_weight_that_does_not_fit_is_named(random_weight) -> None:
    _, weight = random_weight(FORMATS["nvfp4"], 24, 96)
    with pytest.raises(ValueError, match=r"^it: packed \(24, 48\) .* do not fit 64 inputs"):
        weight.check("it", 64)
    with pytest.raises(ValueError, match=r"scale bytes \(24, 5\) do not fit 96 inputs"):
        replace(weight, scale_bits=weight.scale_bits[:, :5]).check("it", 96)
    with pytest.raises(ValueError, match="it: kernels take bfloat16 or float16"):
        weight.check("it", 96, torch.float32)
    blocks = torch.zeros(1, 2, 32, 4, 4, dtype=torch.uint8)
    blocked = replace(weight, scale_bits=blocks)
    assert blocked.blocked
    blocked.check("it", 96)


def test_gate_and_up_are_half_of_the_features_each() -> None:
    x = torch.zeros(2, 32)
    assert [Prologue(kind).features(x) for kind in ("none", "rms_norm", "silu_mul")] == [32, 32, 16]


def test_prologues_that_do_not_exist_are_named() -> None:
    gain = torch.ones(16)
    for prologue in (Prologue(), Prologue("silu_mul"), Prologue("rms_norm", gain)):
        prologue.check("it")
    with pytest.raises(
        ValueError, match="'gelu' does not exist; choose none, rms_norm or silu_mul"
    ):
        Prologue("gelu").check("it")
    for prologue in (Prologue("rms_norm"), Prologue("silu_mul", gain), Prologue(gain=gain)):
        with pytest.raises(ValueError, match="a gain belongs to the prologue rms_norm"):
            prologue.check("it")
