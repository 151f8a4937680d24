"""What is timed for which GPU, and that it runs; timing itself on tiny shapes on the CPU."""

import pytest
import torch

from ptq.bench import timing
from ptq.kernels import gpu
from ptq.kernels.operands import QuantizedInputs


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), set()), ((9, 0), {"rotate+w4a8", "fp8"}), ((10, 0), {"w4a4", "rotate+w4a4", "fp8"})],
)
def test_a_gpu_runs_what_its_tensor_cores_multiply(
    monkeypatch, capability: tuple[int, int], expected: set[str]
):
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None)  # no other libraries
    everywhere = {"bf16", "w4a16", "rotate+w4a16", "rotate", "quantize"}
    assert set(timing.backends(torch.device("cuda"), "e2m1", "e4m3")) == everywhere | expected
    assert "w4a4" not in timing.backends(torch.device("cuda"), "int4", "e4m3")


@pytest.mark.parametrize("name", sorted(set(timing.BACKENDS) - {"fp32", "gemlite"}))
def test_what_is_timed_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A call for every copy of the weight; in Triton's interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = timing.Problem(
        tokens=3, n=64, k=128, element="e2m1", scale="e4m3", rotation=16, device=device, copies=2
    )
    if device.type == "cpu":
        monkeypatch.setattr(
            timing.Problem, "inputs", lambda self: torch.randn(self.tokens, self.k).bfloat16()
        )
        monkeypatch.setattr(gpu, "architecture", lambda device: 120)
    elif name not in timing.backends(device, "e2m1", "e4m3"):
        pytest.skip(f"this GPU has no numbers for {name}")
    results = [call() for call in timing.BACKENDS[name](problem)]
    first = results[0][0] if isinstance(results[0], tuple) else results[0]
    if isinstance(first, QuantizedInputs):
        first = first.packed
    assert len(results) == 2 and isinstance(first, torch.Tensor)
    assert first.shape == (3, 128 if name == "rotate" else 64), (
        "(tokens, in) if only rotated; (tokens, in/2) if packed"
    )


def test_groups_of_calls_take_turns() -> None:
    """So that they share thermal drift; the first run of each, which compiles, is not timed."""
    order: list[str] = []
    groups = {name: [lambda name=name: order.append(name)] * 2 for name in ("a", "b")}
    seconds = timing.time_calls(groups, torch.device("cpu"), repeats=3)
    assert "".join(order) == "aabb" + "aabb" * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
