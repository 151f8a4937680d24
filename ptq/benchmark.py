"""How fast the linear layers of a model are: measured on the device at hand, or predicted from a GPU's roofline.

Facts are stored as JSONL (``Measurement``), opinions (TB/s, ratios to bf16, percentages) are derived from them. What is
timed and how is in ``kernels/timing.py``. Spec: kernels.md §14, §15.
"""

import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn.functional import linear

from ptq.formats import E2M1, FORMATS, Format
from ptq.kernels import timing
from ptq.rotation import Rotation
from ptq.tensor import QuantizedTensor, Scales, unpack

TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
REFERENCE = "reference"  # the path of layers without kernels, for CPUs
BACKENDS = (*timing.BACKENDS, REFERENCE)


# ---------------------------------------------------------------- facts


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The time of one backend on one layer; ``predicted`` is a roofline, not a run.

    Attributes:
        shape: (tokens, out, in).
        bytes: what has to be moved at least: weight, inputs, outputs. flops: 2 · tokens · out · in.
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
    predicted: bool
    device: str
    torch: str
    triton: str
    date: str

    @property
    def tflops(self) -> float:
        return self.flops / self.median_s / 1e12

    @property
    def terabytes_per_second(self) -> float:
        return self.bytes / self.median_s / 1e12

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> "Measurement":
        """The measurement of a line of JSONL."""
        return cls(**(data | {"shape": tuple(data["shape"])}))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a GPU can do at most, in bytes and operations per second, and where the numbers come from."""

    name: str
    bandwidth: float
    bf16: float
    low: float  # FP4 where the tensor cores have it, else FP8
    source: str


GPUS = {
    "h200": Gpu(
        name="H200",
        bandwidth=4.3e12,
        bf16=790e12,
        low=1450e12,
        source="bandwidth and bf16 measured with plain PyTorch; fp8 assumed",
    ),
    "b200": Gpu(
        name="B200", bandwidth=7.2e12, bf16=1450e12, low=4650e12, source="bandwidth assumed, bf16 and fp4 published"
    ),
    "rtx5090": Gpu(
        name="RTX 5090", bandwidth=1.6e12, bf16=224e12, low=1300e12, source="bandwidth assumed, bf16 and fp4 published"
    ),
    "a100": Gpu(name="A100", bandwidth=1.7e12, bf16=270e12, low=270e12, source="assumed: 85 % of the data sheet"),
}

# hidden size, features of queries, of keys and values together, of the MLP
_MODELS = {
    "llama-3.1-8b": (4096, 4096, 2048, 14336),
    "llama-3.1-70b": (8192, 8192, 2048, 28672),
    "qwen3-8b": (4096, 4096, 2048, 12288),
    "qwen3-32b": (5120, 8192, 2048, 25600),
}


def shapes(model: str) -> list[tuple[str, int, int]]:
    """(name, out, in) of the matmuls of a decoder layer, projections that read the same input merged.

    Args:
        model: a name of the built-in list, or a directory with a config.json, or such a file.

    Raises:
        ValueError: neither, or a config without the sizes of a decoder.
    """
    if model in _MODELS:
        hidden, query, key_value, intermediate = _MODELS[model]
    else:
        path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
        if not path.is_file():
            raise ValueError(f"no model {model!r}: give one of {', '.join(_MODELS)} or a directory with a config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            intermediate = config.get("moe_intermediate_size") or config["intermediate_size"]
        except KeyError as error:
            raise ValueError(f"{path}: no {error} in the config, so its layers' shapes are unknown") from error
        size = config.get("head_dim") or hidden // heads
        query, key_value = heads * size, 2 * (config.get("num_key_value_heads") or heads) * size
    return [
        ("qkv", query + key_value, hidden),
        ("o", hidden, query),
        ("gate_up", 2 * intermediate, hidden),
        ("down", hidden, intermediate),
    ]


def moved_bytes(tokens: int, n: int, k: int, weight_bits: float, input_bits: float) -> int:
    """Bytes of weight, inputs and bf16 outputs, each moved once."""
    return round(n * k * weight_bits / 8 + tokens * k * input_bits / 8 + tokens * n * 2)


def bits(backend: str, fmt: Format) -> tuple[float, float]:
    """(bits per weight, bits per input) that the matmul of a backend moves."""
    if backend.endswith("w4a4"):
        return fmt.bits_per_weight, fmt.bits_per_weight
    if backend == "fp8":
        return 8.0, 8.0
    return (16.0 if backend in ("bf16", "rotate", "quantize") else fmt.bits_per_weight), 16.0


def predict(
    model: str, tokens: Sequence[int], formats: Sequence[str], gpu: Gpu, rotation: int = 32
) -> Iterator[Measurement]:
    """Rooflines: the larger of the time to move the bytes and the time to compute; nothing real is faster.

    ``w4a4`` computes in FP4 (in FP8 on GPUs without it). ``rotate+…`` adds one pass over the inputs.
    """
    for layer, n, k in shapes(model):
        for count in tokens:
            for name in formats:
                fmt, flops = FORMATS[name], 2 * count * n * k
                for backend in (
                    "bf16",
                    "w4a16",
                    "rotate+w4a16",
                    *(("w4a4", "rotate+w4a4") if fmt.element is E2M1 else ()),
                ):
                    if backend == "bf16" and name != formats[0]:
                        continue
                    moved = moved_bytes(count, n, k, *bits(backend, fmt))
                    peak = gpu.low if backend.endswith("w4a4") else gpu.bf16
                    seconds = max(moved / gpu.bandwidth, flops / peak)
                    if backend.startswith("rotate+"):
                        seconds += count * k * (16 + bits(backend, fmt)[1]) / 8 / gpu.bandwidth
                    yield _measurement(
                        model,
                        layer,
                        (count, n, k),
                        backend,
                        fmt,
                        rotation,
                        [seconds],
                        predicted=True,
                        device=f"{gpu.name} (roofline)",
                    )


def _measurement(
    model: str,
    layer: str,
    shape: tuple[int, int, int],
    backend: str,
    fmt: Format,
    rotation: int,
    seconds: list[float],
    *,
    predicted: bool,
    device: str,
) -> Measurement:
    ordered = sorted(seconds)
    return Measurement(
        model=model,
        layer=layer,
        shape=shape,
        backend=backend,
        format="" if backend in ("bf16", "fp8") else fmt.name,
        rotation=rotation if "rotate" in backend or backend == "quantize" else 1,
        median_s=statistics.median(ordered),
        p20_s=ordered[len(ordered) // 5],
        p80_s=ordered[(4 * len(ordered)) // 5 if len(ordered) > 1 else 0],
        bytes=moved_bytes(*shape, *bits(backend, fmt)),
        flops=2 * shape[0] * shape[1] * shape[2],
        predicted=predicted,
        device=device,
        torch=torch.__version__,
        triton=_version("triton"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    return importlib.metadata.version(package)


# ---------------------------------------------------------------- measuring


def _reference(problem: timing.Problem, fmt: Format) -> list[timing.Call]:
    """The path of layers without kernels: rotate, dequantize, multiply."""
    x, rotation = problem.inputs(), Rotation(problem.rotation)
    weights = [QuantizedTensor(unpack(p, fmt), Scales(s, t, fmt)) for p, s, t in problem.weights()]
    return [lambda w=w: linear(rotation.rotate(x), w.dequantize().to(x.dtype)) for w in weights]


@torch.inference_mode()
def run(
    model: str,
    tokens: Sequence[int],
    formats: Sequence[str],
    device: torch.device | str,
    *,
    rotation: int = 32,
    only: Sequence[str] = (),
    layers: Sequence[tuple[str, int, int]] | None = None,
    repeats: int = 30,
) -> Iterator[Measurement]:
    """Measure every layer of a model, as the device can; on a CPU the reference path, in fp32.

    Args:
        only: names of ``BACKENDS``; empty takes all that can run.
        layers: (name, out, in) instead of those of the model.

    Raises:
        ValueError: a backend that does not exist.
    """
    device = torch.device(device)
    if unknown := set(only) - set(BACKENDS):
        raise ValueError(f"no backend {', '.join(sorted(unknown))}; there are {', '.join(BACKENDS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is visible; measure on the cpu or predict for a named GPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for layer, n, k in layers or shapes(model):
        for count in tokens:
            for fmt in (FORMATS[f] for f in formats):
                for chosen, seconds in _time_layer(
                    count, n, k, fmt, rotation, device, only, repeats, first=fmt.name == formats[0]
                ):
                    yield _measurement(
                        model, layer, (count, n, k), chosen, fmt, rotation, seconds, predicted=False, device=name
                    )


def _time_layer(
    tokens: int,
    n: int,
    k: int,
    fmt: Format,
    rotation: int,
    device: torch.device,
    only: Sequence[str],
    repeats: int,
    *,
    first: bool,
) -> Iterable[tuple[str, list[float]]]:
    element, scale = fmt.element.name, "e4m3" if fmt.has_global_scale else "e8m0"
    names = timing.backends(device, element, scale) + ([REFERENCE] if device.type == "cpu" else [])
    names = [b for b in names if not only or b in only]
    if not first:  # what has no format was timed with the first one
        names = [b for b in names if b not in ("bf16", "fp8")]
    groups = {}
    for chosen in names:
        problem = timing.Problem(
            tokens=tokens,
            n=n,
            k=k,
            element=element,
            scale=scale,
            rotation=rotation,
            device=device,
            copies=timing.copies_for(round(n * k * bits(chosen, fmt)[0] / 8), device),
        )
        groups[chosen] = _reference(problem, fmt) if chosen == REFERENCE else timing.BACKENDS[chosen](problem)
    return timing.time_calls(groups, device, repeats).items()


def measured(device: torch.device) -> Gpu:
    """The copy bandwidth and bf16 matmul rate of the GPU at hand; ``low`` is left at 0."""
    bandwidth, bf16 = timing.peaks(device)
    return Gpu(name=torch.cuda.get_device_name(device), bandwidth=bandwidth, bf16=bf16, low=0.0, source="measured")


# ---------------------------------------------------------------- records and opinions


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add one line of JSON per measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for measurement in measurements:
            file.write(json.dumps(asdict(measurement)) + "\n")


def read(path: Path) -> list[Measurement]:
    """The measurements of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return [Measurement.from_dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def layer_sums(measurements: Sequence[Measurement]) -> list[Measurement]:
    """One measurement per model, tokens, backend and format: the sum over the layers of a decoder block (named
    ``all``).
    """
    sums: dict[tuple[object, ...], Measurement] = {}
    for m in measurements:
        key = (m.model, m.shape[0], m.backend, m.format, m.device, m.predicted)
        if key not in sums:
            sums[key] = replace(m, layer="all", shape=(m.shape[0], 0, 0))
            continue
        s = sums[key]
        sums[key] = replace(
            s,
            median_s=s.median_s + m.median_s,
            p20_s=s.p20_s + m.p20_s,
            p80_s=s.p80_s + m.p80_s,
            bytes=s.bytes + m.bytes,
            flops=s.flops + m.flops,
        )
    return list(sums.values())


def table(measurements: Sequence[Measurement], gpu: Gpu | None = None) -> str:
    """A markdown table: microseconds, rates, and the ratio to bf16 of the same model, layer and tokens.

    Args:
        gpu: peaks for the two columns of percentages; None leaves them out.
    """
    base = {(m.model, m.layer, m.shape[0], m.device): m.median_s for m in measurements if m.backend == "bf16"}
    head = ["model", "layer", "tokens", "backend", "format", "µs", "TB/s", "TFLOP/s", "× bf16"]
    head += ["% of bandwidth", "% of bf16 peak"] if gpu else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for m in measurements:
        bf16 = base.get((m.model, m.layer, m.shape[0], m.device))
        cells = [
            m.model,
            m.layer,
            str(m.shape[0]),
            m.backend,
            m.format or "–",
            f"{m.median_s * 1e6:.1f}",
            f"{m.terabytes_per_second:.2f}",
        ]
        cells += [f"{m.tflops:.1f}", f"{bf16 / m.median_s:.2f}" if bf16 else "–"]
        if gpu:
            cells += [
                f"{100 * m.bytes / m.median_s / gpu.bandwidth:.0f}",
                f"{100 * m.flops / m.median_s / gpu.bf16:.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    devices = sorted({f"{m.device}, torch {m.torch}, triton {m.triton or 'none'}, {m.date[:10]}" for m in measurements})
    note = (
        "**Predicted** from a roofline; nothing was measured."
        if any(m.predicted for m in measurements)
        else "Measured."
    )
    return "\n".join([f"{note} {'; '.join(devices)}", "", *lines]) + "\n"


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Speed against bf16 over the number of tokens, a line per backend and format, summed over the layers of a block.

    Raises:
        ValueError: matplotlib is not installed, or nothing to compare with.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plotting needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    sums = layer_sums(measurements)
    base = {(m.model, m.shape[0]): m.median_s for m in sums if m.backend == "bf16"}
    if not base:
        raise ValueError("nothing to compare with: no measurement of the backend bf16")
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for line in sorted(
        {(m.model, m.backend, m.format) for m in sums if m.format and m.backend not in ("rotate", "quantize")}
    ):
        points = sorted(
            (m.shape[0], base[m.model, m.shape[0]] / m.median_s) for m in sums if (m.model, m.backend, m.format) == line
        )
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=" ".join(line))
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("× torch bf16")
    axes.set_title(sums[0].device + (" — predicted, not measured" if any(m.predicted for m in sums) else ""))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
