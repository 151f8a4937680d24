"""What is timed, and how: backends for one linear layer, CUDA-graph replays over rotating copies of
its weight.

A time is that of a replay of one graph with a call per copy of the weight, the copies together
larger than twice the L2 cache (timers that repeat one weight flatter 20–60 MB ones). Backends take
turns, so that they share thermal drift (K4). On a CPU calls are timed one by one, in fp32.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from ptq.kernels import coverage, gpu
from ptq.kernels.operands import Encoding, PackedWeight, QuantizedInputs

# ---------------------------------------------------------------- what is timed


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer to be timed: sizes, element and scale type, and how many copies of the weight are
    rotated over."""

    tokens: int
    n: int
    k: int
    element: str
    scale: str
    rotation: int
    device: torch.device
    copies: int

    def inputs(self) -> Tensor:
        """Random (tokens, in): bf16 on a GPU, fp32 on a CPU."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return torch.randn(self.tokens, self.k, device=self.device, dtype=dtype)

    def weights(self) -> list[PackedWeight]:
        """Random packed codes, scale bytes near 1 and a global scale; their time does not depend on
        their values."""
        groups = self.k // coverage.GROUP_SIZE[self.scale]
        low, high = (0x30, 0x40) if self.scale == "e4m3" else (120, 130)
        t = torch.tensor(2.0**-10, device=self.device)

        def random_bytes(low: int, high: int, columns: int) -> Tensor:
            return torch.randint(
                low, high, (self.n, columns), dtype=torch.uint8, device=self.device
            )

        return [
            PackedWeight(
                packed=random_bytes(0, 256, self.k // 2),
                scale_bits=random_bytes(low, high, groups),
                global_scale=t,
                element=self.element,
                scale=self.scale,
            )
            for _ in range(self.copies)
        ]

    @property
    def encoding(self) -> Encoding:
        """What inputs are quantized to, where they are."""
        return Encoding(self.element, self.scale)


def served(weight: PackedWeight) -> PackedWeight:
    """The weight as a loaded layer with 16-bit inputs has it on this device."""
    from ptq.kernels.weight_tiles import tileable, tiled

    return tiled(weight) if gpu.reads_units(weight.packed.device) and tileable(weight) else weight


Call = Callable[[], object]
BACKENDS: dict[str, Callable[[Problem], list[Call]]] = {}


def backend(
    name: str,
) -> Callable[[Callable[[Problem], list[Call]]], Callable[[Problem], list[Call]]]:
    """Enter a function that prepares one call per copy of the weight into the table of backends."""

    def enter(prepare: Callable[[Problem], list[Call]]) -> Callable[[Problem], list[Call]]:
        BACKENDS[name] = prepare
        return prepare

    return enter


@backend("fp32")
@backend("bf16")
def _dense(problem: Problem) -> list[Call]:
    """The library's product with a dense weight in the dtype of the inputs: what all others are
    compared with."""
    x = problem.inputs()
    weights = [
        torch.randn(problem.n, problem.k, device=x.device, dtype=x.dtype)
        for _ in range(problem.copies)
    ]
    return [lambda w=w: linear(x, w) for w in weights]


@backend("w4a16")
def _w4a16(problem: Problem) -> list[Call]:
    from ptq.kernels.op_matmul import w4a16_matmul

    x = problem.inputs()
    return [partial(w4a16_matmul, x, served(weight)) for weight in problem.weights()]


@backend("rotate+w4a16")
def _rotate_w4a16(problem: Problem) -> list[Call]:
    from ptq.kernels.op_inputs import rotate
    from ptq.kernels.op_matmul import w4a16_matmul

    x = problem.inputs()
    weights = [served(weight) for weight in problem.weights()]
    return [lambda w=weight: w4a16_matmul(rotate(x, problem.rotation), w) for weight in weights]


@backend("rotate")
def _rotate(problem: Problem) -> list[Call]:
    from ptq.kernels.op_inputs import rotate

    return [partial(rotate, problem.inputs(), problem.rotation) for _ in range(problem.copies)]


def input_global_scale(device: torch.device) -> Tensor:
    """A global scale for inputs; what it is does not matter to the time."""
    return torch.tensor(1e-3, device=device)


@backend("quantize")
def _quantize(problem: Problem) -> list[Call]:
    from ptq.kernels.op_inputs import rotate_quantize

    t, rotation = input_global_scale(problem.device), problem.rotation
    return [
        partial(rotate_quantize, problem.inputs(), rotation, problem.encoding, t)
        for _ in range(problem.copies)
    ]


def _w4a4_calls(problem: Problem, *, quantize: bool) -> list[Call]:
    from ptq.kernels.op_inputs import rotate_quantize
    from ptq.kernels.op_matmul import w4a4_matmul, wants_blocked_scales
    from ptq.kernels.quantize import swizzle_scales

    x, t, weights = problem.inputs(), input_global_scale(problem.device), problem.weights()
    blocked = wants_blocked_scales(weights[0], problem.tokens)
    if blocked:
        weights = [replace(w, scale_bits=swizzle_scales(w.scale_bits)) for w in weights]

    def inputs() -> QuantizedInputs:
        return rotate_quantize(x, problem.rotation, problem.encoding, t, swizzle=blocked)

    ready = inputs()
    return [lambda w=w: w4a4_matmul(inputs() if quantize else ready, w) for w in weights]


@backend("w4a4")
def _w4a4(problem: Problem) -> list[Call]:
    return _w4a4_calls(problem, quantize=False)


@backend("rotate+w4a4")
def _rotate_w4a4(problem: Problem) -> list[Call]:
    return _w4a4_calls(problem, quantize=True)


@backend("rotate+w4a8")
def _rotate_w4a8(problem: Problem) -> list[Call]:
    from ptq.kernels.op_matmul import w4a8_matmul

    x = problem.inputs()
    return [partial(w4a8_matmul, x, problem.rotation, weight) for weight in problem.weights()]


@backend("fp8")
def _fp8(problem: Problem) -> list[Call]:
    """``torch._scaled_mm`` with one scale per row, inputs quantized beforehand."""
    x = problem.inputs().clamp(-8, 8).to(torch.float8_e4m3fn)
    x_scale = torch.ones(problem.tokens, 1, device=x.device)
    w_scale = torch.ones(1, problem.n, device=x.device)
    weights = [
        torch.randn(problem.n, problem.k, device=x.device).to(torch.float8_e4m3fn)
        for _ in range(problem.copies)
    ]
    return [
        lambda w=w: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16
        )
        for w in weights
    ]


@backend("gemlite")
def _gemlite(problem: Problem) -> list[Call]:
    """gemlite's weight-only layer of the format, as its helpers build it from a dense one."""
    from gemlite import helper  # pyright: ignore[reportMissingImports]

    x, make = problem.inputs(), getattr(helper, GEMLITE[problem.scale])
    dense = [
        torch.nn.Linear(problem.k, problem.n, bias=False, device=x.device, dtype=x.dtype)
    ] * problem.copies
    layers = [
        make(device=str(x.device), dtype=x.dtype).from_linear(layer, del_orig=False)
        for layer in dense
    ]
    return [lambda layer=layer: layer(x) for layer in layers]


