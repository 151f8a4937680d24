"""What a GPU can do, asked of pretended ones: the answers need no device."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from ptq.kernels import gpu

# capability → (architecture, multiplies FP4, multiplies FP8)
GPUS = {
    (7, 5): (None, False, False),
    (8, 0): (80, False, False),
    (8, 6): (80, False, False),
    (8, 9): (80, False, True),
    (9, 0): (90, False, True),
    (10, 0): (100, True, True),
    (10, 3): (100, True, True),
    (11, 0): (None, False, True),  # newer than the tables: no kernels, so nothing multiplies FP4
    (12, 0): (120, True, True),
    (12, 1): (120, True, True),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``pretend(*capabilities)``: one GPU of each, the first is the current one."""
    pytest.importorskip("triton")

    def clear() -> None:
        gpu._capability.cache_clear()
        gpu._multiprocessors.cache_clear()

    def machine(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        clear()

    yield machine
    clear()


@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_a_capability_says_what_runs(capability: tuple[int, int], pretend) -> None:
    arch, fp4, fp8 = GPUS[capability]
    pretend(capability)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        assert gpu.capability(device) == capability and gpu.architecture(device) == arch
        assert gpu.available(device) == (arch is not None)
        assert gpu.multiplies_fp4(device) == fp4 and gpu.multiplies_fp8(device) == fp8


def test_the_current_device_may_be_another_one_next_time(
    pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are kept by index: "cuda" is whatever is current."""
    pretend((9, 0), (12, 0))
    counts = [132, 170]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: type("Properties", (), {"multi_processor_count": counts[i]}),
    )
    assert gpu.architecture("cuda") == 90 and gpu.multiprocessors("cuda") == 132
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert gpu.architecture("cuda") == 120 and gpu.multiprocessors("cuda") == 170
    assert gpu.architecture("cuda:0") == 90 and not gpu.multiplies_fp4("cuda:0")


def test_a_cpu_is_never_available() -> None:
    """Not even with an interpreter: layers on the CPU take the reference path."""
    for device in ("cpu", torch.device("cpu"), torch.device("meta")):
        assert not gpu.available(device) and gpu.architecture(device) is None
        assert not gpu.multiplies_fp4(device) and not gpu.multiplies_fp8(device)


def test_importing_needs_no_triton_and_asks_no_device() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.cuda.get_device_capability = torch.cuda.get_device_properties = None\n"
        "from ptq.kernels import coverage, gpu, operands, tiles\n"
        "assert tiles.choose(90, 'w4a16', 'nvfp4', 1, 4096, 4096).kernel == 'w4a16'\n"
        "assert not gpu.available('cpu') and not gpu.multiplies_fp4('cpu')\n"
        "loaded = [m for m in sys.modules if m.startswith('triton')]\n"
        "assert not [m for m in loaded if sys.modules[m] is not None]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("answer", "status"), [(0, 1), (0, 0), (1, 1)])
def test_the_driver_is_asked_which_graph_is_recorded(monkeypatch, answer: int, status: int) -> None:
    class Driver:
        @staticmethod
        def cuStreamGetCaptureInfo_v2(stream, state, number, graph, nodes, count) -> int:
            state._obj.value, number._obj.value = status, 2**40 + 7
            return answer

    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    if answer or status != 1:
        with pytest.raises(RuntimeError, match="which graph is recorded"):
            gpu.capture_id("cuda")
    else:
        assert gpu.capture_id("cuda") == 2**40 + 7


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert not gpu.capturing("cpu")
