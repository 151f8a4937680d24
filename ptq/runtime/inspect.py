"""What a finished checkpoint holds, from its configuration, reports and the heads of its files; no
weight is read."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import LayerInfo, natural
from ptq.checkpoint.reader import Checkpoint, config_dtype
from ptq.checkpoint.tuning_report import TuningReport
from ptq.kernels import gpu
from ptq.model import layer_names
from ptq.reading.safetensors_layout import Entry
from ptq.runtime.figures import number, size
from ptq.runtime.kernel_choice import kernel_obstacle
from ptq.runtime.tables import Table, Tabular


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A quantized layer. Errors are ‖(W - Ŵ)X‖² / ‖WX‖², or without ``of_outputs`` those of the
    weights; None if the checkpoint does not say.

    Attributes:
        bits_per_weight: of codes, scales and global scales; the bias is not counted.
        nested: bits of the narrower format that its codes hold, which the errors are then of; 0
            for none.
        wide_error: of such codes on the calibration text, as they are stored.
        error, held_out_error: on the calibration text, and on the part of it that was kept aside.
        rtn_error: what rounding to nearest would have cost on the calibration text.
        balance: strength of the balancing of its inputs, 0 where it does not fold.
    """

    layer: str
    shape: tuple[int, int]
    format: str
    nested: int
    rotation: int
    scheme: str
    bytes: int
    bits_per_weight: float
    algorithm: str | None
    error: float | None
    held_out_error: float | None
    rtn_error: float | None
    damping: float | None
    balance: float | None
    of_outputs: bool
    wide_error: float | None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A tensor that stayed as it was."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Tabular):
    """A checkpoint in figures.

    Attributes:
        formats: of its layers, the most common first.
        layers: in the order of the model where reports say it, else by name.
        bytes: of all tensors; ``file_bytes``: of all files of the directory.
        source_bytes: what the same parameters take at 16 bits each.
        parameters, quantized_parameters: counts of numbers.
        runs: how many layers Triton kernels serve on the first GPU of this machine, and how many
            the reference path serves for which reason.
        tuning: what it changed, if there was any; errors of layers are those before.
        bits_per_weight: over quantized layers; ``bits_per_parameter``: over everything.
    """

    path: str
    formats: tuple[str, ...]
    dialect: str
    recipe: dict[str, object]
    provenance: dict[str, object]
    bytes: int
    file_bytes: int
    source_bytes: int
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    bits_per_parameter: float
    layers: tuple[LayerRow, ...]
    kept: tuple[Kept, ...]
    runs: dict[str, int]
    tuning: TuningReport | None

    @property
    def mean_error(self) -> float | None:
        """Mean over layers of the calibration error."""
        return mean(row.error for row in self.layers)

    def to_dict(self) -> dict[str, object]:
        """For JSON: all fields, and ``mean_error``."""
        return {**asdict(self), "mean_error": self.mean_error}

    @property
    def summary(self) -> str:
        """Format, size and bits in one line."""
        schemes = " + ".join(sorted({row.scheme for row in self.layers}))
        return f"{' + '.join(self.formats)} {schemes}, dialect {self.dialect}: {self.sizes}"

    @property
    def sizes(self) -> str:
        """How large it is, beside 16 bits for every number."""
        return (
            f"{size(self.bytes)} of tensors ({size(self.file_bytes)} on disk), "
            f"{self.bytes / self.source_bytes:.0%} of {size(self.source_bytes)} at 16 bits; "
            f"{self.bits_per_weight:.2f} bits per quantized weight, "
            f"{self.bits_per_parameter:.2f} per parameter"
        )

    def tables(self) -> tuple[Table, ...]:
        """What it is; by kind of module; and the error of every block and kind, if it is known."""
        heading = Table(title=f"{self.path}: {self.summary}", columns=(), rows=())
        known = any(row.error is not None for row in self.layers)
        return (heading, kinds(self), *((errors(self),) if known else ()))


def inspect(path: Path) -> Report:
    """Describe the checkpoint in ``path``.

    Raises:
        FileNotFoundError: no such directory, an unfinished one, or one with files missing.
        ValueError: not a quantized checkpoint, or a damaged one.
    """
    checkpoint = Checkpoint(path)
    reports = {report.name: report for report in checkpoint.reports}
    order = {name: place for place, name in enumerate(reports)}  # that of the run: the model's
    owned: dict[str, list[Entry]] = {name: [] for name in checkpoint.layers}
    for name, entry in checkpoint.entries.items():
        owner, _, leaf = name.rpartition(".")
        if owner in owned and leaf != "bias":
            owned[owner].append(entry)
    layers = tuple(
        _layer_row(
            name,
            checkpoint.layers[name],
            checkpoint.shape(name),
            sum(entry.bytes for entry in owned[name]),
            reports.get(name),
        )
        for name in sorted(owned, key=lambda name: (order.get(name, len(order)), natural(name)))
    )
    kept = tuple(
        Kept(name=name, dtype=entry.dtype, shape=entry.shape, bytes=entry.bytes)
        for name in sorted(checkpoint.other_names(), key=natural)
        for entry in (checkpoint.entries[name],)
    )
    sizes = checkpoint.sizes
    biases = [
        e
        for name, e in checkpoint.entries.items()
        if name.endswith(".bias") and name[:-5] in checkpoint.layers
    ]
    weights = sizes["weights"]
    parameters = weights + sum(math.prod(e.shape) for e in (*kept, *biases))
    counts: dict[str, int] = {}
    for row in layers:
        counts[row.format] = counts.get(row.format, 0) + math.prod(row.shape)
    return Report(
        path=str(path),
        formats=tuple(sorted(counts, key=lambda name: -counts[name])),
        dialect=checkpoint.dialect,
        recipe=checkpoint.recipe,
        provenance=checkpoint.parsed.provenance,
        bytes=sizes["total"],
        file_bytes=sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()),
        source_bytes=2 * parameters,
        parameters=parameters,
        quantized_parameters=weights,
        bits_per_weight=8 * sum(row.bytes for row in layers) / weights if weights else math.nan,
        bits_per_parameter=8 * sizes["total"] / parameters if parameters else math.nan,
        layers=layers,
        kept=kept,
        runs=_runs(layers, checkpoint),
        tuning=checkpoint.tuning,
    )