# Scale type → gemlite's name for E2M1 weights with such scales; older versions lack the second.
GEMLITE = {"e8m0": "A16W4_MXFP", "e4m3": "A16W4_NVFP"}


def backends(device: torch.device, element: str, scale: str) -> list[str]:
    """The names of ``BACKENDS`` that can run there, the dense product first; on a CPU only that
    one."""
    if device.type != "cuda":
        return ["fp32"]
    names = ["bf16"]
    if gpu.available(device):
        names += ["w4a16", "rotate+w4a16", "rotate", "quantize"]
        if gpu.multiplies_fp4(device):
            names += ["w4a4", "rotate+w4a4"] if element == "e2m1" else []
        elif gpu.multiplies_fp8(device):
            names.append("rotate+w4a8")
    if gpu.multiplies_fp8(device):
        names.append("fp8")
    if element == "e2m1" and importlib.util.find_spec("gemlite") is not None:
        from gemlite import helper  # pyright: ignore[reportMissingImports]

        names += ["gemlite"] if hasattr(helper, GEMLITE[scale]) else []
    return names


# ---------------------------------------------------------------- timing


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within, ``device`` is the one that streams, graphs and Triton's launches use."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """At least 8 copies of a weight, together more than twice the L2 cache; at most 64, at most a
    third of the free memory."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    fits = int(torch.cuda.mem_get_info(device)[0] / 3 // weight_bytes)
    return max(1, min(max(8, 2 * cache // weight_bytes + 1), 64, fits))


def time_calls(
    groups: dict[str, list[Call]], device: torch.device, repeats: int = 30
) -> dict[str, list[float]]:
    """Seconds per call, ``repeats`` times for each group of calls; the groups take turns.

    On a GPU every group is captured into one CUDA graph that runs its calls once each.
    """
    runs = {
        name: _captured(calls) if device.type == "cuda" else _looped(calls)
        for name, calls in groups.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run() / len(groups[name]))
    return seconds


def _captured(calls: list[Call]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return run


def _looped(calls: list[Call]) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin

    run()
    return run


@torch.inference_mode()
def peaks(device: torch.device) -> tuple[float, float, float]:
    """What a GPU does at most, measured: bytes per second of a copy (read and written), operations
    per second of a matmul in bf16 and in fp8; 0 where there is no fp8."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))

    def rate(work: int, call: Call) -> float:
        return work / statistics.median(time_calls({"": [call]}, device)[""])

    bandwidth = rate(2 * source.numel(), lambda: target.copy_(source))
    bf16 = rate(2 * 8192**3, lambda: a @ b)
    if not gpu.multiplies_fp8(device):
        return bandwidth, bf16, 0.0
    low, high = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)

    def fp8() -> object:
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            low, high, one, one, out_dtype=torch.bfloat16
        )

    return bandwidth, bf16, rate(2 * 8192**3, fp8)
