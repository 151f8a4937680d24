"""How fast the linear layers of a model are: measured on the device at hand, or predicted from a
GPU's roofline.

What is timed, and how, is in :mod:`ptq.bench.timing` (K4).
"""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import torch
from torch.nn.functional import linear

from ptq.bench import timing
from ptq.bench.measurement import LAUNCH, Limits, Measurement
from ptq.bench.shapes import Layer
from ptq.kernels import coverage
from ptq.numerics.formats import E2M1, FORMATS, Format
from ptq.numerics.rotation import Rotation
from ptq.numerics.tensor import QuantizedTensor, Scales, unpack

TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
PACKED = tuple(coverage.FORMATS.values())  # the formats that kernels know
REFERENCE = "reference"  # the path of layers without kernels, for CPUs
BACKENDS = (*timing.BACKENDS, REFERENCE)
DENSE = ("bf16", "fp32")  # what all others are compared with: on a GPU, on a CPU
FORMATLESS = (*DENSE, "fp8", "rotate")  # timed once for all formats


# ---------------------------------------------------------------- what to time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layers of a model, and what to time on them.

    Attributes:
        formats: names of ``PACKED``. rotation: size of the Hadamard blocks, 1 for none.
        backends: names of ``BACKENDS``; empty takes all that can run.

    Raises:
        ValueError: a count, format, rotation or backend that does not exist or does not fit the
            layers.
    """

    model: str
    layers: Sequence[Layer]
    tokens: Sequence[int] = TOKENS
    formats: Sequence[str] = ("nvfp4", "mxfp4", "nvint4")
    rotation: int = 32
    backends: Sequence[str] = ()

    def __post_init__(self) -> None:
        if wrong := [count for count in self.tokens if count < 1]:
            raise ValueError(f"{wrong[0]} tokens cannot be timed; give 1 or more")
        if unknown := [name for name in self.formats if name not in PACKED]:
            raise ValueError(
                f"no kernel for format {unknown[0]!r}; choose from {', '.join(PACKED)}"
            )
        if unknown := [name for name in self.backends if name not in BACKENDS]:
            raise ValueError(f"no backend {unknown[0]!r}; choose from {', '.join(BACKENDS)}")
        for layer, _, k in self.layers:
            for fmt in (FORMATS[name] for name in self.formats):
                reason = coverage.obstacle(*_parts(fmt), fmt.group_size, k, rotation=self.rotation)
                if reason is not None:
                    raise ValueError(f"{layer} of {self.model}: {reason}")

    def backends_by_format(self, place: torch.device | Limits) -> dict[str, list[str]]:
        """Format → the backends to time, or for ``Limits`` to predict; what has no format comes
        with the first one.

        Raises:
            ValueError: a backend was asked for that runs there with none of the formats.
        """
        runnable = {name: backends(place, FORMATS[name], self.rotation) for name in self.formats}
        every = list(dict.fromkeys(b for names in runnable.values() for b in names))
        if missing := [b for b in self.backends if b not in every]:
            what = (
                f"is not predicted for {place.name}"
                if isinstance(place, Limits)
                else f"does not run on {place}"
            )
            raise ValueError(
                f"{missing[0]} {what} with {', '.join(self.formats)}; choose from "
                f"{', '.join(every)}"
            )
        wanted = self.backends or every
        return {
            name: [
                b for b in names if b in wanted and (name == self.formats[0] or b not in FORMATLESS)
            ]
            for name, names in runnable.items()
        }


def backends(place: torch.device | Limits, fmt: Format, rotation: int) -> list[str]:
    """What can be timed on a device, or predicted from a roofline; without a rotation, nothing that
    only rotates."""
    if isinstance(place, Limits):
        names = ["bf16", "w4a16", "rotate+w4a16"]
        if place.fp4:
            names += ["w4a4", "rotate+w4a4"] if fmt.element is E2M1 else []
        elif place.fp8:
            names.append("rotate+w4a8")
    else:
        names = timing.backends(place, *_parts(fmt)) + ([REFERENCE] if place.type == "cpu" else [])
    return [b for b in names if rotation > 1 or b not in ("rotate", "rotate+w4a16")]


def _parts(fmt: Format) -> tuple[str, str]:
    """The names that kernels have for the element and the scale of a format."""
    return fmt.element.name, fmt.scale_name


def cost(backend: str, shape: tuple[int, int, int], fmt: Format, rotation: int) -> tuple[int, int]:
    """(bytes, operations) of one call with (tokens, out, in): everything moved once."""
    tokens, n, k = shape
    wide, low = 32 if backend in ("fp32", REFERENCE) else 16, fmt.bits_per_weight
    if backend in ("rotate", "quantize"):
        return round(
            tokens * k * (wide + (wide if backend == "rotate" else low)) / 8
        ), 2 * tokens * k * rotation
    weight = wide if backend in DENSE else 8 if backend == "fp8" else low
    inputs = low if backend.endswith("w4a4") else 8 if backend in ("fp8", "rotate+w4a8") else wide
    return round((n * k * weight + tokens * k * inputs + tokens * n * wide) / 8), 2 * tokens * n * k


# ---------------------------------------------------------------- predicting


def predict(plan: Plan, gpu: Limits) -> Iterator[Measurement]:
    """Rooflines: the larger of the time to move the bytes and the time to compute, and no less than
    a launch takes; nothing real is faster.

    ``rotate+…`` adds a launch for one pass over the inputs, which are read in bf16 and written as
    the product wants them.
    """
    by_format = plan.backends_by_format(gpu)
    for layer, n, k in plan.layers:
        for count in plan.tokens:
            for name, names in by_format.items():
                for backend in names:
                    fmt, shape = FORMATS[name], (count, n, k)
                    moved, flops = cost(backend, shape, fmt, plan.rotation)
                    seconds = max(moved / gpu.bandwidth, flops / gpu.peak(backend), LAUNCH)
                    if backend.startswith("rotate+"):
                        bits_written = {"w4a16": 16, "w4a8": 8, "w4a4": fmt.bits_per_weight}[
                            backend.removeprefix("rotate+")
                        ]
                        passed = count * k * (16 + bits_written) / 8
                        seconds += max(passed / gpu.bandwidth, LAUNCH)
                    yield _measurement(
                        plan, layer, shape, backend, fmt, [seconds], gpu, predicted=True
                    )


def _measurement(
    plan: Plan,
    layer: str,
    shape: tuple[int, int, int],
    backend: str,
    fmt: Format,
    seconds: list[float],
    limits: Limits,
    *,
    predicted: bool = False,
) -> Measurement:
    ordered = sorted(seconds)
    moved, flops = cost(backend, shape, fmt, plan.rotation)
    return Measurement(
        model=plan.model,
        layer=layer,
        shape=shape,
        backend=backend,
        format="" if backend in FORMATLESS else fmt.name,
        rotation=plan.rotation
        if backend.startswith("rotate") or backend in ("quantize", REFERENCE)
        else 1,
        median_s=statistics.median(ordered),
        p20_s=ordered[len(ordered) // 5],
        p80_s=ordered[4 * len(ordered) // 5],
        bytes=moved,
        flops=flops,
        bandwidth=limits.bandwidth,
        peak=limits.peak(backend),
        predicted=predicted,
        device=limits.name,
        ptq=_version("ptq", "ptq-llm"),
        torch=torch.__version__,
        triton=_version("triton"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@cache
def _version(package: str, distribution: str | None = None) -> str:
    found = importlib.util.find_spec(package) is not None
    return importlib.metadata.version(distribution or package) if found else ""


# ---------------------------------------------------------------- measuring


def measured_limits(device: torch.device) -> Limits:
    """Of the GPU at hand, by a copy and by matmuls; of a CPU nothing, because weights stay in its
    cache."""
    if device.type != "cuda":
        return Limits(
            name="CPU",
            bandwidth=0.0,
            bf16=0.0,
            source="the reference path in fp32, weights in the cache",
        )
    with timing.current(device):
        bandwidth, bf16, fp8 = timing.peaks(device)
    name = torch.cuda.get_device_name(device)
    return Limits(name=name, bandwidth=bandwidth, bf16=bf16, fp8=fp8, source="measured in this run")


def run(
    plan: Plan,
    device: torch.device,
    limits: Limits,
    *,
    repeats: int = 30,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Iterator[Measurement]:
    """Measure every layer, as the device can; on a CPU the reference path, in fp32.

    Args:
        limits: what ``measured_limits`` says of the device.
        on_step: told after every layer, token count and format: steps done, steps in all, which
            one.
    """
    by_format = plan.backends_by_format(device)
    steps = [
        (x, count, name) for x in plan.layers for count in plan.tokens for name in plan.formats
    ]
    for done, ((layer, n, k), count, name) in enumerate(steps, 1):
        fmt, shape = FORMATS[name], (count, n, k)
        for backend, seconds in _time_layer(
            shape, fmt, plan.rotation, device, by_format[name], repeats
        ).items():
            yield _measurement(plan, layer, shape, backend, fmt, seconds, limits)
        on_step(done, len(steps), f"{plan.model} {layer} {count} {name}")


@torch.inference_mode()
def _time_layer(
    shape: tuple[int, int, int],
    fmt: Format,
    rotation: int,
    device: torch.device,
    names: Iterable[str],
    repeats: int,
) -> Mapping[str, list[float]]:
    tokens, n, k = shape
    element, scale = _parts(fmt)
    groups = {}
    with timing.current(device):
        for name in names:
            # with a weight, it is the weight that must not stay in the cache
            inputs_alone = name in ("rotate", "quantize")
            alternating = (
                cost("rotate", shape, fmt, 1)[0] // 2
                if inputs_alone
                else cost(name, (0, n, k), fmt, 1)[0]
            )
            problem = timing.Problem(
                tokens=tokens,
                n=n,
                k=k,
                element=element,
                scale=scale,
                rotation=rotation,
                device=device,
                copies=timing.copies_for(alternating, device),
            )
            groups[name] = (
                _reference(problem, fmt) if name == REFERENCE else timing.BACKENDS[name](problem)
            )
        return timing.time_calls(groups, device, repeats)


def _reference(problem: timing.Problem, fmt: Format) -> list[timing.Call]:
    """The path of layers without kernels: rotate, dequantize, multiply."""
    x, rotation = problem.inputs(), Rotation(problem.rotation)
    weights = [
        QuantizedTensor(unpack(w.packed, fmt), Scales(w.scale_bits, w.global_scale, fmt))
        for w in problem.weights()
    ]
    return [lambda w=w: linear(rotation.rotate(x), w.dequantize().to(x.dtype)) for w in weights]
