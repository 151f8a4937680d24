"""Choices and rooflines of the layer benchmark; timing itself on tiny shapes on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.bench import layers, shapes, speed_report
from ptq.bench.layers import Plan
from ptq.bench.measurement import GPUS, LAUNCH, Measurement, block_sums
from ptq.numerics.formats import FORMATS

CPU = torch.device("cpu")
NO_LIMITS = layers.measured_limits(CPU)


def plan(model: str = "llama-3.1-8b", **choices) -> Plan:
    return Plan(model=model, layers=shapes.block_layers(model), **choices)


# ---------------------------------------------------------------- rooflines

# one decoder layer, microseconds, worked out by hand from bandwidth and peak; of w4a4 at 128 tokens
# two products are 1.5 and 1.9 and take the 2 of a launch
SPEC = [
    ("h200", "llama-3.1-8b", 1, 101.5, 28.6, None),
    ("h200", "llama-3.1-8b", 64, 103.5, 35.3, None),
    ("h200", "llama-3.1-8b", 512, 283.0, 283.0, None),
    ("b200", "llama-3.1-8b", 128, 63.1, 38.5, 19.3),
    ("b200", "llama-3.1-70b", 2048, 2417.0, 2417.0, 754.0),
    ("rtx5090", "llama-3.1-8b", 16, 274.0, 78.1, 77.7),
]


@pytest.mark.parametrize(("gpu", "model", "tokens", "bf16", "w4a16", "w4a4"), SPEC)
def test_rooflines_are_those_of_the_specification(gpu, model, tokens, bf16, w4a16, w4a4) -> None:
    found = block_sums(layers.predict(plan(model, tokens=[tokens], formats=["nvfp4"]), GPUS[gpu]))
    seconds = {m.backend: m.median_s * 1e6 for m in found}
    assert seconds["bf16"] == pytest.approx(bf16, rel=0.015)
    assert seconds["w4a16"] == pytest.approx(w4a16, rel=0.015)
    assert seconds.get("w4a4") == (None if w4a4 is None else pytest.approx(w4a4, rel=0.015))
    assert seconds["rotate+w4a16"] > seconds["w4a16"] and all(m.predicted for m in found)


def test_only_what_tensor_cores_multiply_is_predicted() -> None:
    """4-bit inputs on Blackwell, fp8 on Hopper, neither on Ampere; int4 has no tensor-core format
    anywhere."""

    def low(gpu: str, fmt: str) -> set[str]:
        return set(layers.backends(GPUS[gpu], FORMATS[fmt], 32)) - {
            "bf16",
            "w4a16",
            "rotate+w4a16",
        }

    assert low("b200", "nvfp4") == low("rtx5090", "mxfp4") == {"w4a4", "rotate+w4a4"}
    assert low("h200", "nvfp4") == low("h200", "nvint4") == {"rotate+w4a8"}
    assert low("a100", "nvfp4") == low("b200", "nvint4") == set()


def test_predictions_reach_their_limit_and_rotations_cost() -> None:
    for m in layers.predict(plan(rotation=64), GPUS["h200"]):
        share, _ = m.share or (0.0, "")
        assert share == pytest.approx(1) or (m.backend.startswith("rotate+") and 0.5 < share < 1)
    without = {m.backend for m in layers.predict(plan(rotation=1), GPUS["h200"])}
    assert without == {"bf16", "w4a16", "rotate+w4a8"}, (
        "nothing rotates, but fp8 inputs are still to be rounded"
    )


def test_nothing_is_faster_than_a_launch() -> None:
    small = Plan(model="small", layers=[("square", 64, 64)], tokens=[1])
    for gpu in GPUS.values():
        for m in layers.predict(small, gpu):
            assert m.median_s == LAUNCH * (2 if m.backend.startswith("rotate+") else 1)


def test_a_rotation_alone_is_not_billed_for_the_weight() -> None:
    shape, fmt = (3, 4096, 64), FORMATS["nvfp4"]
    assert layers.cost("rotate", shape, fmt, 32) == (3 * 64 * 4, 2 * 3 * 64 * 32)
    assert layers.cost("quantize", shape, fmt, 32) == (
        3 * 64 * 2 + 3 * 64 * 4.5 / 8,
        2 * 3 * 64 * 32,
    )
    assert layers.cost("bf16", shape, fmt, 32) == (
        2 * (4096 * 64 + 3 * 64 + 3 * 4096),
        2 * 3 * 64 * 4096,
    )
    assert layers.cost("w4a16", shape, fmt, 32)[0] == 4096 * 64 * 4.5 / 8 + 2 * (3 * 64 + 3 * 4096)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tokens": [1, 0]}, "0 tokens"),
        ({"formats": ["mxint8"]}, "no kernel for format 'mxint8'"),
        ({"backends": ["marlin"]}, "no backend 'marlin'"),
        ({"rotation": 48}, "a rotation of 48"),
        ({"layers": [("o", 64, 96)], "rotation": 64}, "o of llama.*a rotation of 64"),
        (
            {"layers": [("o", 64, 80)], "formats": ["mxfp4"], "rotation": 16},
            "80 input features are not groups of 32",
        ),
    ],
)
def test_a_choice_that_does_not_exist_or_fit_is_an_error(
    choices: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan(), **choices)


def test_a_backend_that_cannot_run_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"w4a4 is not predicted for H200 .* choose from bf16"):
        plan(backends=["bf16", "w4a4"]).backends_by_format(GPUS["h200"])
    with pytest.raises(
        ValueError, match=r"bf16 does not run on cpu .* choose from fp32, reference"
    ):
        plan(backends=["bf16"]).backends_by_format(CPU)
    some = plan(
        formats=["nvint4", "nvfp4"], backends=["w4a4", "bf16"]
    )  # one of the formats suffices
    assert some.backends_by_format(GPUS["b200"]) == {"nvint4": ["bf16"], "nvfp4": ["w4a4"]}


# ---------------------------------------------------------------- measuring


def test_the_reference_path_is_timed_on_a_cpu(tmp_path: Path) -> None:
    steps = []
    tiny = Plan(
        model="tiny", layers=[("small", 64, 128)], tokens=[1, 3], formats=["nvfp4", "mxfp4"]
    )
    found = list(
        layers.run(tiny, CPU, NO_LIMITS, repeats=3, on_step=lambda *step: steps.append(step))
    )
    assert [(m.shape[0], m.backend, m.format, m.rotation) for m in found] == [
        (1, "fp32", "", 1), (1, "reference", "nvfp4", 32), (1, "reference", "mxfp4", 32),
        (3, "fp32", "", 1), (3, "reference", "nvfp4", 32), (3, "reference", "mxfp4", 32),
    ]  # fmt: skip
    assert steps[0] == (1, 4, "tiny small 1 nvfp4") and steps[-1][:2] == (4, 4)
    for m in found:
        assert (
            isinstance(m, Measurement) and 0 < m.p20_s <= m.median_s <= m.p80_s and not m.predicted
        )
        assert m.tflops == pytest.approx(m.flops / m.median_s / 1e12) and m.share is None
    speed_report.plot(found, tmp_path / "speed.svg")
    assert 'data-marks="4"' in (tmp_path / "speed.svg").read_text("utf-8")
