"""What is told of measurements and predictions."""

from ptq.bench import layers, shapes, speed_report
from ptq.bench.layers import Plan
from ptq.bench.measurement import GPUS, Limits
from ptq.numerics.formats import FORMATS


def plan(model: str = "llama-3.1-8b", **choices) -> Plan:
    return Plan(model=model, layers=shapes.block_layers(model), **choices)


def test_markdown_says_what_is_predicted_and_of_what() -> None:
    found = list(layers.predict(plan(tokens=[1], formats=["nvfp4"]), GPUS["h200"]))
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
        layers._measurement(
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
