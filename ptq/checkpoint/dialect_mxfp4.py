"""The MXFP4 of gpt-oss (``quant_method: mxfp4``), which is read and not written.

Experts alone are quantized, and those of a block lie in one tensor: ``experts.gate_up_proj_blocks``
U8 [experts, 2 · intermediate, hidden / 32, 16] with rows of gate and up by turns, ``_scales`` U8 of
the same shape without the last; ``experts.down_proj_blocks`` likewise; beside them ``_bias`` of
every row. Nibbles and scale bytes are those of our MXFP4, so that each expert's layers are
rows of these tensors: here they have the names that experts have apart.

Read in transformers 5.24, which dequantizes them on a CPU.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ptq.checkpoint.dialect import Dialect, Export, Layers
from ptq.checkpoint.engines import ENGINES, Opening, Verdict
from ptq.checkpoint.quantization_config import PER_LAYER, JsonDict, Quantization
from ptq.numerics.formats import MXFP4
from ptq.reading.safetensors_layout import Entry, Rows
from ptq.reading.schema import check

STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_(blocks|scales|bias)")
# What lies in a stacked tensor: a projection, and its rows from which on, every how many.
PROJECTIONS = {
    "gate_up_proj": (("gate_proj", 0, 2), ("up_proj", 1, 2)),
    "down_proj": (("down_proj", 0, 1),),
}
LEAVES = {"blocks": "weight_packed", "scales": "weight_scale", "bias": "bias"}
BLOCK = MXFP4.group_size // 2  # bytes of codes that share a scale
READ_ONLY = "ptq does not write it; use dialect ptq"


@dataclass(frozen=True)
class _Said:
    modules_to_not_convert: list[str] | None = field(default_factory=list)


def parse_mxfp4(config: Mapping[str, object]) -> Quantization:
    """What such a configuration says: which modules are left alone."""
    said = check(config, _Said, "quantization_config", "copy it again")
    names = said.modules_to_not_convert or []
    parts = [".*".join(re.escape(part) for part in name.split("*")) for name in names]
    return Quantization(
        values=PER_LAYER | {"format": MXFP4.name},
        ignore=tuple(rf"re:{part}(\..*)?$" for part in parts),
    )


def apart(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of every expert under names of their own; all others as they are.

    Raises:
        ValueError: a stacked tensor of another type or shape than experts have.
    """
    result: dict[str, Entry] = {}
    packed = {
        found.group(1, 2)
        for name in entries
        if (found := STACKED.fullmatch(name)) and found.group(3) == "blocks"
    }
    for name, entry in entries.items():
        found = STACKED.fullmatch(name)
        if found is None or found.group(1, 2) not in packed:
            result[name] = entry
            continue
        experts, stack, kind = found.groups()
        count, rows = _checked(name, entry, kind, PROJECTIONS[stack])
        size = entry.bytes // count
        width = () if kind == "bias" else (size // rows,)
        for e in range(count):
            for leaf, start, step in PROJECTIONS[stack]:
                result[f"{experts}.{e}.{leaf}.{LEAVES[kind]}"] = Rows(
                    file=entry.file,
                    dtype=entry.dtype,
                    shape=(rows // step, *width),
                    offset=entry.offset + e * size,
                    bytes=size // step,
                    start=start,
                    step=step,
                )
    return result


def _checked(
    name: str, entry: Entry, kind: str, projections: tuple[tuple[str, int, int], ...]
) -> tuple[int, int]:
    """The numbers of experts and rows of a stacked tensor."""
    shape = entry.shape
    dimensions = {"blocks": 4, "scales": 3, "bias": 2}[kind]
    wrong = len(shape) != dimensions or not all(shape) or shape[1] % len(projections)
    if wrong or (kind == "blocks" and shape[3] != BLOCK):
        raise ValueError(
            f"{name} has shape {shape}, which experts in MXFP4 do not have: the checkpoint is "
            "damaged, copy it again"
        )
    if kind != "bias" and entry.dtype != "U8":
        raise ValueError(
            f"{name} is {entry.dtype} and should be U8: the checkpoint is damaged, copy it again"
        )
    return shape[0], shape[1]


def _config(quantization: Quantization, layers: Layers, others: Iterable[str]) -> JsonDict:
    raise AssertionError(READ_ONLY)


def _refusal(export: Export) -> str | None:
    return READ_ONLY


def _opens(layers: Layers) -> dict[str, Opening]:
    return dict.fromkeys(ENGINES, Opening(Verdict.UNKNOWN, READ_ONLY))


GPT_OSS = Dialect(
    name="mxfp4",
    config=_config,
    parse=parse_mxfp4,
    refusal=_refusal,
    opens=_opens,
    arrange=apart,
)
