"""What a GPU can do: the one place that asks.

Pure Python: importing this needs neither Triton nor a device. A device without an index is the
current one, which may be another GPU at the next call; so answers are kept by index.
"""

import ctypes
import importlib.util
from functools import lru_cache

import torch

# Compute capability → the architecture whose table it uses.
FAMILIES = {80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}
# Tables are made for these; a device's own count is used when it is there.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
FP4_ARCHITECTURES = (100, 120)
# Where weights in units (``weight_tiles.py``) were measured to be read faster than rows.
UNIT_ARCHITECTURES = (90,)


def available(device: torch.device | str) -> bool:
    """Whether the kernels run there: Triton is installed and the device is an NVIDIA GPU of compute
    capability 8.0 or more that has a table of tiles."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    return importlib.util.find_spec("triton") is not None and architecture(device) is not None


def architecture(device: torch.device | str) -> int | None:
    """The architecture (80, 90, 100 or 120) whose table serves this device; None if there is
    none."""
    if torch.device(device).type != "cuda":
        return None
    major, minor = capability(device)
    return FAMILIES.get(10 * major + minor)


def multiplies_fp4(device: torch.device | str) -> bool:
    """Whether the kernels multiply FP4 numbers natively there, so that quantized inputs are worth
    while."""
    return available(device) and architecture(device) in FP4_ARCHITECTURES


def reads_units(device: torch.device | str) -> bool:
    """Whether weights for 16-bit inputs are put into units when a layer is loaded there."""
    return available(device) and architecture(device) in UNIT_ARCHITECTURES


def multiplies_fp8(device: torch.device | str) -> bool:
    """Whether the tensor cores of this device multiply FP8 numbers: from sm_89 on."""
    return torch.device(device).type == "cuda" and capability(device) >= (8, 9)


def capturing(device: torch.device | str) -> bool:
    """Whether what is launched there now is recorded into a CUDA graph instead of run. What is made
    then must not be kept for calls outside that graph: nothing has filled it."""
    return torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing()


def capture_id(device: torch.device | str) -> int:
    """A number of its own for each recording of a CUDA graph, while :func:`capturing`.

    Torch does not tell it; the driver does.

    Raises:
        RuntimeError: the driver has no answer.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    status, number = ctypes.c_int(), ctypes.c_uint64()
    answer = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if answer or status.value != 1:  # CU_STREAM_CAPTURE_STATUS_ACTIVE
        raise RuntimeError(
            f"the CUDA driver does not say which graph is recorded (error {answer}, status "
            f"{status.value}); quantized layers cannot be recorded here"
        )
    return number.value


def capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of a CUDA device, such as (9, 0)."""
    return _capability(_index(device))


def multiprocessors(device: torch.device | str) -> int:
    """The number of multiprocessors of a CUDA device."""
    return _multiprocessors(_index(device))


def _index(device: torch.device | str) -> int:
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
