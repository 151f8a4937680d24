"""How fast the linear layers of a model are: measured on the device at hand, or predicted from a
GPU's roofline.

Facts are stored as JSONL (``Measurement``), opinions (TB/s, ratios to bf16, percentages) are
derived from them, here and in :mod:`ptq.bench.speed_report`. What is timed, and how, is in
:mod:`ptq.bench.timing` (K4).
"""

import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

from ptq.bench import timing
from ptq.bench.shapes import EXPERT, Layer
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


# ---------------------------------------------------------------- facts


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The time of one backend on one layer; ``predicted`` is a roofline, not a run.

    Attributes:
        shape: (tokens, out, in).
        bytes: what has to be moved at least: weight, inputs, outputs. flops: 2 · tokens · out · in.
        bandwidth, peak: what the device does at most, in bytes and operations per second; 0 if that
            is not known.
    """

    model: str
    layer: str
    shape: tuple[int, int, int]
    backend: str
    format: str
    rotation: int
    median_s: float
    p20_s: float
    p80_s: float
    bytes: int
    flops: int
    bandwidth: float
    peak: float
    predicted: bool
    device: str
    ptq: str
    torch: str
    triton: str
    date: str

    @property
    def tflops(self) -> float:
        return self.flops / self.median_s / 1e12

    @property
    def terabytes_per_second(self) -> float:
        return self.bytes / self.median_s / 1e12

    @property
    def share(self) -> tuple[float, str] | None:
        """The larger of the shares of the device's copy bandwidth and of its matmul peak; None if
        nobody knows them."""
        if not self.bandwidth:
            return None
        moved = self.bytes / self.median_s / self.bandwidth
        computed = self.flops / self.median_s / self.peak if self.peak else 0.0
        return (moved, "copy") if moved >= computed else (computed, "matmul")

    def to_json(self) -> str:
        """One line; :meth:`from_dict` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> "Measurement":
        """The measurement of a line of JSONL."""
        return cls(**(data | {"shape": tuple(data["shape"])}))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device does at most, in bytes and operations per second, and where the numbers come
    from.

    Attributes:
        bandwidth, bf16, fp8, fp4: 0 where the device has none, or where it was not measured.
    """

    name: str
    bandwidth: float
    bf16: float
    fp8: float = 0.0
    fp4: float = 0.0
    source: str

    def peak(self, backend: str) -> float:
        """Operations per second of the numbers that a backend multiplies."""
        return (
            self.fp4
            if backend.endswith("w4a4")
            else self.fp8
            if backend in ("fp8", "rotate+w4a8")
            else self.bf16
        )


GPUS = {
    "h200": Limits(
        name="H200",
        bandwidth=4.3e12,
        bf16=790e12,
        fp8=1450e12,
        source="bandwidth and bf16 measured with plain PyTorch, fp8 assumed",
    ),
    "b200": Limits(
        name="B200",
        bandwidth=7.2e12,
        bf16=1450e12,
        fp4=4650e12,
        source="bandwidth assumed, bf16 and fp4 published",
    ),
    "rtx5090": Limits(
        name="RTX 5090",
        bandwidth=1.6e12,
        bf16=224e12,
        fp4=1300e12,
        source="bandwidth assumed, bf16 and fp4 published",
    ),
    "a100": Limits(
        name="A100", bandwidth=1.7e12, bf16=270e12, source="assumed: 85 % of the data sheet"
    ),
}


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
    """Rooflines: the larger of the time to move the bytes and the time to compute; nothing real is
    faster.

    ``rotate+…`` adds one pass over the inputs, which are read in bf16 and written as the product
    wants them.
    """
    by_format = plan.backends_by_format(gpu)
    for layer, n, k in plan.layers:
        for count in plan.tokens:
            for name, names in by_format.items():
                for backend in names:
                    fmt, shape = FORMATS[name], (count, n, k)
                    moved, flops = cost(backend, shape, fmt, plan.rotation)
                    seconds = max(moved / gpu.bandwidth, flops / gpu.peak(backend))
                    if backend.startswith("rotate+"):
                        bits_written = {"w4a16": 16, "w4a8": 8, "w4a4": fmt.bits_per_weight}[
                            backend.removeprefix("rotate+")
                        ]
                        seconds += count * k * (16 + bits_written) / 8 / gpu.bandwidth
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
        ptq=_version("ptq"),
        torch=torch.__version__,
        triton=_version("triton"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


# ---------------------------------------------------------------- measuring


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


# ---------------------------------------------------------------- records


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add one line of JSON per measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for measurement in measurements:
            file.write(measurement.to_json() + "\n")


def read(path: Path) -> list[Measurement]:
    """The measurements of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return [
        Measurement.from_dict(json.loads(line))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line
    ]


def block_sums(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement per model, tokens, backend and format: the sum over the layers of a decoder
    block, with one expert if it has any."""
    sums: dict[tuple[object, ...], Measurement] = {}
    for m in measurements:
        key = (m.model, m.shape[0], m.backend, m.format, m.device, m.predicted)
        if key not in sums:
            sums[key] = replace(m, layer="block", shape=(m.shape[0], 0, 0))
            continue
        s = sums[key]
        sums[key] = replace(
            s,
            layer="block, 1 expert" if m.layer.startswith(EXPERT) else s.layer,
            median_s=s.median_s + m.median_s,
            p20_s=s.p20_s + m.p20_s,
            p80_s=s.p80_s + m.p80_s,
            bytes=s.bytes + m.bytes,
            flops=s.flops + m.flops,
        )
    return list(sums.values())
