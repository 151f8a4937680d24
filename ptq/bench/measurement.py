"""Facts of speed as they are stored: the time of a layer, measured or predicted, and what a device
does at most.

A :class:`Measurement` is a line of JSONL. Opinions (TB/s, ratios to bf16, percentages) are derived
from it, here and in :mod:`ptq.bench.speed_report`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ptq.bench.shapes import EXPERT


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


# Of one launch in a captured graph, in seconds: what a kernel takes that has next to nothing to do
# (`rotate` at one token, H200, 2026-11-26: 2.1 µs a layer).
LAUNCH = 2e-6

GPUS = {
    "h100": Limits(
        name="H100",
        bandwidth=3.0e12,
        bf16=790e12,
        fp8=1450e12,
        source="bandwidth assumed, 90 % of the data sheet of the SXM board; bf16 and fp8 of the "
        "H200, which has the same processor",
    ),
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
    "l40s": Limits(
        name="L40S",
        bandwidth=0.78e12,
        bf16=310e12,
        fp8=620e12,
        source="assumed: 90 % of the data sheet's bandwidth, 85 % of its peaks",
    ),
    "rtx4090": Limits(
        name="RTX 4090",
        bandwidth=0.91e12,
        bf16=140e12,
        fp8=280e12,
        source="assumed: 90 % of the data sheet's bandwidth, 85 % of its peaks with sums in fp32",
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