def _runs(layers: Iterable[LayerRow], checkpoint: Checkpoint) -> dict[str, int]:
    """Counts of layers by what serves them here; inputs are rounded where a GPU multiplies FP4, see
    ``load``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = config_dtype(checkpoint.config)
    counts: Counter[str] = Counter()
    for row in layers:
        info = checkpoint.layers[row.layer]
        info = replace(info, quantize_inputs=info.quantize_inputs and gpu.multiplies_fp4(device))
        dtype = getattr(torch, named) if named else torch.bfloat16
        reason = kernel_obstacle(info, row.shape[1], device, dtype=dtype)
        counts["Triton kernels" if reason is None else f"the reference path: {reason}"] += 1
    return dict(counts)


def _layer_row(
    name: str, info: LayerInfo, shape: tuple[int, int], size: int, report: LayerReport | None
) -> LayerRow:
    return LayerRow(
        layer=name,
        shape=shape,
        format=info.format,
        nested=info.nested,
        rotation=info.rotation,
        scheme="w4a4" if info.quantize_inputs else "w4a16",
        bytes=size,
        bits_per_weight=8 * size / math.prod(shape),
        algorithm=report.algorithm if report else None,
        error=report.error if report else None,
        held_out_error=report.held_out_error if report else None,
        rtn_error=report.rtn_error if report else None,
        damping=report.damping if report else None,
        balance=report.balance if report else None,
        of_outputs=report.of_outputs if report else True,
        wide_error=report.wide_error if report else None,
    )


def kinds(report: Report) -> Table:
    """Count, format, size and mean error by kind of module; then what was not quantized."""
    rows: list[tuple[str, ...]] = []
    groups: dict[tuple[str, str, int, float], list[LayerRow]] = {}
    kind = layer_names.kinds(row.layer for row in report.layers)
    for row in report.layers:
        key = (kind[row.layer], row.format, row.rotation, row.balance or 0.0)
        groups.setdefault(key, []).append(row)
    for (name, fmt, rotation, balance), layers in groups.items():
        weights = sum(math.prod(row.shape) for row in layers)
        packed = sum(row.bytes for row in layers)
        rows.append(
            (
                name,
                str(len(layers)),
                fmt,
                str(rotation) if rotation > 1 else "none",
                f"{balance:g}" if balance else "none",
                f"{8 * packed / weights:.2f}",
                size(packed),
                number(mean(row.error for row in layers), 3),
                number(mean(row.held_out_error for row in layers), 3),
                number(mean(row.rtn_error for row in layers), 3),
            )
        )
    quantized = len(rows)
    unquantized: dict[tuple[str, str], list[Kept]] = {}
    for tensor in report.kept:
        unquantized.setdefault((".".join(tensor.name.split(".")[-2:]), tensor.dtype), []).append(
            tensor
        )
    for (name, dtype), tensors in unquantized.items():
        stored = sum(t.bytes for t in tensors)
        bits = 8 * stored / sum(math.prod(t.shape) for t in tensors)
        cells = (name, str(len(tensors)), dtype.lower(), "none", "none", f"{bits:.2f}")
        rows.append((*cells, size(stored), "–", "–", "–"))
    return Table(
        title="by kind of module",
        columns=(
            *("module", "count", "format", "rot.", "bal.", "bits", "size"),
            *("error", "held out", "RTN"),
        ),
        rows=tuple(rows),
        dim=frozenset(range(quantized, len(rows))),
    )


def errors(report: Report) -> Table:
    """Blocks down, kinds across; a cell is the mean error of its layers."""
    kind = layer_names.kinds(row.layer for row in report.layers)
    names = list(dict.fromkeys(kind.values()))
    cells: dict[str, dict[str, list[float | None]]] = {}
    for row in report.layers:
        of_block = cells.setdefault(layer_names.block_of(row.layer), {})
        of_block.setdefault(kind[row.layer], []).append(row.error)
    return Table(
        title="output error ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration text"
        + (", before tuning" if report.tuning is not None and report.tuning.kept else "")
        if all(row.of_outputs for row in report.layers)
        else "error of the weights ‖W - Ŵ‖² / ‖W‖² where no inputs were measured",
        columns=("block", *names),
        rows=tuple(
            (name, *(number(mean(cells[name].get(k, [])), 3) for k in names))
            for name in sorted(cells, key=natural)
        ),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
