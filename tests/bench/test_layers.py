"""Shapes, rooflines and records of the layer benchmark; timing itself on tiny shapes on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.bench import layers as benchmark
from ptq.bench import shapes, speed_report
from ptq.bench.layers import GPUS, Limits, Measurement, Plan
from ptq.numerics.formats import FORMATS

CPU = torch.device("cpu")
NO_LIMITS = benchmark.measured_limits(CPU)


def plan(model: str = "llama-3.1-8b", **choices) -> Plan:
    return Plan(model=model, layers=shapes.block_layers(model), **choices)


# ---------------------------------------------------------------- shapes


def test_shapes_are_those_of_the_models() -> None:
    """The layers that users serve."""
    assert shapes.block_layers("llama-3.1-8b") == (
        ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336),
    )  # fmt: skip
    assert shapes.block_layers("llama-3.1-70b") == (
        ("qkv", 10240, 8192), ("o", 8192, 8192), ("gate_up", 57344, 8192), ("down", 8192, 28672),
    )  # fmt: skip
    assert shapes.block_layers("qwen3-32b")[1] == ("o", 5120, 8192)


SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
LAYERS = (("qkv", 128, 64), ("o", 64, 64), ("gate_up", 256, 64), ("down", 64, 128))
EXPERT_LAYERS = (*LAYERS[:2], ("expert gate_up", 64, 64), ("expert down", 64, 32))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (SIZES, LAYERS),
        ({**SIZES, "num_key_value_heads": None}, (("qkv", 192, 64), *LAYERS[1:])),
        ({**SIZES, "head_dim": 32}, (("qkv", 256, 64), ("o", 64, 128), *LAYERS[2:])),
        ({"hidden_size": 7, "text_config": SIZES}, LAYERS),
        ({"thinker_config": {"text_config": SIZES}}, LAYERS),
        ({**SIZES, "num_experts": 4, "moe_intermediate_size": 32}, EXPERT_LAYERS),
        ({**SIZES, "num_local_experts": 4, "intermediate_size": 32}, EXPERT_LAYERS),
    ],
    ids=[
        "plain",
        "no grouped keys",
        "head size",
        "text_config",
        "thinker_config",
        "experts",
        "Mixtral",
    ],
)
def test_shapes_of_a_config(
    tmp_path: Path, config: dict[str, object], layers: tuple[shapes.Layer, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shapes.block_layers(str(tmp_path)) == layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "hidden_size is None"),
        ("{", "not JSON"),
        ("[]", "not a model configuration"),
        (json.dumps({**SIZES, "intermediate_size": "wide"}), "intermediate_size is 'wide'"),
        (json.dumps({**SIZES, "kv_lora_rank": 512}), "compresses keys and values"),
    ],
)
def test_a_config_without_such_shapes_is_an_error(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        shapes.block_layers(str(tmp_path))


# ---------------------------------------------------------------- rooflines

# one decoder layer, microseconds, worked out by hand from bandwidth and peak
SPEC = [
    ("h200", "llama-3.1-8b", 1, 101.5, 28.6, None),
    ("h200", "llama-3.1-8b", 64, 103.5, 35.3, None),
    ("h200", "llama-3.1-8b", 512, 283.0, 283.0, None),
    ("b200", "llama-3.1-8b", 128, 63.1, 38.5, 18.8),
    ("b200", "llama-3.1-70b", 2048, 2417.0, 2417.0, 754.0),
    ("rtx5090", "llama-3.1-8b", 16, 274.0, 78.1, 77.7),
]


@pytest.mark.parametrize(("gpu", "model", "tokens", "bf16", "w4a16", "w4a4"), SPEC)
def test_rooflines_are_those_of_the_specification(gpu, model, tokens, bf16, w4a16, w4a4) -> None:
    found = benchmark.block_sums(
        benchmark.predict(plan(model, tokens=[tokens], formats=["nvfp4"]), GPUS[gpu])
    )
    seconds = {m.backend: m.median_s * 1e6 for m in found}
    assert seconds["bf16"] == pytest.approx(bf16, rel=0.015)
    assert seconds["w4a16"] == pytest.approx(w4a16, rel=0.015)
    assert seconds.get("w4a4") == (None if w4a4 is None else pytest.approx(w4a4, rel=0.015))
    assert seconds["rotate+w4a16"] > seconds["w4a16"] and all(m.predicted for m in found)


def test_only_what_tensor_cores_multiply_is_predicted() -> None:
    """4-bit inputs on Blackwell, fp8 on Hopper, neither on Ampere; int4 has no tensor-core format
    anywhere."""

    def low(gpu: str, fmt: str) -> set[str]:
        return set(benchmark.backends(GPUS[gpu], FORMATS[fmt], 32)) - {
            "bf16",
            "w4a16",
            "rotate+w4a16",
        }

    assert low("b200", "nvfp4") == low("rtx5090", "mxfp4") == {"w4a4", "rotate+w4a4"}
    assert low("h200", "nvfp4") == low("h200", "nvint4") == {"rotate+w4a8"}
    assert low("a100", "nvfp4") == low("b200", "nvint4") == set()


def test_predictions_reach_their_limit_and_rotations_cost() -> None:
    for m in benchmark.predict(plan(rotation=64), GPUS["h200"]):
        share, _ = m.share or (0.0, "")
        assert share == pytest.approx(1) or (m.backend.startswith("rotate+") and 0.5 < share < 1)
    without = {m.backend for m in benchmark.predict(plan(rotation=1), GPUS["h200"])}
    assert without == {"bf16", "w4a16", "rotate+w4a8"}, (
        "nothing rotates, but fp8 inputs are still to be rounded"
    )


def test_a_rotation_alone_is_not_billed_for_the_weight() -> None:
    shape, fmt = (3, 4096, 64), FORMATS["nvfp4"]
    assert benchmark.cost("rotate", shape, fmt, 32) == (3 * 64 * 4, 2 * 3 * 64 * 32)
    assert benchmark.cost("quantize", shape, fmt, 32) == (
        3 * 64 * 2 + 3 * 64 * 4.5 / 8,
        2 * 3 * 64 * 32,
    )
    assert benchmark.cost("bf16", shape, fmt, 32) == (
        2 * (4096 * 64 + 3 * 64 + 3 * 4096),
        2 * 3 * 64 * 4096,
    )
    assert benchmark.cost("w4a16", shape, fmt, 32)[0] == 4096 * 64 * 4.5 / 8 + 2 * (
        3 * 64 + 3 * 4096
    )


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
        plan(backends=["bf16", "w4a4"]).chosen(GPUS["h200"])
    with pytest.raises(
        ValueError, match=r"bf16 does not run on cpu .* choose from fp32, reference"
    ):
        plan(backends=["bf16"]).chosen(CPU)
    some = plan(
        formats=["nvint4", "nvfp4"], backends=["w4a4", "bf16"]
    )  # one of the formats suffices
    assert some.chosen(GPUS["b200"]) == {"nvint4": ["bf16"], "nvfp4": ["w4a4"]}


# ---------------------------------------------------------------- records and tables


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    found = list(benchmark.predict(plan(tokens=[1, 64], formats=["nvfp4", "nvint4"]), GPUS["h200"]))
    benchmark.append(tmp_path / "new" / "runs.jsonl", found[:3])
    benchmark.append(tmp_path / "new" / "runs.jsonl", found[3:])
    assert benchmark.read(tmp_path / "new" / "runs.jsonl") == found


def test_markdown_says_what_is_predicted_and_of_what() -> None:
    found = list(benchmark.predict(plan(tokens=[1], formats=["nvfp4"]), GPUS["h200"]))
    text = speed_report.markdown(found, GPUS["h200"])
    assert text.startswith(
        "**Predicted, not measured**: the roofline of H200, copy 4.30 TB/s, bf16 790 TFLOP/s"
    )
    assert "### llama-3.1-8b, predicted" in text and "fp8 assumed" in text
    assert "| gate_up | 1 | nvfp4 | w4a16 | 15.4 | 4.30 | 15.3 | 100 % copy | 3.55 |" in text


def test_measurements_have_a_spread_and_a_share_of_what_was_measured() -> None:
    limits = Limits(name="a GPU", bandwidth=4e12, bf16=8e14, source="measured in this run")
    timed = [("bf16", [1e-4, 2e-4, 3e-4, 4e-4, 9e-4]), ("w4a16", [1e-4]), ("rotate", [1e-5])]
    found = [
        benchmark._measurement(
            plan(), "o", (1, 4096, 4096), backend, FORMATS["nvfp4"], seconds, limits
        )
        for backend, seconds in timed
    ]
    text = speed_report.markdown(found, limits)
    assert text.startswith(
        "Measured on a GPU: copy 4.00 TB/s, bf16 800 TFLOP/s (measured in this run); ptq "
    )
    assert "redicted" not in text
    assert "| o | 1 | – | bf16 | 300.0 | 200.0–900.0 | 0.112 | 0.112 | 3 % copy | 1.00 |" in text
    assert (
        "| o | 1 | nvfp4 | w4a16 | 100.0 | 100.0–100.0 | 0.0945 | 0.336 | 2 % copy | 3.00 |" in text
    )
    assert text.rstrip().endswith("| – |"), "a rotation alone is not compared with a product"


def test_a_sum_names_the_expert_that_it_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES, "num_experts": 4, "moe_intermediate_size": 32})
    )
    sums = benchmark.block_sums(benchmark.predict(plan(str(tmp_path), tokens=[1]), GPUS["h200"]))
    assert {m.layer for m in sums} == {"block, 1 expert"}
    dense = benchmark.block_sums(
        benchmark.predict(plan(tokens=[1], backends=["bf16"]), GPUS["h200"])
    )
    assert [(m.layer, m.flops) for m in dense] == [
        ("block", 2 * (6144 + 4096 + 28672 + 14336) * 4096)
    ]


# ---------------------------------------------------------------- measuring


def test_the_reference_path_is_timed_on_a_cpu(tmp_path: Path) -> None:
    steps = []
    tiny = Plan(
        model="tiny", layers=[("small", 64, 128)], tokens=[1, 3], formats=["nvfp4", "mxfp4"]
    )
    found = list(
        benchmark.run(tiny, CPU, NO_LIMITS, repeats=3, on_step=lambda *step: steps.append(step))
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
    speed_report.plot(found, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
